# SPDX-License-Identifier: Apache-2.0
"""Read csv files with line numbers for messages, and without guessing missing values.

pandas and `datasets` turn the words "null", "NA" and "None" into missing values and lose line numbers; the
csv module does neither.
"""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from msa_online.corpora.corpus import BrokenRow, CorpusError

MOST_ROWS = 2_000_000
"""Largest number of rows of a corpus, a hundred times that of the largest public ones."""

MOST_COLUMNS = 10_000
MOST_BYTES = 1 << 28  # of a csv file: two million rows of 130 characters
SHOWN = 60  # characters of a cell in a message


@dataclass(frozen=True)
class CsvTable:
    """A csv file: columns, rows as (first line, {column: cell}), and rows with a wrong number of cells."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str]], ...]
    broken: tuple[BrokenRow, ...]


def read_csv(path: Path) -> CsvTable:
    """Read a UTF-8 csv file with a header; empty lines are skipped and cells are left as they are.

    Raises:
        CorpusError: The file is not UTF-8, is not well-formed csv, has no header, names a column twice, or
            exceeds the limits on rows, columns and bytes.
    """
    records = _records(path, _decoded(path))
    columns = _header(path, next(records, None))
    rows, broken = [], []
    for line, cells in records:
        if len(rows) + len(broken) == MOST_ROWS:
            raise CorpusError(f"{path} has more than {MOST_ROWS:,} rows: split it into parts")
        if len(cells) == len(columns):
            rows.append((line, dict(zip(columns, cells, strict=True))))
        else:
            broken.append(BrokenRow(path, line, _wrong_cell_count(cells, columns)))
    return CsvTable(path, columns, tuple(rows), tuple(broken))


def require_columns(path: Path, columns: Sequence[str], wanted: Iterable[str]) -> None:
    """Check that a table has the required columns.

    Raises:
        CorpusError: Columns are missing; the message names all of them, and similar ones that exist.
    """
    missing = [name for name in wanted if name not in columns]
    if not missing:
        return
    complaints = [f"no column {name!r}{did_you_mean(name, columns)}" for name in missing]
    raise CorpusError(
        f"{path} line 1: {'; '.join(complaints)}. Its columns are: {', '.join(filter(None, columns))}. "
        "Rename or add the column in the header; if the label has another name, set label_column."
    )


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """The hint " (did you mean 'x'?)" if a known name is similar, else ""; case is ignored."""
    by_lower = {name.lower(): name for name in known}
    nearest = get_close_matches(value.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[nearest[0]]!r}?)" if nearest else ""


def _decoded(path: Path) -> str:
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise CorpusError(f"{path} is larger than {MOST_BYTES / 1e6:.0f} MB: split it into parts")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CorpusError(
            f"{path} line {line}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8. Save the file "
            f"as UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8.csv"
        ) from error


def _records(path: Path, text: str):
    """The non-empty records of csv text as (first line, cells)."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise CorpusError(
            f"{path} line {line}: the record that starts here is not well-formed csv ({error}). Close every "
            'quoted cell with " and write a quote within it as "".'
        ) from error


def _header(path: Path, record: tuple[int, list[str]] | None) -> tuple[str, ...]:
    if record is None:
        raise CorpusError(f"{path} is empty: its first line must name the columns: file_name,text,label")
    columns = tuple(name.strip() for name in record[1])
    if len(columns) == 1 and (found := [mark for mark in (";", "\t", "|") if mark in columns[0]]):
        raise CorpusError(
            f"{path} line {record[0]}: the columns are separated by {found[0]!r}. Save the file with commas."
        )
    if len(columns) > MOST_COLUMNS:
        raise CorpusError(
            f"{path} line {record[0]}: the header names {len(columns):,} columns, more than {MOST_COLUMNS:,}"
        )
    repeated = sorted(name for name, count in Counter(columns).items() if name and count > 1)
    if repeated:
        raise CorpusError(
            f"{path} line {record[0]}: the header names {', '.join(map(repr, repeated))} more than once. "
            "Keep one column of each name."
        )
    return columns


def _wrong_cell_count(cells: list[str], columns: Sequence[str]) -> str:
    if len(cells) > len(columns):
        extra = ",".join(cells[len(columns) :])[:SHOWN]
        return (
            f"{len(cells)} cells under {len(columns)} columns, {extra!r} is left over: put texts "
            "that contain a comma in quotes"
        )
    return f"{len(cells)} cells under {len(columns)} columns: write a comma for every cell, also an empty one"
