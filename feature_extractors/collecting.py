# SPDX-License-Identifier: Apache-2.0
"""What is kept while a file is decoded: a few frames by their times, and one waveform.

Both collectors are fed frames in order, tell when they have seen enough (`done`), and know the first and last
second they saw, from which truncation and a missed seek are recognised.
"""

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from feature_extractors.clip import SAMPLE_RATE
from feature_extractors.pictures import DecodedFrame, PictureConverter, together

if TYPE_CHECKING:
    import av


class FrameSampler:
    """Keeps the frame on show at each midpoint of `num_frames` equal intervals of a window.

    A frame is on show from its own time until the next frame's; the first frame also stands for the time
    before it. Only two frames are held back at a time, so long clips need no more memory than short ones.

    Attributes:
        first: Time of the first frame seen, None before it; seconds from the beginning of the file.
        last: End of the last frame seen, -1 before it.
        done: Whether later frames cannot be wanted.
        count: Number of frames seen.
    """

    def __init__(self, start: float, end: float, num_frames: int, converter: PictureConverter | None):
        """Prepares for one window, in seconds from the beginning of the file; no video needs no converter."""
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
        """Takes the next frame; a frame without a timestamp follows its predecessor."""
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
        """Keeps the held frame if a target falls before `time`, when the following one takes its place."""
        waiting = self._next
        while self._next < len(self.targets) and self.targets[self._next] < time:
            self._next += 1
        if self._held is None:  # the first frame is not here yet; it will stand for these targets
            self._next = waiting
        elif self._next > waiting and self._held[0] <= self.end:
            picture = self._converter.convert(self._held[1], self._before_held, following)
            self._kept.append((self._held[0], picture))


class WaveformCollector:
    """Resamples audio frames to mono `SAMPLE_RATE` and cuts the window out of them.

    The first frame's timestamp says where the sound begins; sound that begins after the window does is
    preceded by zeros, so that sample 0 is always the window's start and picture and sound stay together.

    Attributes:
        first: Time of the first sound, None before it; seconds from the beginning of the file.
        last: End of the sound seen so far, -1 before it.
        done: Whether later sound cannot be wanted.
    """

    def __init__(self, start: float, end: float):
        """Prepares for one window, in seconds from the beginning of the file."""
        self.start, self.end = start, end
        self.first: float | None = None
        self.last = -1.0
        self.done = False
        self._resampler: av.AudioResampler | None = None
        self._format: tuple[str, str, int] | None = None
        self._channels = 1  # that come out of the resampler
        self._dropped = 0  # samples before the window, which are not kept
        self._pieces: list[np.ndarray] = []

    def add(self, frame: "av.AudioFrame", origin: float) -> None:
        """Takes the next stretch of sound, of any format, which may change on the way."""
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
        frame.pts = None  # gaps in the times must not change the count of samples
        try:
            self._resample(frame)
        except av.error.ArgumentError:  # FFmpeg has no downmix for this number of channels: take their mean
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
        """Draws the last samples out of the resampler; it cannot be fed again."""
        if self._resampler is not None:
            self._resample(None)
            self._resampler = None

    def _resample(self, frame: "av.AudioFrame | None") -> None:
        """Keeps what comes out of the resampler for a frame, or at the end of the sound (None)."""
        for piece in self._resampler.resample(frame):
            samples = piece.to_ndarray()[0]
            mono = samples if self._channels == 1 else samples.reshape(-1, self._channels).mean(axis=1)
            if not self._pieces and self._dropped + len(mono) <= self._before_window():
                self._dropped += len(mono)
            else:
                self._pieces.append(mono)

    def _before_window(self) -> int:
        """Samples from the first sound to the window's start; negative if the sound begins later."""
        return round((self.start - self.first) * SAMPLE_RATE)
