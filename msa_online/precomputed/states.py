# SPDX-License-Identifier: Apache-2.0
"""States of frozen encoders, computed once for each clip and kept on disk beside the clips' features.

A frozen encoder returns the same states in every epoch, run and fold. Their key is a hash of the encoder's
weights, its configuration and the inputs: another encoder or another clip never finds them.
"""

import errno
import hashlib
import json
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from feature_extractors import CacheError, FeatureCache
from msa_online.configuration_msa import MSAConfig
from msa_online.corpora.cache_filling import load_features
from msa_online.corpora.corpus import Sample
from msa_online.corpora.prepared_corpus import PreparedCorpus
from msa_online.encoders.pretrained import EncoderError, PretrainedEncoder
from msa_online.modalities import MODALITIES
from msa_online.processing_msa import MSAProcessor

FORMAT = 2
"""Part of every key; increase it when equal encoders return other states, or when the file format changes."""

TOGETHER = {"text": 32, "audio": 8, "vision": 8}
"""Samples in one forward pass; 30 s of a waveform need 0.4 GB in the first layer of a wav2vec2."""

INPUTS = {
    "text": (),  # the key of a text is the hash of its token ids
    "audio": ("audio_feature_extractor", "max_audio_seconds"),
    "vision": ("image_processor",),
}
"""What the inputs of an encoder follow from besides the extracted clip: fields of `MSAProcessor`."""

FILE_BYTES = 1 << 26
FILE_SECONDS = 60.0  # an interruption loses less than this

Autocast = Callable[[], AbstractContextManager]


class StateStore:
    """States on disk, by sample; a file has those of many samples.

    Files are written atomically and never changed, so any number of processes can fill one folder. They are
    checked once, when the folder is listed, and then memory-mapped: processes share the memory. Damaged files
    and files of another encoder are deleted, so that their states are computed again.

    Args:
        cache: The features of the clips; the states lie in its folder.
        digest: Hash of the encoder and all else that states follow from, besides the sample.
    """

    def __init__(self, cache: FeatureCache, digest: str) -> None:
        self.cache = cache
        self.folder = cache.folder / "states" / digest
        self._places: dict[str, tuple[str, int, int]] = {}
        self._known: set[str] = set()
        self._open: dict[str, dict[str, Tensor]] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        """Without memory-mapped files: each worker of a loader maps them itself."""
        return {**vars(self), "_open": {}}

    def __contains__(self, key: str) -> bool:
        """Whether the states of a sample are stored."""
        return key in self._places

    def refresh(self) -> None:
        """Find what other processes have stored."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._known:
                continue
            try:
                tensors, keys = self._read(path.name)
            except OSError:  # unreadable at the moment, for example with too many open files: not damaged
                continue
            except (SafetensorError, KeyError, TypeError, ValueError):
                with suppress(OSError):
                    path.unlink()
                continue
            self._known.add(path.name)
            ends = tensors["ends"].tolist()
            for key, start, stop in zip(keys, [0, *ends[:-1]], ends, strict=True):
                self._places.setdefault(key, (path.name, start, stop))

    def of(self, key: str) -> tuple[Tensor, Tensor]:
        """States `(time, ...)` of a sample and their mask `(time,)` bool.

        Raises:
            CacheError: The file was deleted.
        """
        name, start, stop = self._places[key]
        if name not in self._open:
            try:
                self._open[name], _ = self._read(name, check=False)
            except (SafetensorError, OSError) as error:
                raise CacheError(
                    f"encoder states were deleted from {self.folder}: start again to compute them"
                ) from error
        tensors = self._open[name]
        return tensors["values"][start:stop], tensors["mask"][start:stop]

    def write(self, entries: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Store states `(time, ...)` and masks `(time,)` of samples by key, as one file.

        Raises:
            CacheError: The disk is full or the folder cannot be written.
        """
        values, masks = zip(*entries.values(), strict=True)
        tensors = {
            "values": torch.cat(values),
            "mask": torch.cat(masks),
            "ends": torch.tensor([len(mask) for mask in masks]).cumsum(dim=0),
        }
        about = {"keys": " ".join(entries), "checksum": str(self._checksum(tensors, " ".join(entries)))}
        self.cache.write(self.folder / f"{uuid.uuid4().hex}.safetensors", save(tensors, about))

    def require_space(self, needed: int) -> None:
        """Check that the disk has `needed` bytes for the states still to be computed.

        Raises:
            CacheError: It has not.
        """
        folder = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        if (free := shutil.disk_usage(folder).free) < needed:
            raise CacheError(
                errno.ENOSPC,
                f"the encoder states need about {needed:,} bytes but {self.folder} has {free:,} bytes free: "
                "free disk space, set MSA_CACHE to a folder on a larger disk, or compute them in every epoch "
                "with training.cache_states=off",
            )

    def _read(self, name: str, check: bool = True) -> tuple[dict[str, Tensor], list[str]]:
        with safe_open(self.folder / name, framework="pt") as file:
            tensors = {part: file.get_tensor(part) for part in ("values", "mask", "ends")}
            about = file.metadata()
        keys = about["keys"].split()
        if check:
            if int(about["checksum"]) != self._checksum(tensors, about["keys"]):
                raise ValueError("wrong checksum")
            _require_fitting(keys, **tensors)
        return tensors, keys

    def _checksum(self, tensors: Mapping[str, Tensor], keys: str) -> int:
        """CRC over the name of the folder, keys, shapes, types and values."""
        parts = ((name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())
        checksum = zlib.crc32(json.dumps([self.folder.name, keys, *parts]).encode())
        for tensor in tensors.values():
            checksum = zlib.crc32(_bytes_of(tensor), checksum)
        return checksum


@dataclass(frozen=True)
class SampleStates:
    """Stored states of one modality of a corpus.

    Attributes:
        store: The states.
        keys: Key of each sample that has the modality, by sample id.
    """

    store: StateStore
    keys: Mapping[str, str]

    def of(self, sample_id: str) -> tuple[Tensor, Tensor]:
        """States `(time, ...)` of a sample and their mask `(time,)` bool; no steps without the modality."""
        if sample_id in self.keys:
            return self.store.of(self.keys[sample_id])
        values, mask = self.store.of(next(iter(self.keys.values())))
        return values[:0], mask[:0]


@dataclass(frozen=True)
class FrozenEncoder:
    """A frozen encoder with a corpus: what its states are, and how to compute them.

    Attributes:
        name: The modality.
        encoder: The encoder; its `states` must not change while this object is used.
        config: Configuration of its model.
        processor: Makes the encoder's inputs.
        data: The corpus; the states are stored in the folder of its cache.
        precision: Name of the precision in which states are computed; others are not found.
    """

    name: str
    encoder: PretrainedEncoder
    config: MSAConfig
    processor: MSAProcessor
    data: PreparedCorpus
    precision: str = "no"

    @cached_property
    def keys(self) -> dict[str, str]:
        """Key of each sample that has the modality, by sample id; equal texts and equal clips share a key."""
        column, data = MODALITIES.index(self.name), self.data
        return {
            sample.id: self._key(sample)
            for split in data.sizes
            for sample, present in zip(data.split(split), data.present(split)[:, column], strict=True)
            if present
        }

    @cached_property
    def store(self) -> StateStore:
        """The states on disk."""
        origin = json.dumps(self._origin(), sort_keys=True, default=str)
        return StateStore(self.data.cache, hashlib.sha256(origin.encode()).hexdigest()[:32])

    @property
    def states(self) -> SampleStates:
        """The stored states of the corpus."""
        return SampleStates(self.store, self.keys)

    @property
    def missing(self) -> list[str]:
        """Keys of states that are not stored, longest sample first."""
        length_of = {self.keys[sample.id]: self._length(sample) for sample in self._samples}
        missing = (key for key in length_of if key not in self.store)
        return sorted(missing, key=lambda key: (-length_of[key], key))

    @torch.inference_mode()
    def compute(
        self, keys: Sequence[str], device: torch.device | str = "cpu", autocast: Autocast = nullcontext
    ) -> None:
        """Compute and store states.

        Samples of similar length share a forward pass. The states of a sample do not depend on the others.

        Args:
            keys: Keys of the samples, sorted by length.
            device: Where to compute; the encoder is moved there.
            autocast: Makes the context of `precision`.

        Raises:
            CacheError: The disk is full, or the features of a clip were deleted.
            EncoderError: States are not finite; such states are not stored.
        """
        if not keys:
            return
        by_key = {self.keys[sample.id]: sample for sample in self._samples}
        encoder = self.encoder.to(device).eval()
        entries: dict[str, tuple[Tensor, Tensor]] = {}
        held, began = 0, time.monotonic()
        size = TOGETHER[self.name]
        batches = [keys[at : at + size] for at in range(0, len(keys), size)]
        for batch in track(
            batches, f"computing states of {self.name}", transient=True, console=Console(stderr=True)
        ):
            inputs = self.processor.pad([self._inputs(by_key[key]) for key in batch])
            with autocast():
                sequence = encoder.states({name: values.to(device) for name, values in inputs.items()})
            for key, values, mask in zip(batch, sequence.values.cpu(), sequence.mask.cpu(), strict=True):
                if not values.isfinite().all():
                    raise EncoderError(
                        f"the {self.name} encoder gives states of {by_key[key].id!r} that are not finite: "
                        "set training.mixed_precision=no; if it is no, the weights are damaged: choose "
                        "another encoder"
                    )
                stop = int(mask.nonzero().max()) + 1
                entries[key] = values[:stop].clone(), mask[:stop].clone()
                held += entries[key][0].nbytes
            if batch is batches[0]:
                self.store.require_space(held * len(batches))  # the longest samples come first
            if held > FILE_BYTES or time.monotonic() - began > FILE_SECONDS:
                self.store.write(entries)
                entries, held, began = {}, 0, time.monotonic()
        if entries:
            self.store.write(entries)
        self.store.refresh()

    @property
    def _samples(self) -> list[Sample]:
        return [sample for sample in self.data.samples if sample.id in self.keys]

    def _key(self, sample: Sample) -> str:
        """Hash of what the inputs of a sample follow from."""
        if self.name != "text":
            return self.data.keys[sample.id]
        ids = self.processor.tokenize(sample.text).tolist()
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    def _length(self, sample: Sample) -> float:
        extent = self.data.extents[sample.id]
        lengths = {"text": len(sample.text), "audio": extent.sound, "vision": extent.frames}
        return lengths[self.name]

    def _inputs(self, sample: Sample) -> dict[str, Tensor]:
        features = None
        if self.name != "text":
            features = load_features(self.data.cache, self.data.keys[sample.id], sample)
        return self.processor.encode(features, sample.text, (self.name,))

    def _origin(self) -> dict[str, Any]:
        """All that the states follow from, besides the sample."""
        weights = hashlib.sha256()
        for name, tensor in sorted(self.encoder.model.state_dict().items()):
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            weights.update(_bytes_of(tensor))
        fields = {
            key: value
            for key, value in self.config.to_dict().items()
            if key.startswith(f"{self.name}_") or (self.name, key) == ("vision", "blendshapes")
        }
        del fields[f"{self.name}_encoder"]  # its name; the weights count
        if self.name == "audio":  # the usual stride and "last" may also be given as numbers
            layer = "weighted" if self.encoder.is_weighted else len(self.encoder.layers)
            fields |= {"audio_stride": self.encoder.stride, "audio_layer": layer}
        made_by = self.processor.to_dict()
        return {
            "format": FORMAT,
            "transformers": transformers.__version__,
            "encoder": type(self.encoder).__name__,
            "fields": fields,
            "weights": weights.hexdigest(),
            "precision": self.precision,
            "inputs": {key: made_by.get(key) for key in INPUTS[self.name]},
        }


def _require_fitting(keys: Sequence[str], values: Tensor, mask: Tensor, ends: Tensor) -> None:
    """Raise ValueError unless the parts of a file are what `StateStore.write` makes."""
    types = values.is_floating_point(), mask.dtype == torch.bool, ends.dtype == torch.int64
    if not all(types) or (values.ndim, mask.ndim, ends.ndim) != (2, 1, 1):
        raise ValueError("other types or numbers of dimensions")
    lengths = ends.diff(prepend=ends.new_zeros(1))
    if not len(keys) == len(ends) > 0 or not len(values) == len(mask) == ends[-1] or lengths.min() < 1:
        raise ValueError("lengths do not fit together")


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
