# SPDX-License-Identifier: Apache-2.0
"""Collect what is needed while a file is decoded: frames at given times, and one waveform.

Both collectors receive frames in order and set `done` when they need no more. Their `first` and `last` times
show whether the file is truncated or a seek missed its target.
"""

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from feature_extractors.clip import SAMPLE_RATE
from feature_extractors.pictures import DecodedFrame, PictureConverter, together

if TYPE_CHECKING:
    import av


class FrameSampler:
    """Keeps the frames that are displayed at the midpoints of `num_frames` equal intervals of a window.

    A frame is displayed from its own time until that of the next frame; the first frame also covers the time
    before it. Only two pending frames are held, so long clips need no more memory than short ones.

    Attributes:
        first: Time of the first frame received, None before it; seconds from the start of the file.
        last: End of the last frame received, -1 before it.
        done: Whether no later frame is needed.
        count: Number of frames received.
    """

    def __init__(self, start: float, end: float, num_frames: int, converter: PictureConverter | None):
        """Create a sampler for one window, in seconds from the start of the file; no video, no converter."""
        self.start, self.end = start, end
        self.count = 0
        self.targets = start + (end - start) * (np.arange(num_frames) + 0.5) / num_frames
        self.first: float | None = None
        self.last = -1.0
        self.done = False
        self._next = 0  # index of the first target that has no frame yet
        self._converter = converter
        self._held: tuple[float, DecodedFrame] | None = None
        self._before_held: DecodedFrame | None = None
        self._kept: list[tuple[float, np.ndarray]] = []

    def add(self, frame: "av.VideoFrame", origin: float) -> None:
        """Receive the next frame; a frame without a timestamp directly follows the one before it."""
        time = max(self.last, 0.0) if frame.time is None else frame.time - origin
        if self.first is None:
            self.first = time
        decoded = self._converter.receive(frame)
        self._settle(time, decoded)
        self._before_held = self._held and self._held[1]
        self._held = (time, decoded)
        self.count += 1
        length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
        self.last = max(self.last, time + length)
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
    """Resamples audio frames to mono `SAMPLE_RATE` and cuts out the window.

    The timestamp of the first frame gives the start of the sound. If it starts after the window, zeros are
    put before it, so that sample 0 is always at the window's start and sound and frames are synchronous.

    Attributes:
        first: Start of the sound, None before the first frame; seconds from the start of the file.
        last: End of the sound received so far, -1 before the first frame.
        done: Whether no later sound is needed.
    """

    def __init__(self, start: float, end: float):
        """Create a collector for one window, in seconds from the start of the file."""
        self.start, self.end = start, end
        self.first: float | None = None
        self.last = -1.0
        self.done = False
        self._resampler: av.AudioResampler | None = None
        self._format: tuple[str, str, int] | None = None
        self._channels = 1  # of the resampler's output
        self._dropped = 0  # samples before the window
        self._pieces: list[np.ndarray] = []

    def add(self, frame: "av.AudioFrame", origin: float) -> None:
        """Receive the next audio frame, of any format; the format may change between frames."""
        import av

        if self.first is None:
            self.first = 0.0 if frame.time is None else frame.time - origin
            self.last = self.first
        self.last += float(Fraction(frame.samples, frame.sample_rate))
        sound_format = (frame.format.name, frame.layout.name, frame.sample_rate)
        if sound_format != self._format:
            self._flush()
            self._format = sound_format
            self._channels, self._resampler = 1, av.AudioResampler("flt", "mono", SAMPLE_RATE)
        frame.pts = None  # gaps in the timestamps must not change the number of samples
        try:
            self._resample(frame)
        except av.error.ArgumentError:  # FFmpeg has no downmix for this number of channels: use their mean
            self._channels = frame.layout.nb_channels
            self._resampler = av.AudioResampler("flt", frame.layout, SAMPLE_RATE)
            self._resample(frame)
        self.done = self.last >= self.end

    def finish(self) -> np.ndarray:
        """The window's sound (samples,), float32; empty if there is none."""
        self._flush()
        if not self._pieces:
            return np.zeros(0, np.float32)
        sound = np.concatenate(self._pieces)
        skip = self._before_window() - self._dropped
        length = round((self.end - self.start) * SAMPLE_RATE)
        sound = sound[skip:] if skip >= 0 else np.pad(sound, (min(-skip, length), 0))
        return sound[:length]

    def _flush(self) -> None:
        """Read the last samples from the resampler and drop it."""
        if self._resampler is not None:
            self._resample(None)
            self._resampler = None

    def _resample(self, frame: "av.AudioFrame | None") -> None:
        """Resample a frame, or flush the resampler (None), and keep its output."""
        for piece in self._resampler.resample(frame):
            samples = piece.to_ndarray()[0]
            mono = samples if self._channels == 1 else samples.reshape(-1, self._channels).mean(axis=1)
            if not self._pieces and self._dropped + len(mono) <= self._before_window():
                self._dropped += len(mono)
            else:
                self._pieces.append(mono)

    def _before_window(self) -> int:
        """Number of samples between the start of the sound and that of the window; may be negative."""
        return round((self.start - self.first) * SAMPLE_RATE)
