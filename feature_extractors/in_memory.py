# SPDX-License-Identifier: Apache-2.0
"""Recordings that are not files on disk: arrays of sound and pictures, bytes, and open files."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np

from feature_extractors import limits
from feature_extractors.audio import first_bad_sample
from feature_extractors.clip import (
    STILL_PICTURE,
    Clip,
    ClipError,
    ExtractionSettings,
    RawClip,
    cancelled_channels_finding,
)
from feature_extractors.collecting import WaveformCollector
from feature_extractors.extraction import frames_to_decode

PICTURES_PER_SECOND = 25
"""Assumed of pictures without sound; it changes no feature, only the reported length."""


@dataclass(frozen=True)
class Upload:
    """A media file as bytes or as an open binary file, which is read once.

    Attributes:
        content: All bytes of the file, or an object whose `read` returns them.
        start: Start of a window in seconds, as in `Clip`.
        end: End of the window in seconds.
    """

    content: bytes | bytearray | memoryview | BinaryIO
    start: float | None = None
    end: float | None = None

    @property
    def path(self) -> Path:
        """The name of the open file if it has one, else "(bytes)"; for messages only."""
        name = getattr(self.content, "name", None)
        return Path(name) if isinstance(name, str) and name else Path("(bytes)")

    @contextmanager
    def on_disk(self) -> Iterator[Clip]:
        """The recording as a temporary file, in a `with` block; a `ClipError` in it names `path`.

        The decoder may read a file several times, and some open files cannot be read twice.
        """
        with TemporaryDirectory(prefix="msa-") as folder:
            file = Path(folder, "clip").with_suffix(_plain_suffix(self.path))
            with open(file, "wb") as target:
                if isinstance(self.content, bytes | bytearray | memoryview):
                    target.write(self.content)
                else:
                    shutil.copyfileobj(self.content, target)
            try:
                yield Clip(file, self.start, self.end)
            except ClipError as error:
                raise ClipError(self.path, error.problem, error.detail) from error


def _plain_suffix(path: PurePath) -> str:
    suffix = path.suffix
    return suffix if suffix.isascii() and suffix[1:].isalnum() else ""


def clip_of_arrays(
    settings: ExtractionSettings, audio: Any = None, sampling_rate: int | None = None, frames: Any = None
) -> RawClip:
    """A clip from arrays, tensors or lists, as `decode_for` returns it; sound, pictures or both are needed.

    Args:
        settings: Number and size of the pictures that are kept.
        audio: Sound (samples,) or (channels, samples): floats with full scale 1, or signed integers.
        sampling_rate: Samples per second of the sound.
        frames: Pictures (frames, height, width, 3) uint8 RGB, in order, or one picture
            (height, width, 3). With sound, they are spread evenly over it.

    Raises:
        ValueError: A value has a wrong shape, type or range; the message says what is needed.
    """
    if audio is None and frames is None:
        raise ValueError("neither audio nor frames: give one of them, or both")
    waveform, findings, pictures = np.zeros(0, np.float32), [], np.zeros((0, 0, 0, 3), np.uint8)
    channels = None if audio is None else _channels(audio, sampling_rate)
    if frames is not None:
        pictures = _pictures(frames)
        findings += [STILL_PICTURE] * (len(pictures) == 1)
    seconds = len(pictures) / PICTURES_PER_SECOND if channels is None else channels.shape[1] / sampling_rate
    if not 0 < seconds <= limits.MAX_SECONDS:
        raise ValueError(
            f"the clip lasts {seconds:,.0f} s: give more than 0 s and at most {limits.MAX_SECONDS:,} s"
        )
    if channels is not None:
        waveform, cancelled = _mono(channels, int(sampling_rate), seconds)
        findings += [] if cancelled is None else [cancelled_channels_finding(cancelled + 1)]
    wanted = frames_to_decode(settings)
    shown = np.unique(((np.arange(wanted) + 0.5) * len(pictures) / wanted).astype(int))[: len(pictures)]
    return RawClip(
        frames=_scaled(pictures[shown], settings.max_height),
        timestamps=shown * (seconds / max(len(pictures), 1)),
        waveform=waveform,
        duration=seconds,
        has_video=frames is not None,
        has_audio=audio is not None,
        findings=tuple(findings),
    )


def _channels(audio: Any, sampling_rate: Any) -> np.ndarray:
    """Sound as (channels, samples) float32 with full scale 1."""
    low, high = limits.MIN_SAMPLE_RATE, limits.MAX_SAMPLE_RATE
    if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, int | np.integer):
        raise ValueError(f"sampling_rate is {sampling_rate!r}: give the samples per second of the audio")
    if not low <= sampling_rate <= high:
        raise ValueError(f"sampling_rate is {sampling_rate:,}: give a number from {low:,} to {high:,}")
    values = np.asarray(audio)
    if values.ndim == 1:
        values = values[None]
    if values.ndim != 2 or not 0 < len(values) <= limits.MAX_CHANNELS or values.dtype.kind not in "fi":
        raise ValueError(
            f"audio is {values.dtype} of shape {values.shape}: give (samples,) or (channels, samples), "
            "floats or signed integers"
        )
    if values.dtype.kind == "i":
        return values.astype(np.float32) / np.float32(1 << (8 * values.dtype.itemsize - 1))
    with np.errstate(over="ignore"):  # too large doubles become infinite and are refused
        values = values.astype(np.float32)
    for channel in values:
        if (index := first_bad_sample(channel)) is not None:
            raise ValueError(
                f"sample {index} of the audio is {channel[index]:g}: give finite values, nominally in [-1, 1]"
            )
    return values


def _mono(channels: np.ndarray, rate: int, duration: float) -> tuple[np.ndarray, int | None]:
    """Mono sound (samples,) at `SAMPLE_RATE`, and the only channel used if the mean of all cancels out."""
    import av

    layout = {1: "mono", 2: "stereo"}.get(len(channels), f"{len(channels)}c")
    packed = np.ascontiguousarray(channels.T).reshape(1, -1)

    def collected(channel: int | None) -> WaveformCollector:
        collector = WaveformCollector(0.0, duration, channel)
        frame = av.AudioFrame.from_ndarray(packed, "flt", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        collector.add(frame, 0.0)
        return collector

    collector = collected(None)
    cancelled = collector.cancelled()
    return (collector if cancelled is None else collected(cancelled)).finish(), cancelled


def _pictures(frames: Any) -> np.ndarray:
    """Pictures as (frames, height, width, 3) uint8."""
    try:
        values = np.asarray(frames)
    except ValueError:
        raise ValueError("frames differ in size: give pictures of one size") from None
    if values.ndim == 3:
        values = values[None]
    if values.ndim != 4 or values.shape[-1] != 3 or values.dtype != np.uint8 or not values.size:
        raise ValueError(
            f"frames are {values.dtype} of shape {values.shape}: give RGB pictures "
            "(frames, height, width, 3) of type uint8"
        )
    try:
        limits.check_picture(Path("frames"), values.shape[2], values.shape[1])
    except ClipError as error:
        raise ValueError(str(error)) from None
    return values


def _scaled(pictures: np.ndarray, max_height: int) -> np.ndarray:
    """Pictures whose shorter side has at most `max_height` pixels, scaled as decoded ones are."""
    import av

    height, width = pictures.shape[1:3]
    if min(height, width) <= max_height:
        return pictures
    scale = max_height / min(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    reformatter = av.video.reformatter.VideoReformatter()
    return np.stack(
        [
            reformatter.reformat(
                av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24"),
                *size,
                "rgb24",
                interpolation="AREA",
                threads=1,
            ).to_ndarray()
            for picture in pictures
        ]
    )
