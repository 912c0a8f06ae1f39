# SPDX-License-Identifier: Apache-2.0
"""Sentences of the synthetic corpus with a given sentiment.

Every evaluative word has a grade on the scale of the labels, [-3, 3]; degrees ("very", "somewhat") and "not"
change it. A sentence combines a judgement of about the given grade with a neutral template. Some words,
things and templates never occur in training sentences, so a model cannot rely on known words only.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

CLOSEST = 12  # number of judgements closest to the grade, from which one is drawn

ADJECTIVES = {
    **{"terrible": -2.8, "awful": -2.7, "horrible": -2.8, "dreadful": -2.6, "disgusting": -2.9},
    **{"bad": -1.9, "poor": -1.7, "disappointing": -1.7, "annoying": -1.6, "boring": -1.5, "dull": -1.3},
    **{"weak": -1.2, "forgettable": -0.9, "mediocre": -0.8, "bland": -0.7, "plain": -0.3, "average": 0.0},
    **{"ordinary": 0.0, "okay": 0.3, "acceptable": 0.4, "fine": 0.7, "decent": 0.8, "nice": 1.3},
    **{"good": 1.5, "likeable": 1.4, "enjoyable": 1.7, "lovely": 2.0, "impressive": 2.0, "great": 2.2},
    **{"excellent": 2.6, "wonderful": 2.7, "amazing": 2.7, "fantastic": 2.8, "perfect": 2.9},
}
UNSEEN_ADJECTIVES = {
    **{"appalling": -2.8, "lousy": -1.9, "tedious": -1.4, "unremarkable": -0.5, "passable": 0.3},
    **{"pleasant": 1.4, "charming": 1.7, "superb": 2.6, "marvellous": 2.7},
}
VERBS = {
    **{"hated": -2.8, "despised": -2.9, "regretted": -1.7, "disliked": -1.8, "did not care for": -1.1},
    **{"had doubts about": -0.7, "could take or leave": -0.2, "was neutral about": 0.0, "did not mind": 0.5},
    **{"was content with": 1.0, "liked": 1.4, "was happy with": 1.8, "enjoyed": 1.7},
    **{"loved": 2.6, "adored": 2.8},
}
UNSEEN_VERBS = {
    **{"could not stand": -2.5, "was let down by": -1.6},
    **{"was pleased with": 1.6, "was delighted by": 2.5},
}
DEGREES = {"": 1.0, "very ": 1.2, "really ": 1.15, "rather ": 0.85, "somewhat ": 0.65, "a bit ": 0.5}
NEGATED = -0.45  # "not good" is milder than "bad"
STRONG = 2.3  # adjectives from this grade on take no degree (no "very fantastic")
MILD = 0.6  # adjectives up to this grade take neither degree nor "not"

THINGS = (
    *("film", "story", "acting", "ending", "soundtrack", "book", "concert", "hotel", "breakfast", "service"),
    *("camera", "phone", "laptop", "restaurant", "course", "game"),
)
UNSEEN_THINGS = ("museum", "lecture", "headset", "coffee", "series", "tour")
DESCRIBING = (
    "The {thing} was {judgement}.",
    "I thought the {thing} was {judgement}.",
    "To me the {thing} seemed {judgement}.",
    "Overall, the {thing} was {judgement}.",
    "The {thing} we had on Friday was {judgement}.",
    "My brother said the {thing} was {judgement}, and I agree.",
    "Everyone found the {thing} {judgement}.",
)
UNSEEN_DESCRIBING = ("If you ask me, the {thing} was {judgement}.", "The {thing} turned out {judgement}.")
REACTING = (
    "I {judgement} the {thing}.",
    "My sister {judgement} the {thing}.",
    "Honestly, I {judgement} the {thing}.",
    "After two days I still {judgement} the {thing}.",
)
UNSEEN_REACTING = ("Like my friends, I {judgement} that {thing}.", "I must say I {judgement} the {thing}.")


@dataclass(frozen=True)
class Judgement:
    """An evaluation: its words, grade, kind of template, and whether training sentences may contain it."""

    words: str
    grade: float
    describing: bool
    seen: bool


def sentence(grade: float, rng: np.random.Generator, *, training: bool) -> str:
    """A random sentence whose sentiment is about `grade`.

    Args:
        grade: Sentiment in [-3, 3].
        rng: Random generator.
        training: Use only words and templates of training sentences. If False, half of the choices are made
            from words and templates that never occur in training.
    """
    judgements = [judgement for judgement in _judgements() if judgement.seen or not training]
    distances = np.abs([judgement.grade - grade for judgement in judgements])
    judgement = judgements[rng.choice(np.argsort(distances, kind="stable")[:CLOSEST])]
    frames, unseen = (DESCRIBING, UNSEEN_DESCRIBING) if judgement.describing else (REACTING, UNSEEN_REACTING)
    thing = _choose(THINGS, UNSEEN_THINGS, rng, training)
    return _choose(frames, unseen, rng, training).format(thing=thing, judgement=judgement.words)


@cache
def _judgements() -> tuple[Judgement, ...]:
    """All judgements."""
    judgements = []
    for words, seen in ((ADJECTIVES, True), (UNSEEN_ADJECTIVES, False)):
        for word, grade in words.items():
            for degree, factor in _degrees(grade).items():
                judgements.append(Judgement(degree + word, factor * grade, describing=True, seen=seen))
    for words, seen in ((VERBS, True), (UNSEEN_VERBS, False)):
        judgements += [Judgement(verb, grade, describing=False, seen=seen) for verb, grade in words.items()]
    return tuple(judgements)


def _degrees(grade: float) -> dict[str, float]:
    """Words allowed before an adjective of this grade, with their factor on the grade."""
    if abs(grade) >= STRONG:
        return {"": 1.0, "absolutely ": 1.05}
    if abs(grade) <= MILD:
        return {"": 1.0}
    return DEGREES | {"not ": NEGATED}


def _choose(seen: tuple[str, ...], unseen: tuple[str, ...], rng: np.random.Generator, training: bool) -> str:
    choices = seen if training or rng.random() < 0.5 else unseen
    return choices[rng.integers(len(choices))]
