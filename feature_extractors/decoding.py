# SPDX-License-Identifier: Apache-2.0
"""Decode a media file with PyAV to a few RGB frames with timestamps and a 16 kHz mono waveform.

Decoding relies on timestamps, because frame counts and frame rates in headers are often missing or wrong. One
pass over the file serves both streams. Only frames that are kept are converted and scaled. Decoders run on
one thread: for short clips this is faster than several (5.4 against 7.4 ms a clip), and it leaves the cores
to other processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from feature_extractors import limits
from feature_extractors.audio import first_bad_sample
from feature_extractors.clip import SAMPLE_RATE, STILL_PICTURE, Clip, ClipError, RawClip, is_region
from feature_extractors.collecting import FrameSampler, WaveformCollector
from feature_extractors.limits import Deadline
from feature_extractors.opening import open_media
from feature_extractors.pictures import PictureConverter

if TYPE_CHECKING:
    import av

TOLERANCE = 0.25
"""Seconds by which a window may exceed the clip, and by which media may be shorter than declared."""

TOLERANCE_SHARE = 0.02
"""The same tolerance as a share of the declared duration; the larger of the two applies."""

SEEK_FROM = 2.0
"""Windows that start later than this many seconds are reached by seeking."""

PRE_ROLL = 0.5
"""Seconds decoded before a window, so that decoders and resampler are in a steady state at its start."""

LATEST_SOUND = 600.0
"""Sound that starts later than this many seconds into a window indicates damaged timestamps."""

HEADERLESS = {"mp3", "aac", "mpeg", "mpegvideo", "mpegts", "ac3", "h264", "hevc"}
"""Formats without a duration in the header; FFmpeg estimates it, for example from the bit rate."""


def decode(
    clip: Clip, num_frames: int = 8, max_height: int = 480, deadline: Deadline | None = None
) -> RawClip:
    """Decode frames and sound of a clip.

    Args:
        clip: The file and, optionally, a time window.
        num_frames: Number of frames. The window is divided into as many equal intervals, and the frame
            displayed at each midpoint is taken. A clip with fewer frames gives fewer; none is repeated.
        max_height: Frames whose shorter side is longer than this are scaled down, keeping their aspect ratio.
        deadline: Time limit; by default one that starts now. It is adjusted to the clip's length once that is
            known.

    Returns:
        The decoded clip. Audio-only files and videos without sound are valid: the missing part is empty.

    Raises:
        ClipError: The file is missing, not a file, empty, a playlist, not decodable, truncated, without
            streams, beyond a limit (size, length, channels, time), or has samples that are not finite or far
            beyond full scale; or the window is invalid or outside the file, or the region outside the frame.
    """
    import av

    clip = replace(clip, path=Path(clip.path))
    check_file(clip.path)
    _check_window(clip)
    _check_region(clip)
    deadline = deadline or Deadline(clip.path)
    task = _Task(clip, num_frames, max_height, deadline)
    try:
        with open_media(clip.path, deadline) as container:
            raw = _decode_window(container, task, seek=(clip.start or 0) > SEEK_FROM)
        if raw is None:  # seeking landed too late, which happens in files without an index
            with open_media(clip.path, deadline) as container:
                raw = _decode_window(container, task, seek=False)
    except (av.error.FFmpegError, OSError, OverflowError) as error:  # OverflowError: times beyond 64 bits
        raise ClipError(clip.path, "undecodable", f"cannot be decoded ({_reason(error)})") from error
    assert raw is not None
    return raw


def _reason(error: Exception) -> str:
    """FFmpeg's message without error number and path."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def check_file(path: Path) -> None:
    """Check that a path is a readable file that is not empty, without opening it as media.

    Raises:
        ClipError: The path does not exist or is not a file, or the file is empty or not readable.
    """
    try:
        if not path.exists():
            raise ClipError(path, "missing", "no such file")
        if not path.is_file():
            raise ClipError(
                path, "not a file", f"is {'a folder' if path.is_dir() else 'a device'}, not a file"
            )
        with open(path, "rb") as stream:
            if not stream.read(1):
                raise ClipError(path, "empty", "the file is empty (0 bytes)")
    except OSError as error:
        raise ClipError(path, "undecodable", f"cannot be read ({_reason(error)})") from error


def _check_window(clip: Clip) -> None:
    """Refuse windows that are invalid for every file."""
    for name, value in (("start", clip.start), ("end", clip.end)):
        if value is not None and not (np.isfinite(value) and value >= 0):
            raise ClipError(clip.path, "bad window", f"{name} is {value} s")
    if clip.end is not None and (clip.start or 0) >= clip.end:
        raise ClipError(
            clip.path, "bad window", f"start {clip.start or 0:g} s is not before end {clip.end:g} s"
        )


def _check_region(clip: Clip) -> None:
    """Refuse regions that are not a part of the frame."""
    if clip.region is not None and not is_region(clip.region):
        raise ClipError(clip.path, "bad region", f"the region is {clip.region}")


@dataclass(frozen=True)
class _Task:
    """The arguments of `decode`."""

    clip: Clip
    num_frames: int
    max_height: int
    deadline: Deadline


@dataclass(frozen=True)
class _Window:
    """Times in seconds from the start of the file; `declared` is the header's duration, if reliable."""

    start: float
    end: float
    declared: float | None


def _decode_window(container: "av.container.InputContainer", task: _Task, *, seek: bool) -> RawClip | None:
    """One pass over the file; None if seeking missed the window's start."""
    clip = task.clip
    video, audio = _streams(container, clip.path)
    origin = (container.start_time or 0) / 1_000_000
    window = _window(container, clip, [s for s in (video, audio) if s], origin)
    task.deadline.allow(window.end - (window.start if seek else 0.0))
    if seek:
        container.seek(int((origin + window.start - PRE_ROLL) * 1_000_000))
    converter = PictureConverter(clip.path, video, task.max_height) if video else None
    sampler = FrameSampler(window.start, window.end, task.num_frames, converter)
    sound = WaveformCollector(window.start, window.end)
    collectors = {s.index: c for s, c in ((video, sampler), (audio, sound)) if s is not None}
    for stream, frame in _decoded_frames(container, collectors):
        task.deadline.check()
        if stream.type == "video":
            limits.check_picture(clip.path, frame.width, frame.height)
        else:
            limits.check_sound(clip.path, frame.layout.nb_channels, frame.sample_rate)
        collectors[stream.index].add(frame, origin)
    if seek and any(c.first is None or c.first > window.start for c in collectors.values()):
        return None
    if video and sampler.first is None and sound.first is None:
        limits.check_size_known(clip.path, video.codec_context.width)
    _check_complete(clip, window, max(sampler.last, sound.last))
    _check_times(clip, window, sound)
    frames, timestamps = sampler.finish()
    waveform = sound.finish()
    _check_samples(clip, waveform, window.start)
    return RawClip(
        frames=frames,
        timestamps=timestamps,
        waveform=waveform,
        duration=window.end - window.start,
        has_video=sampler.first is not None,
        has_audio=sound.first is not None,
        findings=(STILL_PICTURE,) if sampler.count == 1 else (),
    )


def _streams(
    container: "av.container.InputContainer", path: Path
) -> tuple["av.VideoStream | None", "av.AudioStream | None"]:
    """The best decodable video and audio streams; a cover picture in a music file does not count."""
    import av

    cover = av.stream.Disposition.attached_pic
    usable = [s for s in container.streams if s.type in ("video", "audio") and s.codec_context is not None]
    usable = [s for s in usable if not s.disposition & cover]
    if not usable:
        raise ClipError(path, "no streams", "has neither an audio nor a video stream that can be decoded")
    best = {kind: container.streams.best(kind) for kind in ("video", "audio")}
    for kind in best:
        of_kind = [s for s in usable if s.type == kind]
        if best[kind] not in of_kind:
            best[kind] = of_kind[0] if of_kind else None
    limits.check_streams(path, len(container.streams), best["video"], best["audio"])
    for stream in filter(None, best.values()):
        stream.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(limits.MAX_PIXELS)}  # sizes may change in a stream
    return best["video"], best["audio"]


def _window(
    container: "av.container.InputContainer", clip: Clip, streams: list["av.stream.Stream"], origin: float
) -> _Window:
    """The window to decode; packets are scanned if the container declares no duration."""
    declared = container.duration / 1_000_000 if (container.duration or 0) > 0 else None
    file_end = declared or _scan_duration(container, streams, origin)
    slack = _slack(file_end)
    start, end = clip.start or 0.0, file_end if clip.end is None else clip.end
    if start >= file_end or end > file_end + slack:
        raise ClipError(
            clip.path,
            "window beyond clip",
            f"the window {start:g} to {end:g} s reaches beyond the clip, which lasts {file_end:.2f} s",
        )
    limits.check_length(clip.path, min(end, file_end) - start, windowed=(start, clip.end) != (0.0, None))
    guessed = declared is None or set(container.format.name.split(",")) & HEADERLESS
    return _Window(start, min(end, file_end), None if guessed else declared)


def _slack(duration: float) -> float:
    return max(TOLERANCE, TOLERANCE_SHARE * duration)


def _scan_duration(
    container: "av.container.InputContainer", streams: list["av.stream.Stream"], origin: float
) -> float:
    """End of the last packet in seconds; reads the file once without decoding."""
    end = 0.0
    for packet in _packets(container, streams):
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base) - origin)
    container.seek(0)
    return end


def _packets(
    container: "av.container.InputContainer", streams: list["av.stream.Stream"]
) -> Iterator["av.Packet"]:
    """Packets up to the end of the file or to fatal damage; missing media show in the timestamps."""
    import av

    packets = container.demux(streams)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.FFmpegError, IndexError):  # IndexError: a damaged stream number
            return
        yield packet


def _decoded_frames(
    container: "av.container.InputContainer", collectors: dict[int, FrameSampler | WaveformCollector]
) -> Iterator[tuple["av.stream.Stream", "av.VideoFrame | av.AudioFrame"]]:
    """Pairs of stream and frame until all collectors are done; skips packets of finished streams."""
    import av

    for packet in _packets(container, [container.streams[index] for index in collectors]):
        index = packet.stream.index
        if all(collector.done for collector in collectors.values()):
            return
        if collectors[index].done:
            continue
        try:
            frames = packet.decode()
        except av.error.FFmpegError:  # skip a damaged packet, as players do
            continue
        for frame in frames:
            yield packet.stream, frame


def _check_times(clip: Clip, window: _Window, sound: WaveformCollector) -> None:
    """Refuse damaged timestamps that would pad the sound with hours of silence."""
    if sound.first is not None and min(sound.first, window.end) - window.start > LATEST_SOUND:
        late = f"the sound begins {sound.first - window.start:.0f} s after the window"
        raise ClipError(clip.path, "undecodable", f"cannot be decoded (damaged timestamps: {late})")


def _check_samples(clip: Clip, waveform: np.ndarray, start: float) -> None:
    """Refuse sound with values that are not finite or far beyond full scale."""
    index = first_bad_sample(waveform)
    if index is not None:
        value, seconds = waveform[index], start + index / SAMPLE_RATE
        detail = f"the sound has the value {value:g} at {seconds:.2f} s, where full scale is 1"
        raise ClipError(clip.path, "bad samples", detail)


def _check_complete(clip: Clip, window: _Window, decoded_end: float) -> None:
    """Refuse a clip whose media end well before the window or the declared duration."""
    if decoded_end < 0:
        raise ClipError(clip.path, "undecodable", "cannot be decoded (no frame and no sound comes out)")
    if window.declared is not None and decoded_end < window.end - _slack(window.end):
        raise ClipError(
            clip.path,
            "truncated",
            f"is truncated: decoding stops at {decoded_end:.2f} s of the declared {window.declared:.2f} s",
        )
