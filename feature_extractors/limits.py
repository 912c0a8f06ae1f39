# SPDX-License-Identifier: Apache-2.0
"""Limits on size, length, channels and decoding time of a clip, far above real recordings.

A few bytes of header can demand gigabytes of memory or days of work. Limits are checked in the header before
decoding, and again for each decoded frame, because streams can change.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from feature_extractors.clip import ClipError

if TYPE_CHECKING:
    import av

MAX_PIXELS = 8192 * 8192
"""Pixels of a frame; 8K video has half as many."""

MAX_UNPACKED = 32_000_000
"""Bytes of the unpacked texts and colour profile of a PNG picture; real ones have up to 3 MB."""

MAX_ASPECT = 16
"""Ratio of a frame's longer side to the shorter one; the widest screens have 3.6."""

MAX_SECONDS = 3600
"""Length of a clip or of its window; files may be longer if a window is given."""

MAX_FRAMES = 20_000_000
"""Frames that a header may declare: four days at 60 a second."""

MAX_STREAMS = 256
"""Streams in a file; a recorded television multiplex has about a hundred."""

MAX_CHANNELS = 64
"""Channels of a sound stream; large microphone arrays have as many."""

MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1_000, 768_000
"""Samples per second of a sound stream."""

MAX_DECLARED = 64_000_000
"""Bytes that a header may declare for a text, or for the unpacked index of a QuickTime file."""

MAX_MEMORY = 4_000_000_000
"""Bytes that a worker process may map for one clip; 8K video with many reference frames needs two billion."""

OPENING_SECONDS = 120.0
"""Time limit of a clip, in addition to `SECONDS_PER_SECOND` for its length."""

SECONDS_PER_SECOND = 10.0
"""Time limit for each second of media; one core decodes a second of 4K video in about one second."""


class Deadline:
    """Time limit of one clip, counted from creation; checked at each read and each decoded frame.

    Attributes:
        path: The clip's file.
        seconds: Total time allowed.
    """

    def __init__(self, path: Path):
        """Start the clock with the time limit for opening a file."""
        self.path = path
        self.seconds = OPENING_SECONDS
        self._began = time.monotonic()

    def allow(self, media_seconds: float) -> None:
        """Set the time limit for a clip of which this many seconds are decoded."""
        self.seconds = OPENING_SECONDS + SECONDS_PER_SECOND * media_seconds

    def check(self) -> None:
        """Check the time limit.

        Raises:
            ClipError: More than `seconds` have passed.
        """
        if time.monotonic() - self._began > self.seconds:
            raise too_slow(self.path, self.seconds)


def too_slow(path: Path, seconds: float) -> ClipError:
    """The error of a clip that was not extracted within this many seconds."""
    return ClipError(
        path, "too slow", f"takes longer than the {seconds:.0f} s allowed for a clip of its length"
    )


def too_much_memory(path: Path) -> ClipError:
    """The error of a clip that needs more memory than is allowed, or than there is."""
    return ClipError(path, "too much memory", "is damaged, or needs more memory than a clip may use")


def limit_memory(extra: int) -> None:
    """Limit the memory of this process; beyond it an allocation fails. Linux only; others have no such limit.

    Args:
        extra: Bytes that it may map in addition to those mapped now. An existing lower limit stays.
    """
    mapped = Path("/proc/self/statm")
    if not mapped.exists():
        return
    import resource

    pages = int(mapped.read_text().split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + extra
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most)
    )


def check_streams(
    path: Path, count: int, video: "av.VideoStream | None", audio: "av.AudioStream | None"
) -> None:
    """Check the number of streams, and what the header declares of the selected video and audio stream.

    Raises:
        ClipError: A limit is exceeded; names the value and the limit.
    """
    if count > MAX_STREAMS:
        raise ClipError(path, "too many streams", f"has {count:,} streams, more than {MAX_STREAMS}")
    if video is not None:
        check_picture(path, video.codec_context.width, video.codec_context.height)
        check_frames(path, video.frames)
    if audio is not None and audio.codec_context.sample_rate:  # zero means unknown
        check_sound(path, audio.codec_context.layout.nb_channels, audio.codec_context.sample_rate)


def check_frames(path: Path, frames: int) -> None:
    """Check the number of frames that a header declares.

    Raises:
        ClipError: There are too many; names the number and the limit.
    """
    if frames > MAX_FRAMES:
        raise ClipError(path, "too many frames", f"declares {frames:,} frames, more than {MAX_FRAMES:,}")


def check_picture(path: Path, width: int, height: int) -> None:
    """Check the size and the aspect ratio of a frame; zero means unknown.

    Raises:
        ClipError: A limit is exceeded; names the value and the limit.
    """
    if width * height > MAX_PIXELS:
        detail = f"has pictures of {width} x {height} pixels, more than {MAX_PIXELS:,} in all"
        raise ClipError(path, "picture too large", detail)
    if min(width, height) > 0 and max(width, height) > MAX_ASPECT * min(width, height):
        detail = f"has pictures of {width} x {height} pixels, an aspect ratio beyond {MAX_ASPECT}:1"
        raise ClipError(path, "picture too large", detail)


def check_size_known(path: Path, width: int) -> None:
    """Refuse frames whose width is still zero after decoding.

    A decoder stops at a frame of more than `MAX_PIXELS` before decoding it and reports no size.

    Raises:
        ClipError: The width is zero; names the limit.
    """
    if not width:
        detail = f"has pictures of more than {MAX_PIXELS:,} pixels in all, or of damaged size"
        raise ClipError(path, "picture too large", detail)


def check_channels_known(path: Path, channels: int) -> None:
    """Refuse sound that gave no samples and has no number of channels.

    FFmpeg reports no number for sound of more than 512 channels.

    Raises:
        ClipError: Naming the limit.
    """
    if not channels:
        detail = f"has more than {MAX_CHANNELS} sound channels, or a damaged number of them"
        raise ClipError(path, "unusual sound", detail)


def check_sound(path: Path, channels: int, sample_rate: int) -> None:
    """Check the number of channels and the sample rate.

    Raises:
        ClipError: A limit is exceeded; names the value and the limit.
    """
    if channels > MAX_CHANNELS:
        raise ClipError(path, "unusual sound", f"has {channels} sound channels, more than {MAX_CHANNELS}")
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        allowed = f"{MIN_SAMPLE_RATE:,} to {MAX_SAMPLE_RATE:,}"
        detail = f"has sound of {sample_rate:,} samples a second, outside {allowed}"
        raise ClipError(path, "unusual sound", detail)


def check_length(path: Path, seconds: float, windowed: bool) -> None:
    """Check the length of a clip or window.

    Raises:
        ClipError: It is too long; names the length and the limit.
    """
    if seconds > MAX_SECONDS:
        subject = "the window" if windowed else "the clip"
        raise ClipError(path, "too long", f"{subject} lasts {seconds:,.0f} s, more than {MAX_SECONDS:,} s")
