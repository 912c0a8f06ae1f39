# SPDX-License-Identifier: Apache-2.0
"""Video frames to aligned face crops and expression scores, following one face through the clip.

MediaPipe's Face Landmarker runs in IMAGE mode and the tracking is ours: its VIDEO mode carries state from one
clip to the next, so that features would depend on the order in which clips are read.
"""

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from feature_extractors.assets import get_asset
from feature_extractors.clip import NUM_BLENDSHAPES, ExtractionSettings

# fmt: off
BLENDSHAPE_NAMES = (
    "_neutral", "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight",
    "cheekPuff", "cheekSquintLeft", "cheekSquintRight", "eyeBlinkLeft", "eyeBlinkRight", "eyeLookDownLeft",
    "eyeLookDownRight", "eyeLookInLeft", "eyeLookInRight", "eyeLookOutLeft", "eyeLookOutRight",
    "eyeLookUpLeft", "eyeLookUpRight", "eyeSquintLeft", "eyeSquintRight", "eyeWideLeft", "eyeWideRight",
    "jawForward", "jawLeft", "jawOpen", "jawRight", "mouthClose", "mouthDimpleLeft", "mouthDimpleRight",
    "mouthFrownLeft", "mouthFrownRight", "mouthFunnel", "mouthLeft", "mouthLowerDownLeft",
    "mouthLowerDownRight", "mouthPressLeft", "mouthPressRight", "mouthPucker", "mouthRight",
    "mouthRollLower", "mouthRollUpper", "mouthShrugLower", "mouthShrugUpper", "mouthSmileLeft",
    "mouthSmileRight", "mouthStretchLeft", "mouthStretchRight", "mouthUpperUpLeft", "mouthUpperUpRight",
    "noseSneerLeft", "noseSneerRight",
)
# fmt: on
"""What each of the 52 blendshape scores says, in the order of the last axis."""

TEMPLATE = np.array([[0.33, 0.40], [0.67, 0.40], [0.50, 0.75]])
"""Where the left eye (as seen), the right eye and the mouth lie in a crop, as shares of its size."""

ANCHORS = ((33, 133), (362, 263), (61, 291))
"""Landmarks whose mean is one point of `TEMPLATE`: corners of either eye, corners of the mouth."""

MAX_FACES = 4
"""Faces looked at in one frame; more cost nothing where they are not there."""

BORDER = 0.25
"""Width of the border, as a share of the frame, with which faces that fill the frame are found at last."""

WIDE = 1.1
"""Frames wider than this many heights are also searched square by square: the detector looks at 128 x 128
pixels, in which a face narrower than an eighth of the frame goes unseen."""

MAX_SQUARES = 32
"""Squares searched in one frame; enough for frames of `limits.MAX_ASPECT`, wider ones are left with gaps."""

CONTINUES = 1.0
"""A face continues the tracked one if the centres lie within this many face widths."""

_LOADING = threading.RLock()
_NOTICE = re.compile(rb"WARNING: Logging before|INFO: Created TensorFlow Lite|[IWE]\d{4} \d\d:\d\d:")


@dataclass(frozen=True)
class Faces:
    """One face followed through a clip.

    Attributes:
        crops: Aligned crops (frames, size, size, 3), uint8 RGB; zeros where not found.
        blendshapes: Expression scores in [0, 1] (frames, 52), float32, named by `BLENDSHAPE_NAMES`; zeros
            likewise.
        found: Whether the frame shows the face (frames,), bool.
    """

    crops: np.ndarray
    blendshapes: np.ndarray
    found: np.ndarray


@dataclass(frozen=True)
class _Face:
    """A face in one frame: landmarks (478, 2) in the frame's pixels and its scores (52,)."""

    landmarks: np.ndarray
    blendshapes: np.ndarray

    @property
    def center(self) -> np.ndarray:
        return (self.landmarks.min(0) + self.landmarks.max(0)) / 2

    @property
    def size(self) -> float:
        """Geometric mean of width and height in pixels."""
        return float(np.sqrt(np.prod(np.ptp(self.landmarks, axis=0))))


class FaceExtractor:
    """MediaPipe Face Landmarker with tracking and alignment; open one, use it for any number of clips.

    Use it in a `with` block, one per process:

        with FaceExtractor() as face_extractor:
            faces = face_extractor.extract(frames)

    What is extracted from a clip depends on this clip alone. One that is never closed makes MediaPipe print a
    traceback when the interpreter ends; processes of `multiprocessing` end without that.
    """

    def __init__(self, settings: ExtractionSettings | None = None, model_path: Path | str | None = None):
        """Loads the landmark model.

        Args:
            settings: Say how large the crops are; the defaults of `ExtractionSettings` if left out.
            model_path: A `face_landmarker.task` file; by default the asset of this name, fetched if need be.

        Raises:
            AssetError: The model is not here and no source has it.
            ValueError: The file at `model_path` is no landmark model.
        """
        self.size = (settings or ExtractionSettings()).face_size
        self._landmarker = _open_landmarker(Path(model_path or get_asset("face_landmarker")))

    def __enter__(self) -> "FaceExtractor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees MediaPipe's memory and threads; the extractor cannot be used afterwards."""
        self._landmarker.close()

    def extract(self, frames: np.ndarray) -> Faces:
        """Follows one face through a clip.

        The largest face of the first frame that has one is chosen. In later frames it is the nearest face, if
        it is near enough to be the same; if not, the track is lost and the largest face is taken again.

        Args:
            frames: RGB pictures (frames, height, width, 3), uint8, in order; there may be none.

        Returns:
            Crops, scores and found mask, one row per frame.
        """
        crops = np.zeros((len(frames), self.size, self.size, 3), np.uint8)
        blendshapes = np.zeros((len(frames), NUM_BLENDSHAPES), np.float32)
        found = np.zeros(len(frames), bool)
        tracked: _Face | None = None
        for index, frame in enumerate(frames):
            faces = self._detect(frame)
            if faces:
                tracked = _choose(faces, tracked)
                crops[index] = align(frame, anchor_points(tracked.landmarks), self.size)
                blendshapes[index] = tracked.blendshapes
                found[index] = True
        return Faces(crops, blendshapes, found)

    def _detect(self, frame: np.ndarray) -> list[_Face]:
        """Faces in the first view of the frame that shows any; the views of squares count as one."""
        for views in (((frame, 0, 0),), _bordered(frame), _squares(frame)):
            faces = [face for view, x, y in views for face in self._detect_in(view, x, y)]
            if faces:
                return faces
        return []

    def _detect_in(self, view: np.ndarray, x: int, y: int) -> list[_Face]:
        """Faces in a view whose corner lies at (x, y) of the frame."""
        import mediapipe

        image = mediapipe.Image(mediapipe.ImageFormat.SRGB, np.ascontiguousarray(view))
        result = self._landmarker.detect(image)
        height, width = view.shape[:2]
        return [
            _Face(
                landmarks=np.array([(point.x * width + x, point.y * height + y) for point in points]),
                blendshapes=np.array([category.score for category in scores], np.float32),
            )
            for points, scores in zip(result.face_landmarks, result.face_blendshapes, strict=True)
        ]


def _bordered(frame: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
    """The frame with a black border, for faces that fill it; finds a third of those missed in tight crops."""
    import cv2

    border = round(BORDER * min(frame.shape[:2]))
    yield cv2.copyMakeBorder(frame, *[border] * 4, cv2.BORDER_CONSTANT), -border, -border


def _squares(frame: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
    """Overlapping squares across a wide frame, for faces small in it (down to an eighth of the height)."""
    height, width = frame.shape[:2]
    if width > WIDE * height:
        count = min(int(np.ceil(width / height / 0.6)), MAX_SQUARES)
        for x in np.linspace(0, width - height, count).astype(int):
            yield frame[:, x : x + height], int(x), 0


def _choose(faces: list[_Face], tracked: _Face | None) -> _Face:
    """The face that continues the tracked one, else the largest."""
    if tracked is not None:
        distances = [float(np.linalg.norm(face.center - tracked.center)) for face in faces]
        nearest = int(np.argmin(distances))
        if distances[nearest] <= CONTINUES * tracked.size:
            return faces[nearest]
    return max(faces, key=lambda face: face.size)


def anchor_points(landmarks: np.ndarray) -> np.ndarray:
    """Both eyes and the mouth (3, 2), (x, y) in pixels, out of the 478 landmarks (478, 2)."""
    return np.stack([landmarks[list(indices)].mean(0) for indices in ANCHORS])


def align(frame: np.ndarray, points: np.ndarray, size: int) -> np.ndarray:
    """Cuts a face out so that eyes and mouth lie at `TEMPLATE`, by rotation, scale and shift only.

    Args:
        frame: RGB picture (height, width, 3), uint8.
        points: Both eyes and the mouth (3, 2) in pixels of the frame.
        size: Height and width of the crop.

    Returns:
        The crop (size, size, 3), uint8 RGB; pixels from outside the frame are black.
    """
    import cv2

    scale = np.hypot(*_similarity(points, TEMPLATE * size)[:, 0])
    oversize = size * max(1, round(1 / scale))  # first at about full resolution, so that shrinking is smooth
    matrix = _similarity(points, TEMPLATE * oversize)
    crop = cv2.warpAffine(frame, matrix, (oversize, oversize), flags=cv2.INTER_LINEAR)
    return crop if oversize == size else cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)


def _similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The matrix (2, 3) of the similarity that takes source to target points (n, 2) with least squared error.

    Linear in (scale cos, scale sin, shift x, shift y), hence exact; OpenCV's estimator picks random subsets.
    """
    x, y = source.T
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    (a, b, shift_x, shift_y), *_ = np.linalg.lstsq(rows, target.T.reshape(-1), rcond=None)
    return np.array([[a, -b, shift_x], [b, a, shift_y]])


def _open_landmarker(model_path: Path) -> "vision.FaceLandmarker":  # noqa: F821
    """A Face Landmarker for single images.

    Raises:
        ValueError: The file is no landmark model.
    """
    from mediapipe.tasks.python import BaseOptions, vision

    options = vision.FaceLandmarkerOptions(
        base_options=BaseOptions(model_asset_buffer=model_path.read_bytes()),
        running_mode=vision.RunningMode.IMAGE,
        output_face_blendshapes=True,
        num_faces=MAX_FACES,
    )
    try:
        with _native_log_silenced():
            return vision.FaceLandmarker.create_from_options(options)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{model_path}: not a MediaPipe face landmark model; give a face_landmarker.task file"
            " or remove this one to have it fetched again"
        ) from error


@contextmanager
def _native_log_silenced() -> Iterator[None]:
    """Keeps MediaPipe's C++ notices off the terminal while a model is loaded; no setting turns them off.

    They go to file descriptor 2, which belongs to the whole process. Models are therefore loaded one after
    the other, and lines that other threads write meanwhile are passed on afterwards. Errors of MediaPipe
    arrive as exceptions.
    """
    with _LOADING:
        try:
            saved = os.dup(2)
        except OSError:  # no standard error, as in a daemon: there is nothing to silence
            yield
            return
        with os.fdopen(saved, "wb") as stderr, tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(saved, 2)
                sink.seek(0)
                stderr.writelines(line for line in sink if not _NOTICE.match(line))
