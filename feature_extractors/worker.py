# SPDX-License-Identifier: Apache-2.0
"""Extraction in a process of a pool: one face model per process, results in the cache, findings returned.

Here and not beside `prepare`, so that a spawned process imports neither torch nor transformers.
"""

import multiprocessing
import os
import signal
import threading

from feature_extractors.cache import FeatureCache
from feature_extractors.clip import Clip, ExtractionSettings
from feature_extractors.extraction import extract
from feature_extractors.face import FaceExtractor

_worker: tuple[FeatureCache, ExtractionSettings, FaceExtractor]  # of this process, set by `open_worker`


def open_worker(cache: FeatureCache, settings: ExtractionSettings) -> None:
    """Load the face model once in a process; Ctrl-C is left to the parent, which then lets workers finish."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = cache, settings, FaceExtractor(settings)


def extract_into_cache(key: str, clip: Clip) -> tuple[str, ...]:
    """Extract one clip and store it under its cache key; only its findings travel back.

    Raises:
        ClipError: The clip cannot be used.
        CacheError: The cache cannot be written.
    """
    cache, settings, face_extractor = _worker
    features = extract(clip, settings, face_extractor)
    cache.store(key, features)
    return features.findings


def _end_with_parent() -> None:
    """End this process when the parent is killed, which a pool's idle processes would never notice."""
    multiprocessing.parent_process().join()
    os._exit(1)
