# SPDX-License-Identifier: Apache-2.0
"""Fixed signal processing, from raw media to arrays: no parameters, no gradients, no torch.

`extract` turns a recording of a person talking into 16 kHz mono sound, aligned face crops and blendshape
scores. `FeatureCache` stores them on disk. `get_asset` downloads the pretrained files they need. PyAV, OpenCV
and MediaPipe are imported on first use, so importing this package is cheap.
"""

from feature_extractors.assets import asset_path, cache_root, get_asset
from feature_extractors.audio import is_silent, log_mel
from feature_extractors.cache import CacheError, FeatureCache
from feature_extractors.catalogue import ASSETS, AssetError
from feature_extractors.clip import (
    FINDINGS,
    SAMPLE_RATE,
    Clip,
    ClipError,
    ClipExtent,
    ClipFeatures,
    ExtractionSettings,
    RawClip,
)
from feature_extractors.decoding import decode
from feature_extractors.extraction import extract
from feature_extractors.face import BLENDSHAPE_NAMES, FaceExtractor
from feature_extractors.in_memory import Upload, clip_of_arrays

__all__ = [
    "ASSETS",
    "BLENDSHAPE_NAMES",
    "FINDINGS",
    "SAMPLE_RATE",
    "AssetError",
    "CacheError",
    "Clip",
    "ClipError",
    "ClipExtent",
    "ClipFeatures",
    "ExtractionSettings",
    "FaceExtractor",
    "FeatureCache",
    "RawClip",
    "Upload",
    "asset_path",
    "cache_root",
    "clip_of_arrays",
    "decode",
    "extract",
    "get_asset",
    "is_silent",
    "log_mel",
]
