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
from collections.abc import Mapping, Sequence
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
LENGTHS = tuple(f"{name}_lengths" for name in MODALITIES)
NUMBERS = (int, float, np.integer, np.floating, np.bool_)
FOREIGN, TOO_MANY_ROWS, UNUSABLE = 3, 4, 5  # exit statuses
SHOWN, LONGEST = 100, 300  # characters of a name that the file chose, and of a message


class ForeignObject(Exception):
    """The pickle names something that is not plain data; the argument is that name."""


class TooManyRows(Exception):
    """A split has more samples than a corpus may have."""


class UnusableKey(Exception):
    """A key that is read as features, tokens or lengths contains something else; the argument says what."""


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
        UnusableKey: Features, tokens or lengths have another shape or type.
    """
    tensors: dict[str, np.ndarray] = {}
    columns: dict[str, dict[str, list[str]]] = {}
    for split, part in content.items() if isinstance(content, Mapping) else ():
        columns[str(split)] = {}
        for key, value in part.items() if isinstance(part, Mapping) else ():
            if _rows(value) > most_rows:
                raise TooManyRows
            name, cells = f"{split} {key}", _cells(value)
            if key in MODALITIES and not _are_words(value):
                tensors |= {f"{split}/{key}{kind}": array for kind, array in _features(name, value).items()}
            elif key == TOKENS:
                try:
                    arrays = _tokens(name, value)
                except UnusableKey:
                    if "text" not in part:
                        raise
                    continue  # what is not used cannot make the file unusable
                tensors |= {f"{split}/{key}{kind}": array for kind, array in arrays.items()}
            elif cells is not None:
                columns[str(split)][str(key)] = cells
            elif key in LENGTHS:
                raise UnusableKey(f"{name} is {_described(value)}: a whole number for each sample is needed")
    return tensors, columns


def _has_samples(value: Any) -> bool:
    """Whether a key contains something for each sample."""
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _rows(value: Any) -> int:
    """Number of samples in a key; 0 if it is not a column."""
    return len(value) if _has_samples(value) else 0


def _are_words(value: Any) -> bool:
    """Whether a key contains a string for each sample: transcripts in place of features."""
    return _rows(value) > 0 and all(isinstance(each, str | bytes) for each in value)


def _features(name: str, value: Any) -> dict[str, np.ndarray]:
    """Arrays of a key of features: "" and, if each sample is an array of its own, "/lengths".

    In the order of C: safetensors writes an array as it lies in memory.

    Raises:
        UnusableKey: A sample is not one step `(width,)` or steps `(time, width)` of numbers.
    """
    if isinstance(value, np.ndarray) and (value.dtype != object or value.ndim != 1):
        return {"": _numbers(name, value)}
    if not _has_samples(value):
        raise UnusableKey(f"{name} is {_described(value)}: an array of numbers is needed")
    samples = []
    for number, each in enumerate(value, start=1):
        steps = _numbers(f"{name} of sample {number}", each)
        if steps.ndim not in (1, 2):
            raise UnusableKey(
                f"{name} of sample {number} is {_described(each)}: numbers of the shape (width,) or (time, "
                "width) are needed"
            )
        samples.append(np.atleast_2d(steps))
    return _joined(name, samples)


def _tokens(name: str, value: Any) -> dict[str, np.ndarray]:
    """Arrays of a key of tokens, `(3, tokens)` of each sample, like those of `_features`."""
    if not _has_samples(value):
        raise UnusableKey(f"{name} is {_described(value)}: token ids, mask and segments are needed")
    samples = []
    for number, each in enumerate(value, start=1):
        rows = _numbers(f"{name} of sample {number}", each)
        if rows.ndim != 2:
            raise UnusableKey(
                f"{name} of sample {number} is {_described(each)}: token ids, mask and segments (3, tokens) "
                "are needed"
            )
        samples.append(rows.T)
    return _joined(name, samples)


def _joined(name: str, samples: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Samples `(time, width)`, one after the other, with their lengths; an empty one has no steps."""
    if not samples:
        return {}
    number, first = next(((n, each) for n, each in enumerate(samples, 1) if each.size), (1, samples[0]))
    width = first.shape[1]
    kept = [each if each.size else np.zeros((0, width), first.dtype) for each in samples]
    for other, each in enumerate(kept, start=1):
        if each.shape[1] != width:
            raise UnusableKey(
                f"{name} of sample {other} is {each.shape[1]} wide, and that of sample {number} is {width}: "
                "all samples need the same width"
            )
    lengths = np.array([len(each) for each in kept])
    return {"": np.ascontiguousarray(np.concatenate(kept)), "/lengths": lengths}


def _numbers(name: str, value: Any) -> np.ndarray:
    """An array, or nested lists, as an array of numbers that safetensors can store.

    Raises:
        UnusableKey: It contains anything else.
    """
    try:
        array = np.asarray(value)
        if array.dtype == object and all(isinstance(each, NUMBERS) for each in array.flat):
            array = array.astype(np.float64)  # without the check, None would become NaN
    except (TypeError, ValueError, OverflowError):
        array = np.zeros((), "O")
    if array.dtype.kind not in "fiub" or array.ndim == 0:
        raise UnusableKey(f"{name} is {_described(value)}: an array of numbers is needed")
    return np.ascontiguousarray(array, np.float64 if array.dtype.itemsize > 8 else None)


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype.name}"
    return f"a {type(value).__name__}" + (f" of {len(value):,}" if isinstance(value, list | tuple) else "")


def _cells(value: Any) -> list[str] | None:
    """A column of one cell a sample, as text; None for anything else."""
    if isinstance(value, np.ndarray) and value.ndim and value.size == len(value):
        value = value.reshape(-1)
    if not _has_samples(value) or not all(
        isinstance(cell, str | bytes | int | float | np.generic) for cell in value
    ):
        return None
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
    except UnusableKey as error:
        print(str(error)[:LONGEST])
        return UNUSABLE
    try:
        save_file(tensors, folder / TENSORS)
    except SafetensorError as error:
        if os.strerror(errno.EFBIG) in str(error):
            raise OSError(errno.EFBIG, str(error)) from error
        raise
    with open(folder / COLUMNS, "w", encoding="utf-8") as file:
        json.dump(columns, file)  # written in pieces, so that the output limit applies
    return 0
