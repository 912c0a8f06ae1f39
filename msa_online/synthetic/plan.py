# SPDX-License-Identifier: Apache-2.0
"""Plan a synthetic corpus before rendering, and compute the ideal contribution of each modality.

A label is `y = 1.3 z`, `z` standard normal, clipped to [-3, 3]. Each modality has a cue on that scale,
`cue = 1.3 (r z + sqrt(1 - r^2) n)`, clipped likewise; `r` is the strength of the modality and `n` its own
standard normal noise. So each cue has correlation `r` with the label, and cues are independent given the
label. In a share of the clips the cue of one modality, drawn uniformly, is negated (contradicting). In
another share, of other clips, one modality is missing.

With `hidden_signs` the corpus is a control in which balancing can matter, as in `control`. The label is the
sum of four independent factors: one of each modality's own and a shared one, a quarter of its variance each.
The cue of the text is linear in its factor and the shared one. The cues of voice and face are multiplied by a
random sign of each clip. A low voice and dim light show a negative sign, so a reader must find both and
multiply. Light is visible in face crops, not in blendshapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from msa_online.corpora.corpus import CorpusError
from msa_online.modalities import MODALITIES
from msa_online.synthetic.text import sentence

LABEL_SPREAD = 1.3  # standard deviation of labels and cues before clipping; 2 % lie beyond 3
LIMIT = 3.0
SHORTEST, LONGEST = 0.5, 4.0  # seconds; two carrier sentences, spoken fast, last as long
HELD_OUT = 0.2  # share of the speakers in validation, and in test

# Each kind of random choice has its own random stream, so that changing one does not change the others.
CUES, CONFLICTS, SENTENCES, SPEAKERS, CLIPS, SIGNS = range(6)

CONTROL_WEIGHT = 0.72  # of each factor in the label of a control
READERS = {"text": (1.0, 1.0), "audio": (1.0, 0.3), "vision": (1.0, 0.3)}
"""How much of its own and of the shared factor the cue of a modality contains in a control."""
SIGNED = ("audio", "vision")


@dataclass(frozen=True)
class CorpusRecipe:
    """Parameters of a corpus; equal recipes give equal clips.

    Attributes:
        clips: Number of clips in all splits.
        seed: Seed of all random choices.
        strengths: Correlation of each modality's cue with the label, from 0 (noise) to 1 (the label itself).
        contradicting: Share of the clips in which the cue of one modality is negated.
        missing: Share of the clips that lack one modality: no audio stream, no face in any frame, or no
            words.
        speakers: Number of speakers, each with a voice and a face. A speaker belongs to one split: 60 % to
            training, 20 % each to validation and test.
        seconds: Length of the shortest and of the longest clip.
        hidden_signs: Make a control, see above. Strengths are not used; nothing contradicts or is missing.

    Raises:
        CorpusError: A value is out of range, or there are too few clips or speakers for three splits.
    """

    clips: int = 240
    seed: int = 1111
    strengths: Mapping[str, float] = field(default_factory=lambda: {"text": 1.0, "audio": 0.6, "vision": 0.8})
    contradicting: float = 0.1
    missing: float = 0.1
    speakers: int = 15
    seconds: tuple[float, float] = (1.2, 2.2)
    hidden_signs: bool = False

    def __post_init__(self) -> None:
        if set(self.strengths) != set(MODALITIES):
            raise CorpusError(f"strengths name {sorted(self.strengths)}: give one for each of {MODALITIES}")
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
        if self.hidden_signs and (self.contradicting or self.missing):
            raise CorpusError("in a control nothing contradicts or is missing: set both shares to 0")
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
        file_name: Path within the corpus' folder.
        text: The transcript, a sentence with the text cue. It is *not* what the voice says.
        label: Sentiment in [-3, 3], one decimal.
        split: "train", "valid" or "test".
        speaker: Name of the speaker.
        cues: Actual cue of each modality, in [-3, 3]; None for the missing one.
        contradicting: Name of the modality whose cue was negated, or "".
        missing: Name of the missing modality, or "".
        signs: 1 or -1 that multiplied the cues of voice and face; empty unless the corpus is a control.
    """

    file_name: str
    text: str
    label: float
    split: str
    speaker: str
    cues: Mapping[str, float | None]
    contradicting: str
    missing: str
    signs: Mapping[str, int] = field(default_factory=dict)


def plan_corpus(recipe: CorpusRecipe) -> list[PlannedClip]:
    """Draw labels, cues, sentences and splits of all clips; renders nothing."""
    hidden = _draw_signs(recipe)
    labels, cues = _draw_control(recipe, hidden) if recipe.hidden_signs else _draw_cues(recipe)
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
                signs={name: int(values[index]) for name, values in hidden.items()},
            )
        )
    return plan


def bayes_weights(recipe: CorpusRecipe) -> dict[str, float]:
    """Ideal weight of each cue: the weights of the best linear estimate `y = sum of weight * cue`.

    Let all cues be present and unclipped, and `q` the probability that a given modality contradicts. Then the
    cues have unit variance (in units of the label's), covariance `r_m r_n (1 - 4q)` with each other and
    `r_m (1 - 2q)` with the label. The weights are the inverse of this matrix times this vector. Without
    contradictions this is the Gaussian posterior mean, with weights `r / (1 - r^2)` divided by 1 + the sum of
    `r^2 / (1 - r^2)`. With contradictions, a non-linear estimate that detects the contradicting modality is
    better. Clipping and rounding of labels change the weights by a few thousandths.

    Two modalities of strength 1 that never contradict are equal, and get equal weights.
    """
    strengths = np.array([recipe.strengths[name] for name in MODALITIES], float)
    complete = 1 - recipe.missing  # contradictions happen among complete clips only
    wrong = recipe.contradicting / complete / len(MODALITIES) if complete else 0.0
    covariance = np.outer(strengths, strengths) * (1 - 4 * wrong)
    np.fill_diagonal(covariance, 1.0)
    weights = np.linalg.pinv(covariance, hermitian=True) @ (strengths * (1 - 2 * wrong))
    return dict(zip(MODALITIES, weights.tolist(), strict=True))


def ideal_contributions(recipe: CorpusRecipe) -> dict[str, float]:
    """Share of each modality in the best linear estimate: the weights scaled to sum to 1.

    All cues have equal variance, so this is also each modality's share of the mean absolute Shapley value of
    the estimate. It is the reference for the contributions that a trained model reports on complete clips.
    All shares are 0 if all strengths are 0.
    """
    weights = bayes_weights(recipe)
    total = sum(weights.values())
    return {name: weight / total if total else 0.0 for name, weight in weights.items()}


def generator(recipe: CorpusRecipe, stream: int, index: int = 0) -> np.random.Generator:
    """Random generator of one stream (`CUES` to `CLIPS`) and one clip or speaker."""
    return np.random.default_rng([recipe.seed, stream, index])


def _draw_cues(recipe: CorpusRecipe) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Labels `(clips,)` and the cues of each modality `(clips,)`, before negation."""
    draws = generator(recipe, CUES).standard_normal((recipe.clips, 1 + len(MODALITIES)))
    sentiment = draws[:, 0]
    cues = {}
    for name, noise in zip(MODALITIES, draws[:, 1:].T, strict=True):
        strength = recipe.strengths[name]
        cues[name] = _on_label_scale(strength * sentiment + np.sqrt(1 - strength**2) * noise)
    return _on_label_scale(sentiment), cues


def _draw_signs(recipe: CorpusRecipe) -> dict[str, np.ndarray]:
    """Sign of each clip `(clips,)` for the modalities that have one; empty unless the corpus is a control."""
    if not recipe.hidden_signs:
        return {}
    rng = generator(recipe, SIGNS)
    return {name: rng.choice((-1, 1), recipe.clips) for name in SIGNED}


def _draw_control(
    recipe: CorpusRecipe, signs: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Labels `(clips,)` and the cues of each modality `(clips,)` of a control."""
    *own, shared = generator(recipe, CUES).standard_normal((1 + len(MODALITIES), recipe.clips))
    cues = {}
    for name, factor in zip(MODALITIES, own, strict=True):
        of_own, of_shared = READERS[name]
        cue = (of_own * factor + of_shared * shared) / np.hypot(of_own, of_shared)
        cues[name] = _on_label_scale(cue * signs.get(name, 1))
    return (CONTROL_WEIGHT * (sum(own) + shared)).clip(-LIMIT, LIMIT), cues


def _on_label_scale(standard: np.ndarray) -> np.ndarray:
    return (LABEL_SPREAD * standard).clip(-LIMIT, LIMIT)


def _draw_conflicts(recipe: CorpusRecipe) -> tuple[list[str], list[str]]:
    """Contradicting and missing modality of every clip, "" for none; never both in one clip."""
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
    """Split of every speaker: a random fifth each for validation and test, at least one speaker."""
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
