# SPDX-License-Identifier: Apache-2.0
"""Frames of the synthetic corpus: one photographed face, warped to smile, frown and speak.

The portrait of an astronaut in scikit-image (NASA, public domain) is warped by a smooth displacement field.
Named points of the face, measured once with the MediaPipe Face Landmarker and listed below, move by fixed
amounts for a frown, a neutral face, a smile and an open mouth. A thin-plate spline interpolates between the
points, and a ring of fixed points keeps the rest of the picture in place.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

FRAME_SIZE = 160  # pixels, square
CROP_LEFT, CROP_TOP, CROP_SIZE = 110, 5, 226  # the window of the portrait within which the head moves
PORTRAIT_SCALE = 1.05  # pixels of the portrait per pixel of the frame
FACELESS_TOP = 290  # a window from here down shows the suit only
FACE_CENTRE = (223.0, 118.0)
HEAD_CENTRE, HEAD_REACH = (224.0, 114.0), 84.0  # nothing moves on the square this far from here

# Name: position in the portrait of the point on the left of the picture and, where there are two, of its
# mirror image.
POINTS = {
    "mouth_corner": ((201.9, 139.2), (244.7, 140.6)),
    "upper_lip_outer": ((207.5, 139.1), (239.3, 140.0)),
    "upper_lip_inner": ((209.2, 140.8), (237.4, 141.7)),
    "lower_lip_inner": ((209.2, 145.5), (236.5, 146.5)),
    "lower_lip_outer": ((207.1, 147.8), (238.6, 149.1)),
    "mid_upper_lip_outer": ((223.2, 140.5),),
    "mid_upper_lip_inner": ((223.1, 143.2),),
    "mid_lower_lip_inner": ((222.5, 150.0),),
    "mid_lower_lip_outer": ((222.2, 155.5),),
    "chin": ((220.6, 178.4),),
    "chin_side": ((195.3, 163.0), (248.8, 166.0)),
    "jaw": ((185.8, 149.1), (260.6, 153.2)),
    "cheek": ((195.3, 125.9), (252.6, 129.0)),
    "brow_inner": ((216.2, 94.8), (234.5, 95.2)),
    "brow_middle": ((197.6, 86.7), (254.7, 89.1)),
    "brow_outer": ((187.7, 90.8), (264.4, 94.5)),
    "upper_lid": ((202.6, 97.9), (248.2, 100.1)),
    "lower_lid": ((204.1, 104.3), (246.1, 106.6)),
}
FIXED_POINTS = (
    *((223.0, 131.0), (223.0, 133.5), (210.1, 126.5), (236.9, 127.8), (224.0, 96.0)),  # nose
    *((195.3, 100.7), (213.5, 103.7), (236.4, 104.9), (255.4, 103.8)),  # corners of the eyes
    *((226.4, 70.2), (180.3, 109.5), (270.7, 114.3)),  # hairline and temples
)

# Displacement of each point from the portrait: pixels towards the middle of the face, pixels down.
# The portrait smiles broadly, so even a neutral face needs lower corners of the mouth and closed lips.
FROWN = {
    "mouth_corner": (3.5, 8.0),
    "upper_lip_outer": (2.2, 5.0),
    "upper_lip_inner": (2.2, 4.7),
    "lower_lip_inner": (2.2, 1.8),
    "lower_lip_outer": (2.2, 1.8),
    "mid_upper_lip_outer": (0.0, 0.3),
    "mid_upper_lip_inner": (0.0, 0.3),
    "mid_lower_lip_inner": (0.0, -5.2),
    "mid_lower_lip_outer": (0.0, -3.0),
    "chin": (0.0, -1.5),
    "cheek": (0.7, 2.2),
    "brow_inner": (1.8, 3.2),
    "brow_middle": (0.5, 1.8),
    "upper_lid": (0.0, 1.0),
}
NEUTRAL = {
    "mouth_corner": (1.8, 3.6),
    "upper_lip_outer": (1.1, 2.5),
    "upper_lip_inner": (1.1, 2.4),
    "lower_lip_inner": (1.1, 0.4),
    "lower_lip_outer": (1.1, 0.0),
    "mid_upper_lip_outer": (0.0, 0.8),
    "mid_upper_lip_inner": (0.0, 0.8),
    "mid_lower_lip_inner": (0.0, -3.6),
    "mid_lower_lip_outer": (0.0, -2.3),
    "chin": (0.0, -0.8),
    "cheek": (0.4, 1.1),
}
SMILE = {
    "mouth_corner": (-2.5, -2.5),
    "upper_lip_outer": (-1.5, -1.5),
    "upper_lip_inner": (-1.5, -1.5),
    "lower_lip_inner": (-1.0, 0.0),
    "lower_lip_outer": (-1.0, 0.0),
    "mid_lower_lip_inner": (0.0, 1.0),
    "mid_lower_lip_outer": (0.0, 0.5),
    "cheek": (-0.5, -1.5),
    "brow_inner": (0.0, -2.0),
    "brow_middle": (0.0, -2.5),
    "brow_outer": (0.0, -1.0),
    "lower_lid": (0.0, -1.2),
}
OPEN_MOUTH = {
    "mouth_corner": (1.2, 1.0),
    "lower_lip_inner": (0.4, 3.4),
    "lower_lip_outer": (0.4, 3.4),
    "mid_lower_lip_inner": (0.0, 4.2),
    "mid_lower_lip_outer": (0.0, 4.2),
    "chin": (0.0, 3.5),
    "chin_side": (0.0, 1.8),
    "cheek": (0.0, 0.5),
}
WIDE_JAW = {"jaw": (-1.0, 0.0), "chin_side": (-0.7, 0.0)}  # this and the next two distinguish speakers
LONG_CHIN = {"chin": (0.0, 1.0), "chin_side": (0.0, 0.5)}
HIGH_BROWS = {"brow_inner": (0.0, -1.0), "brow_middle": (0.0, -1.0), "brow_outer": (0.0, -1.0)}
MOVEMENTS = (FROWN, NEUTRAL, SMILE, OPEN_MOUTH, WIDE_JAW, LONG_CHIN, HIGH_BROWS)

# Outline of the teeth in the portrait; darkened when the mouth opens, because stretched teeth look unnatural.
TEETH = ((205, 141.5), (209.2, 142.5), (216, 145), (222.5, 146.2), (229, 145.6), (237, 143), (242, 142))
TEETH += ((236.5, 146.5), (228, 149.7), (222.5, 150), (217, 149.2), (209.2, 145.5))
MOUTH_COLOUR = (70, 28, 28)


@dataclass(frozen=True)
class Look:
    """Appearance of a speaker, independent of the expression.

    Attributes:
        mirrored: Whether left and right are exchanged.
        zoom: Size of the face relative to the frame, about 1.
        colour: Factors on red, green and blue, about 1.
        contrast: Exponent on the brightness in [0, 1], about 1.
        jaw: Pixels by which each side of the jaw stands out.
        chin: Pixels by which the chin is lower.
        brows: Pixels by which the brows are higher.
    """

    mirrored: bool
    zoom: float
    colour: tuple[float, float, float]
    contrast: float
    jaw: float
    chin: float
    brows: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Look":
        """Draw a random appearance: brightness and colour of the light, and facial features."""
        brightness, warmth = rng.uniform(0.8, 1.1), rng.uniform(-0.08, 0.08)
        return cls(
            mirrored=bool(rng.integers(2)),
            zoom=float(rng.uniform(0.88, 1.12)),
            colour=(brightness * (1 + warmth), brightness, brightness * (1 - warmth)),
            contrast=float(rng.uniform(0.8, 1.3)),
            jaw=float(rng.uniform(-2.5, 2.5)),
            chin=float(rng.uniform(-2.5, 2.5)),
            brows=float(rng.uniform(-0.8, 0.8)),
        )


@dataclass(frozen=True)
class Pose:
    """The head in one frame: `angle` in radians, `shift` in pixels right and down, `scale` about 1."""

    angle: float
    shift: tuple[float, float]
    scale: float


def head_motion(frames: int, rng: np.random.Generator) -> list[Pose]:
    """Slow movement of a head, one pose per frame: random sines, independent of the cues."""
    phases = rng.uniform(0, 2 * np.pi, 4)
    periods = rng.uniform(8, 20, 4)  # frames
    amplitudes = rng.uniform(0.4, 1.0, 4) * (0.06, 5.0, 3.5, 0.03)
    waves = amplitudes * np.sin(2 * np.pi * np.arange(frames)[:, None] / periods + phases)
    return [Pose(angle, (right, down), 1 + growth) for angle, right, down, growth in waves.tolist()]


class FaceRenderer:
    """Draws the face with a given expression; share one renderer between clips and threads."""

    def __init__(self) -> None:
        from skimage.data import astronaut

        self._portrait = astronaut()

    def faceless(self, frames: int, rng: np.random.Generator) -> np.ndarray:
        """A video without a face, `(frames, 160, 160, 3)` uint8 RGB: the camera moves over the suit."""
        left = int(rng.integers(100, 240))
        drift = rng.integers(-3, 4)
        lefts = np.clip(left + drift * np.arange(frames), 0, self._portrait.shape[1] - FRAME_SIZE)
        rows = slice(FACELESS_TOP, FACELESS_TOP + FRAME_SIZE)
        return np.stack([self._portrait[rows, start : start + FRAME_SIZE] for start in lefts])

    def draw(self, look: Look, pose: Pose, expression: float, openness: float) -> np.ndarray:
        """One frame, `(160, 160, 3)` uint8 RGB.

        Args:
            look: The speaker.
            pose: Pose of the head.
            expression: From -1 (frown) over 0 (neutral) to 1 (broad smile).
            openness: Opening of the mouth, from 0 (closed) to 1.
        """
        import cv2

        frown, neutral, smile = max(-expression, 0), 1 - abs(expression), max(expression, 0)
        weights = np.array([frown, neutral, smile, openness, look.jaw, look.chin, look.brows], np.float32)
        field = np.einsum("m,mhwc->hwc", weights, self._fields)  # without BLAS, whose threads would compete
        where = target = _source_positions(pose, look)
        for _ in range(3):  # solve where + field(where) = target by iteration
            moved = cv2.remap(
                field, where[..., 0], where[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
            where = target - moved
        texture = (1 - openness) * self._texture + openness * self._speaking_texture
        frame = cv2.remap(
            texture, where[..., 0], where[..., 1], cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
        )
        frame = (frame.clip(0, 255) / 255) ** look.contrast * look.colour
        return np.rint(frame.clip(0, 1) * 255).astype(np.uint8)

    @cached_property
    def _texture(self) -> np.ndarray:
        """The portrait's window, `(226, 226, 3)` float32."""
        rows, columns = slice(CROP_TOP, CROP_TOP + CROP_SIZE), slice(CROP_LEFT, CROP_LEFT + CROP_SIZE)
        return self._portrait[rows, columns].astype(np.float32)

    @cached_property
    def _speaking_texture(self) -> np.ndarray:
        """The same window with the teeth painted dark."""
        import cv2

        outline = (np.array(TEETH) - (CROP_LEFT, CROP_TOP)) * 4  # drawn at four times the size, to smooth it
        mask = np.zeros((CROP_SIZE * 4, CROP_SIZE * 4), np.float32)
        cv2.fillPoly(mask, [np.rint(outline).astype(np.int32)], 1.0)
        mask = cv2.resize(
            cv2.GaussianBlur(mask, (0, 0), 3), (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA
        )
        mask = mask[..., None]
        return self._texture * (1 - mask) + mask * np.array(MOUTH_COLOUR, np.float32)

    @cached_property
    def _fields(self) -> np.ndarray:
        """Displacement of every pixel for each of `MOVEMENTS`, `(movements, 226, 226, 2)` float32."""
        from scipy.interpolate import RBFInterpolator

        sources, targets = [], []
        for name, pair in POINTS.items():
            for point, side in zip(pair, (1, -1) if len(pair) == 2 else (0,), strict=True):
                sources.append(point)
                targets.append([(side * inward, down) for inward, down in _moves(name)])
        around = np.linspace(-1, 1, 5)
        ring = np.array([(x, y) for x in around for y in around if 1 in (abs(x), abs(y))])
        fixed = [*FIXED_POINTS, *(HEAD_CENTRE + HEAD_REACH * ring), *(HEAD_CENTRE + 1.4 * HEAD_REACH * ring)]
        points = np.array([*sources, *fixed])
        values = np.zeros((len(points), len(MOVEMENTS) * 2))
        values[: len(sources)] = np.array(targets).reshape(len(sources), -1)
        columns, rows = np.meshgrid(np.arange(CROP_SIZE) + CROP_LEFT, np.arange(CROP_SIZE) + CROP_TOP)
        grid = np.stack([columns.ravel(), rows.ravel()], axis=1)
        fields = RBFInterpolator(points, values, kernel="thin_plate_spline")(grid.astype(float))
        fields = fields.reshape(CROP_SIZE, CROP_SIZE, len(MOVEMENTS), 2)
        return np.ascontiguousarray(fields.transpose(2, 0, 1, 3), np.float32)


def _moves(name: str) -> list[tuple[float, float]]:
    return [movement.get(name, (0.0, 0.0)) for movement in MOVEMENTS]


def _source_positions(pose: Pose, look: Look) -> np.ndarray:
    """Position in the portrait of every pixel, without expression: `(160, 160, 2)` float32, x first."""
    rows, columns = np.mgrid[:FRAME_SIZE, :FRAME_SIZE].astype(np.float32) - FRAME_SIZE / 2
    if look.mirrored:
        columns = -columns
    right, down = columns - pose.shift[0], rows - pose.shift[1]
    zoom = PORTRAIT_SCALE / (look.zoom * pose.scale)
    cos, sin = np.cos(pose.angle) * zoom, np.sin(pose.angle) * zoom
    x = cos * right + sin * down + FACE_CENTRE[0] - CROP_LEFT
    y = -sin * right + cos * down + FACE_CENTRE[1] - CROP_TOP
    return np.stack([x, y], axis=-1).astype(np.float32)
