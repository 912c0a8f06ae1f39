# SPDX-License-Identifier: Apache-2.0
"""Extract aligned face crops and blendshape scores from frames, tracking one face through the clip.

MediaPipe's Face Landmarker runs in IMAGE mode, with our own tracking. Its VIDEO mode carries state from one
clip to the next, so features would depend on the order of the clips.
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
"""Names of the 52 blendshape scores, in the order of the last axis."""

TEMPLATE = np.array([[0.33, 0.40], [0.67, 0.40], [0.50, 0.75]])
"""Positions in a crop, as shares of its size, of the left eye (as seen), the right eye and the mouth."""

ANCHORS = ((33, 133), (362, 263), (61, 291))
"""Landmarks whose mean is a point of `TEMPLATE`: corners of each eye, corners of the mouth."""

MAX_FACES = 4
"""Largest number of faces detected in a frame; the limit costs nothing if there are fewer."""

BORDER = 0.25
"""Width of the border, as a share of the frame, that is added to detect faces that fill the frame."""

WIDE = 1.1
"""Frames with a larger aspect ratio are also searched in squares: the detector works on 128 x 128 pixels and
misses faces narrower than an eighth of the frame."""

MAX_SQUARES = 32
"""Largest number of squares searched in a frame; enough for `limits.MAX_ASPECT`. Wider frames have gaps."""

CONTINUES = 1.0
"""A face continues the track if its centre is at most this many face widths from the tracked one."""

_LOADING = threading.RLock()
_NOTICE = re.compile(rb"WARNING: Logging before|INFO: Created TensorFlow Lite|[IWE]\d{4} \d\d:\d\d:")


@dataclass(frozen=True)
class Faces:
    """One face tracked through a clip.

    Attributes:
        crops: Aligned crops (frames, size, size, 3), uint8 RGB; zeros where no face was found.
        blendshapes: Scores in [0, 1] (frames, 52), float32, in the order of `BLENDSHAPE_NAMES`; zeros where
            no face was found.
        found: Whether the frame shows the face (frames,), bool.
    """

    crops: np.ndarray
    blendshapes: np.ndarray
    found: np.ndarray


@dataclass(frozen=True)
class _Face:
    """A face in one frame: landmarks (478, 2) in pixels of the frame, and blendshape scores (52,)."""

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
    """MediaPipe Face Landmarker with tracking and alignment.

    Use one extractor per process, in a `with` block, for any number of clips:

        with FaceExtractor() as face_extractor:
            faces = face_extractor.extract(frames)

    The result for a clip depends on this clip only. If an extractor is not closed, MediaPipe prints a
    traceback at the end of the interpreter (not in processes of `multiprocessing`).
    """

    def __init__(self, settings: ExtractionSettings | None = None, model_path: Path | str | None = None):
        """Load the landmark model.

        Args:
            settings: Sets the size of the crops; by default `ExtractionSettings()`.
            model_path: A `face_landmarker.task` file; by default the asset of this name, which is downloaded
                if necessary.

        Raises:
            AssetError: The model is neither on this machine nor at any source.
            ValueError: The file at `model_path` is not a landmark model.
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
        """Free MediaPipe's memory and threads; the extractor cannot be used afterwards."""
        self._landmarker.close()

    def extract(self, frames: np.ndarray) -> Faces:
        """Track one face through a clip.

        It starts with the largest face of the first frame that has one. In later frames the nearest face
        continues the track if it is close enough. Otherwise the track is lost, and the largest face starts a
        new one.

        Args:
            frames: RGB frames (frames, height, width, 3), uint8, in order; may be empty.

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
        """Faces in the first view of the frame that shows any; all squares together are one view."""
        for views in (((frame, 0, 0),), _bordered(frame), _squares(frame)):
            faces = [face for view, x, y in views for face in self._detect_in(view, x, y)]
            if faces:
                return faces
        return []

    def _detect_in(self, view: np.ndarray, x: int, y: int) -> list[_Face]:
        """Faces in a view whose upper left corner is at (x, y) of the frame."""
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
    """The frame with a black border, for faces that fill it: finds a third of those missed otherwise."""
    import cv2

    border = round(BORDER * min(frame.shape[:2]))
    yield cv2.copyMakeBorder(frame, *[border] * 4, cv2.BORDER_CONSTANT), -border, -border


def _squares(frame: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
    """Overlapping squares of a wide frame, to detect small faces (down to an eighth of the height)."""
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
    """Both eyes and the mouth (3, 2), (x, y) in pixels, from the landmarks (478, 2)."""
    return np.stack([landmarks[list(indices)].mean(0) for indices in ANCHORS])


def align(frame: np.ndarray, points: np.ndarray, size: int) -> np.ndarray:
    """Crop a face so that eyes and mouth are at `TEMPLATE`, by rotation, scaling and translation only.

    Args:
        frame: RGB frame (height, width, 3), uint8.
        points: Both eyes and the mouth (3, 2) in pixels of the frame.
        size: Height and width of the crop.

    Returns:
        The crop (size, size, 3), uint8 RGB; pixels outside the frame are black.
    """
    import cv2

    scale = np.hypot(*_similarity(points, TEMPLATE * size)[:, 0])
    oversize = size * max(1, round(1 / scale))  # warp at about full resolution, then shrink with averaging
    matrix = _similarity(points, TEMPLATE * oversize)
    crop = cv2.warpAffine(frame, matrix, (oversize, oversize), flags=cv2.INTER_LINEAR)
    return crop if oversize == size else cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)


def _similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Matrix (2, 3) of the least-squares similarity transform from source to target points (n, 2).

    The problem is linear in (scale cos, scale sin, shift x, shift y), so the solution is exact. OpenCV's
    estimator samples random subsets.
    """
    x, y = source.T
    one, zero = np.ones_like(x), np.zeros_like(x)
    rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
    (a, b, shift_x, shift_y), *_ = np.linalg.lstsq(rows, target.T.reshape(-1), rcond=None)
    return np.array([[a, -b, shift_x], [b, a, shift_y]])


def _open_landmarker(model_path: Path) -> "vision.FaceLandmarker":  # noqa: F821
    """Open a Face Landmarker for single images.

    Raises:
        ValueError: The file is not a landmark model.
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
            " or remove this one to download it again"
        ) from error


@contextmanager
def _native_log_silenced() -> Iterator[None]:
    """Suppress MediaPipe's C++ log while a model is loaded; no setting turns it off.

    The log goes to file descriptor 2, which the whole process shares. So only one model is loaded at a time,
    and lines that other threads write meanwhile are written afterwards. Errors of MediaPipe are exceptions
    and not affected.
    """
    with _LOADING:
        try:
            saved = os.dup(2)
        except OSError:  # no standard error, as in a daemon: nothing to suppress
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
