# SPDX-License-Identifier: Apache-2.0
"""Precomputed features on disk: a folder with metadata.csv and features.safetensors, or an .npz file."""

import csv
import json
import math
import os
import re
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.csv_table import LONGEST_CELL, MOST_ROWS, SHOWN, CsvTable, read_csv
from msa_online.corpora.limited_process import installed_memory
from msa_online.corpora.reading import FEATURES
from msa_online.corpora.validation import why_not_writable
from msa_online.modalities import MODALITIES
from msa_online.precomputed.corpus import FeatureSteps

METADATA = "metadata.csv"
ORIGIN = "origin.json"
PICKLES = (".pkl", ".pickle")
COLUMNS = ("id", "text", "label", "split", "speaker")
NO_TEXT = re.compile("[\ud800-\udfff\0]")  # halves of characters, and the end of a text in C
TRANSCRIPT = "raw_text"  # key of the transcript in an .npz or a pickle, where `text` has the features
DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, KeyError, NotImplementedError),
    *(SyntaxError, TokenError, MemoryError, RecursionError),  # numpy parses the headers as Python
)
"""Errors that zipfile and numpy raise on a damaged file, another format, or Python objects."""

MOST_CELLS = 20_000_000  # of text
MOST_HEADER = 1_000_000  # bytes of a safetensors header
SMALL, RATIO = 1 << 28, 100  # an archive of n bytes may unpack to at most SMALL + RATIO * n bytes
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class FeatureTable:
    """Features and their rows as written, before validation.

    Attributes:
        metadata: The rows.
        places: Index of each row in the features. Rows with a wrong number of cells also have features; their
            indices do not occur here.
        steps: Features by modality.
        tokens: Tokens of the text, `(all tokens, 3)`: their ids, 1 where they are no padding, and their
            segment. None if the source has none.
    """

    metadata: CsvTable
    places: tuple[int, ...]
    steps: dict[str, FeatureSteps]
    tokens: FeatureSteps | None = None


def is_precomputed_path(path: str | Path) -> bool:
    """Whether a path names precomputed features and not clips; checks the name only, not the content."""
    local = Path(path).expanduser()
    return local.suffix.lower() in (".npz", *PICKLES) or (local / FEATURES).is_file()


def read_feature_folder(folder: Path) -> FeatureTable:
    """Read the rows of a folder and map its features into memory.

    Raises:
        CorpusError: A file is missing or damaged, or the two do not match.
    """
    source = folder / FEATURES
    if not (folder / METADATA).is_file():
        raise CorpusError(f"{folder} has no {METADATA}, which describes the samples of {FEATURES}")
    metadata = read_csv(folder / METADATA)
    known = [f"{name}.{part}" for name in MODALITIES for part in ("values", "offsets")]
    try:
        with open(source, "rb") as file:
            if (size := int.from_bytes(file.read(8), "little")) > MOST_HEADER:
                raise CorpusError(
                    f"{source} has a header of {size:,} bytes, too many for {len(known)} tensors: copy or "
                    "create it again"
                )
        with safe_open(source, framework="pt") as file:
            if unknown := sorted(set(file.keys()).difference(known)):
                raise CorpusError(
                    f"{source} contains {', '.join(unknown[:10])}: known are <modality>.values and "
                    f"<modality>.offsets of {', '.join(MODALITIES)}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise CorpusError(f"{source} is damaged or truncated ({error}): copy or create it again") from error
    steps = {}
    for name in MODALITIES:
        parts = [tensors.get(f"{name}.{part}") for part in ("values", "offsets")]
        if parts != [None, None]:
            steps[name] = _checked_steps(source, name, *parts)
    lines = sorted([*(line for line, _ in metadata.rows), *(row.line for row in metadata.broken)])
    place_of = {line: place for place, line in enumerate(lines)}
    places = tuple(place_of[line] for line, _ in metadata.rows)
    return check_sizes(FeatureTable(metadata, places, steps), source)


def read_feature_archive(path: Path) -> FeatureTable:
    """Read the rows and features of an .npz file; nothing is unpickled.

    Its keys are: `id` and the columns of labels and splits, one-dimensional; `text`, `audio` and `vision`,
    `(samples, width)` or `(samples, time, width)`, with `<modality>_lengths` or padded with rows of zeros at
    the end; optionally `raw_text` and `speaker`.

    Raises:
        CorpusError: It is not an .npz file, is damaged, unpacks to far more than its size, or its arrays do
            not match each other.
    """
    try:
        _check_archive(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except CorpusError:
        raise
    except DAMAGED as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorpusError(
            f"{path} cannot be read as an .npz file of arrays ({reason}): copy it again; columns of text "
            "must be arrays of strings (dtype U), not of Python objects"
        ) from error
    steps, columns = {}, {}
    for key, array in arrays.items():
        if key in MODALITIES and (array.ndim > 1 or array.dtype.kind not in "US"):
            steps[key] = unpadded(path, key, array, arrays.get(f"{key}_lengths"))
        elif array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1):
            strings = np.char.decode(array, "utf-8", "replace") if array.dtype.kind == "S" else array
            columns[TRANSCRIPT if key == "text" else key] = [str(cell) for cell in strings.ravel()]
    metadata = table_of(path, columns)
    return check_sizes(FeatureTable(metadata, tuple(range(len(metadata.rows))), steps), path)


def _check_archive(path: Path) -> None:
    """Check the headers of an archive before any array is unpacked.

    Raises:
        CorpusError: The arrays are too large for the size of the archive, or exceed the limits of a corpus.
        ValueError: A member is not an array of numbers or text, its length does not match its shape, or it is
            compressed in a way numpy does not use. The caller reports it, like the errors of `zipfile`.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked, size = sum(member.file_size for member in members), path.stat().st_size
        if unpacked > (most := min(SMALL + RATIO * size, installed_memory())):
            raise CorpusError(
                f"{path} ({size:,} bytes) unpacks to {unpacked / 1e9:,.1f} GB, more than the "
                f"{most / 1e9:,.1f} GB that an archive of its size may contain: it is damaged or malicious. "
                "If you trust it, save its arrays with numpy.savez, without compression."
            )
        cells = 0
        for member in members:
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename} is encrypted, or compressed in a way numpy does not use")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version not in HEADERS:
                    raise ValueError(f"{member.filename} is an array of named fields")
                shape, _, dtype = HEADERS[version](file)
                if dtype.hasobject:
                    raise ValueError(f"{member.filename} contains Python objects")
                if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                    raise ValueError(f"the length of {member.filename} does not match its shape {shape}")
            if shape and shape[0] > MOST_ROWS:
                raise CorpusError(f"{path}: {member.filename} has more than {MOST_ROWS:,} rows: split it")
            cells += math.prod(shape) if math.prod(shape[1:]) == 1 else 0
    if cells > MOST_CELLS:
        raise CorpusError(f"{path} has {cells:,} cells in its columns, more than {MOST_CELLS:,}: split it")


def table_of(source: Path, columns: Mapping[str, Sequence[str]]) -> CsvTable:
    """Columns of text as a table, with `raw_text` renamed to `text`.

    Raises:
        CorpusError: There are no ids, the columns differ in length, or they exceed the limits of a corpus.
    """
    if "id" not in columns:
        raise CorpusError(f"{source} has no key 'id'; its keys are: {', '.join(columns) or 'none'}")
    count = len(columns["id"])
    if count * len(columns) > MOST_CELLS or count > MOST_ROWS:
        raise CorpusError(f"{source} has {count:,} rows of {len(columns)} columns: split it into parts")
    for key, cells in columns.items():
        if len(cells) != count:
            raise CorpusError(f"{source}: {len(cells):,} {key} for {count:,} ids: one is needed for each")
        if NO_TEXT.search(key):
            raise CorpusError(f"{source}: {key!r} cannot be the name of a column: rename the key")
        for row, cell in enumerate(cells, start=1):
            if len(cell) > LONGEST_CELL or (not cell.isascii() and NO_TEXT.search(cell)):
                raise CorpusError(
                    f"{source}: {key} of row {row:,} is {cell[:SHOWN]!r}, which a csv file cannot store: "
                    f"write at most {LONGEST_CELL:,} characters, and no halves of characters (surrogates)"
                )
    names = tuple("text" if name == TRANSCRIPT else name for name in columns)
    rows = enumerate(zip(*columns.values(), strict=True), start=1)
    return CsvTable(
        source, names, tuple((number, dict(zip(names, cells, strict=True))) for number, cells in rows), ()
    )


def unpadded(source: Path, name: str, values: np.ndarray, lengths: np.ndarray | None) -> FeatureSteps:
    """Remove the padding from the features of a modality.

    Args:
        source: The file, for messages.
        name: The modality, for messages.
        values: `(samples, width)`, one step each, or `(samples, time, width)`.
        lengths: Steps of each sample, `(samples,)`. None treats rows of zeros at the end as padding; a sample
            of zeros only then lacks the modality.

    Raises:
        CorpusError: The array has another shape, does not contain numbers, or a length is impossible.
    """
    if values.ndim not in (2, 3) or values.dtype.kind not in "fiub" or 0 in values.shape[1:]:
        raise CorpusError(
            f"{source}: {name} is an array {values.shape} of {values.dtype}: numbers of the shape "
            "(samples, width) or (samples, time, width) are needed"
        )
    time = values.shape[1] if values.ndim == 3 else 1
    values = values.reshape(len(values), time, values.shape[-1])
    if lengths is None:
        backwards = values.any(axis=-1)[:, ::-1]  # NaN counts as non-zero
        lengths = np.where(backwards.any(axis=1), time - backwards.argmax(axis=1), 0)
    lengths = np.asarray(lengths).ravel()
    if len(lengths) != len(values):
        raise CorpusError(f"{source}: {len(lengths):,} {name}_lengths for {len(values):,} samples of {name}")
    lengths = checked_lengths(source, name, lengths, np.full(len(lengths), time))
    kept = values[np.arange(time) < lengths[:, None]]
    with np.errstate(over="ignore"):  # an overflow becomes infinite and is refused later
        return FeatureSteps(
            torch.from_numpy(kept.astype(np.float32, copy=False)), np.cumsum([0, *lengths], dtype=np.int64)
        )


def checked_lengths(source: Path, name: str, lengths: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The steps of each sample, `(samples,)` int64.

    Args:
        source: The file, for messages.
        name: The modality, for messages.
        lengths: The steps as written, `(samples,)`.
        most: The steps that there are, `(samples,)`.

    Raises:
        CorpusError: A length is not a whole number, negative, or beyond the steps that there are.
    """
    if lengths.dtype.kind not in "iuf":
        raise CorpusError(f"{source}: {name}_lengths must be whole numbers, not {lengths.dtype}")
    possible = (lengths >= 0) & (lengths <= most) & (lengths == np.round(lengths))  # all False for NaN
    if wrong := np.flatnonzero(~possible).tolist():
        row = wrong[0]
        raise CorpusError(
            f"{source}: {name}_lengths says {lengths[row]:.15g} steps in row {row + 1}, but {name} has "
            f"{most[row]:,} ({len(wrong):,} such rows): correct the lengths, or leave them out"
        )
    return lengths.astype(np.int64)


def require_new_folder(folder: Path) -> None:
    """Check that a corpus can be written to a folder; does not create it or its parents.

    Raises:
        CorpusError: The path exists and is not an empty folder, or the folder cannot be created.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CorpusError(f"{folder} exists already: name a new folder, or delete this one")
    if reason := why_not_writable(folder):
        raise CorpusError(f"{folder} cannot be created: {reason}; name another folder")


def write_feature_folder(
    folder: Path,
    rows: Sequence[Mapping[str, str]],
    steps: Mapping[str, FeatureSteps],
    origin: Mapping[str, Any],
    documents: Mapping[str, Any] | None = None,
) -> None:
    """Write a corpus of features; the folder is written completely or not at all.

    Args:
        folder: Folder to write, see `require_new_folder`; parent folders are created.
        rows: Cells of each sample by column: those of `COLUMNS`, and other columns, the same in every row.
        steps: Features by modality, samples in the order of `rows`.
        origin: Record of how the features were made.
        documents: More JSON files to write into the folder, by name.

    Raises:
        CorpusError: The folder cannot be written.
    """
    require_new_folder(folder)
    parent = folder.absolute().parent
    draft = parent / f".{folder.name}-{uuid.uuid4().hex}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        with open(draft / METADATA, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys([*COLUMNS, *(rows[0] if rows else ())])))
            writer.writeheader()
            writer.writerows(rows)
        tensors = {
            f"{name}.{part}": tensor
            for name, of_modality in steps.items()
            for part, tensor in (
                ("values", of_modality.values.contiguous()),
                ("offsets", torch.from_numpy(of_modality.offsets)),
            )
        }
        save_file(tensors, draft / FEATURES)
        shutil.copymode(draft / METADATA, draft / FEATURES)  # safetensors makes it readable by its owner only
        for name, content in {ORIGIN: origin, **(documents or {})}.items():
            (draft / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, folder)
    except (OSError, SafetensorError) as error:
        raise CorpusError(
            f"{folder} cannot be written ({error}): free disk space, or name a folder on another disk"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _checked_steps(
    source: Path, name: str, values: torch.Tensor | None, offsets: torch.Tensor | None
) -> FeatureSteps:
    if values is None or offsets is None:
        raise CorpusError(f"{source}: {name}.values and {name}.offsets are needed together")
    if values.ndim != 2 or values.dtype != torch.float32 or values.shape[1] == 0:
        raise CorpusError(
            f"{source}: {name}.values is {tuple(values.shape)} of {values.dtype}: float32 of the shape "
            "(all steps, width) is needed"
        )
    if offsets.ndim != 1 or offsets.dtype != torch.int64 or len(offsets) == 0:
        raise CorpusError(f"{source}: {name}.offsets must be int64 of the shape (samples + 1,)")
    ends = offsets.numpy().copy()
    if ends[0] != 0 or ends[-1] != len(values) or (np.diff(ends) < 0).any():
        raise CorpusError(
            f"{source}: {name}.offsets must rise from 0 to the {len(values):,} steps of {name}.values"
        )
    return FeatureSteps(values, ends)


def check_sizes(table: FeatureTable, source: Path) -> FeatureTable:
    """Check that a table has features for as many samples as it has rows, and return it.

    Args:
        table: The table.
        source: The file of the features, for messages.

    Raises:
        CorpusError: There are no features, or the numbers of samples and rows differ.
    """
    counted = table.steps if table.tokens is None else {**table.steps, "text_bert": table.tokens}
    if not counted:
        raise CorpusError(f"{source} contains no features: one of text, audio and vision is needed")
    count = len(table.metadata.rows) + len(table.metadata.broken)
    for name, steps in counted.items():
        if len(steps.lengths) != count:
            raise CorpusError(
                f"{source}: {name} has {len(steps.lengths):,} samples, but {table.metadata.path.name} has "
                f"{count:,}: both must have the same samples in the same order"
            )
    return table
