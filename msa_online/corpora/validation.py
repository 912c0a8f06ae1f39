# SPDX-License-Identifier: Apache-2.0
"""Validate every value of every row before a run starts."""

import logging
import math
import os
import re
import shlex
import stat
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeVar

from feature_extractors import limits
from feature_extractors.clip import Clip, Region, is_region, printable
from msa_online.corpora.corpus import BrokenRow, CorpusError, Sample, place
from msa_online.corpora.csv_table import did_you_mean
from msa_online.corpora.layouts import Row, RowTable
from msa_online.corpora.splits import SPLIT_NAMES, split_of
from msa_online.processing_msa import clean_text

OUTSIDE = 0.1  # if a larger share of the labels is out of range, the range is probably wrong
MANY_CLASSES = 30  # more classes with whole numbers as names are probably ratings
SEARCHED_NAMES = 10  # number of missing files for which a similar name is searched, which is slow
Value = TypeVar("Value")
logger = logging.getLogger(__name__)


class RowProblem(ValueError):
    """A value of a row cannot be used; the message contains the value and the remedy."""


def check_rows(
    table: RowTable, label_range: tuple[float, float] | None
) -> tuple[list[Sample], list[BrokenRow]]:
    """Convert valid rows to samples, and list all problems of every other row.

    If no row has a split, the split of all samples is "", for the caller to fill in.

    Args:
        table: The rows as written.
        label_range: Smallest and largest legal label; None if labels are class names.

    Returns:
        The samples and the broken rows, each in the order of the rows.
    """
    files = _FileCheck(table.links_into)
    splits_given = any(row.split for row in table.rows)
    first_rows: dict[tuple[str, float, float | None, Region | None, int | None], Row] = {}
    samples, broken = [], list(table.broken)
    for row in table.rows:
        problems: list[str] = []
        path = attempt(problems, files.check, row)
        file = row.file if path is None or path == row.folder / row.file else files.name_of(row, path)
        window = attempt(problems, _window, row) or (None, None)
        region = attempt(problems, _region, row)
        track = attempt(problems, _audio_track, row)
        label = attempt(problems, checked_label, row, label_range)
        split = attempt(problems, checked_split, row.split) if splits_given else ""
        if not problems:
            place_in_file = (os.path.realpath(path), window[0] or 0.0, window[1], region, track)
            earlier = first_rows.setdefault(place_in_file, row)
            if earlier is not row:
                known = place(earlier.source, earlier.line)
                problems.append(
                    f"{row.file!r} has the clip and window of {known}: delete one of the two rows"
                )
        if problems:
            broken.append(BrokenRow(row.source, row.line, "; ".join(problems)))
        else:
            clip = Clip(path, *window, region=region, audio_track=track)
            samples.append(
                Sample(
                    clip=clip,
                    text=row.text,
                    label=label,
                    split=split,
                    speaker=row.speaker.strip() or None,
                    source=row.source,
                    line=row.line,
                    id=_identity(file, clip),
                    dialogue=row.dialogue.strip() or None,
                    turn=row.turn.strip() or None,
                )
            )
    return samples, sorted(broken, key=lambda each: (str(each.source), each.line))


def check_label_column(
    rows: Sequence[Row], column: str, label_range: tuple[float, float] | None, skip_broken: bool
) -> None:
    """Refuse a label column that does not suit the task, with one message instead of one for each row.

    Args:
        rows: All rows, with their labels as written.
        column: Name of the label column.
        label_range: Smallest and largest legal label of a regression; None if labels are class names.
        skip_broken: Rows without a label, or with one out of range, will be left out.

    Raises:
        CorpusError: Numbers are needed and most labels are words; most labels are empty; or many are out of
            range.
    """
    filled = [row for row in rows if row.label is not None and row.label.strip()]
    if not skip_broken and len(filled) < len(rows) / 2:
        first = next(row for row in rows if not (row.label or "").strip())
        raise CorpusError(
            f"{place(first.source, first.line)}: the label column {column!r} is empty, as in "
            f"{len(rows) - len(filled):,} of {len(rows):,} rows: name the column of the labels "
            "(data.label_column, or --label-column)"
        )
    if label_range is None:
        return
    low, high = label_range
    words = [row for row in filled if number_in(row.label) is None]
    if len(words) > len(filled) / 2:
        raise CorpusError(
            f"{place(words[0].source, words[0].line)}: the label column {column!r} contains words "
            f"({words[0].label.strip()!r}; {len(words):,} of {len(rows):,} rows), but a regression needs "
            f"numbers from {low:g} to {high:g}: train with data.task=classification, or name a column of "
            "numbers (data.label_column, or --label-column)"
        )
    values = [(row, number_in(row.label)) for row in filled]
    numbers = [(row, value) for row, value in values if value is not None and math.isfinite(value)]
    outside = [row for row, value in numbers if not low <= value <= high]
    if not skip_broken and len(outside) > max(2, OUTSIDE * len(rows)):
        lowest, highest = min(value for _, value in numbers), max(value for _, value in numbers)
        raise CorpusError(
            f"{place(outside[0].source, outside[0].line)}: label {outside[0].label.strip()!r} is outside "
            f"[{low:g}, {high:g}], as in {len(outside):,} of {len(rows):,} rows; column {column!r} runs from "
            f"{lowest:g} to {highest:g}: train with data.label_range=[{math.floor(lowest)},"
            f"{math.ceil(highest)}], or name another column (data.label_column, or --label-column)"
        )


def check_class_names(source: Path, column: str, names: Collection[str]) -> None:
    """Refuse class names that are scores; warn of many classes that are whole numbers.

    Args:
        source: The file that contains the labels.
        column: Name of the label column.
        names: All distinct labels.

    Raises:
        CorpusError: There is only one class; or all labels are numbers, and not all are whole.
    """
    if len(names) == 1:
        raise CorpusError(
            f"{source}: the label column {column!r} contains one class only, {next(iter(names))!r}: a "
            "classification needs two or more; name another column with data.label_column"
        )
    numbers = [number_in(name) for name in names]
    if None in numbers or not all(map(math.isfinite, numbers)):
        return
    if fractions := sorted(name for name in names if not number_in(name).is_integer()):
        raise CorpusError(
            f"{source}: the label column {column!r} contains scores ({len(numbers):,} distinct numbers, like "
            f"{fractions[0]!r}), and data.task=classification would make a class of each: set "
            "data.task=regression, or name a column of class names with data.label_column"
        )
    if len(numbers) > MANY_CLASSES:
        logger.warning(
            "%s: column %r gives %s classes, all of them whole numbers; if they are ratings, set "
            "data.task=regression and data.label_range",
            printable(source),
            column,
            len(numbers),
        )


def with_scores(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with floats for labels if all labels are numbers; else as they are."""
    numbers = {sample.label: number_in(sample.label) for sample in samples if sample.label is not None}
    if None in numbers.values() or not all(map(math.isfinite, numbers.values())):
        return list(samples)
    return [replace(sample, label=numbers.get(sample.label)) for sample in samples]


def attempt(problems: list[str], check: Callable[..., Value], *values) -> Value | None:
    """Call a check and return its value; a `RowProblem` is added to `problems`, and None returned."""
    try:
        return check(*values)
    except RowProblem as problem:
        problems.append(str(problem))
        return None


def _identity(file: str, clip: Clip) -> str:
    name = str(PurePosixPath(file))
    window = f"@{clip.start or 0.0}-{'end' if clip.end is None else clip.end}"
    region = "" if clip.region is None else "@" + ",".join(map(str, clip.region))
    track = "" if clip.audio_track is None else f"@track{clip.audio_track}"
    if clip.start is None and clip.end is None and not region:
        return name + track
    return name + window + region + track


def checked_label(row: Row, label_range: tuple[float, float] | None) -> float | str | None:
    """The label of a row: a number within `label_range`, or a class name if that is None.

    Raises:
        RowProblem: The label is empty or not finite; or, with a range, not a number or out of it.
    """
    if row.label is None:
        return None
    cell = row.label.strip()
    if not clean_text(cell):
        raise RowProblem("the label is empty: rate the clip or delete the row")
    value = number_in(cell)
    if label_range is None:
        if value is not None and not math.isfinite(value):
            raise RowProblem(f"label {cell!r} is not finite: write a class or a number, or delete the row")
        return cell
    low, high = label_range
    wanted = f"write a number from {low:g} to {high:g}"
    if value is None:
        raise RowProblem(f"label {cell!r} is not a number: {wanted}")
    if not math.isfinite(value):
        raise RowProblem(f"label {cell!r} is not finite: {wanted}")
    if not low <= value <= high:
        raise RowProblem(f"label {cell!r} is outside [{low:g}, {high:g}]: {wanted}, or change label_range")
    return value


def checked_split(name: str | None) -> str:
    """The split that a cell names.

    Raises:
        RowProblem: The cell is empty or names no split.
    """
    if name is None:
        raise RowProblem("no split is given here although other rows have one: write train, valid or test")
    split = split_of(name)
    if split is None:
        hint = did_you_mean(name, SPLIT_NAMES)
        raise RowProblem(f"split {name!r} is unknown{hint}: write train, valid or test")
    return split


def _window(row: Row) -> tuple[float | None, float | None]:
    start, end = _seconds("start", row.start), _seconds("end", row.end)
    if end is not None and (start or 0.0) >= end:
        raise RowProblem(f"start {start or 0.0} is not before end {end}: write seconds, start < end")
    return start, end


def _region(row: Row) -> Region | None:
    cell = row.region.strip().strip("[]()")
    if not cell:
        return None
    shares = [number_in(share) for share in re.split(r"[\s,;]+", cell)]
    if None in shares or not is_region(shares):
        raise RowProblem(
            f"region {row.region!r} is not a part of the frame: write x y width height as shares of it, such "
            "as 0.5 0 0.5 1 for the right half"
        )
    return tuple(shares)


def _audio_track(row: Row) -> int | None:
    cell = row.audio_track.strip()
    if not cell:
        return None
    number = number_in(cell)
    if number is None or not number.is_integer() or not 1 <= number <= limits.MAX_STREAMS:
        raise RowProblem(f"audio_track {cell!r} is no track: write its number among the audio tracks, from 1")
    return int(number)


def _seconds(column: str, cell: str) -> float | None:
    cell = cell.strip()
    if not cell:
        return None
    value = number_in(cell)
    if value is None or not math.isfinite(value) or value < 0:
        raise RowProblem(f"{column} {cell!r} is not a time: write seconds, like 2.5")
    return value


def number_in(cell: str) -> float | None:
    """The number in a cell, also with a decimal comma or the minus sign of typesetting; None for words."""
    cell = clean_text(cell).replace("\N{MINUS SIGN}", "-")
    if re.fullmatch(r"[-+]?\d*,\d+", cell):
        cell = cell.replace(",", ".")
    try:
        return None if "_" in cell else float(cell)  # Python would read 1_5 as 15
    except ValueError:
        return None


class _FileCheck:
    """Finds the file of a row, or reports why it cannot be used and which file may have been meant.

    A name that differs from that on the disk only in its Unicode form (composed or decomposed) or in its
    slashes (Windows) is the same name.
    """

    def __init__(self, links_into: Path | None):
        self.links_into = links_into and Path(os.path.realpath(links_into))
        self.real_folders: dict[Path, str] = {}
        self.names: dict[Path, list[str]] = {}
        self.by_form: dict[Path, dict[str, str]] = {}
        self.by_key: dict[Path, dict[str, str]] = {}
        self.places: dict[Path, dict[str, str]] = {}
        self.searches_left = SEARCHED_NAMES

    def check(self, row: Row) -> Path:
        """Path of the row's file; it exists within the corpus, is readable and not empty."""
        if not row.file.strip() or "\0" in row.file:
            raise RowProblem(f"file name {row.file!r} is empty or invalid: name the clip of this row")
        windows = PureWindowsPath(row.file)
        path = row.folder / row.file
        rooted = windows.root and (windows.drive or not os.path.lexists(path))
        if os.path.isabs(row.file) or rooted:
            raise RowProblem(f"{row.file!r} is an absolute path: write it relative to {row.folder}")
        try:
            if not os.path.lexists(path) and (same := self._same_name(row)):
                path = same
            self._require_inside(row, path)
            status = path.stat()
        except (OSError, UnicodeEncodeError) as error:
            hint = self._suggestion(row)
            raise RowProblem(
                f"{row.file!r} does not exist{hint}: copy it to {path} or correct the name"
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise RowProblem(f"{row.file!r} is not a file: name the clip itself")
        if status.st_size == 0:
            raise RowProblem(f"{row.file!r} has zero bytes: copy or download it again")
        if not os.access(path, os.R_OK):
            raise RowProblem(f"{row.file!r} is not readable for this user: change its permissions")
        return path

    def name_of(self, row: Row, path: Path) -> str:
        """Name of a file that the row writes in another form, equal on every machine."""
        return unicodedata.normalize("NFC", path.relative_to(row.folder).as_posix())

    def _same_name(self, row: Row) -> Path | None:
        """The existing path whose parts are those of the row in any Unicode form; None if there is none."""
        path = row.folder
        for part in PurePosixPath(_with_slashes(row.file)).parts:
            if not os.path.lexists(path / part):
                part = self._listed(path).get(_form(part))
                if part is None:
                    return None
            path /= part
        return path

    def _listed(self, folder: Path) -> dict[str, str]:
        """Names in a folder by their composed form."""
        if folder not in self.by_form:
            self.by_form[folder] = {_form(name): name for name in self._names(folder)}
        return self.by_form[folder]

    def _names(self, folder: Path) -> list[str]:
        if folder not in self.names:
            self.names[folder] = sorted(os.listdir(folder)) if folder.is_dir() else []
        return self.names[folder]

    def _require_inside(self, row: Row, path: Path) -> None:
        if row.folder not in self.real_folders:
            self.real_folders[row.folder] = os.path.join(os.path.realpath(row.folder), "")
        real = os.path.realpath(path)
        if real.startswith(self.real_folders[row.folder]):
            return
        if self.links_into is None or not Path(real).is_relative_to(self.links_into):
            if link := _linked_folder(row.folder, path):
                name, corpus = (shlex.quote(str(part)) for part in (link.relative_to(row.folder), row.folder))
                raise RowProblem(
                    f"the folder {str(link.relative_to(row.folder))!r} is a link that leads out of the "
                    f"corpus to {os.path.realpath(link)}: links out of a corpus are not followed. Replace it "
                    f"by what it names: cd {corpus} && cp -rL {name} {name}.copy && rm {name} && "
                    f"mv {name}.copy {name}"
                )
            raise RowProblem(
                f"{row.file!r} leads out of the corpus to {real}: copy the file into {row.folder}"
            )

    def _suggestion(self, row: Row) -> str:
        """Hint at the file probably meant: another suffix or case, lost zeros, a similar name, elsewhere."""
        wanted = PurePosixPath(_with_slashes(row.file))
        if ".." in wanted.parts:  # the hint names no file outside the corpus
            near = self._elsewhere(row.folder).get(_form(wanted.name))
            return f" (but {near!r} does)" if near else ""
        folder = row.folder / wanted.parent
        if folder not in self.by_key:
            self.by_key[folder] = {_key(PurePosixPath(name).stem): name for name in self._names(folder)}
        near = self.by_key[folder].get(_key(wanted.name)) or self.by_key[folder].get(_key(wanted.stem))
        if near is None:
            near = self._elsewhere(row.folder).get(_form(wanted.name))
            return f" (but {near!r} does)" if near else self._similar(folder, wanted)
        zeros = PurePosixPath(near).stem.startswith("0") and not wanted.stem.startswith("0")
        cause = "; spreadsheet programs drop leading zeros" if zeros else ""
        return f" (but {str(wanted.parent / near)!r} does{cause})"

    def _elsewhere(self, folder: Path) -> dict[str, str]:
        """Paths of all files below the folder, by file name."""
        if folder not in self.places:
            self.places[folder] = {
                _form(name): (Path(base).relative_to(folder) / name).as_posix()
                for base, _, names in os.walk(folder)
                for name in names
            }
        return self.places[folder]

    def _similar(self, folder: Path, wanted: PurePosixPath) -> str:
        if self.searches_left == 0:
            return ""
        self.searches_left -= 1
        near = get_close_matches(wanted.name, self._names(folder), n=1, cutoff=0.8)
        return f" (did you mean {str(wanted.parent / near[0])!r}?)" if near else ""


def _form(name: str) -> str:
    """A name in composed form: macOS writes the parts of letters like é one by one, other systems do not."""
    return unicodedata.normalize("NFC", name)


def _key(stem: str) -> str:
    """What two names have in common if they differ in case, Unicode form or leading zeros: "1" and "0001"."""
    return _form(stem).casefold().lstrip("0")


def _with_slashes(file: str) -> str:
    return file.replace("\\", "/")


def _linked_folder(folder: Path, path: Path) -> Path | None:
    """The first folder on the way from `folder` to `path` that is a link; None if there is none."""
    parts = path.relative_to(folder).parts
    on_the_way = (folder.joinpath(*parts[:count]) for count in range(1, len(parts)))
    return next((part for part in on_the_way if part.is_symlink()), None)


def why_not_writable(path: Path) -> str | None:
    """The reason why `path` cannot be written, or None; missing parent folders are no reason."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        return f"{there} is a file, not a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"this user has no permission to write in {there}"
    return None
