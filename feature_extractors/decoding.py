# SPDX-License-Identifier: Apache-2.0
"""Decode a media file with PyAV to a few RGB frames with timestamps and a 16 kHz mono waveform.

Decoding relies on timestamps, because frame counts and frame rates in headers are often missing or wrong. One
pass over the file serves both streams. Only frames that are kept are converted and scaled. Decoders run on
one thread: for short clips this is faster than several (5.4 against 7.4 ms a clip), and it leaves the cores
to other processes.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from feature_extractors import limits
from feature_extractors.audio import first_bad_sample, is_silent
from feature_extractors.clip import (
    SAMPLE_RATE,
    STILL_PICTURE,
    Clip,
    ClipError,
    RawClip,
    audio_track_finding,
    cancelled_channels_finding,
    is_region,
    scene_cuts_finding,
)
from feature_extractors.collecting import FrameSampler, OverlappingWindows, WaveformCollector
from feature_extractors.limits import Deadline
from feature_extractors.opening import open_media
from feature_extractors.pictures import PictureConverter, decoder_of

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

LATEST_PART = 10.0
"""Seconds after the end of a window of a long recording at which it is complete though one stream has shown
nothing later: that stream has a gap, or has ended."""

LATEST_SOUND = 600.0
"""Sound that starts later than this many seconds into a window indicates damaged timestamps."""

# fmt: off
TIMED_AT_END = {"mpeg", "mpegts"}
"""Formats without a duration in the header; FFmpeg reads it from the last timestamps."""

GUESSED = {
    "mp3", "aac", "loas", "ac3", "eac3", "ac4", "dts", "dtshd", "truehd", "mlp", "amr", "amrnb", "amrwb",
    "gsm", "g722", "g723_1", "g726", "g729", "sbc", "codec2", "spdif", "mpegvideo", "mjpeg", "m4v", "h261",
    "h263", "h264", "hevc", "vvc", "vc1", "cavsvideo", "av1", "obu", "apv", "evc", "avs2", "avs3", "dirac",
    "dnxhd",
}
"""Formats without a duration in the header; FFmpeg guesses it from the bit rate, if at all."""
# fmt: on


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
            streams, beyond a limit (size, length, channels, metadata, time, memory), or has samples that are
            not finite or far beyond full scale; or the window is invalid or outside the file, or the region
            outside the frame.
    """
    clip = _checked(clip)
    deadline = deadline or Deadline(clip.path)
    reading = _Reading(clip, num_frames, max_height, deadline, seek=(clip.start or 0) > SEEK_FROM)
    with _as_clip_errors(clip.path):
        media = _read(reading)
        media, findings = _with_best_sound(reading, media)
    _check_samples(clip, media.waveform, media.window.start)
    return RawClip(
        frames=media.frames,
        timestamps=media.timestamps,
        waveform=media.waveform,
        duration=media.window.end - media.window.start,
        has_video=media.has_video,
        has_audio=media.has_audio,
        findings=media.findings + findings,
        cuts=media.cuts,
    )


def decode_windows(
    clip: Clip, seconds: float, step: float, num_frames: int = 8, max_height: int = 480
) -> Iterator[tuple[Clip, RawClip]]:
    """Decode overlapping windows of a recording in one pass; memory does not grow with its length.

    All windows have the same length. The last one ends with the recording, so it may overlap more. A
    recording that is shorter than a window is one window. A window whose default audio track is silent, or
    whose channels cancel each other, is decoded once more on its own, as in `decode`.

    Args:
        clip: The recording, of any length; may be a part of a file.
        seconds: Length of a window.
        step: Seconds from the start of a window to that of the next.
        num_frames: Number of frames of each window, as in `decode`.
        max_height: As in `decode`.

    Yields:
        Each window as a `Clip` of its own and decoded, in order.

    Raises:
        ClipError: As in `decode`. A file that turns out to be truncated, or damaged in some other way, raises
            it after the windows before the damage.
    """
    clip = _checked(clip)
    deadline = Deadline(clip.path)
    reading = _Reading(clip, num_frames, max_height, deadline, seek=False, any_length=True)
    with _as_clip_errors(clip.path), open_media(clip.path, deadline) as container:
        video, tracks = _streams(container, clip)
        audio = tracks[0] if tracks else None
        window = _window(container, reading, [s for s in (video, audio) if s is not None])
        origin = window.origin
        deadline.allow(window.end)
        windows = windows_of(window.start, window.end, seconds, step)
        converter = PictureConverter(clip.path, video, max_height) if video else None
        pictures = OverlappingWindows(
            windows, lambda start, end: FrameSampler(start, end, num_frames, converter), PRE_ROLL
        )
        sound = OverlappingWindows(windows, WaveformCollector, PRE_ROLL)
        collectors = {s.index: c for s, c in ((video, pictures), (audio, sound)) if s is not None}
        findings = ()
        if len(tracks) > 1:
            number = list(container.streams.audio).index(audio) + 1
            findings = (audio_track_finding(number, len(tracks)),)
        taken = 0

        def take() -> tuple[Clip, RawClip]:
            nonlocal taken
            start, end = windows[taken]
            taken += 1
            part = replace(clip, start=start, end=end)
            sampler, collector = pictures.take(origin), sound.take(origin)
            waveform = collector.finish()
            if collector.cancelled() is not None or (len(tracks) > 1 and is_silent(waveform)):
                return part, decode(part, num_frames, max_height)
            _check_samples(clip, waveform, start)
            frames, timestamps = sampler.finish()
            return part, RawClip(
                frames=frames,
                timestamps=timestamps,
                waveform=waveform,
                duration=end - start,
                has_video=sampler.first is not None,
                has_audio=collector.first is not None,
                findings=_picture_findings(sampler) + findings,
                cuts=sampler.cuts,
            )

        for stream, frame in _decoded_frames(container, collectors, origin, to_end=False):
            deadline.check()
            if stream.type == "video":
                limits.check_picture(clip.path, frame.width, frame.height)
            else:
                limits.check_sound(clip.path, frame.layout.nb_channels, frame.sample_rate)
            collectors[stream.index].add(frame, origin)
            while taken < len(windows) and (
                all(collector.is_first_done for collector in collectors.values())
                or max(pictures.time, sound.time) > windows[taken][1] + LATEST_PART
            ):
                yield take()
        _check_complete(reading, window, max(pictures.last, sound.last))
        while taken < len(windows):
            yield take()


def decode_sound(
    clip: Clip, seconds: float, margin: float
) -> Iterator[tuple[float, float, float, np.ndarray]]:
    """Decode the sound of a recording of any length in equal parts, without its pictures.

    Args:
        clip: The recording; may be a part of a file.
        seconds: About the length of a part.
        margin: Seconds of sound that a part has in addition, from before its start and after its end.

    Yields:
        Start and end of each part and the time of its first sample, in seconds from the clip's start, and the
        sound (samples,), float32 at `SAMPLE_RATE`. Nothing if there is no sound.

    Raises:
        ClipError: As in `decode`; the recording may be longer than `decode` allows.
    """
    length, origin = media_seconds(clip), clip.start or 0.0
    count = max(1, round(length / seconds))
    bounds = [length * place / count for place in range(count + 1)]
    for start, end in pairwise(bounds):
        first = max(start - margin, 0.0)
        part = _checked(replace(clip, start=origin + first, end=origin + min(end + margin, length)))
        deadline = Deadline(clip.path)
        reading = _Reading(part, 1, 64, deadline, part.start > SEEK_FROM, picture=False, any_length=True)
        with _as_clip_errors(clip.path):
            media, _ = _with_best_sound(reading, _read(reading))
        if not media.tracks:
            return
        _check_samples(part, media.waveform, part.start)
        yield start, end, first, media.waveform


def windows_of(start: float, end: float, seconds: float, step: float) -> list[tuple[float, float]]:
    """Start and end of windows of equal length that cover a recording; the last one ends with it.

    The last two are up to a tenth of a step further apart, rather than nearly the same.
    """
    last = end - seconds
    if last <= start:
        return [(start, end)]
    count = math.ceil((last - start) / step - 0.1)
    return [(start + step * index, start + step * index + seconds) for index in range(count)] + [(last, end)]


def media_seconds(clip: Clip) -> float:
    """Length of a recording in seconds, from its header if that is reliable; decodes nothing.

    Raises:
        ClipError: As in `decode`, as far as the header shows it; the length has no limit.
    """
    clip = _checked(clip)
    deadline = Deadline(clip.path)
    with _as_clip_errors(clip.path), open_media(clip.path, deadline) as container:
        video, tracks = _streams(container, clip)
        reading = _Reading(clip, 1, 64, deadline, seek=False, any_length=True)
        window = _window(container, reading, [s for s in (video, *tracks[:1]) if s is not None])
    return window.end - window.start


def _checked(clip: Clip) -> Clip:
    """The clip with a `Path`, after the checks that need no decoding."""
    clip = replace(clip, path=Path(clip.path))
    check_file(clip.path)
    _check_window(clip)
    _check_region(clip)
    return clip


@contextmanager
def _as_clip_errors(path: Path) -> Iterator[None]:
    """Turn errors of FFmpeg and of memory into those of a clip."""
    import av

    try:
        yield
    except MemoryError as error:
        raise limits.too_much_memory(path) from error
    except (av.error.FFmpegError, OSError, OverflowError) as error:  # OverflowError: times beyond 64 bits
        raise ClipError(path, "undecodable", f"cannot be decoded ({_reason(error)})") from error


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
class _Reading:
    """The arguments of one pass over the file.

    Attributes:
        clip: The file, window and audio track.
        num_frames: Number of frames.
        max_height: Limit of the shorter side, as in `decode`.
        deadline: Time limit.
        seek: Whether to start near the window instead of at the start of the file.
        length: Length of the media in seconds if it is known from an earlier pass.
        origin: Start of the media on the container's clock, in seconds, if it is known from an earlier pass.
        picture: Whether to decode the video.
        track: Position of the audio track in the order of `_audio_tracks`.
        channel: Index of the channel to use instead of the mean; None for the mean.
        any_length: Whether the recording may be longer than a clip.
    """

    clip: Clip
    num_frames: int
    max_height: int
    deadline: Deadline
    seek: bool
    length: float | None = None
    origin: float | None = None
    picture: bool = True
    track: int = 0
    channel: int | None = None
    any_length: bool = False


@dataclass(frozen=True)
class _Window:
    """Times in seconds from the start of the file.

    Attributes:
        start: Start of the window.
        end: End of the window.
        length: Length of the media, measured or declared.
        origin: Start of the file on the container's clock.
        declared: The header's duration, which intact media reach; None if it is not reliable.
        of_streams: Whether `declared` is the duration of the selected streams, not of the whole file.
    """

    start: float
    end: float
    length: float
    origin: float
    declared: float | None
    of_streams: bool


@dataclass(frozen=True)
class _Media:
    """The result of one pass, as in `RawClip`.

    Attributes:
        tracks: Numbers of the audio tracks, counted from 1; the preferred one first.
        cancelled: Index of the loudest channel if the channels cancel each other, else None.
        sound_end: End of the sound in seconds from the start of the file, -1 without sound.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    waveform: np.ndarray
    has_video: bool
    has_audio: bool
    window: _Window
    tracks: tuple[int, ...]
    cancelled: int | None
    sound_end: float
    findings: tuple[str, ...]
    cuts: tuple[float, ...]


def _with_best_sound(whole: _Reading, media: _Media) -> tuple[_Media, tuple[str, ...]]:
    """Select the first audible track, and one channel if all cancel out; returns the media with findings."""
    window = media.window
    reading = replace(whole, picture=False, length=window.length, origin=window.origin)
    tracks = media.tracks if reading.clip.audio_track is None else media.tracks[:1]
    sound, used, chosen = media, (), reading
    for track, number in enumerate(tracks):
        choice = replace(reading, track=track)
        candidate = media if track == 0 else _read(choice)
        findings = []
        if len(tracks) > 1:
            silent = tracks[0] if track else None
            findings.append(audio_track_finding(number, len(tracks), silent))
        if candidate.cancelled is not None:
            findings.append(cancelled_channels_finding(candidate.cancelled + 1))
            choice = replace(choice, channel=candidate.cancelled)
            candidate = _read(choice)
        if track == 0 or not is_silent(candidate.waveform):
            sound, used, chosen = candidate, tuple(findings), choice
        if not is_silent(candidate.waveform):
            break
    if whole.clip.end is None and sound.sound_end > window.end + _slack(window.end):
        media = _read(replace(whole, track=chosen.track, channel=chosen.channel))  # as long as its sound
        return media, used
    return replace(media, waveform=sound.waveform, has_audio=sound.has_audio), used


def _read(reading: _Reading) -> _Media:
    """Read the file once; read it again if seeking missed the window or the header's duration is wrong."""
    clip, deadline = reading.clip, reading.deadline
    with open_media(clip.path, deadline) as container:
        video, tracks = _streams(container, clip)
        audio = tracks[reading.track] if tracks else None
        every = [s.index for s in container.streams.audio]
        numbers = tuple(every.index(s.index) + 1 for s in tracks)
        chosen = [s for s in (video, audio) if s is not None]
        window = _window(container, reading, chosen)
        origin = window.origin
        deadline.allow(window.end - (window.start if reading.seek else 0.0))
        if reading.seek:
            container.seek(int((origin + window.start - PRE_ROLL) * 1_000_000))
        converter = PictureConverter(clip.path, video, reading.max_height) if video else None
        sampler = FrameSampler(window.start, window.end, reading.num_frames, converter)
        sound = WaveformCollector(window.start, window.end, reading.channel)
        collectors = {s.index: c for s, c in ((video, sampler), (audio, sound)) if s is not None}
        if not reading.picture and audio is not None:
            collectors = {audio.index: sound}
        for stream, frame in _decoded_frames(container, collectors, origin, to_end=clip.end is None):
            deadline.check()
            if stream.type == "video":
                limits.check_picture(clip.path, frame.width, frame.height)
            else:
                limits.check_sound(clip.path, frame.layout.nb_channels, frame.sample_rate)
            collectors[stream.index].add(frame, origin)
        waveform = sound.finish()
        if reading.seek and any(c.first is None or c.first > window.start for c in collectors.values()):
            return _read(replace(reading, seek=False))  # as in files without an index
        if audio and sound.first is None:
            limits.check_channels_known(clip.path, audio.codec_context.layout.nb_channels)
        if video and sampler.first is None and sound.first is None:
            limits.check_size_known(clip.path, video.codec_context.width)
    if reading.length is None and reading.picture:
        decoded_end = max(sampler.last, sound.last)
        _check_complete(reading, window, decoded_end)
        if clip.end is None and abs(decoded_end - window.length) > _slack(window.length):
            return _read(replace(reading, length=decoded_end, origin=window.origin))
    _check_times(clip, window, sound)
    frames, timestamps = sampler.finish()
    return _Media(
        frames=frames,
        timestamps=timestamps,
        waveform=waveform,
        has_video=sampler.first is not None,
        has_audio=sound.first is not None,
        window=window,
        tracks=numbers,
        cancelled=sound.cancelled(),
        sound_end=sound.last,
        findings=_picture_findings(sampler),
        cuts=sampler.cuts,
    )


def _picture_findings(sampler: FrameSampler) -> tuple[str, ...]:
    """What the pictures of a window show before any face is found."""
    still = (STILL_PICTURE,) if sampler.count == 1 else ()
    cuts = [sampler.start + time for time in sampler.cuts]
    return (*still, scene_cuts_finding(cuts)) if cuts else still


def _streams(
    container: "av.container.InputContainer", clip: Clip
) -> tuple["av.VideoStream | None", list["av.AudioStream"]]:
    """The best video stream, and the audio streams with the preferred one first."""
    usable = _usable(container)
    if not usable:
        raise ClipError(
            clip.path, "no streams", "has neither an audio nor a video stream that can be decoded"
        )
    videos = [s for s in usable if s.type == "video"]
    best = container.streams.best("video")
    video = best if best in videos else next(iter(videos), None)
    tracks = _audio_tracks(container, clip, [s for s in usable if s.type == "audio"])
    limits.check_streams(clip.path, len(container.streams), video, tracks[0] if tracks else None)
    for stream in usable:
        stream.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(limits.MAX_PIXELS)}  # pictures may grow on the way
    return video, tracks


def _usable(container: "av.container.InputContainer") -> "list[av.stream.Stream]":
    """Decodable audio and video streams; a cover picture in a music file does not count."""
    import av

    cover = av.stream.Disposition.attached_pic
    media = [s for s in container.streams if s.type in ("video", "audio") and s.codec_context is not None]
    return [s for s in media if not s.disposition & cover]


def _audio_tracks(
    container: "av.container.InputContainer", clip: Clip, usable: "list[av.AudioStream]"
) -> "list[av.AudioStream]":
    """The requested track alone; or all: default tracks first, those for impaired viewers last.

    A file without sound has no track to choose, which is no error: a number may apply to a whole corpus.
    """
    from av.stream import Disposition

    every = container.streams.audio
    if clip.audio_track is not None and every:
        if not 1 <= clip.audio_track <= len(every) or every[clip.audio_track - 1] not in usable:
            held = f"{len(every)} audio track{'s' * (len(every) != 1)}"
            raise ClipError(
                clip.path,
                "no such track",
                f"has {held}, none that can be decoded is number {clip.audio_track}",
            )
        return [every[clip.audio_track - 1]]
    special = Disposition.hearing_impaired | Disposition.visual_impaired | Disposition.comment
    return sorted(
        usable, key=lambda s: (not s.disposition & Disposition.default, bool(s.disposition & special))
    )


def _window(
    container: "av.container.InputContainer", reading: _Reading, streams: "list[av.stream.Stream]"
) -> _Window:
    """The window to decode.

    Packets are scanned if the header has no reliable duration, if the media start late, because some headers
    count from 0 and others from the start, and before a window is refused.
    """
    clip = reading.clip
    declared = container.duration / 1_000_000 if (container.duration or 0) > 0 else None
    origin = _start_time(container) if reading.origin is None else reading.origin
    formats = set(container.format.name.split(","))
    guessed = bool(formats & GUESSED) or declared is None
    trusted = not guessed and not formats & TIMED_AT_END
    of_streams = False
    if trusted:
        declared -= origin if origin and origin > TOLERANCE else 0.0
        ends = [_declared_end(s) for s in streams]
        if None not in ends and (of_streams := max(ends) - (origin or 0.0) < declared - _slack(declared)):
            declared = max(ends) - (origin or 0.0)
    length = reading.length
    if length is None:
        late = trusted and origin is not None and origin > TOLERANCE
        if late or declared is None or (guessed and (clip.end is None or origin is None)):
            length, origin = _scan(reading, streams, origin)
        else:
            length = declared
    start, end = clip.start or 0.0, length if clip.end is None else clip.end
    if reading.length is None and _is_beyond(start, end, length):
        length, origin = _scan(reading, streams, origin)
    if _is_beyond(start, end, length):
        raise _beyond(clip, start, end, length)
    if not reading.any_length:
        limits.check_length(clip.path, min(end, length) - start, windowed=(start, clip.end) != (0.0, None))
    declared = declared if trusted else None
    return _Window(start, min(end, length), length, origin or 0.0, declared, of_streams)


def _is_beyond(start: float, end: float, length: float) -> bool:
    return start >= length or end > length + _slack(length)


def _beyond(clip: Clip, start: float, end: float, length: float) -> ClipError:
    if (clip.start, clip.end) == (None, None):
        return ClipError(clip.path, "undecodable", "cannot be decoded (it contains no media)")
    return ClipError(
        clip.path,
        "window beyond clip",
        f"the window {start:g} to {end:g} s reaches beyond the clip, which lasts {length:.2f} s",
    )


def _start_time(container: "av.container.InputContainer") -> float | None:
    """Time of the first picture or sound on the container's clock, in seconds; None if unknown."""
    times = [s.start_time * s.time_base for s in _usable(container) if s.start_time is not None]
    if times:
        return round(min(times) * 1_000_000) / 1_000_000
    return None if container.start_time is None else container.start_time / 1_000_000


def _declared_end(stream: "av.stream.Stream") -> float | None:
    """End of a stream by its own header, on the container's clock in seconds; None if it has none."""
    tag = next((value for name, value in stream.metadata.items() if name.startswith("DURATION")), "")
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", tag):  # Matroska
        hours, minutes, seconds = map(float, match.groups())
        return 3600 * hours + 60 * minutes + seconds
    if stream.duration is None or stream.time_base is None:
        return None
    return float((stream.duration + (stream.start_time or 0)) * stream.time_base)


def _slack(duration: float) -> float:
    return max(TOLERANCE, TOLERANCE_SHARE * duration)


def _scan(
    reading: _Reading, streams: "Sequence[av.stream.Stream] | None", origin: float | None
) -> tuple[float, float]:
    """Length of streams and their start on the container's clock, in seconds, from packets; decodes nothing.

    Args:
        reading: The file and its deadline.
        streams: The streams to measure; None for all.
        origin: The start, if it is known.
    """
    begins: dict[int, float] = {}
    latest: dict[int, float] = {}
    ends: dict[int, float] = {}
    with open_media(reading.clip.path, reading.deadline) as container:
        indices = [s.index for s in (container.streams if streams is None else streams)]
        measured = [container.streams[index] for index in indices]
        units = {stream.index: float(stream.time_base) for stream in measured if stream.time_base}
        for packet in _packets(container, measured):
            index = packet.stream.index
            if not packet.size or index not in units:
                continue
            time = ends.get(index, 0.0) if packet.pts is None else packet.pts * units[index]
            begins[index] = min(begins.get(index, time), time)
            if time >= latest.get(index, time):  # an earlier packet's duration may be wrong
                latest[index], ends[index] = time, time + (packet.duration or 0) * units[index]
    origin = min(begins.values(), default=0.0) if origin is None else origin
    return max(ends.values(), default=origin) - origin, origin


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
    container: "av.container.InputContainer",
    collectors: dict[int, FrameSampler | WaveformCollector | OverlappingWindows],
    origin: float,
    to_end: bool,
) -> Iterator[tuple["av.stream.Stream", "av.VideoFrame | av.AudioFrame"]]:
    """Pairs of stream and frame until all collectors are done; skips packets of finished streams.

    With `to_end` everything is decoded, because the header's duration may be too short. Pictures that are
    not needed and that no other picture refers to are not decoded.
    """
    import av

    streams = [container.streams[index] for index in collectors]
    units = {stream.index: float(stream.time_base) for stream in streams}
    decoders = {stream.index: decoder_of(stream) for stream in streams}
    for packet in _packets(container, streams):
        collector = collectors[packet.stream.index]
        if not to_end:
            if all(collector.done for collector in collectors.values()):
                return
            if collector.done:
                continue
        if packet.stream.type == "video":
            index, pts = packet.stream.index, packet.pts
            skip = pts is not None and collector.may_skip(pts * units[index] - origin)
            decoders[index].skip_frame = "NONREF" if skip else "DEFAULT"
        try:
            frames = decoders[packet.stream.index].decode(packet)
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


def _check_complete(reading: _Reading, window: _Window, decoded_end: float) -> None:
    """Refuse a clip whose media end well before the window or the declared duration.

    An intact file may declare the duration of a stream that is not decoded, such as subtitles.
    """
    clip = reading.clip
    if decoded_end < 0:
        raise ClipError(clip.path, "undecodable", "cannot be decoded (no frame and no sound comes out)")
    if window.declared is None:
        return
    wanted = max(window.end, window.declared) if clip.end is None else window.end
    if decoded_end >= wanted - _slack(wanted):
        return
    lacking = decoded_end < window.declared - _slack(window.declared)
    if lacking and not window.of_streams:
        late = window.origin > TOLERANCE  # as in `_window`, where `declared` is made
        last_packet, _ = _scan(reading, None, window.origin if late else 0.0)
        lacking = last_packet < window.declared - _slack(window.declared)
    if lacking:
        raise ClipError(
            clip.path,
            "truncated",
            f"is truncated: decoding stops at {decoded_end:.2f} s of the declared {window.declared:.2f} s",
        )
    if _is_beyond(window.start, window.end, decoded_end) and clip.end is not None:
        raise _beyond(clip, window.start, clip.end, decoded_end)
