# SPDX-License-Identifier: Apache-2.0
"""Corpora in memory: samples by split, broken rows, and the error that lists those."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from feature_extractors.clip import Clip
from msa_online.corpora.splits import SPLITS

SHOWN_ROWS = 50  # of the broken rows, in the message of a CorpusError; the exception holds them all


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a corpus: a clip, what is said in it and how it was rated.

    Attributes:
        clip: The media file and the window of it that belongs to this sample.
        text: The transcript; empty where there is none.
        label: A float for regression, a class name for classification, None where no label was asked for.
        split: "train", "valid" or "test".
        speaker: Who speaks, or None where the data do not say.
        source: The file that holds the row.
        line: The row's first line in `source`, counted from 1 (in an Arrow table: its row, counted from 1).
        id: Unique within the corpus and the same on every machine: the path within the corpus and the window.
    """

    clip: Clip
    text: str
    label: float | str | None
    split: str
    speaker: str | None
    source: Path
    line: int
    id: str


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A row that cannot be used: which one, what is wrong and how to correct it."""

    source: Path
    line: int
    problem: str


class BySplit:
    """What every corpus offers, of clips or of precomputed features: its samples, split by split.

    Attributes:
        samples: The usable samples of all splits, in the order of their rows.
        source: The file the rows came from, or the folder where there are several such files.
        broken: The rows that were left out, which happens only on request.
        empty_split_remedy: What a user can do about an empty split.
    """

    samples: tuple[Any, ...]
    source: Path
    broken: tuple[BrokenRow, ...]
    empty_split_remedy: ClassVar[str]

    def split(self, name: str) -> tuple[Any, ...]:
        """The samples of "train", "valid" or "test", in the order of their rows."""
        return tuple(sample for sample in self.samples if sample.split == name)

    @property
    def sizes(self) -> dict[str, int]:
        """Samples in each split that has any."""
        counts = Counter(sample.split for sample in self.samples)
        return {name: counts[name] for name in SPLITS if counts[name]}


@dataclass(frozen=True)
class Corpus(BySplit):
    """The usable samples of a corpus in the order of their rows.

    Attributes:
        samples: The samples of all splits.
        source: The file the rows came from, or the folder where there are several such files.
        broken: The rows that were left out, which happens only on request.
    """

    samples: tuple[Sample, ...]
    source: Path
    broken: tuple[BrokenRow, ...] = ()
    empty_split_remedy: ClassVar[str] = (
        "Name train, valid or test in the column 'split', or leave that column out to have the clips shared "
        "out 70/10/20."
    )


class CorpusError(ValueError):
    """A corpus that cannot be used as it is; the message names file, line, value and remedy.

    Attributes:
        broken: All broken rows, also those beyond the ones that the message lists; empty where the
            corpus as a whole is the problem (no metadata, a missing column).
    """

    def __init__(self, message: str, broken: Sequence[BrokenRow] = ()):
        super().__init__(message)
        self.broken = tuple(broken)

    def __reduce__(self):
        return type(self), (str(self), self.broken)

    @classmethod
    def of_rows(cls, source: Path, broken: Sequence[BrokenRow]) -> "CorpusError":
        """The error that lists broken rows, one a line, and says how to go on without them."""
        lines = [f"{source}: {len(broken):,} broken row{'s' * (len(broken) != 1)}"]
        lines += [f"  {place(row.source, row.line)}: {row.problem}" for row in broken[:SHOWN_ROWS]]
        if len(broken) > SHOWN_ROWS:
            lines.append(f"  and {len(broken) - SHOWN_ROWS:,} more")
        lines.append("Correct these rows, or go on without them: --skip-broken, or data.skip_broken=true.")
        return cls("\n".join(lines), broken)


def require_splits(corpus: BySplit, names: Iterable[str]) -> None:
    """Check that the splits a command works on are not empty.

    Raises:
        CorpusError: One of the named splits has no sample.
    """
    sizes = corpus.sizes
    if empty := [name for name in names if name not in sizes]:
        held = ", ".join(f"{sizes.get(name, 0)} {name}" for name in SPLITS)
        raise CorpusError(
            f"{corpus.source}: the {' and '.join(empty)} split is empty (samples: {held}). "
            f"{corpus.empty_split_remedy}",
            corpus.broken,
        )


def place(source: Path, line: int) -> str:
    """How a message names a row, for example "corpus/metadata.csv line 12"."""
    return f"{source.parent.name}/{source.name} {'line' if source.suffix == '.csv' else 'row'} {line}"
