# SPDX-License-Identifier: Apache-2.0
"""The local cache of pretrained files, and the verification of these files.

`get_asset` downloads a file or folder into the cache from the first source that has it, or converts it from
another asset; `asset_path` only looks into the cache. Weights are checked against pinned SHA-256 sums, so the
source does not matter.

To use other weights, set `MSA_MODEL_<NAME>` (for instance `MSA_MODEL_FACE_LANDMARKER=/data/face.task`); they
are not checked. `MSA_CACHE` sets the folder of the cache.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from feature_extractors.catalogue import ASSETS, Asset, AssetError
from feature_extractors.face_weights import convert_face_network
from feature_extractors.sources import SOURCES
from feature_extractors.whisper_weights import convert_encoder

_log = logging.getLogger(__name__)

CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    "whisper-tiny.en-encoder": convert_encoder,
    "dlib-face-resnet": convert_face_network,
}
"""How assets are converted: from the folder of the other asset to a new folder."""


def cache_root() -> Path:
    """Folder of the cache, which can be deleted at any time: `MSA_CACHE`, else `~/.cache/msa_online`."""
    return Path(os.environ.get("MSA_CACHE") or "~/.cache/msa_online").expanduser().absolute()


def asset_path(name: str) -> Path | None:
    """Path of a model on this machine, or None; never uses the network.

    Args:
        name: A key of `ASSETS`.

    Returns:
        A file if the asset has one file, else a folder.

    Raises:
        AssetError: The name is unknown, the user's file does not exist, or files in the cache have a wrong
            checksum.
    """
    asset = _asset(name)
    if override := os.environ.get(asset.variable):
        path = Path(override).expanduser()
        if not path.exists():
            raise AssetError(f"{asset.variable} is {override!r}, which does not exist; correct or unset it")
        return path
    folder = _folder(asset)
    if not all((folder / file).is_file() for file in asset.files):
        return None
    _verify_once(asset, folder)
    return _result(asset)


def get_asset(name: str, progress: Callable[[str], None] = _log.info) -> Path:
    """Path of a model, which is downloaded or converted if necessary.

    Args:
        name: A key of `ASSETS`.
        progress: Called with one line for each source that is tried, that failed, or that succeeded.

    Returns:
        A file if the asset has one file, else a folder.

    Raises:
        AssetError: The name is unknown, no source has the right files, or the disk is too small; names every
            source tried and the remedy.
    """
    if path := asset_path(name):
        return path
    asset = _asset(name)
    if asset.converted_from:
        return _convert(asset, progress)
    folder = _folder(asset)
    failures = []
    with _workspace(asset, folder.parent) as workspace:
        for source in SOURCES:
            if not (label := source.label(asset)):
                continue
            progress(f"{name}: trying {label}")
            fetched = Path(tempfile.mkdtemp(dir=workspace))
            try:
                source.fetch(asset, fetched)
                verify(asset, fetched)
            except (AssetError, OSError) as error:
                failures.append(f"{label}: {error}")
                progress(f"{name}: failed: {failures[-1]}")
                shutil.rmtree(fetched)
                continue
            _publish(asset, fetched, folder)
            progress(f"{name}: downloaded from {label}, sha256 correct, stored in {_result(asset)}")
            return _result(asset)
    raise AssetError(_unavailable(asset, failures))


def _convert(asset: Asset, progress: Callable[[str], None]) -> Path:
    """Convert an asset from another one, which is downloaded if necessary."""
    origin, folder = get_asset(asset.converted_from, progress), _folder(asset)
    with _workspace(asset, folder.parent) as workspace:
        converted = Path(tempfile.mkdtemp(dir=workspace))
        try:
            verify(ASSETS[asset.converted_from], origin)
            CONVERTERS[asset.name](origin, converted)
            verify(asset, converted)
            _publish(asset, converted, folder)
        except (AssetError, OSError) as error:
            raise AssetError(
                f"cannot convert {asset.name} from {origin}: {error};"
                f" set {asset.variable} to a folder with an encoder of your own"
            ) from error
    progress(f"{asset.name}: converted from {origin}, sha256 correct, stored in {_result(asset)}")
    return _result(asset)


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"unknown pretrained model {name!r}; known are {', '.join(ASSETS)}")
    return ASSETS[name]


def _folder(asset: Asset) -> Path:
    return cache_root() / "models" / asset.name


def _result(asset: Asset) -> Path:
    """The path for callers: the only file, or the folder."""
    return _folder(asset) / asset.files[0] if len(asset.files) == 1 else _folder(asset)


def _unavailable(asset: Asset, failures: list[str]) -> str:
    tried = "\n".join(f"  - {failure}" for failure in failures)
    return (
        f"{asset.name} ({asset.description}) is unavailable; tried\n{tried}\n"
        f"Connect to one of these, or put {', '.join(asset.files)} into {_folder(asset)},"
        f" or set {asset.variable} to your copy"
    )


def _workspace(asset: Asset, parent: Path) -> "tempfile.TemporaryDirectory[str]":
    """A temporary folder on the disk of the cache, so that moving files is atomic; checks the free space."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free / 1e6
        needed = 2.5 * asset.megabytes + 10  # the wheels or their archive, and the files
        if free < needed:
            raise AssetError(
                f"{asset.name} temporarily needs {needed:.0f} MB in {parent}, where {free:.0f} MB are free;"
                " free disk space, or set MSA_CACHE to a folder on another disk"
            )
        return tempfile.TemporaryDirectory(dir=parent, prefix=".fetching-")
    except OSError as error:
        raise AssetError(f"cannot write to the cache {parent} ({error.strerror}); set MSA_CACHE") from error


def _publish(asset: Asset, fetched: Path, folder: Path) -> None:
    """Move verified files into place; another process may have done so already, with the same files."""
    folder.mkdir(exist_ok=True)
    for file in asset.files:
        os.replace(fetched / file, folder / file)
    _stamp_file(folder).write_text(json.dumps(_stamp(asset, folder)))


def verify(asset: Asset, folder: Path) -> None:
    """Check that all files exist and that weights have the pinned checksums.

    Raises:
        AssetError: A file is missing or its checksum differs; names the file and both checksums.
    """
    for file in asset.files:
        if not (folder / file).is_file():
            raise AssetError(f"{file} is missing")
    for file, expected in asset.sha256.items():
        with open(folder / file, "rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != expected:
            raise AssetError(f"{file} has sha256 {actual}, not {expected}")


def _verify_once(asset: Asset, folder: Path) -> None:
    """Verify files that are new or have changed; hashing 440 MB at every start would take too long."""
    stamp, stamp_file = _stamp(asset, folder), _stamp_file(folder)
    if stamp_file.is_file() and stamp_file.read_text() == json.dumps(stamp):
        return
    try:
        verify(asset, folder)
    except AssetError as error:
        raise AssetError(
            f"{folder}: {error}; remove this folder to download it again,"
            f" or set {asset.variable} to use other weights"
        ) from error
    if os.access(folder, os.W_OK):  # a shared read-only cache is verified every time
        stamp_file.write_text(json.dumps(stamp))


def _stamp(asset: Asset, folder: Path) -> dict[str, list[int]]:
    """Size and modification time of the files with weights."""
    stats = {file: (folder / file).stat() for file in asset.sha256}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def _stamp_file(folder: Path) -> Path:
    return folder / ".verified.json"
