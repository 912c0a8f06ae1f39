# SPDX-License-Identifier: Apache-2.0
"""Content-addressed cache of extracted features: a clip is decoded only once.

The key of an entry is a hash of the file's bytes, the window and the settings. So a renamed or copied clip
keeps its entry, and a changed clip gets a new one. Entries are written atomically (to a temporary file, then
renamed): any number of processes can fill one cache, and an interrupted run continues where it stopped.
Damaged entries are created again.
"""

import hashlib
import json
import os
import time
import uuid
import zlib
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from feature_extractors.assets import cache_root
from feature_extractors.clip import Clip, ClipFeatures, ExtractionSettings
from feature_extractors.decoding import check_file
from feature_extractors.extraction import extract
from feature_extractors.face import FaceExtractor

FORMAT_VERSION = 7
"""Part of every key; increase it when equal settings give other features, or when the file format changes."""

SETTLED = 2.0
"""Seconds since its last change after which a file's time stamp identifies its content. A file may change
twice within one tick of the file system's clock."""

_SCALARS = ("findings", "duration", "audible_from", "full_scale")
_ARRAYS = tuple(field.name for field in fields(ClipFeatures) if field.type is np.ndarray)


class CacheError(OSError):
    """The cache cannot be written: no space, no permission."""

    def __str__(self) -> str:
        """The message, without the number of the error."""
        return self.strerror or super().__str__()


class FeatureCache:
    """Features on disk; `prepare` fills them and training reads them.

    Attributes:
        folder: Folder of the entries, in 256 subfolders.
    """

    def __init__(self, folder: Path | str | None = None):
        """Open or create a cache in `folder`, by default `features` in `cache_root()`."""
        self.folder = cache_root() / "features" if folder is None else Path(folder)

    def key(self, clip: Clip, settings: ExtractionSettings) -> str:
        """The key of a clip's entry, 64 hexadecimal digits.

        Raises:
            ClipError: The file is missing, not a file, empty or not readable.
        """
        content = {
            "format": FORMAT_VERSION,
            "file": self.file_digest(Path(clip.path)),
            "window": [None if time is None else float(time) for time in (clip.start, clip.end)],
            "audio_track": clip.audio_track,
            "region": clip.region and [float(share) for share in clip.region],
            "settings": {
                name: value if isinstance(value, str) else float(value)
                for name, value in asdict(settings).items()
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def load(self, key: str) -> ClipFeatures | None:
        """The features stored under a key; None if there is no entry or it is damaged."""
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
        return ClipFeatures(**arrays, **about | {"findings": tuple(about["findings"])})

    def store(self, key: str, features: ClipFeatures) -> None:
        """Store features under a key; replaces an existing entry.

        Raises:
            CacheError: The disk is full or the folder cannot be written.
        """
        from safetensors.numpy import save

        arrays = {name: np.ascontiguousarray(getattr(features, name)) for name in _ARRAYS}
        about = json.dumps({name: getattr(features, name) for name in _SCALARS})
        self.write(
            self._entry(key), save(arrays, {"about": about, "checksum": str(_checksum(arrays, about))})
        )

    def get(
        self, clip: Clip, settings: ExtractionSettings, face_extractor: FaceExtractor | None = None
    ) -> ClipFeatures:
        """A clip's features, from the cache, or else extracted and stored.

        Args:
            clip: The recording.
            settings: What to extract.
            face_extractor: An open extractor; by default one is opened for this clip if needed.

        Raises:
            ClipError: The clip cannot be used.
            CacheError: The cache cannot be written.
            AssetError: The face model is needed and unavailable.
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

    def file_digest(self, path: Path) -> str:
        """SHA-256 of a file's bytes, itself cached on disk so that corpora are not read at every start."""
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
            with suppress(CacheError):  # a shared cache may be read-only
                self.write(memo, digest.encode())
        return digest

    def write(self, path: Path, content: bytes) -> None:
        """Write a file atomically, with the permissions of the umask.

        Several processes may write the same file: each writes its own temporary file; the last rename wins.
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
                f"cannot write the feature cache in {self.folder} ({error.strerror}); free disk space, or set"
                " MSA_CACHE to a folder on another disk. Stored entries are kept",
            ) from error


def _checksum(arrays: dict[str, np.ndarray], about: str) -> int:
    """CRC over all that `load` returns: findings and duration as stored, shapes, types and values."""
    header = [about, *((name, arrays[name].dtype.str, arrays[name].shape) for name in _ARRAYS)]
    checksum = zlib.crc32(json.dumps(header).encode())
    for name in _ARRAYS:
        checksum = zlib.crc32(np.ascontiguousarray(arrays[name]), checksum)
    return checksum
