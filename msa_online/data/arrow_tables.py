# SPDX-License-Identifier: Apache-2.0
"""Corpora that come as Arrow: folders of `datasets.save_to_disk`, .arrow and .parquet files.

Clips that are stored inside a table are written once, under the hash of their bytes, into the cache: from
there on they are files like any other. Tables are read a few rows at a time, since a clip is megabytes.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from feature_extractors.assets import cache_root
from msa_online.data.corpus import CorpusError
from msa_online.data.layouts import Row, RowTable
from msa_online.data.metadata import require_columns
from msa_online.data.splits import split_of

if TYPE_CHECKING:
    from datasets import Features

SUFFIXES = (".parquet", ".arrow")
ROWS_AT_ONCE = 16
CLIP_COLUMNS = ("video", "file_name")


def is_arrow(path: Path) -> bool:
    """Whether the path is a file or a folder of Arrow tables."""
    return path.suffix in SUFFIXES if path.is_file() else bool(_saved(path) or _table_files(path))


def read_arrow(path: Path, label_column: str | None) -> RowTable:
    """Rows of Arrow tables with the columns of a metadata.csv.

    The clip is in a column `video` or `file_name`: a path relative to the table's folder, or the bytes of
    a media file with its name, as `datasets` stores videos. Splits are the parts of a saved DatasetDict,
    the beginnings of the file names ("train-00000-of-00002.parquet") or a column `split`.

    Raises:
        CorpusError: A column is missing, or a file is no Arrow table.
    """
    rows = [row for table in _tables(path) for row in _rows(*table, label_column=label_column)]
    return RowTable(path, tuple(rows))


def _saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _table_files(folder: Path) -> list[Path]:
    """Parquet or Arrow files in the folder or in its data/, where the Hub keeps them."""
    places = (folder, folder / "data")
    return sorted(path for place in places for path in place.glob("*") if path.suffix in SUFFIXES)


def _tables(path: Path) -> Iterator[tuple[Path, str | None, "Features", Iterator[Any]]]:
    """Every table as (file it came from, split, features, batches of rows)."""
    import pyarrow

    try:
        if path.is_dir() and _saved(path):
            yield from _saved_tables(path)
            return
        for file in [path] if path.is_file() else _table_files(path):
            split = file.stem.split("-")[0]
            yield file, split if split_of(split) else None, *_open(file)
    except (pyarrow.ArrowInvalid, FileNotFoundError) as error:
        raise CorpusError(f"{path} is no complete Arrow table ({error}): copy it again") from error


def _saved_tables(folder: Path) -> Iterator[tuple[Path, str | None, "Features", Iterator[Any]]]:
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {None: loaded}
    for split, part in parts.items():
        batches = part.with_format("arrow").iter(ROWS_AT_ONCE)
        yield (folder / split if split else folder), split, part.features, batches


def _open(file: Path) -> tuple["Features", Iterator[Any]]:
    import datasets
    import pyarrow.parquet

    if file.suffix == ".arrow":
        table = datasets.Dataset.from_file(str(file))
        return table.features, table.with_format("arrow").iter(ROWS_AT_ONCE)
    parquet = pyarrow.parquet.ParquetFile(file)
    features = datasets.Features.from_arrow_schema(parquet.schema_arrow)
    return features, parquet.iter_batches(ROWS_AT_ONCE)


def _rows(
    source: Path, split: str | None, features: "Features", batches: Iterator[Any], *, label_column: str | None
) -> Iterator[Row]:
    clip_column = next((name for name in CLIP_COLUMNS if name in features), "file_name")
    require_columns(source, list(features), [clip_column, "text", *([label_column] if label_column else [])])
    folder = source if source.is_dir() else source.parent
    known = {"text", "split", "start", "end", "speaker", clip_column, label_column} & set(features)
    records = (record for batch in batches for record in batch.select(sorted(known)).to_pylist())
    for number, record in enumerate(records, start=1):
        clip = record[clip_column]
        stored = isinstance(clip, Mapping) and clip["bytes"] is not None
        yield Row(
            source=source,
            line=number,
            folder=_stored_clips() if stored else folder,
            file=_store(clip) if stored else _cell(clip["path"] if isinstance(clip, Mapping) else clip),
            text=_cell(record["text"]),
            label=_label(record[label_column], features[label_column]) if label_column else None,
            split=_cell(record.get("split")) or split,
            start=_cell(record.get("start")),
            end=_cell(record.get("end")),
            speaker=_cell(record.get("speaker")),
        )


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _label(value: object, feature: Any) -> str:
    """A label as text; the numbers of a ClassLabel become the names of their classes."""
    import datasets

    if isinstance(feature, datasets.ClassLabel) and value is not None:
        return feature.int2str(value) if value >= 0 else ""
    return _cell(value)


def _stored_clips() -> Path:
    return cache_root() / "clips"


def _store(clip: Mapping[str, Any]) -> str:
    """Write a clip's bytes into the cache unless they are there; the name follows from the bytes."""
    digest = hashlib.sha256(clip["bytes"]).hexdigest()
    name = f"{digest[:2]}/{digest}{PurePosixPath(clip['path'] or '').suffix.lower() or '.mp4'}"
    target = _stored_clips() / name
    if not target.exists() or target.stat().st_size != len(clip["bytes"]):
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".writing-{uuid.uuid4().hex}")  # opened plainly: the umask applies
        try:
            draft.write_bytes(clip["bytes"])
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    return name
