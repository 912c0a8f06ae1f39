# SPDX-License-Identifier: Apache-2.0
"""Read csv files with line numbers for messages, and without guessing missing values.

pandas and `datasets` turn the words "null", "NA" and "None" into missing values and lose line numbers; the
csv module does neither. Files of spreadsheets are read as they are: separated by semicolons, tabs or bars,
with a first line "sep=;", in UTF-8 or UTF-16. Other encodings are refused with the command that converts
them, because the bytes alone do not say which one was meant.
"""

import codecs
import csv
import io
import re
import shlex
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
LONGEST_CELL = 131_072  # characters; the default limit of the csv module
SEPARATOR_NAMES = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
KNOWN_COLUMNS = {
    *("file_name", "text", "label", "split", "start", "end", "speaker", "id", "video_id", "clip_id", "mode"),
    *("utterance", "emotion", "sentiment", "dialogue_id", "utterance_id", "raw_text", "dialogue", "turn"),
}
"""Column names, in lower case, by which the separator of a header is recognised."""

BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
LEGACY_ENCODINGS = (  # name in Python, name for iconv, characters of its texts, least share of these
    ("cp1251", "WINDOWS-1251", "[а-яё]", 0.75),  # noqa: RUF001
    ("koi8_r", "KOI8-R", "[а-яё]", 0.75),  # noqa: RUF001
    ("cp1253", "WINDOWS-1253", "[ά-ώ]", 0.75),
    ("shift_jis", "SHIFT_JIS", "[ぁ-ヿ]", 0.3),
    ("euc_jp", "EUC-JP", "[ぁ-ヿ]", 0.3),
    ("euc_kr", "EUC-KR", "[가-힣]", 0.85),
    ("gb18030", "GB18030", "[一-鿿]", 0.7),
)
WESTERN = ("cp1252", "WINDOWS-1252", "[À-ÿŒœŠšŽžŸ‘’“”„–—…•€£°«»§·´¡¿ª®©™\N{NO-BREAK SPACE}]", 0.9)  # noqa: RUF001


class MissingColumnError(CorpusError):
    """A table lacks a column.

    Attributes:
        columns: The columns it has.
    """

    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class CsvTable:
    """A csv file: columns, rows as (first line, {column: cell}), and rows with a wrong number of cells."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str]], ...]
    broken: tuple[BrokenRow, ...]


def read_csv(path: Path) -> CsvTable:
    """Read a csv file with a header; empty lines are skipped and cells are left as they are.

    Raises:
        CorpusError: The file is neither UTF-8 nor UTF-16, is not well-formed csv, has no header, names a
            column twice, or exceeds the limits on rows, columns, cells and bytes.
    """
    text, separator, skipped = _without_declaration(_decoded(path))
    separator = separator or _separator_of(text)
    records = _records(path, text, separator, skipped)
    columns = _header(path, next(records, None))
    rows, broken = [], []
    for line, cells in records:
        if len(rows) + len(broken) == MOST_ROWS:
            raise CorpusError(f"{path} has more than {MOST_ROWS:,} rows: split it into parts")
        if len(cells) == len(columns):
            rows.append((line, dict(zip(columns, cells, strict=True))))
        else:
            broken.append(BrokenRow(path, line, _wrong_cell_count(cells, columns, separator)))
    return CsvTable(path, columns, tuple(rows), tuple(broken))


def require_columns(path: Path, columns: Sequence[str], wanted: Iterable[str]) -> None:
    """Check that a table has the required columns.

    Raises:
        MissingColumnError: Columns are missing; the message names all of them, and similar ones that exist.
    """
    missing = [name for name in wanted if name not in columns]
    if not missing:
        return
    complaints = [f"no column {name!r}{did_you_mean(name, columns)}" for name in missing]
    remedy = "Rename or add the column in the header; if the label has another name, set label_column"
    if "text" in missing:
        remedy += "; without texts, --transcribe (data.transcribe in training) recognises the speech"
    error = MissingColumnError(
        f"{path} line 1: {'; '.join(complaints)}. Its columns are: {', '.join(filter(None, columns))}. "
        f"{remedy}."
    )
    error.columns = tuple(columns)
    raise error


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
    if data.startswith(b"PK\x03\x04") or data.startswith(b"\xd0\xcf\x11\xe0"):
        raise CorpusError(f"{path} is a workbook of a spreadsheet program, not csv: save it as CSV UTF-8")
    encoding = _encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise CorpusError(_not_decodable(path, data, encoding, error.start)) from error
    return text.removeprefix("\ufeff")


def _encoding_of(data: bytes) -> str:
    """The encoding that the first bytes show; UTF-8 if they show none."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return encoding
    head = data[:200]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) > len(head) / 8 and min(even, odd) == 0:  # Latin letters in UTF-16, without a mark
        return "utf-16-be" if even else "utf-16-le"
    return "utf-8"


def _not_decodable(path: Path, data: bytes, encoding: str, at: int) -> str:
    """Message about bytes that are no text, with a command that converts them from the likely encoding."""
    number = data.count(b"\n", 0, at) + 1
    message = f"{path} line {number}: byte {at} (0x{data[at]:02x}) is not "
    if encoding != "utf-8":
        return f"{message}{encoding.upper()}, as the file begins: save it as CSV UTF-8"
    message += 'UTF-8. Save the file as UTF-8 (in a spreadsheet program: "CSV UTF-8")'
    name, iconv = _legacy_encoding(data)
    if name is None:
        return f"{message}."
    begin, end = data.rfind(b"\n", 0, at) + 1, data.find(b"\n", at)
    line = data[begin : end if end >= 0 else None].decode(name)
    word = next((word for word in re.split(r"[\s,;|\"]+", line) if not word.isascii()), line)[:SHOWN]
    source, target = shlex.quote(path.name), shlex.quote(f"{path.stem}.utf8{path.suffix}")
    return (
        f"{message}. If the word in this line is {word!r}, convert it with: iconv -f {iconv} -t UTF-8 "
        f"{source} > {target} && mv {target} {source}"
    )


def _legacy_encoding(data: bytes) -> tuple[str, str] | tuple[None, None]:
    """The likely encoding of bytes that are not UTF-8, as Python and as `iconv` call it.

    In Western texts single letters are beyond ASCII, in others whole words.
    """
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", data)]
    are_words = sum(runs) / len(runs) >= 2.5 or max(runs) > 4
    for encoding, name, expected, share in LEGACY_ENCODINGS if are_words else (WESTERN,):
        try:
            characters = re.sub(r"[\x00-\x7f]+", "", data.decode(encoding))
        except UnicodeDecodeError:
            continue
        if len(re.findall(expected, characters)) >= share * len(characters):
            return encoding, name
    return None, None


def _without_declaration(text: str) -> tuple[str, str | None, int]:
    """The text without a first line "sep=;", the separator it declares, and the number of lines removed."""
    declared = re.match(r'"?sep=(.)"?\s*?(\r\n|\r|\n|$)', text, re.IGNORECASE)
    return (text[declared.end() :], declared[1], 1) if declared else (text, None, 0)


def _separator_of(text: str) -> str:
    """The separator with which the header has the most known columns, or else the most columns."""
    header = next((line for line in io.StringIO(text) if line.strip()), "")

    def columns(separator: str) -> tuple[int, int]:
        cells = [cell.strip().lower() for cell in next(csv.reader([header], delimiter=separator), [])]
        return len(KNOWN_COLUMNS.intersection(cells)), len(cells)

    try:
        return max(SEPARATOR_NAMES, key=columns)  # of equals the first, the comma
    except csv.Error:
        return ","


def _records(path: Path, text: str, separator: str, skipped: int):
    """The non-empty records of csv text as (first line, cells); `skipped` lines stood before it."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = skipped + 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = skipped + reader.line_num + 1
    except csv.Error as error:
        if "field limit" in str(error):
            raise CorpusError(
                f"{path} line {line}: a cell of the record that starts here is longer than {LONGEST_CELL:,} "
                'characters. Shorten its text, or, if a quoted cell was never closed, close it with ".'
            ) from error
        raise CorpusError(
            f"{path} line {line}: the record that starts here is not well-formed csv ({error}). Close every "
            'quoted cell with " and write a quote within it as "".'
        ) from error


def _header(path: Path, record: tuple[int, list[str]] | None) -> tuple[str, ...]:
    if record is None:
        raise CorpusError(f"{path} is empty: its first line must name the columns: file_name,text,label")
    columns = tuple(name.strip() for name in record[1])
    if any("\0" in name for name in columns):
        raise CorpusError(
            f"{path} is damaged, or in an encoding that is not recognised: save it as CSV UTF-8"
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


def _wrong_cell_count(cells: list[str], columns: Sequence[str], separator: str) -> str:
    mark = SEPARATOR_NAMES.get(separator, repr(separator))
    if len(cells) > len(columns):
        extra = separator.join(cells[len(columns) :])[:SHOWN]
        return (
            f"{len(cells)} cells under {len(columns)} columns, {extra!r} is left over: put texts "
            f"that contain a {mark} in quotes"
        )
    return (
        f"{len(cells)} cells under {len(columns)} columns: write a {mark} for every cell, also an empty one"
    )
