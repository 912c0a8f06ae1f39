# SPDX-License-Identifier: Apache-2.0
"""Extract all features of a clip: decoding, log-mel spectrogram and faces."""

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
    """Extract all inputs of a model but the text.

    Args:
        clip: The recording.
        settings: What to extract.
        face_extractor: An open `FaceExtractor`; it can be reused for any number of clips, in any order.
        deadline: Time limit of decoding, as in `decode`.

    Returns:
        The features. What the clip lacks is listed in `findings`; it is not an error.

    Raises:
        ClipError: The clip cannot be used.
        ValueError: `face_extractor` has another crop size than `settings`.
    """
    raw = decode(clip, settings.num_frames, settings.max_height, deadline)
    return measure(raw, settings, face_extractor)


def measure(raw: RawClip, settings: ExtractionSettings, face_extractor: FaceExtractor) -> ClipFeatures:
    """The second half of `extract`, for callers that need the decoded frames too."""
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
    """At most one finding about the video and one about the audio."""
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
