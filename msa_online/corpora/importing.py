# SPDX-License-Identifier: Apache-2.0
"""Write the metadata.csv of a downloaded data set, or start one for a folder of clips."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from feature_extractors import Clip, ClipError
from feature_extractors.clip import printable
from msa_online.corpora.cache_filling import progress_bar
from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.downloads import LAYOUTS, find
from msa_online.corpora.downloads.layout import Files, Layout, Reading, text_of
from msa_online.corpora.layouts import IMPORTED, METADATA, VIDEO_SUFFIXES, Row
from msa_online.corpora.splits import split_of
from msa_online.corpora.validation import why_not_writable
from msa_online.transcription import Transcriber

MEDIA_SUFFIXES = (
    *VIDEO_SUFFIXES,
    *(".m4v", ".mpeg", ".wmv", ".3gp", ".ogv", ".wav", ".mp3", ".m4a", ".flac", ".ogg", ".opus", ".aac"),
)
NOT_UNICODE = "the file name is no UTF-8, which a table cannot hold: rename the file"
LFS_POINTER = b"version https://git-lfs"
WINDOW_COLUMNS = ("split", "start", "end", "speaker", "dialogue", "turn", "region")


@dataclass(frozen=True)
class Imported:
    """A metadata.csv that was written.

    Attributes:
        layout: Name of the layout that was recognised.
        clips: The folder in which it begins.
        protocol: Name of the protocol that made the splits.
        metadata: The file.
        rows: Number of its rows.
        label_columns: Its columns of labels.
        left_out: What could not be used: a name for each row, by the reason.
        notes: What a user should know about these data.
    """

    layout: str
    clips: Path
    protocol: str
    metadata: Path
    rows: int
    label_columns: tuple[str, ...]
    left_out: Mapping[str, Sequence[str]]
    notes: tuple[str, ...]


def import_dataset(
    path: Path, out: Path, name: str = "auto", protocol: str | None = None, files: Files | None = None
) -> Imported:
    """Write the metadata.csv of a downloaded data set. Clips stay where they are, nothing is decoded.

    Names of clips are relative if the clips are in `out`. Otherwise they are absolute, and imported.json
    beside the table names the folder that they are in.

    Args:
        path: The folder of the unpacked data set.
        out: The folder for metadata.csv; it may be `path`.
        name: A key of `LAYOUTS`, or "auto".
        protocol: A protocol of the layout; None for its first.
        files: Additional files that the layout needs.

    Raises:
        CorpusError: The layout is not there, is not complete enough to be read, or does not have this
            protocol; no clip can be used; or the table exists or cannot be written.
    """
    files = files or Files()
    _require_new(out)
    name, clips = find(path.absolute(), name)
    layout = LAYOUTS[name]
    protocol = _chosen_protocol(name, layout, protocol)
    for each in ("labels", "splits"):
        given = getattr(files, each)
        if given and each not in layout.takes:
            raise CorpusError(f"--{each} {given}: {layout.title} needs no such file; leave --{each} out")
        if given and not given.is_file():
            raise CorpusError(f"--{each} {given} is not a file: check the path")
    reading = layout.read(clips, protocol, files)
    rows = _usable(reading, clips)
    left_out = {reason: names for reason, names in reading.left_out.items() if names}
    if not rows:
        reasons = "; ".join(f"{reason}: {len(names):,}" for reason, names in left_out.items())
        raise CorpusError(f"{clips} was recognised as {layout.title}, but no clip can be used ({reasons})")
    columns = tuple(dict.fromkeys(column for row in rows for column, _ in row.labels))
    folder, inside = Path(os.path.realpath(out)), Path(os.path.realpath(clips))
    relative = inside.is_relative_to(folder)
    prefix = inside.relative_to(folder) if relative else clips
    _write(out / METADATA, _table(rows, columns, prefix))
    if not relative:
        record = {"layout": name, "protocol": protocol, "clips": str(clips)}
        _write(out / IMPORTED, json.dumps(record, indent=2) + "\n")
    notes = (*reading.notes, *_count_notes(layout, protocol, rows))
    return Imported(name, clips, protocol, out / METADATA, len(rows), columns, left_out, notes)


def start_metadata(folder: Path, transcriber: Transcriber | None = None) -> tuple[Path, int, tuple[str, ...]]:
    """Start a metadata.csv: a row for every clip below a folder, with empty columns to fill in.

    The text of a clip is that of a .txt file of the same name beside it, if there is one. A sound beside a
    video of the same name is taken for the sound of that video and gets no row.

    Args:
        folder: The folder.
        transcriber: Makes the texts of the other clips; None leaves them empty.

    Returns:
        The file, the number of its rows, and notes for the user.

    Raises:
        TranscriptionError: The recogniser failed.
        CorpusError: There is no such folder, or no clip in it, or the table exists or cannot be written.
    """
    if not folder.is_dir():
        raise CorpusError(f"{folder} is not a folder: give the folder of your clips")
    _require_new(folder)
    paths = [
        path for path in sorted(folder.rglob("*")) if path.suffix.lower() in MEDIA_SUFFIXES and path.is_file()
    ]
    paths = [
        path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    unnamed = [path for path in paths if not _is_unicode(str(path.relative_to(folder)))]
    paths = [path for path in paths if path not in unnamed]
    videos = {path.with_suffix("") for path in paths if path.suffix.lower() in VIDEO_SUFFIXES}
    clips = [
        path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES or path.with_suffix("") not in videos
    ]
    if not clips:
        raise CorpusError(
            f"{folder} has no clips ({', '.join(MEDIA_SUFFIXES)}): give the folder of your clips"
        )
    texts = [path.with_suffix(".txt") for path in clips]
    rows = [
        Row(
            source=folder,
            line=0,
            folder=folder,
            file=path.relative_to(folder).as_posix(),
            text=" ".join(text_of(text).split()) if text.is_file() else "",
        )
        for path, text in zip(clips, texts, strict=True)
    ]
    notes = []
    if beside := len(paths) - len(clips):
        notes.append(f"{beside:,} sounds beside a video of the same name have no row")
    if unnamed:
        notes.append(f"{printable(unnamed[0])}: {NOT_UNICODE}; {len(unnamed):,} such files have no row")
    found = sum(bool(row.text) for row in rows)
    notes.append(f"{found:,} texts were found in .txt files of the same name")
    if transcriber is not None:
        rows, of_speech = _with_transcripts(rows, transcriber)
        notes += of_speech
    _write(folder / METADATA, _table(rows, ("label",), Path(), ("speaker",)))
    if any(split_of(Path(row.file).parts[0]) for row in rows if len(Path(row.file).parts) > 1):
        notes.append("folders named train, valid and test give the splits")
    return folder / METADATA, len(rows), tuple(notes)


def _with_transcripts(rows: Sequence[Row], transcriber: Transcriber) -> tuple[list[Row], list[str]]:
    """Rows with what a recogniser hears in clips without a text, and notes on them."""
    filled, heard, broken = [], 0, 0
    with progress_bar() as progress:
        for row in progress.track(rows, description="recognising speech"):
            if not row.text:
                try:
                    row = replace(row, text=transcriber.recording(Clip(row.folder / row.file)).text)
                    heard += bool(row.text)
                except ClipError:  # `prepare` reports it, with the reason
                    broken += 1
            filled.append(row)
    notes = [f"{heard:,} texts were recognised by {transcriber.name}: check them before you train"]
    if broken:
        notes.append(f"{broken:,} clips cannot be read and have no text; `msa-online prepare` says why")
    return filled, notes


def _require_new(out: Path) -> None:
    """Refuse a folder that has a metadata.csv already, or in which none can be written."""
    if (out / METADATA).exists():
        raise CorpusError(f"{out / METADATA} exists already: delete or rename it, or choose another folder")
    if out.exists() and not out.is_dir():
        raise CorpusError(f"{out} is a file: name a folder for metadata.csv")
    if reason := why_not_writable(out / METADATA):
        raise CorpusError(f"{out / METADATA} cannot be written ({reason}): choose another folder")


def _chosen_protocol(name: str, layout: Layout, protocol: str | None) -> str:
    if protocol is None:
        return next(iter(layout.protocols))
    if protocol not in layout.protocols:
        known = "; ".join(f"{each}: {what}" for each, what in layout.protocols.items())
        raise CorpusError(f"--protocol {protocol} is no protocol of {name}. There are {known}")
    return protocol


def _usable(reading: Reading, root: Path) -> list[Row]:
    """The rows whose clip and window can be used; the others are added to what is left out."""
    faults: dict[str, str | None] = {}
    real_root = os.path.realpath(root)
    seen: set[tuple[str, str, str, str]] = set()
    usable = []
    for row in reading.rows:
        if row.file not in faults:
            faults[row.file] = _fault(root / row.file, real_root)
        reason = faults[row.file] or _window_fault(row)
        place = (row.file, row.start, row.end, row.region)
        if reason is None and place in seen:
            reason = "the clip and window of another row"
        if reason:
            reading.left_out[reason].append(row.file)
        else:
            seen.add(place)
            usable.append(row)
    return usable


def _is_unicode(name: str) -> bool:
    """Whether a table in UTF-8 can hold a file name; a name on a disk can be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fault(path: Path, real_root: str) -> str | None:
    if not _is_unicode(str(path)):
        return NOT_UNICODE
    try:
        if not Path(os.path.realpath(path)).is_relative_to(real_root):
            return "a link or path that leads out of the data set"
        size = path.stat().st_size
        if not path.is_file():
            return "not a file"
        if size == 0:
            return "the clip has zero bytes"
        if size < 1024 and path.read_bytes().startswith(LFS_POINTER):
            return "a pointer of Git LFS in place of the clip: run `git lfs pull`"
    except (FileNotFoundError, NotADirectoryError):
        return "the clip is not in the download"
    except OSError as error:
        return f"the clip cannot be read ({error.strerror})"
    except ValueError:  # the name contains a null character
        return "a name that no file can have"
    return None


def _window_fault(row: Row) -> str | None:
    if not row.end:
        return None
    try:
        return (
            None if 0 <= float(row.start or 0) < float(row.end) < float("inf") else "a window without length"
        )
    except ValueError:
        return "a window that is no time"


def _count_notes(layout: Layout, protocol: str, rows: Sequence[Row]) -> list[str]:
    """A note for every official count that these rows do not have."""
    splits = Counter(split_of(row.split) for row in rows if row.split)
    found = {"all": len(rows), "train+valid": splits["train"] + splits["valid"], **splits}
    return [
        f"{part}: {here:,} clips, and the complete {layout.title} has {official:,}: "
        + ("the others are not in this download, or were left out" if here < official else "some are extra")
        for part, official in layout.counts.get(protocol, {}).items()
        if (here := found.get(part, 0)) != official and (splits or part == "all")
    ]


def _table(rows: Sequence[Row], labels: Sequence[str], prefix: Path, kept: Iterable[str] = ()) -> str:
    """The text of a metadata.csv; columns without a value are left out, except those in `kept`."""
    others = [name for name in WINDOW_COLUMNS if name in kept or any(getattr(row, name) for row in rows)]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file_name", "text", *labels, *others])
    for row in rows:
        cells = dict(row.labels)
        values = {name: getattr(row, name) or "" for name in others}
        if values.get("split"):
            values["split"] = split_of(values["split"])
        file = (prefix / row.file).as_posix()
        text_cell = row.text.replace("\0", "")
        writer.writerow([file, text_cell, *(cells.get(name, "") for name in labels), *values.values()])
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, "utf-8", newline="")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CorpusError(
            f"{path} cannot be written ({error.strerror}): free space, or choose another folder"
        ) from error
