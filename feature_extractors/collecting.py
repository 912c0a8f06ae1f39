# SPDX-License-Identifier: Apache-2.0
"""Collect what is needed while a file is decoded: frames at given times, and one waveform.

Both collectors receive frames in order and set `done` when they need no more. Their `first` and `last` times
show whether the file is truncated or a seek missed its target.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from feature_extractors.clip import SAMPLE_RATE
from feature_extractors.cuts import CutDetector
from feature_extractors.pictures import DecodedFrame, PictureConverter, together

if TYPE_CHECKING:
    import av

LOOK_AHEAD = 2
"""Audio frames on each side over which the median deviation is taken."""

MAX_DEVIATION = 0.01
"""Seconds by which sound may differ from its timestamps: one step of the spectrogram."""

CANCELLATION = 0.1
"""Channels cancel if the power of their mean is less than this share of that of independent channels."""

ROUNDING = 1e-6
"""Seconds by which computed times may differ."""

JOINED_SAMPLES = 8192
"""Samples that are resampled at once."""

PYAV_PLANES = 8
"""Channels in separate planes from which on PyAV reads beyond its list of planes."""

REMEMBERED = 64
"""Number of frame times that are remembered; decoders reorder far fewer frames."""


class FrameSampler:
    """Keeps the frames that are displayed at the midpoints of `num_frames` equal intervals of a window.

    A frame is displayed from its own time until that of the next frame; the first frame also covers the time
    before it. Only two pending frames are held, so long clips need no more memory than short ones.

    Attributes:
        first: Time of the first frame received, None before it; seconds from the start of the file.
        last: End of the last displayed frame received, -1 before it.
        done: Whether no later frame is needed.
        count: Number of frames received.
    """

    def __init__(self, start: float, end: float, num_frames: int, converter: PictureConverter | None):
        """Create a sampler for one window, in seconds from the start of the file; no video, no converter."""
        self.start, self.end = start, end
        self.count = 0
        self.targets = (start + (end - start) * (np.arange(num_frames) + 0.5) / num_frames).tolist()
        self.first: float | None = None
        self.last = -1.0
        self.done = False
        self._interlaced = False
        self._announced: list[float] = []  # times of the latest packets, sorted
        self._next = 0  # index of the first target that has no frame yet
        self._converter = converter
        self._latest = -math.inf  # time of the last displayed frame received
        self._held: tuple[float, DecodedFrame] | None = None
        self._before_held: DecodedFrame | None = None
        self._kept: list[tuple[float, np.ndarray]] = []
        self._detector = CutDetector()

    @property
    def cuts(self) -> tuple[float, ...]:
        """Times of the scene cuts within the window, in seconds from its start."""
        return tuple(time - self.start for time in self._detector.times if self.start < time < self.end)

    def may_skip(self, time: float) -> bool:
        """Whether the frame of a packet is certainly not needed.

        It is not needed if the frame of an earlier packet is displayed after it and no midpoint lies between
        the two, which happens where frames are reordered. Interlaced frames need their neighbours.

        Args:
            time: Time of the packet's frame. Call this for each packet, in the order of the file.
        """
        later = bisect_right(self._announced, time)
        following = self._announced[later] if later < len(self._announced) else None
        insort(self._announced, time)
        if len(self._announced) > 2 * REMEMBERED:
            del self._announced[:REMEMBERED]
        if following is None or self._interlaced or not self.count:
            return False
        target = bisect_left(self.targets, time - ROUNDING)
        return target == len(self.targets) or self.targets[target] >= following + ROUNDING

    def add(self, frame: "av.VideoFrame", origin: float) -> None:
        """Receive the next frame; a frame without a timestamp directly follows the one before it."""
        time = max(self.last, 0.0) if frame.time is None else frame.time - origin
        if self.first is None:
            self.first = time
        decoded = self._converter.receive(frame)
        self._detector.add(frame, time)
        self._interlaced |= decoded.fields is not None
        self._settle(time, decoded)
        self._before_held = self._held and self._held[1]
        self._held = (time, decoded)
        self.count += 1
        length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
        if time >= self._latest:  # lengths before a jump in time, or of reordered frames, may be wrong
            self._latest, self.last = time, time + length
        self.done = self._next >= len(self.targets) and time >= self.end

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Frames (frames, height, width, 3) uint8 RGB and their times (frames,) from the window's start."""
        self._settle(np.inf, None)
        if not self._kept:
            return np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0)
        times, pictures = zip(*self._kept, strict=True)
        return together(pictures), np.array(times, np.float64) - self.start

    def _settle(self, time: float, following: DecodedFrame | None) -> None:
        """Keep the held frame if a target lies before `time`, the time of the following frame."""
        waiting = self._next
        while self._next < len(self.targets) and self.targets[self._next] < time:
            self._next += 1
        if self._held is None:  # there is no frame yet; the first one will cover these targets
            self._next = waiting
        elif self._next > waiting and self._held[0] <= self.end:
            picture = self._converter.convert(self._held[1], self._before_held, following)
            self._kept.append((self._held[0], picture))


class WaveformCollector:
    """Converts audio frames to mono at `SAMPLE_RATE` and cuts out the window.

    Samples are placed by their timestamps. Gaps are filled with zeros. Where sound overlaps, the earlier
    sound is kept. Sample 0 is always at the window's start, so sound and frames are synchronous. Because
    timestamps are noisy, frames are joined without a gap until the median deviation of five frames exceeds
    `MAX_DEVIATION`. If timestamps jump back, as in concatenated recordings, the sound continues without one.

    The mono sound is the mean of the channels, whatever the layout. It is taken before resampling.

    Attributes:
        first: Start of the sound, None before the first frame; seconds from the start of the file.
        last: End of the sound placed so far, -1 before the first frame.
        done: Whether no later sound is needed.
    """

    def __init__(self, start: float, end: float, channel: int | None = None):
        """Create a collector for one window.

        Args:
            start: Start of the window in seconds from the start of the file.
            end: End of the window.
            channel: Index of the channel to use instead of the mean; None for the mean.
        """
        self.start, self.end, self.channel = start, end, channel
        self.first: float | None = None
        self.last = -1.0
        self.done = False
        self._powers: np.ndarray | None = None  # sum of squares of each channel, within the window
        self._mixed_power = 0.0  # the same of the mean of the channels
        self._waiting: deque[tuple[np.ndarray, int]] = (
            deque()
        )  # samples and rate of frames that are not placed yet
        self._deviations: list[float] = []  # of each frame: its time minus the length of all frames before it
        self._received = 0.0  # seconds of sound received
        self._placed = 0.0  # seconds of sound placed
        self._deviation: float | None = None  # of the sound that is being placed
        self._restarts = 0.0  # seconds added to timestamps because they jumped back
        self._begin = -math.inf  # start of the last frame placed
        self._resampler: av.AudioResampler | None = None
        self._rate = 0
        self._joined: list[np.ndarray] = []  # samples that wait to be resampled together
        self._joined_length = 0
        self._length = round((end - start) * SAMPLE_RATE)
        self._at = 0  # position in the window of the resampler's next sample
        self._filled = 0  # the window is filled up to here
        self._pieces: list[tuple[int, np.ndarray]] = []  # position and samples

    def add(self, frame: "av.AudioFrame", origin: float) -> None:
        """Receive the next audio frame, of any format; the format may change between frames."""
        channels = _channels(frame)
        if frame.time is None:  # directly follows the frame before it
            deviation = self._deviations[-1] if self._deviations else 0.0
        else:
            deviation = frame.time - origin - self._received
        time, seconds = self._received + deviation, frame.samples / frame.sample_rate
        if self.first is None:
            self.first = time
        mean = channels[0] if len(channels) == 1 else channels.mean(axis=0)
        if time < self.end and time + seconds > self.start:
            self._measure(channels, mean)
        one = self.channel is not None and self.channel < len(channels)
        self._deviations.append(deviation)
        self._received += seconds
        self._waiting.append((channels[self.channel] if one else mean, frame.sample_rate))
        if len(self._waiting) > LOOK_AHEAD:
            self._place_next()

    def finish(self) -> np.ndarray:
        """The window's sound (samples,), float32; empty if there is none."""
        while self._waiting:
            self._place_next()
        self._flush()
        sound = np.zeros(self._filled, np.float32)
        for at, samples in self._pieces:
            sound[at : at + len(samples)] = samples
        return sound

    def cancelled(self) -> int | None:
        """Index of the loudest channel if the channels cancel each other in their mean, else None.

        The mean of n independent channels has the sum of their powers divided by n squared.
        """
        if self._powers is None or len(self._powers) < 2:
            return None
        expected = float(self._powers.sum()) / len(self._powers) ** 2
        return int(self._powers.argmax()) if self._mixed_power < CANCELLATION * expected else None

    def _measure(self, channels: np.ndarray, mean: np.ndarray) -> None:
        """Add to the power of channels and mean; starts again if the number of channels changes."""
        if self._powers is None or len(self._powers) != len(channels):
            self._powers, self._mixed_power = np.zeros(len(channels)), 0.0
        if len(channels) > 1:
            with np.errstate(over="ignore", invalid="ignore"):  # such values are refused later
                self._powers += np.square(channels).sum(axis=1)
                self._mixed_power += float(np.square(mean).sum())

    def _place_next(self) -> None:
        """Place the frame that has waited longest, and resample it."""
        index = len(self._deviations) - len(self._waiting)
        reach = min(index, len(self._waiting) - 1, LOOK_AHEAD)
        median = sorted(self._deviations[index - reach : index + reach + 1])[reach]
        samples, rate = self._waiting.popleft()
        deviation = median + self._restarts
        if self._deviation is not None and self._placed + deviation < self._begin - MAX_DEVIATION:
            self._restarts += self._deviation - deviation
            deviation = self._deviation
        if self._deviation is None or abs(deviation - self._deviation) > MAX_DEVIATION:
            self._flush()
            self._deviation = deviation
            self._at = round((self._placed + deviation - self.start) * SAMPLE_RATE)
            self._filled = max(self._filled, min(self._at, self._length))  # a gap is filled with zeros
        elif rate != self._rate:
            self._flush()
        self._begin = self._placed + self._deviation
        self._placed += len(samples) / rate
        self.last = max(self.last, self._placed + self._deviation)
        self.done = self.last >= self.end
        self._resample(samples, rate)

    def _resample(self, samples: np.ndarray, rate: int) -> None:
        """Resample several frames at once, which is faster than one by one."""
        self._rate = rate
        self._joined.append(samples)
        self._joined_length += len(samples)
        if self._joined_length >= JOINED_SAMPLES:
            self._resample_joined()

    def _resample_joined(self) -> None:
        import av

        if self._resampler is None:
            self._resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
        frame = av.AudioFrame.from_ndarray(np.concatenate(self._joined)[None], "flt", "mono")
        frame.sample_rate = self._rate
        self._joined, self._joined_length = [], 0
        self._keep(self._resampler.resample(frame))

    def _flush(self) -> None:
        """Get the last samples from the resampler, which cannot be used afterwards."""
        if self._joined:
            self._resample_joined()
        if self._resampler is not None:
            self._keep(self._resampler.resample(None))
            self._resampler = None

    def _keep(self, resampled: "list[av.AudioFrame]") -> None:
        """Keep samples that are in the window, at positions that are not filled yet."""
        for piece in resampled:
            samples = piece.to_ndarray()[0]
            begin, end = max(self._at, self._filled), min(self._at + len(samples), self._length)
            if begin < end:
                self._pieces.append((begin, samples[begin - self._at : end - self._at]))
                self._filled = end
            self._at += len(samples)


class OverlappingWindows:
    """Passes the frames of one stream on to a collector for each of many windows, which may overlap.

    A collector exists from shortly before its window until `take`, so memory does not grow with the length of
    the recording. A window starts with the picture that is displayed then.

    Attributes:
        time: Time of the latest frame, -1 before the first; seconds from the start of the file.
        last: End of the latest frame that a collector has received, -1 before the first.
    """

    def __init__(
        self,
        windows: Sequence[tuple[float, float]],
        make: Callable[[float, float], FrameSampler | WaveformCollector],
        lead: float,
    ):
        """Create the collectors of no window yet.

        Args:
            windows: Start and end of each window in seconds from the start of the file, in order.
            make: Makes the collector of a window.
            lead: Seconds before its start from which on the frames of a window are collected.
        """
        self.time = self.last = -1.0
        self._waiting = deque(windows)
        self._open: deque[FrameSampler | WaveformCollector] = deque()
        self._make, self._lead = make, lead
        self._latest: av.VideoFrame | None = None

    @property
    def done(self) -> bool:
        """Whether no later frame is needed."""
        return not self._waiting and all(collector.done for collector in self._open)

    @property
    def is_first_done(self) -> bool:
        """Whether the earliest window that was not taken needs no later frame."""
        return bool(self._open) and self._open[0].done

    def may_skip(self, time: float) -> bool:
        """Whether no window needs the frame of a packet; see `FrameSampler.may_skip`."""
        answers = [sampler.may_skip(time) for sampler in self._open]  # each has to know the packet
        return all(answers)

    def add(self, frame: "av.VideoFrame | av.AudioFrame", origin: float) -> None:
        """Receive the next frame."""
        self.time = self.time if frame.time is None else frame.time - origin
        while self._waiting and self._waiting[0][0] - self._lead <= self.time:
            self._begin(origin)
        for collector in self._open:
            if not collector.done:
                collector.add(frame, origin)
                self.last = max(self.last, collector.last)
        self._latest = frame

    def take(self, origin: float) -> FrameSampler | WaveformCollector:
        """The collector of the earliest window that was not taken; the caller finishes it."""
        if not self._open:
            self._begin(origin)
        return self._open.popleft()

    def _begin(self, origin: float) -> None:
        collector = self._make(*self._waiting.popleft())
        if self._latest is not None and isinstance(collector, FrameSampler):
            collector.add(self._latest, origin)
        self._open.append(collector)


def _channels(frame: "av.AudioFrame") -> np.ndarray:
    """Samples of each channel (channels, samples), float32 with full scale 1."""
    count = frame.layout.nb_channels
    if frame.format.name.startswith("s64") or (frame.format.is_planar and count >= PYAV_PLANES):
        values = _packed_floats(frame)
    else:
        values = frame.to_ndarray()
    if len(values) != count:  # packed
        values = values.reshape(-1, count).T
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # too large doubles become infinite and are refused later
            return values.astype(np.float32, copy=False)
    scale = np.float32(1 / (1 << (8 * values.dtype.itemsize - 1)))
    if values.dtype.kind == "u":
        return (values.astype(np.float32) - 128) * scale
    return values.astype(np.float32) * scale


def _packed_floats(frame: "av.AudioFrame") -> np.ndarray:
    """Samples (1, samples * channels), float32, of formats that PyAV cannot convert to an array."""
    import av

    resampler = av.AudioResampler("flt", frame.layout, frame.sample_rate)
    frame.pts = None
    pieces = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([piece.to_ndarray() for piece in pieces], axis=1)
