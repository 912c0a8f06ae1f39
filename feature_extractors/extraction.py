# SPDX-License-Identifier: Apache-2.0
"""The one place where decoding, sound and face come together."""

import numpy as np

from feature_extractors.audio import is_silent, log_mel
from feature_extractors.clip import (
    NO_AUDIO,
    NO_FACE,
    NO_VIDEO,
    SILENT_AUDIO,
    Clip,
    ClipFeatures,
    ExtractionSettings,
    RawClip,
)
from feature_extractors.decoding import decode
from feature_extractors.face import FaceExtractor
from feature_extractors.limits import Deadline


def extract(
    clip: Clip,
    settings: ExtractionSettings,
    face_extractor: FaceExtractor,
    deadline: Deadline | None = None,
) -> ClipFeatures:
    """Everything a model sees of a clip besides its words.

    Args:
        clip: The recording.
        settings: What to measure.
        face_extractor: An open `FaceExtractor`; one serves any number of clips, in any order.
        deadline: The time allowed for decoding, as in `decode`.

    Returns:
        The features; what is missing is named in `findings` and is no error.

    Raises:
        ClipError: The clip cannot be used.
        ValueError: `face_extractor` was made for another crop size than `settings` asks for.
    """
    raw = decode(clip, settings.num_frames, settings.max_height, deadline)
    return measure(raw, settings, face_extractor)


def measure(raw: RawClip, settings: ExtractionSettings, face_extractor: FaceExtractor) -> ClipFeatures:
    """The second half of `extract`, for callers that want to see the decoded frames too."""
    if face_extractor.size != settings.face_size:
        raise ValueError(
            f"face_extractor makes crops of {face_extractor.size} pixels but settings.face_size is"
            f" {settings.face_size}; make it with FaceExtractor(settings)"
        )
    faces = face_extractor.extract(raw.frames)
    return ClipFeatures(
        log_mel=log_mel(raw.waveform, settings.num_mels, settings.window_ms, settings.hop_ms),
        face_crops=faces.crops,
        blendshapes=faces.blendshapes,
        face_found=faces.found,
        timestamps=raw.timestamps.astype(np.float32),
        findings=_findings(raw, bool(faces.found.any())),
        duration=raw.duration,
    )


def _findings(raw: RawClip, any_face: bool) -> tuple[str, ...]:
    """At most one finding on the picture and one on the sound."""
    findings = []
    if not raw.has_video:
        findings.append(NO_VIDEO)
    elif not any_face:
        findings.append(NO_FACE)
    if not raw.has_audio:
        findings.append(NO_AUDIO)
    elif is_silent(raw.waveform):
        findings.append(SILENT_AUDIO)
    return tuple(findings)
