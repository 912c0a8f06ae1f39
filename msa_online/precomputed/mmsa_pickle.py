# SPDX-License-Identifier: Apache-2.0
"""Read MMSA's pickled features in a separate process.

A pickle is a program. Here it can build arrays, containers, strings and numbers, and call nothing else. The
process has limits (`limited_process`) and ends after the one file. It returns its result as safetensors and
JSON. Only numpy and safetensors are imported, so it starts quickly.
"""

import codecs
import errno
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct, scalar
from numpy._core.numeric import _frombuffer
from safetensors import SafetensorError
from safetensors.numpy import save_file

MODALITIES = ("text", "audio", "vision")
TOKENS = "text_bert"  # of each sample: token ids, attention mask and segments, (3, tokens)
TENSORS, COLUMNS = "features.safetensors", "columns.json"
FOREIGN, TOO_MANY_ROWS = 3, 4  # exit statuses
SHOWN = 100  # characters of a name that the file chose


class ForeignObject(Exception):
    """The pickle names something that is not plain data; the argument is that name."""


class TooManyRows(Exception):
    """A split has more samples than a corpus may have."""


def _array(_: object, shape: tuple, kind: bytes) -> np.ndarray:
    return _reconstruct(np.ndarray, shape, kind)


def _scalar(dtype: np.dtype, *value: Any) -> Any:
    return scalar(_without_pointers(dtype), *value)


def _from_buffer(buffer: Any, dtype: np.dtype, *layout: Any) -> np.ndarray:
    return _frombuffer(buffer, _without_pointers(dtype), *layout)


def _without_pointers(dtype: np.dtype) -> np.dtype:
    if dtype.hasobject:
        raise ForeignObject("numpy.object_")  # bytes would be taken for addresses
    return dtype


def _latin_1(text: str, encoding: str) -> bytes:
    """Bytes as written by old pickle protocols; another codec could run arbitrary code."""
    if encoding != "latin1":
        raise ForeignObject(f"_codecs.encode to {encoding}")
    return codecs.encode(text, "latin-1")


PLAIN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): "numpy.ndarray",  # passed to _reconstruct only
    ("_codecs", "encode"): _latin_1,
    ("collections", "OrderedDict"): OrderedDict,
    **{(package, "_reconstruct"): _array for package in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{(package, "scalar"): _scalar for package in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{(package, "_frombuffer"): _from_buffer for package in ("numpy.core.numeric", "numpy._core.numeric")},
    **{
        (package, kind.__name__): kind
        for package in ("builtins", "__builtin__")
        for kind in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
    },
}
"""All names that a pickle may use."""


class PlainUnpickler(pickle.Unpickler):
    """Builds arrays and plain Python data, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up a name in `PLAIN`; nothing is imported.

        Raises:
            ForeignObject: The name is not in `PLAIN`.
        """
        if (module, name) not in PLAIN:
            raise ForeignObject(f"{module}.{name}")
        return PLAIN[module, name]


def read_pickle(path: Path) -> Any:
    """Read the plain data in a pickle; strings of Python 2 are read as Latin-1.

    Raises:
        ForeignObject: It contains something else.
    """
    with open(path, "rb") as file:
        return PlainUnpickler(file, encoding="latin1").load()


def plain_parts(
    content: Any, most_rows: int
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, list[str]]]]:
    """Features and columns of each split.

    Args:
        content: Content of the pickle: splits by name, each a dict of keys.
        most_rows: Largest number of samples of a split.

    Returns:
        Features as `split/modality`, `(samples, width)` or `(samples, time, width)`; if each sample is an
        array of its own, `(all steps, width)` with `split/modality/lengths` `(samples,)`. `text_bert` becomes
        `(all tokens, 3)` in the same way. And the one-dimensional keys of each split, as cells of text.

    Raises:
        TooManyRows: A key has more samples.
    """
    tensors: dict[str, np.ndarray] = {}
    columns: dict[str, dict[str, list[str]]] = {}
    for split, part in content.items() if isinstance(content, Mapping) else ():
        columns[str(split)] = {}
        for key, value in part.items() if isinstance(part, Mapping) else ():
            if _rows(value) > most_rows:
                raise TooManyRows
            if key in MODALITIES and _is_features(value):
                tensors |= {f"{split}/{name}": array for name, array in _features(key, value).items()}
            elif key == TOKENS and _is_features(value) and value[0].ndim == 2:
                by_token = [np.transpose(each) for each in value]
                tensors |= {f"{split}/{name}": array for name, array in _features(key, by_token).items()}
            elif cells := _cells(value):
                columns[str(split)][str(key)] = cells
    return tensors, columns


def _rows(value: Any) -> int:
    """Number of samples in a key; 0 if it is not a column."""
    if isinstance(value, np.ndarray):
        return len(value) if value.ndim else 0
    return len(value) if isinstance(value, list | tuple) else 0


def _is_features(value: Any) -> bool:
    first = value[0] if isinstance(value, list | tuple | np.ndarray) and len(value) else None
    return isinstance(first, np.ndarray) and first.ndim > 0


def _features(key: str, value: Any) -> dict[str, np.ndarray]:
    """In the order of C: safetensors writes an array as it lies in memory."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return {key: np.ascontiguousarray(value)}
    lengths = np.array([len(each) for each in value])
    return {key: np.ascontiguousarray(np.concatenate(list(value))), f"{key}/lengths": lengths}


def _cells(value: Any) -> list[str]:
    """A column of one cell a sample, as text; an empty list for anything else."""
    if isinstance(value, np.ndarray) and value.ndim and value.size == len(value):
        value = value.reshape(-1)
    if not isinstance(value, list | tuple | np.ndarray) or not all(
        isinstance(cell, str | bytes | int | float | np.generic) for cell in value
    ):
        return []
    return [_cell(each) for each in value]


def _cell(value: str | bytes | int | float | np.generic) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float | np.floating) and value.is_integer():
        return str(int(value))  # a class, 2 and not 2.0
    return str(value)


def main(argv: list[str]) -> int:
    """Run with the arguments PICKLE FOLDER MOST_ROWS; returns the exit status."""
    path, folder = map(Path, argv[:2])
    try:
        tensors, columns = plain_parts(read_pickle(path), most_rows=int(argv[2]))
    except ForeignObject as error:
        print(str(error)[:SHOWN])  # the only thing on standard output
        return FOREIGN
    except TooManyRows:
        return TOO_MANY_ROWS
    try:
        save_file(tensors, folder / TENSORS)
    except SafetensorError as error:
        if os.strerror(errno.EFBIG) in str(error):
            raise OSError(errno.EFBIG, str(error)) from error
        raise
    with open(folder / COLUMNS, "w", encoding="utf-8") as file:
        json.dump(columns, file)  # written in pieces, so that the output limit applies
    return 0
