# SPDX-License-Identifier: Apache-2.0
"""Content-addressed store of extracted features: a clip is decoded once, however often it is read.

An entry's name is a hash of the file's bytes, the window and the settings, so a renamed or copied clip is
found again and a changed one is not mistaken. Entries appear whole (written aside, then renamed), so any
number of processes may fill one cache, and a run that was killed goes on where it stopped. Damaged entries
are made again.
"""

import hashlib
import json
import os
import time
import uuid
import zlib
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from feature_extractors.assets import cache_root
from feature_extractors.clip import Clip, ClipFeatures, ExtractionSettings
from feature_extractors.decoding import check_file
from feature_extractors.extraction import extract
from feature_extractors.face import FaceExtractor

FORMAT_VERSION = 3
"""Part of every key; raise it when settings come to give other features, or the files change."""

SETTLED = 2.0
"""A file changed less than this many seconds ago may change again within one tick of its clock."""

_ARRAYS = tuple(field.name for field in fields(ClipFeatures) if field.type is np.ndarray)


class CacheError(OSError):
    """The cache cannot be written: no space, no permission."""


class FeatureCache:
    """Features on disk, for `prepare` to fill and for training to read.

    Attributes:
        folder: Where entries lie, spread over 256 subfolders.
    """

    def __init__(self, folder: Path | str | None = None):
        """Opens or begins a cache in `folder`, by default `features` in `cache_root()`."""
        self.folder = cache_root() / "features" if folder is None else Path(folder)

    def key(self, clip: Clip, settings: ExtractionSettings) -> str:
        """The name of a clip's entry: 64 hexadecimal digits.

        Raises:
            ClipError: The file is missing, no file, empty or not readable.
        """
        content = {
            "format": FORMAT_VERSION,
            "file": self._file_digest(Path(clip.path)),
            "window": [None if time is None else float(time) for time in (clip.start, clip.end)],
            "settings": {name: float(value) for name, value in asdict(settings).items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load(self, key: str) -> ClipFeatures | None:
        """The features stored under a key; None if there are none or the entry is damaged."""
        from safetensors import SafetensorError, safe_open

        path = self._entry(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="np") as entry:
                arrays = {name: entry.get_tensor(name) for name in _ARRAYS}
                metadata = entry.metadata()
            if int(metadata["checksum"]) != _checksum(arrays, metadata["about"]):
                return None
            about = json.loads(metadata["about"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None
        return ClipFeatures(**arrays, findings=tuple(about["findings"]), duration=about["duration"])

    def store(self, key: str, features: ClipFeatures) -> None:
        """Stores features under a key, replacing what is there.

        Raises:
            CacheError: The disk is full or the folder cannot be written.
        """
        from safetensors.numpy import save

        arrays = {name: np.ascontiguousarray(getattr(features, name)) for name in _ARRAYS}
        about = json.dumps({"findings": features.findings, "duration": features.duration})
        self._write(
            self._entry(key), save(arrays, {"about": about, "checksum": str(_checksum(arrays, about))})
        )

    def get(
        self, clip: Clip, settings: ExtractionSettings, face_extractor: FaceExtractor | None = None
    ) -> ClipFeatures:
        """A clip's features, from the cache or extracted now and stored.

        Args:
            clip: The recording.
            settings: What to measure.
            face_extractor: An open extractor; without one it is opened for this clip if it is needed.

        Raises:
            ClipError: The clip cannot be used.
            CacheError: The cache cannot be written.
            AssetError: The face model is needed and not to be had.
        """
        key = self.key(clip, settings)
        features = self.load(key)
        if features is None:
            if face_extractor is None:
                with FaceExtractor(settings) as own_extractor:
                    features = extract(clip, settings, own_extractor)
            else:
                features = extract(clip, settings, face_extractor)
            self.store(key, features)
        return features

    def _entry(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _file_digest(self, path: Path) -> str:
        """SHA-256 of a file's bytes, remembered on disk so that large corpora are not read at every start."""
        check_file(path)
        status = path.stat()
        identity = f"{path.absolute()}\n{status.st_size}\n{status.st_mtime_ns}"
        name = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
        memo = self.folder / "digests" / name[:2] / name
        try:
            remembered = memo.read_text()
        except (OSError, ValueError):
            remembered = ""
        if len(remembered) == 64:
            return remembered
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if time.time() - status.st_mtime > SETTLED:
            self._write(memo, digest.encode())
        return digest

    def _write(self, path: Path, content: bytes) -> None:
        """Makes a file appear whole or not at all, with the permissions that the umask gives.

        Several processes may write the same file: each writes its own draft, and the last rename counts.
        """
        draft = path.with_name(f".writing-{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                draft.write_bytes(content)
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise CacheError(
                error.errno,
                f"cannot write the feature cache in {self.folder} ({error.strerror}); make room, or point"
                " MSA_CACHE to a disk that has some. What is stored already is kept",
            ) from error


def _checksum(arrays: dict[str, np.ndarray], about: str) -> int:
    """CRC of everything that `load` returns: findings and duration as stored, shapes, types and values."""
    header = [about, *((name, arrays[name].dtype.str, arrays[name].shape) for name in _ARRAYS)]
    checksum = zlib.crc32(json.dumps(header).encode())
    for name in _ARRAYS:
        checksum = zlib.crc32(np.ascontiguousarray(arrays[name]), checksum)
    return checksum
