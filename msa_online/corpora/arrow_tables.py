# SPDX-License-Identifier: Apache-2.0
"""Arrow corpora: folders of `datasets.save_to_disk`, .arrow and .parquet files.

Tables are read in a separate process (`arrow_reader`) whose limits depend on their size. Clips that are
stored inside a table are written to the cache once, under the hash of their bytes. After that they are
ordinary files.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from feature_extractors.assets import cache_root
from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.csv_table import MOST_ROWS, require_columns
from msa_online.corpora.layouts import Row, RowTable
from msa_online.corpora.limited_process import LimitExceededError, last_line, run_limited
from msa_online.corpora.splits import split_of

SUFFIXES = (".parquet", ".arrow")
CLIP_COLUMNS = ("video", "file_name")
READER = Path(__file__).with_name("arrow_reader.py")
TOO_MANY_ROWS = 4  # exit status of the reader
SMALL, SECONDS = 1 << 30, 60  # bytes and CPU time that a table of any size may need


def is_arrow(path: Path) -> bool:
    """Whether the path is a file or a folder of Arrow tables."""
    return path.suffix.lower() in SUFFIXES if path.is_file() else bool(_saved(path) or _table_files(path))


def read_arrow(path: Path, label_column: str | None, texts_optional: bool = False) -> RowTable:
    """Read the rows of Arrow tables, which have the columns of a metadata.csv.

    The clip is in column `video` or `file_name`: a path relative to the table's folder, or the bytes and the
    name of a media file, as `datasets` stores videos. The split is a part of a saved DatasetDict, the start
    of the file name ("train-00000-of-00002.parquet") or column `split`.

    Raises:
        CorpusError: A column is missing, a file is not an Arrow table, or reading it exceeds the limits for
            its size.
    """
    with tempfile.TemporaryDirectory(prefix="msa-tables-") as folder:
        lines = Path(folder, "rows")
        _read_in_a_process(path, label_column, lines)
        return RowTable(path, tuple(_rows(lines, label_column, texts_optional)))


def _saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _table_files(folder: Path) -> list[Path]:
    """Parquet or Arrow files in the folder or in its data/, where the Hub keeps them."""
    places = (folder, folder / "data")
    return sorted(path for place in places for path in place.glob("*") if path.suffix.lower() in SUFFIXES)


def _read_in_a_process(path: Path, label_column: str | None, lines: Path) -> None:
    """Let the reader process write the rows of all tables to a file.

    The memory limit allows for several copies of a clip and for all memory-mapped files.
    """
    saved = path.is_dir() and _saved(path)
    paths = [path] if saved or path.is_file() else _table_files(path)
    sizes = [file.stat().st_size for file in (path.rglob("*.arrow") if saved else paths) if file.is_file()]
    largest, total = max(sizes, default=0), sum(sizes)
    try:
        done = run_limited(
            READER,
            (lines, _stored_clips(), label_column or "", MOST_ROWS, *paths),
            memory=SMALL + 4 * largest + total,
            seconds=SECONDS + total // 1_000_000,
            output=SMALL + 4 * largest,
        )
    except LimitExceededError as error:
        raise CorpusError(
            f"{path} ({total:,} bytes) needs more than {error} to be read, the limit for tables of its size: "
            "it is damaged or malicious. If you trust it, write a metadata.csv beside its clips."
        ) from error
    if done.returncode == TOO_MANY_ROWS:
        raise CorpusError(f"{path} has more than {MOST_ROWS:,} rows: split it into parts")
    if done.returncode != 0:
        raise CorpusError(f"{path} is not a complete Arrow table ({last_line(done)}): copy it again")


def _rows(lines: Path, label_column: str | None, texts_optional: bool) -> Iterator[Row]:
    """Parse what the reader wrote; rows of each table are numbered from 1."""
    with open(lines, encoding="utf-8") as file:
        for line in file:
            if isinstance(record := json.loads(line), list):
                source, split = _table(record, label_column, texts_optional)
                number = 0
            else:
                number += 1
                yield _row(source, split, number, record)


def _table(record: list[Any], label_column: str | None, texts_optional: bool) -> tuple[Path, str | None]:
    """Source and split of a table; checks its columns."""
    source, split, columns = Path(record[0]), record[1], record[2]
    clip_column = next((name for name in CLIP_COLUMNS if name in columns), "file_name")
    wanted = [clip_column, *([] if texts_optional else ["text"]), *([label_column] if label_column else [])]
    require_columns(source, columns, wanted)
    in_name = source.stem.split("-")[0] if source.is_file() else None
    return source, split or (in_name if in_name and split_of(in_name) else None)


def _row(source: Path, split: str | None, number: int, record: Mapping[str, Any]) -> Row:
    clip = record["clip"]
    stored = isinstance(clip, list)
    return Row(
        source=source,
        line=number,
        folder=_stored_clips() if stored else source if source.is_dir() else source.parent,
        file=clip[0] if stored else clip,
        text=record.get("text", ""),
        label=record.get("label"),
        split=record.get("split") or split,
        start=record.get("start", ""),
        end=record.get("end", ""),
        speaker=record.get("speaker", ""),
        region=record.get("region", ""),
        audio_track=record.get("audio_track", ""),
        dialogue=record.get("dialogue", ""),
        turn=record.get("turn", ""),
    )


def _stored_clips() -> Path:
    return cache_root() / "clips"
