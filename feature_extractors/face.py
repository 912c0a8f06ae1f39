# SPDX-License-Identifier: Apache-2.0
"""Extract aligned face crops and blendshape scores from frames, tracking one face through the clip.

MediaPipe's Face Landmarker runs in IMAGE mode, with our own tracking. Its VIDEO mode carries state from one
clip to the next, so features would depend on the order of the clips.
"""

import io
import os
import re
import tempfile
import threading
import weakref
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import numpy as np

from feature_extractors.assets import get_asset
from feature_extractors.clip import NUM_BLENDSHAPES, ExtractionSettings, Region
from feature_extractors.following import (
    EYES,
    SAME,
    Face,
    View,
    most_speaking,
    nearest_or_largest,
    people,
    shows_several,
)

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

ANCHORS = (*EYES, (61, 291))
"""Landmarks whose mean is a point of `TEMPLATE`: corners of each eye, corners of the mouth."""

MAX_FACES = 4
"""Largest number of faces detected in a frame; the limit costs nothing if there are fewer."""

BORDER = 0.25
"""Width of the border, as a share of the frame, that is added to detect faces that fill the frame."""

LONG = 1.1
"""Frames whose longer side is more than this many shorter sides are also searched in squares: the detector
works on 128 x 128 pixels and misses faces narrower than an eighth of the frame."""

MAX_SQUARES = 32
"""Largest number of squares searched in a frame; enough for `limits.MAX_ASPECT`. Wider frames have gaps."""

CENSUS = 2
"""Number of frames searched for other people, if the search stopped early at the tracked face."""

CENSUS_LONG = 1.5
"""Aspect ratio up to which the whole frame shows nearly all faces that its squares show."""

MIN_REGION = 16
"""Smallest side in pixels of a searched region; smaller regions are enlarged."""

_LOADING = threading.RLock()
_NOTICE = re.compile(
    rb"(?m:^INFO: \[.*\n?)"
    rb"|(?:WARNING: Logging before|INFO: Created TensorFlow Lite"
    rb"|[IWE]\d{4} \d\d:\d\d:\d+\.\d+ +\d+ [\w.]+:\d+\]).*\n?"
)
"""Notices of MediaPipe and TensorFlow Lite. All but the first form can begin in the middle of a line."""


@dataclass(frozen=True)
class Faces:
    """One face tracked through a clip.

    Attributes:
        crops: Aligned crops (frames, size, size, 3), uint8 RGB; zeros where no face was found.
        blendshapes: Scores in [0, 1] (frames, 52), float32, in the order of `BLENDSHAPE_NAMES`; zeros where
            no face was found.
        found: Whether the frame shows the face (frames,), bool.
        several: Whether the clip shows other faces of comparable size.
    """

    crops: np.ndarray
    blendshapes: np.ndarray
    found: np.ndarray
    several: bool = False


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
        self._landmarker, self._detector = _open_models(Path(model_path or get_asset("face_landmarker")))

    def __enter__(self) -> "FaceExtractor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free MediaPipe's memory and threads; the extractor cannot be used afterwards."""
        with _native_log_silenced():
            self._landmarker.close()
            self._detector.close()

    def extract(
        self,
        frames: np.ndarray,
        region: Region | None = None,
        loudness: np.ndarray | None = None,
        scenes: np.ndarray | None = None,
    ) -> Faces:
        """Track one face through a clip.

        It starts with the largest face of the first frame that has one. In later frames the nearest face
        continues the track if it is close enough. Otherwise the track is lost, and the largest face starts a
        new one. If `loudness` is given, only the face that speaks is tracked (see `most_speaking`). A track
        ends with its scene: a face at the same place after a cut is another person's.

        Args:
            frames: RGB frames (frames, height, width, 3), uint8, in order; may be empty.
            region: Part of the frame to search, as in `Clip`; None for the whole frame.
            loudness: Sound level around each frame (frames,); needed to choose the face that speaks.
            scenes: Number of each frame's scene (frames,), rising; None if there is one scene.

        Returns:
            Crops, scores and found mask, one row per frame.
        """
        crops = np.zeros((len(frames), self.size, self.size, 3), np.uint8)
        blendshapes = np.zeros((len(frames), NUM_BLENDSHAPES), np.float32)
        found = np.zeros(len(frames), bool)
        area = _area(frames.shape[2], frames.shape[1], region)
        scenes = np.zeros(len(frames), int) if scenes is None else scenes
        if loudness is None:
            complete, followed = self._follow(frames, area, scenes)
        else:
            complete = [self._detect_all(frame, area) for frame in frames]
            followed = {}
            for scene in np.unique(scenes):
                indices = np.flatnonzero(scenes == scene)
                chosen = most_speaking([complete[index] for index in indices], loudness[indices])
                followed |= {int(indices[place]): face for place, face in chosen.items()}
        for index, face in followed.items():
            crops[index] = align(frames[index], anchor_points(face.landmarks), self.size)
            blendshapes[index] = face.blendshapes
            found[index] = True
        return Faces(crops, blendshapes, found, shows_several(complete, followed))

    def _follow(
        self, frames: np.ndarray, area: View, scenes: np.ndarray
    ) -> tuple[list[list[Face]], dict[int, Face]]:
        """All faces of the completely searched frames, and the tracked face by frame.

        If the only face was found in a square, the next frame is first searched in this square: a complete
        search needs five detections. A few of the frames that were not searched completely are then searched
        for other people.
        """
        complete: list[list[Face]] = []
        followed: dict[int, Face] = {}
        partly: list[int] = []
        tracked: Face | None = None
        alone = False
        for index, frame in enumerate(frames):
            if index and scenes[index] != scenes[index - 1]:
                tracked, alone = None, False
            again = self._found_again(frame, tracked, tracked.square) if tracked and alone else None
            faces = [again] if again else self._detect(frame, area)
            if not faces:
                continue
            followed[index] = tracked = nearest_or_largest(faces, tracked)
            if not again:
                alone = tracked.square is not None and len(people(faces)) == 1
            if again or (tracked.square is None and _is_long(area, CENSUS_LONG)):
                partly.append(index)
            else:
                complete.append(faces)
        for index in partly[len(partly) // 4 :: max(2, len(partly) // 2)][:CENSUS]:
            complete.append([followed[index], *self._others(frames[index], area, followed[index])])
        return complete, followed

    def _found_again(self, frame: np.ndarray, tracked: Face, square: View) -> Face | None:
        """The tracked face, if the square shows all of it and no other face."""
        faces = self._detect_in(square.of(frame), square.x, square.y, square)
        alone = len(faces) == 1 and faces[0].continues(tracked) and faces[0].lies_inside(square)
        return faces[0] if alone else None

    def _detect(self, frame: np.ndarray, area: View) -> list[Face]:
        """Faces in the first view of an area that shows any; all squares together are one view."""
        whole = area.of(frame)
        if faces := self._detect_in(whole, area.x, area.y):
            return faces
        border = round(BORDER * min(area.width, area.height))
        if faces := self._detect_in(_bordered(whole, border), area.x - border, area.y - border):
            return faces
        return self._detect_in_squares(frame, area)

    def _detect_all(self, frame: np.ndarray, area: View) -> list[Face]:
        """Faces in all views of an area; a face may occur several times."""
        return [*self._detect(frame, area), *self._detect_in_squares(frame, area)]

    def _detect_in_squares(self, frame: np.ndarray, area: View) -> list[Face]:
        squares = ((square.of(frame), square.x, square.y, square) for square in _squares(area))
        return [face for square in squares for face in self._detect_in(*square)]

    def _others(self, frame: np.ndarray, area: View, followed: Face) -> list[Face]:
        """Faces in the squares of an area in which the fast detector sees a face besides the tracked one."""
        import mediapipe

        faces = []
        for square in _squares(area, overlap=0.1):
            view = np.ascontiguousarray(square.of(frame))
            found = self._detector.detect(mediapipe.Image(mediapipe.ImageFormat.SRGB, view))
            boxes = (detection.bounding_box for detection in found.detections)
            centers = [(box.origin_x + box.width / 2, box.origin_y + box.height / 2) for box in boxes]
            offsets = np.array(centers).reshape(-1, 2) + square[:2] - followed.center
            if (np.linalg.norm(offsets, axis=1) > SAME * followed.size).any():
                faces.extend(self._detect_in(view, square.x, square.y, square))
        return faces

    def _detect_in(self, view: np.ndarray, x: int, y: int, square: View | None = None) -> list[Face]:
        """Faces in a view whose upper left corner is at (x, y) of the frame."""
        import mediapipe

        image = mediapipe.Image(mediapipe.ImageFormat.SRGB, np.ascontiguousarray(view))
        result = self._landmarker.detect(image)
        height, width = view.shape[:2]
        return [
            Face(
                landmarks=np.array([(point.x * width + x, point.y * height + y) for point in points]),
                blendshapes=np.array([category.score for category in scores], np.float32),
                square=square,
            )
            for points, scores in zip(result.face_landmarks, result.face_blendshapes, strict=True)
        ]


def face_extractor_of(owner: object, settings: ExtractionSettings) -> FaceExtractor:
    """The open extractor of an object, opened at the first call; errors as for `FaceExtractor`.

    It stays open while the object exists, or until `close_face_extractor_of`. MediaPipe must not be closed by
    the garbage collector. That may run in MediaPipe's own thread, which then waits for itself. So the
    extractor of an object that was dropped stays open for the next one. Those left are closed at the end of
    the interpreter. Each process has its own: a forked one has none of MediaPipe's threads.
    """
    with _LOADING:
        loan = _LOANS.get(owner)
        if loan is None or loan.process != os.getpid() or loan.extractor.size != settings.face_size:
            loan = _LOANS[owner] = _Loan(owner, settings)
        return loan.extractor


def close_face_extractor_of(owner: object) -> None:
    """Close the extractor of an object, if it has one."""
    with _LOADING:
        if (loan := _LOANS.pop(owner, None)) is not None:
            loan.close()


class _Loan:
    """An open `FaceExtractor` of one owner; goes to `_idle` when the owner is dropped."""

    _open: ClassVar[dict[FaceExtractor, int]] = {}  # with the process that opened it
    _idle: ClassVar[list[FaceExtractor]] = []

    def __init__(self, owner: object, settings: ExtractionSettings):
        self.process = os.getpid()
        fitting = [
            number
            for number, idle in enumerate(self._idle)
            if (idle.size, self._open[idle]) == (settings.face_size, self.process)
        ]
        self.extractor = self._idle.pop(fitting[0]) if fitting else FaceExtractor(settings)
        if not self._open:  # functions of `atexit` run too late: MediaPipe's threads have ended by then
            threading._register_atexit(self._close_all)
        self._open[self.extractor] = self.process
        self._give_back = weakref.finalize(owner, self._idle.append, self.extractor)

    def close(self) -> None:
        if self._give_back.detach() and self.process == os.getpid():
            del self._open[self.extractor]
            self.extractor.close()

    @classmethod
    def _close_all(cls) -> None:
        for extractor, process in cls._open.items():
            if process == os.getpid():
                extractor.close()


_LOANS: "weakref.WeakKeyDictionary[object, _Loan]" = weakref.WeakKeyDictionary()


def _area(width: int, height: int, region: Region | None) -> View:
    """The part of a frame to search, in pixels."""
    if region is None:
        return View(0, 0, width, height)
    left, top = round(region[0] * width), round(region[1] * height)
    right, bottom = round((region[0] + region[2]) * width), round((region[1] + region[3]) * height)
    left, top = max(0, min(left, width - MIN_REGION)), max(0, min(top, height - MIN_REGION))
    right, bottom = max(right, left + MIN_REGION), max(bottom, top + MIN_REGION)
    return View(left, top, min(right, width) - left, min(bottom, height) - top)


def _bordered(view: np.ndarray, border: int) -> np.ndarray:
    """The view with a black border, for faces that fill it: finds a third of those missed otherwise."""
    import cv2

    return cv2.copyMakeBorder(view, *[border] * 4, cv2.BORDER_CONSTANT)


def _is_long(area: View, ratio: float = LONG) -> bool:
    return max(area.width, area.height) > ratio * min(area.width, area.height)


def _squares(area: View, overlap: float = 0.4) -> Iterator[View]:
    """Overlapping squares of a long area, to detect small faces (down to an eighth of the shorter side)."""
    if not _is_long(area):
        return
    side, length = sorted((area.width, area.height))
    count = min(int(np.ceil(length / side / (1 - overlap))), MAX_SQUARES)
    for offset in np.linspace(0, length - side, count).astype(int):
        along = int(offset)
        if area.width > area.height:
            yield View(area.x + along, area.y, side, side)
        else:
            yield View(area.x, area.y + along, side, side)


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


def _open_models(model_path: Path) -> "tuple[vision.FaceLandmarker, vision.FaceDetector]":  # noqa: F821
    """Open a Face Landmarker for single images, and the face detector that its file contains.

    Raises:
        ValueError: The file is not a landmark model.
    """
    # Modules of this import keep an exception, and with it the local variables of all callers, for example a
    # model. A thread has no callers.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(import_module, "mediapipe.tasks.python.vision").result()
    from mediapipe.tasks.python import BaseOptions, vision

    try:
        content = model_path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as bundle:
            detector = bundle.read("face_detector.tflite")
        with _native_log_silenced():
            return (
                vision.FaceLandmarker.create_from_options(
                    vision.FaceLandmarkerOptions(
                        base_options=BaseOptions(model_asset_buffer=content),
                        running_mode=vision.RunningMode.IMAGE,
                        output_face_blendshapes=True,
                        num_faces=MAX_FACES,
                    )
                ),
                vision.FaceDetector.create_from_options(
                    vision.FaceDetectorOptions(base_options=BaseOptions(model_asset_buffer=detector))
                ),
            )
    except (RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{model_path}: not a MediaPipe face landmark model; give a face_landmarker.task file"
            " or remove this one to download it again"
        ) from error


@contextmanager
def _native_log_silenced() -> Iterator[None]:
    """Keeps MediaPipe's C++ notices off the terminal while models are loaded or freed; no setting does.

    The log goes to file descriptor 2, which the whole process shares. So only one model is loaded at a time,
    and what other threads write meanwhile is written afterwards, without a notice that came in the middle of
    a line. Errors of MediaPipe are exceptions and not affected.
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
                stderr.write(_NOTICE.sub(b"", sink.read()))
