# SPDX-License-Identifier: Apache-2.0
"""Layouts of corpora on disk (ours, MMSA's, MELD's), each read into the same plain rows."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from msa_online.corpora.corpus import BrokenRow, CorpusError
from msa_online.corpora.csv_table import CsvTable, read_csv, require_columns
from msa_online.corpora.splits import SPLIT_NAMES, split_of

METADATA = "metadata.csv"
IMPORTED = "imported.json"
"""Beside a metadata.csv that `msa-online import` wrote elsewhere: names the folder of its clips."""

MMSA_METADATA = ("label.csv", "meta.csv")  # MMSA's own name, and that of CH-SIMS v2
MMSA_LABELS = ("label", "label_T", "label_A", "label_V", "annotation")
MELD_LABELS = ("Emotion", "Sentiment")
MELD_METADATA = {"train": "train_sent_emo.csv", "dev": "dev_sent_emo.csv", "test": "test_sent_emo.csv"}
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".flv", ".mpg")  # preferred to other suffixes
BEYOND_LATIN_1 = {  # characters that MELD's tables have in the numbering of Windows: 0x92 for an apostrophe
    number: bytes([number]).decode("cp1252", "ignore") for number in range(0x80, 0xA0)
}


@dataclass(frozen=True, slots=True)
class Row:
    """One row as written, before validation; cells that the data lack are empty.

    Attributes:
        source: The file that contains the row.
        line: The row's first line in `source`.
        folder: The folder that `file` is relative to and must lie in.
        file: The media file.
        text: The transcript.
        label: The label; None if no label was requested.
        split: The split, by any of its names; None if the data give none.
        start: Start of the window in seconds.
        end: End of the window in seconds.
        speaker: Name of the speaker.
        region: Part of the frame that contains the speaker's face: x, y, width and height.
        audio_track: Number of the audio track, counted from 1.
        dialogue: The conversation or recording that the clip is a part of.
        turn: Place of the clip in its dialogue.
        labels: All labels of a known layout, as pairs of column and cell.
    """

    source: Path
    line: int
    folder: Path
    file: str
    text: str
    label: str | None = None
    split: str | None = None
    start: str = ""
    end: str = ""
    speaker: str = ""
    region: str = ""
    audio_track: str = ""
    dialogue: str = ""
    turn: str = ""
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RowTable:
    """All rows of a corpus, before validation.

    Attributes:
        source: The file that contains the rows, or the folder if there are several.
        rows: The rows in order.
        broken: Rows whose number of cells differs from the header's.
        links_into: Folder outside the corpus that symbolic links may point into (the Hub's cache).
    """

    source: Path
    rows: tuple[Row, ...]
    broken: tuple[BrokenRow, ...] = ()
    links_into: Path | None = None


def find_layout(folder: Path) -> Callable[[Path, str | None, bool], RowTable] | None:
    """The function that reads this folder, chosen by the metadata files in it; None if there are none.

    Its arguments are the folder, the label column, and whether the column of texts is optional.
    """
    if metadata := _metadata_in(folder):
        return lambda folder, *columns: read_metadata(metadata, *columns)
    if _split_folders(folder):
        return read_split_folders
    if table := mmsa_table(folder):
        return lambda folder, *columns: read_mmsa(table, *columns)
    if any(meld_tables(folder).values()):
        return read_meld
    return None


def mmsa_table(folder: Path) -> Path | None:
    """The table of a folder in MMSA's layout; None if there is none."""
    found = [folder / name for name in MMSA_METADATA if (folder / name).is_file()]
    return found[0] if found and (found[0].name == "label.csv" or (folder / "Raw").is_dir()) else None


def meld_tables(folder: Path) -> dict[str, Path | None]:
    """MELD's tables by split, in the folder or its train/, dev/ and test/; None for missing ones."""
    return {
        split: next(
            (path for path in (folder / name, *sorted(folder.glob(f"*{split}*/{name}"))) if path.is_file()),
            None,
        )
        for split, name in MELD_METADATA.items()
    }


def read_metadata(source: Path, label_column: str | None, texts_optional: bool = False) -> RowTable:
    """Read one metadata.csv: file_name, text, label, and the optional columns of docs/data.md.

    Beside an imported.json, file names may be absolute paths below the folder that it names.
    Without a split column, clips in train/, valid/ (validation/, val/, dev/) and test/ belong to the split
    of that name, as in the Hub's video folders.
    """
    table = read_csv(source)
    rows = tuple(_metadata_rows(table, source.parent, "", label_column, texts_optional))
    if clips := _imported_from(source.parent):
        rows = tuple(_within(clips, row) for row in rows)
    if not any(row.split for row in rows):
        rows = tuple(replace(row, split=_split_by_folder(row.file)) for row in rows)
    return RowTable(source, rows, table.broken)


def read_split_folders(folder: Path, label_column: str | None, texts_optional: bool = False) -> RowTable:
    """Read the metadata.csv in each of train/, valid/ and test/."""
    rows, broken = [], []
    for split_folder in _split_folders(folder):
        table = read_csv(_metadata_in(split_folder))
        found = _metadata_rows(table, folder, split_folder.name, label_column, texts_optional)
        rows += [replace(row, split=row.split or split_folder.name) for row in found]
        broken += table.broken
    return RowTable(folder, tuple(rows), tuple(broken))


def read_mmsa(source: Path, label_column: str | None, texts_optional: bool = False) -> RowTable:
    """Read MMSA's label.csv, or CH-SIMS' meta.csv, with clips in Raw/<video_id>/.

    The columns are video_id, clip_id, text, label and mode. The file of a clip is found by its stem, or by
    its number if spreadsheet programs dropped leading zeros; its suffix does not matter. In these corpora
    each video shows one speaker, so `video_id` serves as the speaker.
    """
    table = read_csv(source)
    wanted = ["video_id", "clip_id", *([] if texts_optional else ["text"])]
    require_columns(source, table.columns, wanted + ([label_column] if label_column else []))
    folder = source.parent
    stems: dict[str, dict[str, str]] = {}
    rows = []
    for line, cells in table.rows:
        video, clip = cells["video_id"], cells["clip_id"]
        if video not in stems:
            by_stem = names_by_stem(folder / "Raw" / video)
            stems[video] = {stem.lstrip("0"): name for stem, name in by_stem.items()} | by_stem
        file = stems[video].get(clip) or stems[video].get(clip.lstrip("0"), clip + ".mp4")
        rows.append(
            Row(
                source=source,
                line=line,
                folder=folder,
                file=f"Raw/{video}/{file}",
                text=cells.get("text", ""),
                label=cells[label_column] if label_column else None,
                split=cells.get("mode") or None,
                speaker=cells.get("speaker") or video,
                dialogue=video,
                turn=clip,
                labels=tuple((name, cells[name]) for name in MMSA_LABELS if name in cells),
            )
        )
    return RowTable(source, tuple(rows), table.broken)


def read_meld(folder: Path, label_column: str | None, texts_optional: bool = False) -> RowTable:
    """Read MELD's three csv files; the label column is Emotion or Sentiment.

    The clips dia<D>_utt<U>.mp4 are next to each csv file, in a folder whose name contains that of the split
    (train_splits, dev_splits_complete, output_repeated_splits_test), possibly one level deeper. A clip of the
    test split that exists only as final_videos_testdia<D>_utt<U>.mp4 is found under that name.
    """
    rows, broken = [], []
    for split, source in meld_tables(folder).items():
        if source is None:
            continue
        table = read_csv(source)
        wanted = ["Speaker", "Dialogue_ID", "Utterance_ID", *([] if texts_optional else ["Utterance"])]
        require_columns(table.path, table.columns, wanted + ([label_column] if label_column else []))
        clips = _meld_clips(folder, split)
        stems = names_by_stem(folder / clips)
        for line, cells in table.rows:
            dialogue, turn = cells["Dialogue_ID"], cells["Utterance_ID"]
            clip = f"dia{dialogue}_utt{turn}"
            file = stems.get(clip) or stems.get(f"final_videos_test{clip}", clip + ".mp4")
            rows.append(
                Row(
                    source=table.path,
                    line=line,
                    folder=folder,
                    file=f"{clips}/{file}",
                    text=cells.get("Utterance", "").translate(BEYOND_LATIN_1),
                    label=cells[label_column] if label_column else None,
                    split=split,
                    speaker=cells["Speaker"],
                    dialogue=f"{split}_{dialogue}",  # each split counts its dialogues from 0
                    turn=turn,
                    labels=tuple((name, cells[name]) for name in MELD_LABELS if name in cells),
                )
            )
        broken += table.broken
    return RowTable(folder, tuple(rows), tuple(broken))


def _metadata_rows(
    table: CsvTable, folder: Path, prefix: str, label_column: str | None, texts_optional: bool
) -> Iterator[Row]:
    """Rows of the metadata.csv in `folder`/`prefix`, with file names relative to `folder`."""
    wanted = ["file_name", *([] if texts_optional else ["text"])] + ([label_column] if label_column else [])
    require_columns(table.path, table.columns, wanted)
    for line, cells in table.rows:
        file = cells["file_name"]
        yield Row(
            source=table.path,
            line=line,
            folder=folder,
            file=os.path.join(prefix, file) if file else "",  # an absolute path stays absolute: refused later
            text=cells.get("text", ""),
            label=cells[label_column] if label_column else None,
            split=cells.get("split", "").strip() or None,
            start=cells.get("start", ""),
            end=cells.get("end", ""),
            speaker=cells.get("speaker", ""),
            region=cells.get("region", ""),
            audio_track=cells.get("audio_track", ""),
            dialogue=cells.get("dialogue", ""),
            turn=cells.get("turn", ""),
        )


def _imported_from(folder: Path) -> Path | None:
    """The folder of clips that a folder's imported.json names; None without such a file."""
    source = folder / IMPORTED
    if not source.is_file():
        return None
    try:
        clips = Path(json.loads(source.read_text("utf-8"))["clips"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{source} is damaged: import the data again with `msa-online import`") from error
    if not clips.is_dir():
        raise CorpusError(
            f"{source}: the clips were imported from {clips}, which is not there: mount or unpack it again, "
            "or import it from its new place with `msa-online import`"
        )
    return clips


def _within(folder: Path, row: Row) -> Row:
    """A row whose file is an absolute path below `folder`, with its name in that folder."""
    if os.path.isabs(row.file) and Path(row.file).is_relative_to(folder):
        return replace(row, folder=folder, file=Path(row.file).relative_to(folder).as_posix())
    return row


def _split_by_folder(file: str) -> str | None:
    parts = PurePosixPath(file).parts
    return parts[0] if len(parts) > 1 and split_of(parts[0]) else None


def _split_folders(folder: Path) -> list[Path]:
    """Subfolders named like a split that contain a metadata.csv, training first."""
    named = [folder / name for name in SPLIT_NAMES]
    return [each for each in named if _metadata_in(each)]


def _metadata_in(folder: Path) -> Path | None:
    """The metadata.csv of a folder, in any case of letters, or a metadata.tsv; None if there is none."""
    if (folder / METADATA).is_file() or not folder.is_dir():
        return folder / METADATA if folder.is_dir() else None
    named = [name for name in sorted(os.listdir(folder)) if name.lower() in (METADATA, "metadata.tsv")]
    return folder / named[0] if named and (folder / named[0]).is_file() else None


def names_by_stem(folder: Path) -> dict[str, str]:
    """The files of a folder by stem; of several with one stem, a video is preferred to, say, a .wav."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    by_rank = sorted(names, key=lambda name: Path(name).suffix.lower() in VIDEO_SUFFIXES)
    return {Path(name).stem: name for name in by_rank}


def _meld_clips(folder: Path, split: str) -> str:
    nearby = sorted(path for path in (*folder.glob("*/"), *folder.glob("*/*/")) if split in path.name)
    holding = [path for path in nearby if next(path.glob("dia*_utt*.*"), None)]
    if len(holding) != 1:
        found = ", ".join(str(path.relative_to(folder)) for path in holding) or "none"
        raise CorpusError(
            f"{folder}: the clips dia<D>_utt<U>.mp4 of {MELD_METADATA[split]} must be in one "
            f"folder whose name contains {split!r}; found: {found}. Unpack or rename the folder of clips."
        )
    return holding[0].relative_to(folder).as_posix()
