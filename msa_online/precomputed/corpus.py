# SPDX-License-Identifier: Apache-2.0
"""Corpora of precomputed features in memory, and the checks before training."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from msa_online.corpora.corpus import BrokenRow, CorpusError, ReadyCorpus
from msa_online.corpora.splits import SPLITS
from msa_online.modalities import MODALITIES

CHUNK = 1 << 24  # numbers read at once: 64 MB, however large the memory-mapped file is
CONSTANT = 1e-6  # standard deviations below this share of the mean are rounding errors of fp32


@dataclass(frozen=True)
class FeatureSteps:
    """Features of one modality, the steps of all samples concatenated.

    Attributes:
        values: Features, `(all steps, width)` float32; may be memory-mapped.
        offsets: Start of each sample and end of the last one, `(samples + 1,)` int64. A sample without steps
            lacks the modality.
    """

    values: Tensor
    offsets: np.ndarray

    @classmethod
    def join(cls, sequences: Sequence[np.ndarray], width: int) -> "FeatureSteps":
        """Concatenate the sequences `(time, width)` of all samples; time may be zero."""
        offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
        joined = np.concatenate(
            [np.zeros((0, width)), *sequences], axis=0, dtype=np.float32, casting="unsafe"
        )
        return cls(torch.from_numpy(joined), offsets)

    @property
    def width(self) -> int:
        """Features in a step."""
        return self.values.shape[1]

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each sample, `(samples,)`."""
        return np.diff(self.offsets)

    def of(self, row: int) -> Tensor:
        """Steps of one sample, `(time, width)`."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: Sequence[int]) -> "FeatureSteps":
        """Features of the samples `rows`, in this order."""
        lengths = self.lengths[list(rows)]
        joined = torch.cat([self.values[:0], *(self.of(row) for row in rows)])
        return FeatureSteps(joined, np.cumsum([0, *lengths], dtype=np.int64))

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """All steps in chunks `(some steps, width)`, each with the number of its first step."""
        step = max(1, CHUNK // self.width)
        for start in range(0, len(self.values), step):
            yield start, self.values[start : start + step]

    def non_finite(self) -> dict[int, tuple[int, float]]:
        """By sample with NaN or infinite values: the first such step within the sample, and its value."""
        found: dict[int, tuple[int, float]] = {}
        for start, chunk in self.chunks():
            if torch.isfinite(chunk.sum()):  # 40 times as fast as testing every number
                continue
            for step in torch.nonzero(~torch.isfinite(chunk).all(dim=1)).flatten().tolist():
                row = int(np.searchsorted(self.offsets, start + step, side="right")) - 1
                values = chunk[step]
                value = float(values[~torch.isfinite(values)][0])
                found.setdefault(row, (start + step - int(self.offsets[row]), value))
        return found

    def statistics(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each feature over all steps of some samples, `(width,)` float32.

        Computed in float64. A feature that is constant or never observed gets a deviation of 1.
        """
        chosen = np.zeros(len(self.offsets) - 1, bool)
        chosen[rows] = True
        steps = torch.from_numpy(np.repeat(chosen, self.lengths))
        count = max(1, int(steps.sum()))
        mean = torch.zeros(self.width, dtype=torch.float64)
        square = torch.zeros_like(mean)
        for start, chunk in self.chunks():
            mean += chunk[steps[start : start + len(chunk)]].double().sum(dim=0) / count
        for start, chunk in self.chunks():
            centred = chunk[steps[start : start + len(chunk)]].double() - mean
            square += centred.square().sum(dim=0) / count
        deviation = square.sqrt()
        varies = (deviation > CONSTANT * mean.abs()) & (deviation > torch.finfo(torch.float32).tiny)
        return mean.float(), torch.where(varies, deviation, 1.0).float()


@dataclass(frozen=True, slots=True)
class FeatureSample:
    """One row of a corpus of features.

    Attributes:
        id: Unique within the corpus.
        text: The transcript, for readers only; empty if unknown.
        label: A float for regression, a class name for classification.
        split: "train", "valid" or "test".
        speaker: Name of the speaker, or None if unknown.
        source: The file that contains the row.
        line: The row's first line in `source` (in an .npz: its row), counted from 1.
        row: Index of the sample in the features.
        dialogue: Name of the conversation or recording that the sample is a part of; None if unknown.
        turn: Place in the dialogue, as written; see `corpora.dialogues`.
        clip: None: there is no media file.
    """

    id: str
    text: str
    label: float | str
    split: str
    speaker: str | None
    source: Path
    line: int
    row: int
    dialogue: str | None = None
    turn: str | None = None
    clip: ClassVar[None] = None


@dataclass(frozen=True)
class FeatureCorpus(ReadyCorpus):
    """The usable samples of a corpus of features, in the order of their rows.

    Attributes:
        samples: The samples of all splits.
        steps: The features by modality; a modality that the corpus lacks is left out.
        source: The metadata.csv or .npz file that was read.
        broken: Rows that were left out; empty unless `skip_broken` was set.
    """

    samples: tuple[FeatureSample, ...]
    steps: dict[str, FeatureSteps]
    source: Path
    broken: tuple[BrokenRow, ...] = ()
    empty_split_remedy: ClassVar[str] = (
        "Name train, valid or test in every row; if the column of splits has another name, set split_column; "
        "`msa-online convert-features --valid-share 0.1` takes a validation split from training."
    )

    def lengths(self, name: str, samples: Sequence[FeatureSample]) -> np.ndarray:
        """Steps of a modality in each of `samples`, `(samples,)`; zeros where the corpus lacks it."""
        rows = [sample.row for sample in samples]
        return self.steps[name].lengths[rows] if name in self.steps else np.zeros(len(rows), np.int64)

    @cached_property
    def contents(self) -> dict[str, str]:
        """Hash of the features of each sample that has any, by sample id."""
        found = {}
        for sample in self.samples:
            digest, steps = hashlib.blake2b(digest_size=16), 0
            for name in self.steps:
                values = self.steps[name].of(sample.row)
                digest.update(f"{name} {len(values)} ".encode())
                digest.update(values.contiguous().numpy())
                steps += len(values)
            found[sample.id] = digest.hexdigest() if steps else ""
        return found

    def present(self, split: str) -> Tensor:
        """Which modalities each sample of a split has, `(samples, 3)` bool."""
        lengths = [self.lengths(name, self.split(split)) for name in MODALITIES]
        return torch.from_numpy(np.stack(lengths, axis=1) > 0)

    def statistics(
        self, split: str, seen: Tensor, widths: Mapping[str, int]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation of each feature over a split, `(width,)` each, by modality.

        Args:
            split: "train", "valid" or "test".
            seen: Which modalities of each sample count, `(samples, 3)` bool.
            widths: Width of each modality in the model.

        Raises:
            CorpusError: The features have other widths.
        """
        require_widths(self, widths)
        rows = [sample.row for sample in self.split(split)]
        return {
            name: steps.statistics([row for row, counts in zip(rows, seen[:, column], strict=True) if counts])
            for column, name in enumerate(MODALITIES)
            if (steps := self.steps.get(name))
        }


def require_widths(corpus: FeatureCorpus, widths: Mapping[str, int]) -> None:
    """Check that a corpus has the feature widths of a model.

    Args:
        corpus: The corpus.
        widths: Width of each modality in the model. A modality that the corpus lacks is not checked.

    Raises:
        CorpusError: Widths differ; the message names all of them with both numbers.
    """
    differing = [
        f"{name} is {steps.width} wide in the data and {widths[name]} in the model"
        for name, steps in corpus.steps.items()
        if steps.width != widths[name]
    ]
    if differing:
        fitting = {**widths, **{name: steps.width for name, steps in corpus.steps.items()}}
        wanted = ", ".join(f"{name}: {fitting[name]}" for name in MODALITIES)
        raise CorpusError(
            f"{corpus.source}: {'; '.join(differing)}. Set model.feature_widths: {{{wanted}}}, or give the "
            "features that the model was made for."
        )


def features_table(corpus: FeatureCorpus) -> Table:
    """Summary for the terminal: width, lengths and missing samples of each modality."""
    samples = corpus.samples
    sizes = Counter(sample.split for sample in samples)
    held = ", ".join(f"{sizes[name]:,} {name}" for name in SPLITS)
    left_out = f", {len(corpus.broken):,} broken rows left out" if corpus.broken else ""
    title = f"{corpus.source.name}: features of {len(samples):,} samples ({held}){left_out}"
    table = Table(title=Text(title), title_justify="left", min_width=78)
    for column in ("modality", "width", "steps, median", "steps, most", "samples without"):
        table.add_column(column, justify="left" if column == "modality" else "right")
    for name in MODALITIES:
        lengths = corpus.lengths(name, samples)
        lacking = int((lengths == 0).sum())
        steps = [f"{np.median(lengths):.0f}", f"{lengths.max():,}"] if name in corpus.steps else ["", ""]
        width = str(corpus.steps[name].width) if name in corpus.steps else "not in the data"
        table.add_row(name, width, *steps, f"{lacking:,} ({lacking / len(samples):.1%})")
    return table
