# SPDX-License-Identifier: Apache-2.0
"""The state that a run resumes from, as plain data: safetensors, JSON and a manifest of checksums."""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from msa_online.modeling_msa import MSAModel
from msa_online.training.yaml_reader import ConfigurationError

MANIFEST = "manifest.json"
FORMAT = 1
MODEL = "model.safetensors"
SETTINGS = "run.yaml"
RUN = "run"  # optimizer, schedules, modulator and progress
TENSOR, TUPLE, ITEMS = "$tensor", "$tuple", "$items"  # types that JSON does not have
FORMER_FILES = ("random_states_0.pkl", "optimizer.bin")
REMEDY = "put the file back, or start the run again with training.overwrite=true"
UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError)
"""Errors that json, safetensors and torch raise on invalid content."""


class Stateful(Protocol):
    """An object that can be saved and resumed."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors, numbers, strings, None, and dicts, lists and tuples of these."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Continue from `state`."""


@dataclass(frozen=True)
class RunState:
    """The complete state of a run.

    A state is a folder:

        model.safetensors                the model's weights and buffers
        run.json, run.safetensors        the other parts: plain data, and the tensors it refers to
        rank_0.json, rank_0.safetensors  random-number generators of each process
        manifest.json                    size and SHA-256 of all files; written last

    Args:
        model: The model, not wrapped.
        parts: The other objects with a state, by name: optimizer, schedules, modulator, progress.
        device: Device of this process.
        rank: Rank of this process.
        processes: Number of processes.
    """

    model: MSAModel
    parts: Mapping[str, Stateful]
    device: torch.device
    rank: int
    processes: int

    def write(self, folder: Path) -> None:
        """Write the files of this process to an existing folder; `seal` it when all processes are done."""
        if self.rank == 0:
            save_model(self.model, str(folder / MODEL))
            _write_tree({name: part.state_dict() for name, part in self.parts.items()}, folder / RUN)
        _write_tree(_random_numbers(self.device), folder / _of_rank(self.rank))

    def read(self, folder: Path) -> None:
        """Restore the state in a folder.

        Raises:
            ConfigurationError: The state is damaged or incomplete, or belongs to another run.
        """
        manifest = verify(folder)
        with _explained(folder / MANIFEST):
            if manifest["processes"] != self.processes:
                raise ValueError(f"written by {manifest['processes']} processes, not {self.processes}")
        with _explained(folder / MODEL):
            load_model(self.model, folder / MODEL)
        with _explained(folder / f"{RUN}.json"):
            saved = _read_tree(folder / RUN)
            if saved.keys() != self.parts.keys():
                raise ValueError(f"it contains {', '.join(saved)}, not {', '.join(self.parts)}")
            for name, part in self.parts.items():
                if saved[name].keys() != part.state_dict().keys():
                    raise ValueError(f"it contains the {name} of another run")
                part.load_state_dict(saved[name])
        with _explained(folder / f"{_of_rank(self.rank)}.json"):
            _restore_random_numbers(_read_tree(folder / _of_rank(self.rank)), self.device)


def seal(folder: Path, processes: int, settings: Path) -> None:
    """Write the manifest of a complete state; a state without it is not read.

    Args:
        folder: The state.
        processes: Number of processes that have written to it.
        settings: The configuration file of the run; its checksum becomes part of the manifest.
    """
    files = {name: _measure(folder / name, flush=True) for name in _files(processes)}
    manifest = {"format": FORMAT, "processes": processes, SETTINGS: _measure(settings), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def verify(folder: Path) -> dict[str, Any]:
    """Check that a state is complete and unchanged; its content is hashed, not interpreted.

    Args:
        folder: The state.

    Returns:
        The manifest.

    Raises:
        ConfigurationError: It is not; names the file, what differs, and the remedy.
    """
    if not (folder / MANIFEST).exists() and any((folder / name).exists() for name in FORMER_FILES):
        raise ConfigurationError(
            f"{folder}: the state of an earlier version, in pickles; they are not read, because a pickle can "
            "run any code: start the run again with training.overwrite=true, or finish it with the version "
            "that began it"
        )
    with _explained(folder / MANIFEST):
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != FORMAT:
            raise ValueError(f"format {manifest.get('format')!r}; this version reads format {FORMAT}")
        files = manifest["files"]
        ranks = sum(name.startswith("rank_") for name in files) // 2
        if manifest["processes"] != ranks or files.keys() != set(_files(ranks)):
            raise ValueError(f"it lists {', '.join(sorted(files))} for {manifest['processes']} processes")
    for name, written in files.items():
        with _explained(folder / name):
            _compare(_measure(folder / name), written)
    return manifest


def require_settings(manifest: Mapping[str, Any], settings: Path) -> None:
    """Check that the configuration of a run is the one that its state was written with.

    Args:
        manifest: The manifest of the state.
        settings: The configuration file of the run.

    Raises:
        ConfigurationError: The file is missing or has changed.
    """
    with _explained(settings):
        if _measure(settings) != manifest.get(SETTINGS):
            raise ValueError("it is not the configuration that the state was written with")


def _measure(path: Path, flush: bool = False) -> dict[str, Any]:
    """Size and SHA-256 of a file; with `flush`, wait until it is on the disk."""
    with open(path, "rb+" if flush else "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())  # otherwise a power cut could leave a manifest without its files
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _compare(found: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    if found["bytes"] != written["bytes"]:
        raise ValueError(f"{found['bytes']} bytes, not the {written['bytes']} that were written")
    if found["sha256"] != written["sha256"]:
        raise ValueError("the checksum differs from that of the file that was written")


def _of_rank(rank: int) -> str:
    return f"rank_{rank}"


def _files(processes: int) -> list[str]:
    trees = [RUN, *map(_of_rank, range(processes))]
    return [MODEL, *(f"{tree}.{kind}" for tree in trees for kind in ("json", "safetensors"))]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Convert errors in reading `path` to a message with the path and the remedy."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{path}: the run cannot be resumed, the file is missing; {REMEDY}"
        ) from error
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigurationError(f"{path}: the run cannot be resumed from it ({reason}); {REMEDY}") from error


def _random_numbers(device: torch.device) -> dict[str, Any]:
    """State of the random generators of this process."""
    algorithm, key, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(key), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device.type).get_rng_state()
    return states


def _restore_random_numbers(states: Mapping[str, Any], device: torch.device) -> None:
    if device.type not in {*states, "cpu"}:
        raise ValueError(f"it was not written on a {device.type} device")
    algorithm, key, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((algorithm, key.numpy(), *rest))
    torch.set_rng_state(states["torch"])
    if device.type != "cpu":
        torch.get_device_module(device.type).set_rng_state(states[device.type])


def _write_tree(tree: Mapping[str, Any], stem: Path) -> None:
    """Write nested plain data to `stem`.json, its tensors to `stem`.safetensors."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(tree, stem.name, tensors), indent=1)
    save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(text, encoding="utf-8")


def _read_tree(stem: Path) -> dict[str, Any]:
    tree = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    return _decode(tree, load_file(stem.with_suffix(".safetensors")))


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Convert `value` to JSON types; tensors are added to `tensors` and replaced by their name."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d} {place}"
        value = value.detach().cpu()
        is_view = value.untyped_storage().nbytes() != value.nbytes  # safetensors refuses shared memory
        tensors[name] = value.clone() if is_view else value.contiguous()
        return {TENSOR: name}
    if isinstance(value, Mapping):
        encoded = {key: _encode(item, f"{place}.{key}", tensors) for key, item in value.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in encoded):
            return encoded
        return {ITEMS: [[_encode(key, place, {}), item] for key, item in encoded.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{place}.{number}", tensors) for number, item in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{place} is a {type(value).__name__}: the state of a run is tensors and plain data")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {TENSOR}:
        return tensors[value[TENSOR]]
    if value.keys() == {TUPLE}:
        return tuple(_decode(item, tensors) for item in value[TUPLE])
    if value.keys() == {ITEMS}:
        return {key: _decode(item, tensors) for key, item in value[ITEMS]}
    return {key: _decode(item, tensors) for key, item in value.items()}
