# SPDX-License-Identifier: Apache-2.0
"""Corpora in memory: samples by split, broken rows, and the error that lists them."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from feature_extractors.clip import Clip, printable
from msa_online.corpora.splits import SPLITS

SHOWN_ROWS = 50  # lines on rows in the message of a CorpusError; the exception holds all rows
TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
"""Suffixes of tables in text."""
SHOWN_LINES = 8  # rows with the same problem that are named; more share a line


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a corpus: a clip, its transcript and its label.

    Attributes:
        clip: The media file and the time window of this sample.
        text: The transcript; empty if there is none.
        label: A float for regression, a class name for classification, None if no label was requested.
        split: "train", "valid" or "test".
        speaker: Name of the speaker, or None if unknown.
        source: The file that contains the row.
        line: The row's first line in `source`, counted from 1 (in an Arrow table: its row, counted from 1).
        id: Unique within the corpus and equal on every machine: path within the corpus, and window.
        dialogue: Name of the conversation or recording that the clip is a part of; None if unknown.
        turn: Place in the dialogue, as written; see `dialogues`.
    """

    clip: Clip
    text: str
    label: float | str | None
    split: str
    speaker: str | None
    source: Path
    line: int
    id: str
    dialogue: str | None = None
    turn: str | None = None


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A row that cannot be used, with what is wrong and how to correct it."""

    source: Path
    line: int
    problem: str


class BySplit:
    """Base of all corpora, of clips or of precomputed features: samples by split.

    Attributes:
        samples: The usable samples of all splits, in the order of their rows.
        source: The file the rows came from, or the folder if there are several such files.
        broken: Rows that were left out; empty unless `skip_broken` was set.
        empty_split_remedy: What a user can do about an empty split; part of an error message.
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
        """Number of samples in each split that has any."""
        counts = Counter(sample.split for sample in self.samples)
        return {name: counts[name] for name in SPLITS if counts[name]}


class ReadyCorpus(BySplit, ABC):
    """Base of corpora whose samples can be loaded: `PreparedCorpus` of clips, `FeatureCorpus` of features.

    Training sees this and does not ask which of the two it is.

    Attributes:
        contents: Hash of the clip or of the features of each sample, by sample id.
    """

    contents: Mapping[str, str]

    @abstractmethod
    def present(self, split: str) -> Tensor:
        """Which modalities each sample of a split has, `(samples, 3)` bool."""

    def statistics(
        self, split: str, seen: Tensor, widths: Mapping[str, int]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and standard deviation of each feature over a split, `(width,)` each, by modality.

        Empty here: encoders of raw clips learn their scaling.

        Args:
            split: "train", "valid" or "test".
            seen: Which modalities of each sample count, `(samples, 3)` bool.
            widths: Width of each modality in the model.
        """
        return {}


@dataclass(frozen=True)
class Corpus(BySplit):
    """The usable samples of a corpus of clips, in the order of their rows.

    Attributes:
        samples: The samples of all splits.
        source: The file the rows came from, or the folder if there are several such files.
        broken: Rows that were left out; empty unless `skip_broken` was set.
    """

    samples: tuple[Sample, ...]
    source: Path
    broken: tuple[BrokenRow, ...] = ()
    empty_split_remedy: ClassVar[str] = (
        "Name train, valid or test in the column 'split', or leave that column out: the clips are then split "
        "70/10/20."
    )


class CorpusError(ValueError):
    """A corpus cannot be used as it is; the message names file, line, value and remedy.

    Attributes:
        broken: All broken rows, including those that the message does not list; empty if the problem is not
            in single rows (no metadata, a missing column).
    """

    def __init__(self, message: str, broken: Sequence[BrokenRow] = ()):
        super().__init__(message)
        self.broken = tuple(broken)

    def __reduce__(self):
        return type(self), (str(self), self.broken)

    @classmethod
    def of_rows(cls, source: Path, broken: Sequence[BrokenRow]) -> "CorpusError":
        """An error that lists broken rows and says how to leave them out; many alike share a line."""
        lines = [f"{source}: {len(broken):,} broken row{'s' * (len(broken) != 1)}"]
        alike = Counter((row.source, row.problem) for row in broken)
        shown: dict[tuple[Path, str, int], list[BrokenRow]] = {}
        for row in broken:
            many = alike[row.source, row.problem] > SHOWN_LINES
            shown.setdefault((row.source, row.problem, 0 if many else row.line), []).append(row)
        for rows in list(shown.values())[:SHOWN_ROWS]:
            more = [str(row.line) for row in rows[1:SHOWN_LINES]]
            rest = f" and {len(rows) - SHOWN_LINES:,} more" if len(rows) > SHOWN_LINES else ""
            where = ", ".join([place(rows[0].source, rows[0].line), *more])
            lines.append(f"  {where}{rest}: {rows[0].problem}")
        if left := sum(len(rows) for rows in list(shown.values())[SHOWN_ROWS:]):
            lines.append(f"  and {left:,} more")
        lines.append("Correct these rows, or leave them out: --skip-broken, or data.skip_broken=true.")
        return cls("\n".join(lines), broken)


def require_splits(corpus: BySplit, names: Iterable[str]) -> None:
    """Check that the splits a command needs are not empty.

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
    """Name of a row for messages, for example "corpus/metadata.csv line 12"."""
    name = printable(f"{source.parent.name}/{source.name}")
    return f"{name} {'line' if source.suffix.lower() in TEXT_SUFFIXES else 'row'} {line}"
