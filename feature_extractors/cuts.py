# SPDX-License-Identifier: Apache-2.0
"""Find scene cuts: pictures that differ from all before them much more than neighbouring pictures do."""

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av

SIDE = 64
"""Samples of the luma on each side of a picture; blocks of `BLOCK` x `BLOCK` are averaged."""

BLOCK = 4

LEAST = 5.0
"""Mean difference of luma (of 255) below which a change is no cut."""

ISOLATED = 4.0
"""A cut differs by more than this many times the largest change of the pictures around it."""

REMEMBERED = 8
"""Changes before a cut that it is compared with."""

EIGHT_BITS = {"gray", "nv12", "nv21", "yuv410p", "yuv411p", "yuv420p", "yuv422p", "yuv440p", "yuv444p"}
EIGHT_BITS |= {"yuvj420p", "yuvj422p", "yuvj440p", "yuvj444p", "yuva420p"}
"""Pixel formats whose first plane is the luma in bytes; others are converted first."""


class CutDetector:
    """Finds the cuts of one video, from its pictures in order.

    A flash or a damaged picture is no cut: the picture after it must differ from the one before it too.

    Attributes:
        times: Times of the cuts found so far: of the first picture of each new scene, as given to `add`.
    """

    def __init__(self) -> None:
        """Start without a picture."""
        self.times: list[float] = []
        self._pictures: deque[tuple[float, np.ndarray]] = deque(maxlen=3)
        self._changes: deque[float] = deque(maxlen=REMEMBERED)

    def add(self, frame: "av.VideoFrame", time: float) -> None:
        """Receive the next picture and its time."""
        self._pictures.append((time, _thumbnail(frame)))
        if len(self._pictures) < 3:
            return
        (_, before), (cut, this), (_, after) = self._pictures
        if not before.shape == this.shape == after.shape:
            return
        change, following = _difference(before, this), _difference(this, after)
        lasting = min(change, _difference(before, after))
        if lasting > LEAST and lasting > ISOLATED * max(following, *self._changes, 0.0):
            self.times.append(cut)
            self._changes.clear()
        else:
            self._changes.append(change)


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


def _thumbnail(frame: "av.VideoFrame") -> np.ndarray:
    """The luma in blocks (rows, columns), float32."""
    if frame.format.name not in EIGHT_BITS:
        frame = frame.reformat(width=SIDE, height=SIDE, format="gray")
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]
    samples = rows[:: max(1, frame.height // SIDE), :: max(1, frame.width // SIDE)][:SIDE, :SIDE]
    height, width = (max(1, size // BLOCK) * BLOCK for size in samples.shape)
    samples = samples[:height, :width].astype(np.float32)
    if min(samples.shape) < BLOCK:
        return samples
    return samples.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK).mean((1, 3))
