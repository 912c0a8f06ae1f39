# SPDX-License-Identifier: Apache-2.0
"""What a synthetic corpus will contain, before anything is rendered, and how much each modality should count.

A label is `y = 1.3 z`, `z` standard normal, clipped to [-3, 3]. Each modality carries a cue on that scale,
`cue = 1.3 (r z + sqrt(1 - r^2) n)`, clipped likewise, with `r` the modality's strength and `n` its own
standard normal noise: every cue alone has correlation `r` with the label, and given the label cues are
independent. In a share of the clips one modality, drawn evenly, contradicts: its cue is negated. In another
share, never the same clips, one modality is missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from msa_online.corpora.corpus import CorpusError
from msa_online.modalities import MODALITIES
from msa_online.synthetic.text import sentence

LABEL_SPREAD = 1.3  # standard deviation of labels and cues before clipping; 2 % lie beyond 3
LIMIT = 3.0
SHORTEST, LONGEST = 0.5, 4.0  # seconds; two carrier sentences spoken fast last this long
HELD_OUT = 0.2  # share of the speakers in each of validation and test

# Every random choice has a stream of its own, so that changing one share leaves the others as they were.
CUES, CONFLICTS, SENTENCES, SPEAKERS, CLIPS = range(5)


@dataclass(frozen=True)
class CorpusRecipe:
    """How to render a corpus; two equal recipes give the same clips.

    Attributes:
        clips: How many, over all splits.
        seed: Of every random choice.
        strengths: Correlation of each modality's cue with the label, 0 (noise) to 1 (the label itself).
        contradicting: Share of the clips in which one modality carries the opposite of its cue.
        missing: Share of the clips that really lack one modality: no audio stream, no face in any frame, no
            words.
        speakers: Voices and faces; every speaker belongs to one split, 60 % to training and 20 % to each
            other.
        seconds: Shortest and longest clip.

    Raises:
        CorpusError: A value outside its range, or too few clips or speakers to fill three splits.
    """

    clips: int = 240
    seed: int = 1111
    strengths: Mapping[str, float] = field(default_factory=lambda: {"text": 1.0, "audio": 0.6, "vision": 0.8})
    contradicting: float = 0.1
    missing: float = 0.1
    speakers: int = 15
    seconds: tuple[float, float] = (1.2, 2.2)

    def __post_init__(self) -> None:
        if set(self.strengths) != set(MODALITIES):
            raise CorpusError(f"strengths name {sorted(self.strengths)}: give one each for {MODALITIES}")
        shares = {f"strength of {name}": value for name, value in self.strengths.items()}
        shares |= {"contradicting": self.contradicting, "missing": self.missing}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise CorpusError(f"{name} is {value}: choose a number from 0 to 1")
        if self.contradicting + self.missing > 1:
            raise CorpusError(
                f"contradicting {self.contradicting} and missing {self.missing} are shares of different "
                "clips: lower one until they add up to at most 1"
            )
        if self.seed < 0:
            raise CorpusError(f"seed is {self.seed}: choose 0 or more")
        if self.speakers < 3:
            raise CorpusError(f"{self.speakers} speakers cannot fill three splits: choose at least 3")
        if self.clips < self.speakers:
            raise CorpusError(
                f"{self.clips} clips are too few for {self.speakers} speakers: choose at least as many clips"
            )
        if not SHORTEST <= self.seconds[0] <= self.seconds[1] <= LONGEST:
            raise CorpusError(
                f"seconds are {self.seconds}: choose shortest and longest between {SHORTEST} and {LONGEST}"
            )


@dataclass(frozen=True)
class PlannedClip:
    """One row of `metadata.csv`.

    Attributes:
        file_name: Below the corpus' folder.
        text: The sentence that stands for the transcript; it carries the text cue and is *not* what the
            voice says.
        label: Sentiment in [-3, 3], one decimal.
        split: "train", "valid" or "test".
        speaker: Name of the voice and face.
        cues: What each modality really carries, in [-3, 3]; None for the one that is missing.
        contradicting: Name of the modality whose cue was negated, or "".
        missing: Name of the modality that is not there, or "".
    """

    file_name: str
    text: str
    label: float
    split: str
    speaker: str
    cues: Mapping[str, float | None]
    contradicting: str
    missing: str


def plan_corpus(recipe: CorpusRecipe) -> list[PlannedClip]:
    """Draw labels, cues, sentences and splits of all clips; quick, since nothing is rendered."""
    labels, cues = _draw_cues(recipe)
    contradicting, missing = _draw_conflicts(recipe)
    splits = _speaker_splits(recipe)
    plan = []
    for index in range(recipe.clips):
        speaker = index % recipe.speakers
        signs = {name: -1 if contradicting[index] == name else 1 for name in MODALITIES}
        carried = {name: round(signs[name] * float(cues[name][index]), 3) for name in MODALITIES}
        carried |= {missing[index]: None} if missing[index] else {}
        plan.append(
            PlannedClip(
                file_name=f"clips/{index:05d}.mp4",
                text=_words(recipe, index, carried["text"], splits[speaker]),
                label=round(float(labels[index]), 1) + 0.0,  # never "-0.0"
                split=splits[speaker],
                speaker=f"speaker_{speaker:02d}",
                cues=carried,
                contradicting=contradicting[index],
                missing=missing[index],
            )
        )
    return plan


def bayes_weights(recipe: CorpusRecipe) -> dict[str, float]:
    """How much each cue should count: the weights of the best linear estimate `y = sum of weight * cue`.

    With every cue present, unclipped, and `q` the chance that a given modality contradicts, the cues have
    unit variance (in units of the label's), covariance `r_m r_n (1 - 4q)` with each other and `r_m (1 - 2q)`
    with the label; the weights are the inverse of the one matrix times the other vector. Without
    contradictions this is the Gaussian posterior mean, `r / (1 - r^2)` each, divided by 1 + the sum of `r^2
    / (1 - r^2)`. With contradictions a non-linear estimate, which notices the odd one out, does better
    still. Clipping and the rounding of labels change the weights by a few thousandths.

    Where two modalities of strength 1 never contradict, they are the same number and share the weight evenly.
    """
    strengths = np.array([recipe.strengths[name] for name in MODALITIES], float)
    complete = 1 - recipe.missing  # contradictions happen among complete clips only
    wrong = recipe.contradicting / complete / len(MODALITIES) if complete else 0.0
    covariance = np.outer(strengths, strengths) * (1 - 4 * wrong)
    np.fill_diagonal(covariance, 1.0)
    weights = np.linalg.pinv(covariance, hermitian=True) @ (strengths * (1 - 2 * wrong))
    return dict(zip(MODALITIES, weights.tolist(), strict=True))


def ideal_contributions(recipe: CorpusRecipe) -> dict[str, float]:
    """The share of each modality in the best linear estimate: weights scaled to sum to 1.

    Since all cues vary equally, it is also each modality's share of the mean absolute Shapley value of that
    estimate, which makes it the yardstick for the contributions a trained model reports on complete clips.
    All shares are 0 where every strength is 0.
    """
    weights = bayes_weights(recipe)
    total = sum(weights.values())
    return {name: weight / total if total else 0.0 for name, weight in weights.items()}


def generator(recipe: CorpusRecipe, stream: int, index: int = 0) -> np.random.Generator:
    """The random numbers of one purpose (`CUES` to `CLIPS`) and one clip or speaker."""
    return np.random.default_rng([recipe.seed, stream, index])


def _draw_cues(recipe: CorpusRecipe) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Labels `(clips,)` and each modality's cue `(clips,)`, none of them negated yet."""
    draws = generator(recipe, CUES).standard_normal((recipe.clips, 1 + len(MODALITIES)))
    sentiment = draws[:, 0]
    cues = {}
    for name, noise in zip(MODALITIES, draws[:, 1:].T, strict=True):
        strength = recipe.strengths[name]
        cues[name] = _on_label_scale(strength * sentiment + np.sqrt(1 - strength**2) * noise)
    return _on_label_scale(sentiment), cues


def _on_label_scale(standard: np.ndarray) -> np.ndarray:
    return (LABEL_SPREAD * standard).clip(-LIMIT, LIMIT)


def _draw_conflicts(recipe: CorpusRecipe) -> tuple[list[str], list[str]]:
    """For every clip the contradicting and the missing modality, "" for none; never both in one clip."""
    rng = generator(recipe, CONFLICTS)
    order = rng.permutation(recipe.clips)
    contradictions = round(recipe.contradicting * recipe.clips)
    absences = round(recipe.missing * recipe.clips)
    contradicting, missing = [""] * recipe.clips, [""] * recipe.clips
    for turn, index in enumerate(order[: contradictions + absences]):
        column = contradicting if turn < contradictions else missing
        column[index] = MODALITIES[turn % len(MODALITIES)]
    return contradicting, missing


def _speaker_splits(recipe: CorpusRecipe) -> list[str]:
    """The split of every speaker: a random fifth of them each for validation and test, at least one."""
    held_out = max(1, round(HELD_OUT * recipe.speakers))
    splits = np.array(["train"] * recipe.speakers, dtype=object)
    order = generator(recipe, SPEAKERS).permutation(recipe.speakers)
    splits[order[:held_out]] = "valid"
    splits[order[held_out : 2 * held_out]] = "test"
    return splits.tolist()


def _words(recipe: CorpusRecipe, index: int, cue: float | None, split: str) -> str:
    if cue is None:
        return ""
    return sentence(cue, generator(recipe, SENTENCES, index), training=split == "train")
