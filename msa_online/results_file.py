# SPDX-License-Identifier: Apache-2.0
"""Files of predictions with one row a clip, which survive an interruption and a full disk."""

import csv
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from feature_extractors import ClipError
from feature_extractors.clip import REMEDIES
from msa_online.modeling_msa import MSAModel
from msa_online.pipeline import Prediction
from msa_online.processing_msa import MSAProcessor

FORMATS = (".csv", ".jsonl", ".parquet")
"""Suffixes of the formats."""

KEY = "key"
ERROR = "error"

Row = dict[str, Any]


class ResultsError(OSError):
    """A file of predictions cannot be read or written; rows that were stored are kept."""


class ResultsFile:
    """Predictions on disk, by key.

    A row goes to the journal `NAME.partial` beside the file as soon as it is known, as one line of JSON. At
    the end the whole file is written and replaces an earlier one, and the journal is deleted. A run that was
    stopped therefore loses no row, and the next one starts with the rows of file and journal. Rows with an
    error are not kept, so that their clips are tried again.

    Attributes:
        path: The file; its suffix is one of `FORMATS`.
        journal: The journal.
        rows: Stored rows without an error, by key.
    """

    def __init__(self, path: Path):
        """Read the rows that are there.

        Raises:
            ResultsError: The suffix is unknown; or the file or its journal is not readable, or of other kind.
        """
        require_format(path)
        self.path, self.journal = path, path.with_name(f"{path.name}.partial")
        self.rows: dict[str, Row] = {}
        self._stream: BinaryIO | None = None
        if path.exists():
            self._remember(_read(path), path)
        if self.journal.exists():
            self._remember(_whole_lines(self.journal), self.journal)

    def add(self, row: Row) -> None:
        """Store one row in the journal.

        Raises:
            ResultsError: The disk is full, or the folder not writable.
        """
        line = memoryview(json.dumps(self._stored(row)).encode() + b"\n")
        try:
            if self._stream is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = open(self.journal, "ab", buffering=0)  # noqa: SIM115
                _drop_torn_line(self._stream, self.journal)
            while line:
                line = line[self._stream.write(line) :]
        except OSError as error:
            raise self._unwritable(self.journal, error) from error

    def finish(self, rows: Sequence[Row]) -> None:
        """Write the whole file, and delete the journal.

        Raises:
            ResultsError: The disk is full, or the folder not writable; the journal is kept.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(self.path, [self._stored(row) for row in rows])
        except OSError as error:
            raise self._unwritable(self.path, error) from error
        self.close()
        self.journal.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the journal, which is kept."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _stored(self, row: Row) -> Row:
        return row if self.path.suffix == ".jsonl" else flat(row)

    def _remember(self, rows: Iterable[Row], source: Path) -> None:
        for row in rows:
            if not isinstance(row, dict) or KEY not in row:
                raise ResultsError(
                    f"{source} exists and has no column {KEY}, so it is not a file of predictions: give "
                    "another name, or delete it"
                )
            if row[KEY] and not row.get(ERROR):
                self.rows[row[KEY]] = row

    def _unwritable(self, file: Path, error: OSError) -> ResultsError:
        kept = f"rows made before are kept in {self.journal}" if self.journal.exists() else "no row was made"
        return ResultsError(
            f"{file} cannot be written ({error.strerror}); {kept}: free disk space, or make the folder "
            "writable, and run the same command again"
        )


def require_format(path: Path) -> None:
    """Check the suffix of a file of rows.

    Raises:
        ResultsError: It is none of `FORMATS`.
    """
    if path.suffix not in FORMATS:
        raise ResultsError(f"{path} has an unknown format: end its name with {', '.join(FORMATS)}")


def row_of(result: Prediction | ClipError, name: str, key: str | None, **more: Any) -> Row:
    """The row of one clip: name, prediction and error; the key of a result that may be kept.

    Args:
        result: What was predicted, or why the clip cannot be used.
        name: Name of the clip.
        key: As made by `result_key`; None if the file cannot be read.
        more: Further columns, after the name.
    """
    row = {"clip": name, **more}
    if isinstance(result, ClipError):
        return row | {ERROR: f"{result.detail}; {REMEDIES[result.problem]}", KEY: key}
    return row | {**result.to_dict(), "clip": name, ERROR: None, KEY: key}


def result_key(model: str, file: str, **choices: Any) -> str:
    """Key of a prediction: equal keys have equal predictions.

    Args:
        model: Digest made by `model_digest`.
        file: Hash of the clip's content.
        choices: Everything else that the prediction depends on.
    """
    content = json.dumps([model, file, choices], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def model_digest(model: MSAModel, processor: MSAProcessor) -> str:
    """Hash of weights, configuration and processor."""
    digest = hashlib.sha256()
    config = {name: value for name, value in model.config.to_dict().items() if name != "trained_on"}
    digest.update(json.dumps([config, processor.to_dict()], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows in the format of the suffix; an earlier file is replaced once all are written.

    Raises:
        OSError: The disk is full, or the folder not writable; an earlier file is unchanged.
    """
    draft = path.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        draft.write_bytes(_WRITERS[path.suffix](rows))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def flat(row: Row) -> Row:
    """A row of plain cells: {"a": {"b": 1}} is a column a_b; lists of texts are joined."""
    cells: Row = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            cells |= {f"{name}_{part}": each for part, each in flat(dict(value)).items()}
        elif isinstance(value, list | tuple):
            texts = all(isinstance(each, str) for each in value)
            cells[name] = "; ".join(value) if texts else json.dumps(value)
        else:
            cells[name] = value
    return cells


def _columns(rows: Sequence[Row]) -> list[str]:
    """Names of all columns, in the order of their first row; error and key last."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in (ERROR, KEY)))
    return names + [name for name in (ERROR, KEY) if any(name in row for row in rows)]


def _as_csv(rows: Sequence[Row]) -> bytes:
    rows = [flat(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _as_jsonl(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _as_parquet(rows: Sequence[Row]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    rows = [flat(row) for row in rows]
    columns = {name: pyarrow.array([_encodable(row.get(name)) for row in rows]) for name in _columns(rows)}
    typed = {
        name: column.cast(pyarrow.string()) if column.type == pyarrow.null() else column
        for name, column in columns.items()
    }
    target = io.BytesIO()
    parquet.write_table(pyarrow.table(typed), target)
    return target.getvalue()


def _encodable(value: Any) -> Any:
    """A cell that UTF-8 can store: file names may have bytes that it cannot."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


_WRITERS = {".csv": _as_csv, ".jsonl": _as_jsonl, ".parquet": _as_parquet}


def _read(path: Path) -> Iterable[Row]:
    """The rows of a file.

    Raises:
        ResultsError: It is not readable, or not in the format of its suffix.
    """
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as stream:
                return list(csv.DictReader(stream))
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors
        reason = str(error).splitlines()[0]
        raise ResultsError(f"{path} cannot be read ({reason}): give another name, or delete it") from error


def _whole_lines(journal: Path) -> Iterable[Row]:
    """The rows of a journal; a last line that was not written whole is left out."""
    lines = journal.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ResultsError(
            f"{journal} is damaged ({error}): delete it, and its clips are tried again"
        ) from error


def _drop_torn_line(stream: BinaryIO, journal: Path) -> None:
    content = journal.read_bytes()
    stream.truncate(content.rfind(b"\n") + 1)
