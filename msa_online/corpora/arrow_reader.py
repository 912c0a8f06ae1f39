# SPDX-License-Identifier: Apache-2.0
"""Read Arrow tables in a separate process (`limited_process`) and write them as lines of JSON.

A line is either the header of a table, `[source, split, columns]` (split null if the table does not name
it), or a row of that table, `{column: text}`. The bytes of a stored clip are written to a folder, and its
cell is `[file name]`. Only pyarrow and `datasets` are imported, so the process starts quickly.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

CLIP_COLUMNS = ("video", "file_name")
CELLS = ("text", "split", "start", "end", "speaker", "region", "audio_track", "dialogue", "turn")
ROWS_AT_ONCE = 1024
TOO_MANY_ROWS = 4  # exit status


class TooManyRowsError(Exception):
    """The tables have more rows than a corpus may have."""


def tables(path: Path) -> Iterator[tuple[Path, str | None, datasets.Features, int, Any]]:
    """Every table as (source, split, features, number of rows, table); the table is a Dataset or parquet."""
    if path.is_dir():
        loaded = datasets.load_from_disk(str(path))
        parts = loaded if isinstance(loaded, datasets.DatasetDict) else {None: loaded}
        for split, part in parts.items():
            _require_inside(path, part)
            yield path / split if split else path, split, part.features, len(part), part
    elif path.suffix.lower() == ".arrow":
        table = datasets.Dataset.from_file(str(path))
        yield path, None, table.features, len(table), table
    else:
        parquet = pyarrow.parquet.ParquetFile(path)
        features = datasets.Features.from_arrow_schema(parquet.schema_arrow)
        yield path, None, features, parquet.metadata.num_rows, parquet


def _require_inside(folder: Path, part: datasets.Dataset) -> None:
    """Refuse a saved data set whose description names tables outside its folder.

    Raises:
        ValueError: It does; names the table.
    """
    for file in part.cache_files:
        if not Path(os.path.abspath(file["filename"])).is_relative_to(os.path.abspath(folder)):
            raise ValueError(f"it names a table outside its folder: {file['filename']!r}")


def batches(table: Any, features: datasets.Features, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
    """Some columns of a table in small batches; of one row if clips are stored, since a clip is megabytes."""
    stored = any(name in columns and not _is_text(features[name]) for name in CLIP_COLUMNS)
    at_once = 1 if stored else ROWS_AT_ONCE
    if isinstance(table, datasets.Dataset):
        return table.select_columns(columns).with_format("arrow").iter(at_once)
    return table.iter_batches(at_once, columns=columns, use_threads=False)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _label(value: object, feature: Any) -> str:
    """A label as text; numbers of a ClassLabel become class names."""
    if isinstance(feature, datasets.ClassLabel) and value is not None:
        return feature.int2str(value) if value >= 0 else ""
    return _cell(value)


def _clip(value: object, folder: Path) -> str | list[str]:
    """The path of a clip as text; or, if the table stores its bytes, a list with its name in `folder`."""
    if isinstance(value, Mapping):
        return [store(value, folder)] if value["bytes"] is not None else _cell(value["path"])
    return _cell(value)


def store(clip: Mapping[str, Any], folder: Path) -> str:
    """Write a clip's bytes into a folder unless it exists there; its name is the hash of its bytes."""
    digest = hashlib.sha256(clip["bytes"]).hexdigest()
    name = f"{digest[:2]}/{digest}{PurePosixPath(clip['path'] or '').suffix.lower() or '.mp4'}"
    target = folder / name
    if not target.exists() or target.stat().st_size != len(clip["bytes"]):
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".writing-{uuid.uuid4().hex}")  # no tempfile: the umask applies
        try:
            draft.write_bytes(clip["bytes"])
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
    return name


def lines(path: Path, clips: Path, label: str, most_rows: int) -> Iterator[Any]:
    """The lines of all tables of a path; no rows for a table that lacks a required column.

    Raises:
        TooManyRowsError: The tables declare more rows than `most_rows`.
    """
    count = 0
    for source, split, features, rows, table in tables(path):
        count += rows
        if count > most_rows:
            raise TooManyRowsError
        yield str(source), split, list(features)
        clip = next((name for name in CLIP_COLUMNS if name in features), None)
        if clip is None or "text" not in features or (label and label not in features):
            continue
        columns = sorted(
            {name for name in CELLS if name in features} | {clip} | ({label} if label else set())
        )
        for batch in batches(table, features, columns):
            for record in batch.to_pylist():
                row = {name: _cell(record[name]) for name in CELLS if name in record}
                if label:
                    row["label"] = _label(record[label], features[label])
                yield row | {"clip": _clip(record[clip], clips)}


def main(argv: list[str]) -> int:
    """Run with the arguments TARGET CLIPS LABEL MOST_ROWS PATH...; returns the exit status."""
    target, clips, label, most_rows = Path(argv[0]), Path(argv[1]), argv[2], int(argv[3])
    try:
        with open(target, "w", encoding="utf-8") as file:
            for path in map(Path, argv[4:]):
                for line in lines(path, clips, label, most_rows):
                    file.write(json.dumps(line) + "\n")
    except TooManyRowsError:
        return TOO_MANY_ROWS
    return 0
