# SPDX-License-Identifier: Apache-2.0
"""Extract all features of a clip: decoding, sound and faces."""

from collections.abc import Iterator

import numpy as np

from feature_extractors.audio import as_int16, audible_from, is_silent
from feature_extractors.clip import (
    NO_AUDIO,
    NO_FACE,
    NO_VIDEO,
    SAMPLE_RATE,
    SEVERAL_FACES,
    SILENT_AUDIO,
    Clip,
    ClipFeatures,
    ExtractionSettings,
    RawClip,
    Region,
)
from feature_extractors.decoding import decode, decode_windows
from feature_extractors.face import FaceExtractor
from feature_extractors.limits import Deadline

SPEAKING_FRAMES = 3
"""Frames searched for each frame that is kept, to find the mouth that moves. Odd, so that the kept frames are
those that are sampled without the search."""


def extract(
    clip: Clip,
    settings: ExtractionSettings,
    face_extractor: FaceExtractor,
    deadline: Deadline | None = None,
) -> ClipFeatures:
    """Extract all inputs of a model except the text.

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
    return measure(decode_for(clip, settings, deadline), settings, face_extractor, clip.region)


def extract_windows(
    clip: Clip, settings: ExtractionSettings, face_extractor: FaceExtractor, seconds: float, step: float
) -> Iterator[tuple[Clip, ClipFeatures]]:
    """Extract overlapping windows of a recording of any length, in one pass, as `decode_windows`.

    Yields:
        Each window as a `Clip` of its own, and its features.

    Raises:
        ClipError: The clip cannot be used.
    """
    frames = frames_to_decode(settings)
    for window, raw in decode_windows(clip, seconds, step, frames, settings.max_height):
        yield window, measure(raw, settings, face_extractor, clip.region)


def decode_for(clip: Clip, settings: ExtractionSettings, deadline: Deadline | None = None) -> RawClip:
    """The first half of `extract`: frames and sound as `measure` needs them."""
    return decode(clip, frames_to_decode(settings), settings.max_height, deadline)


def frames_to_decode(settings: ExtractionSettings) -> int:
    """Number of frames that `measure` needs of a clip."""
    return settings.num_frames * (SPEAKING_FRAMES if settings.face_choice == "most_speaking" else 1)


def measure(
    raw: RawClip, settings: ExtractionSettings, face_extractor: FaceExtractor, region: Region | None = None
) -> ClipFeatures:
    """The second half of `extract`, for callers that need the decoded frames too."""
    if face_extractor.size != settings.face_size:
        raise ValueError(
            f"face_extractor makes crops of {face_extractor.size} pixels but settings.face_size is"
            f" {settings.face_size}; make it with FaceExtractor(settings)"
        )
    scenes = np.searchsorted(raw.cuts, raw.timestamps, side="right")
    if settings.face_choice == "most_speaking":
        faces = face_extractor.extract(raw.frames, region, _loudness(raw), scenes)
        chosen = _shown_at_midpoints(raw, settings.num_frames)
    else:
        faces = face_extractor.extract(raw.frames, region, scenes=scenes)
        chosen = np.arange(len(raw.frames))
    waveform, full_scale = as_int16(raw.waveform)
    return ClipFeatures(
        waveform=waveform,
        face_crops=faces.crops[chosen],
        blendshapes=faces.blendshapes[chosen],
        face_found=faces.found[chosen],
        timestamps=raw.timestamps[chosen].astype(np.float32),
        findings=_findings(raw, bool(faces.found[chosen].any()), faces.several),
        duration=raw.duration,
        audible_from=0.0 if is_silent(raw.waveform) else audible_from(raw.waveform),
        full_scale=full_scale,
    )


def _loudness(raw: RawClip) -> np.ndarray:
    """Root mean square of the sound around each frame (frames,); zeros without sound."""
    half = 0.5 * raw.duration / max(len(raw.frames), 1)
    bounds = np.clip(np.stack([raw.timestamps - half, raw.timestamps + half], 1), 0, None) * SAMPLE_RATE
    pieces = (raw.waveform[int(begin) : int(end)] for begin, end in bounds)
    return np.array([np.sqrt(np.mean(piece**2)) if len(piece) else 0.0 for piece in pieces])


def _shown_at_midpoints(raw: RawClip, num_frames: int) -> np.ndarray:
    """Indices of the frames that `decode` returns if only this many frames are wanted."""
    midpoints = raw.duration * (np.arange(num_frames) + 0.5) / num_frames
    shown = np.searchsorted(raw.timestamps, midpoints, side="right") - 1
    return np.unique(np.clip(shown, 0, None)) if len(raw.frames) else np.arange(0)


def _findings(raw: RawClip, any_face: bool, several: bool) -> tuple[str, ...]:
    """What the clip lacks, and what makes its face doubtful."""
    findings = []
    if not raw.has_video:
        findings.append(NO_VIDEO)
    elif not any_face:
        findings.append(NO_FACE)
    if several:
        findings.append(SEVERAL_FACES)
    findings.extend(raw.findings)
    if not raw.has_audio:
        findings.append(NO_AUDIO)
    elif is_silent(raw.waveform):
        findings.append(SILENT_AUDIO)
    return tuple(findings)
