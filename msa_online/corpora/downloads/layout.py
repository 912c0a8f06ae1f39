# SPDX-License-Identifier: Apache-2.0
"""What a layout of a downloaded data set is: how it is recognised, and the rows it is read into."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.csv_table import read_csv
from msa_online.corpora.layouts import Row

BY_SPEAKER = "no split is written; clips are split by speaker when they are read"


@dataclass(frozen=True)
class Files:
    """Files that a download may need in addition; None for those in it.

    Attributes:
        labels: The labels of CMU-MOSI or CMU-MOSEI.
        splits: The split of each video of CMU-MOSEI.
    """

    labels: Path | None = None
    splits: Path | None = None


@dataclass
class Reading:
    """What was read from a download.

    Attributes:
        rows: The rows in order.
        left_out: What cannot be used: a name for each row, by the reason.
        notes: What a user should know about these data.
    """

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """A data set as it is downloaded.

    Attributes:
        title: Name of the data set.
        looks_like: Files and folders by which it is recognised.
        is_here: Whether a folder holds it.
        read: Reads it: folder, protocol, additional files.
        protocols: What each protocol is, by name; the first is the default.
        counts: Official number of clips by protocol and split; "train+valid" is the sum of both, "all" that
            of all splits.
        takes: Names of the additional files that it uses.
    """

    title: str
    looks_like: str
    is_here: Callable[[Path], bool]
    read: Callable[[Path, str, Files], Reading]
    protocols: Mapping[str, str]
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    takes: tuple[str, ...] = ()


def text_of(path: Path) -> str:
    """Text of a file in UTF-8, or else in the encoding of Windows for Western languages."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def columns_of(table: Path) -> set[str]:
    """Columns of a csv file; none if it cannot be read."""
    try:
        return set(read_csv(table).columns)
    except CorpusError:
        return set()


def visible(folder: Path, pattern: str) -> list[Path]:
    """Paths that match a pattern, in order; without the hidden files ._* that macOS puts into archives."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def anywhere(root: Path, name: str) -> Iterator[Path]:
    """Files or folders of this name in a folder, its subfolders and theirs."""
    for pattern in (name, f"*/{name}", f"*/*/{name}"):
        yield from visible(root, pattern)


def the_one(root: Path, name: str, what: str) -> Path:
    """The file or folder of this name in `root` or up to two levels below.

    Raises:
        CorpusError: There is none.
    """
    found = next(anywhere(root, name), None)
    if found is None:
        raise CorpusError(f"{root} has no {name} ({what}): download it, or unpack its archive there")
    return found
