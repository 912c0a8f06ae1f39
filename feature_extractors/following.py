# SPDX-License-Identifier: Apache-2.0
"""Choose which face of a clip to track: the largest, or the one that speaks.

It computes with the faces that a detector found in each frame, and reads no pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

EYES = ((33, 133), (362, 263))
"""Landmarks of the corners of each eye."""

LIPS = (13, 14)
"""Landmarks of the middle of the upper and the lower lip, on their inner edges."""

CONTINUES = 1.0
"""A face continues an earlier one if the centres lie within this many face widths."""

SAME = 0.5
"""Two detections in one frame are one face if the centres lie within this many widths of the larger one."""

COMPARABLE = 1 / 3
"""A face smaller than this share of the followed one belongs to the background."""

SEVERAL_SHARE = 0.25
"""Share of the frames with a face that must show a second one before it is reported."""

MARGIN = 0.25
"""Margin, in widths of the face, that a view must show on each side to show the whole face."""

MIN_FRAMES = 3
"""Number of frames with a face that are needed to measure the movement of its mouth."""


class View(NamedTuple):
    """A rectangle of a frame, in pixels."""

    x: int
    y: int
    width: int
    height: int

    def of(self, frame: np.ndarray) -> np.ndarray:
        """The part of a frame (height, width, 3) that the view shows."""
        return frame[self.y : self.y + self.height, self.x : self.x + self.width]


@dataclass(frozen=True)
class Face:
    """A face in one frame.

    Attributes:
        landmarks: Its points (478, 2), (x, y) in the frame's pixels.
        blendshapes: Its scores (52,), float32.
        square: The square of a long frame in which it was found; None if it was found in the whole frame.
    """

    landmarks: np.ndarray
    blendshapes: np.ndarray
    square: View | None = None

    @property
    def center(self) -> np.ndarray:
        """Middle (x, y) in pixels."""
        return (self.landmarks.min(0) + self.landmarks.max(0)) / 2

    @property
    def size(self) -> float:
        """Geometric mean of width and height in pixels."""
        return float(np.sqrt(np.prod(np.ptp(self.landmarks, axis=0))))

    @property
    def mouth_opening(self) -> float:
        """Distance between the lips, as a share of the distance between the eyes."""
        left, right = (self.landmarks[list(corners)].mean(0) for corners in EYES)
        upper, lower = self.landmarks[list(LIPS)]
        return float(np.linalg.norm(upper - lower) / max(np.linalg.norm(left - right), 1e-6))

    def distance(self, other: "Face") -> float:
        """Pixels between the centres of two faces."""
        return float(np.linalg.norm(self.center - other.center))

    def continues(self, earlier: "Face") -> bool:
        """Whether this is probably the person that `earlier` shows in an earlier frame."""
        return self.distance(earlier) <= CONTINUES * earlier.size

    def lies_inside(self, view: View) -> bool:
        """Whether a view shows the whole face."""
        low, high = self.landmarks.min(0) - MARGIN * self.size, self.landmarks.max(0) + MARGIN * self.size
        return bool((low >= view[:2]).all() and (high <= np.add(view[:2], view[2:])).all())


def nearest_or_largest(faces: Sequence[Face], tracked: Face | None) -> Face:
    """The face that continues the tracked one, else the largest."""
    if tracked is not None:
        nearest = min(faces, key=tracked.distance)
        if nearest.continues(tracked):
            return nearest
    return max(faces, key=lambda face: face.size)


def people(faces: Sequence[Face]) -> list[Face]:
    """The faces without duplicates from overlapping views; largest first."""
    distinct: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.size):
        if all(face.distance(other) > SAME * other.size for other in distinct):
            distinct.append(face)
    return distinct


def shows_several(faces: Sequence[Sequence[Face]], followed: Mapping[int, Face]) -> bool:
    """Whether a clip shows people other than the tracked one.

    Args:
        faces: The faces in each frame that was searched as a whole.
        followed: The face that is followed, by frame.
    """
    if not followed:
        return False
    least = COMPARABLE * float(np.median([face.size for face in followed.values()]))
    counts = [sum(face.size >= least for face in people(of_frame)) for of_frame in faces if of_frame]
    return sum(count > 1 for count in counts) > SEVERAL_SHARE * len(counts)


def most_speaking(faces: Sequence[Sequence[Face]], loudness: np.ndarray) -> dict[int, Face]:
    """The person whose mouth moves most, and most in time with the sound; the largest if no mouth moves.

    A person's score is the standard deviation of the mouth's opening, times one plus its correlation with the
    loudness (if positive), times the share of the frames in which the person is found.

    Args:
        faces: The faces in each frame.
        loudness: Sound level around each frame (frames,), zeros without sound.

    Returns:
        The person's face by frame; empty if there is no face.
    """
    tracks = _tracks(faces)
    if not tracks:
        return {}
    return max(
        tracks,
        key=lambda track: (_speaking_score(track, loudness), sum(face.size for face in track.values())),
    )


def _tracks(faces: Sequence[Sequence[Face]]) -> list[dict[int, Face]]:
    """Each person's face by frame; a face continues the nearest person that no nearer face continues."""
    tracks: list[dict[int, Face]] = []
    for index, of_frame in enumerate(faces):
        left = people(of_frame)
        last = [(track, track[max(track)]) for track in tracks]
        pairs = [
            (face.distance(end), face, track) for face in left for track, end in last if face.continues(end)
        ]
        for _, face, track in sorted(pairs, key=lambda pair: pair[0]):
            if index not in track and any(face is each for each in left):
                track[index] = face
                left = [each for each in left if each is not face]
        tracks.extend({index: face} for face in left)
    return tracks


def _speaking_score(track: Mapping[int, Face], loudness: np.ndarray) -> float:
    if len(track) < MIN_FRAMES:
        return 0.0
    opening = np.array([face.mouth_opening for face in track.values()])
    level = loudness[list(track)]
    together = 0.0
    if opening.std() > 0 and level.std() > 0:
        together = max(0.0, float(np.corrcoef(opening, level)[0, 1]))
    return float(opening.std()) * (1 + together) * len(track) / len(loudness)
