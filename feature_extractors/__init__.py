# SPDX-License-Identifier: Apache-2.0
"""Fixed signal work, from raw media to arrays: no parameters, no gradients, no torch.

Use it to turn a recording of somebody talking into a log-mel spectrogram, aligned face crops and expression
scores (`extract`), to keep these on disk (`FeatureCache`), and to bring the pretrained files they need
(`get_asset`). PyAV, OpenCV and MediaPipe are imported when first used, so that importing this package costs
next to nothing.
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
    "asset_path",
    "cache_root",
    "decode",
    "extract",
    "get_asset",
    "is_silent",
    "log_mel",
]
