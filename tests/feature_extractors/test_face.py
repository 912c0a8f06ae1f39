# SPDX-License-Identifier: Apache-2.0
"""Faces are found, aligned to the template, and the same person is followed whatever came before."""

import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest

from feature_extractors import BLENDSHAPE_NAMES, ExtractionSettings, FaceExtractor
from feature_extractors.face import MAX_SQUARES, TEMPLATE, _native_log_silenced, align, anchor_points
from feature_extractors.following import View


@pytest.fixture(scope="module")
def face_extractor():
    with FaceExtractor() as extractor:
        yield extractor


def scene(*placed: tuple[np.ndarray, int, int, int], size: tuple[int, int] = (360, 640)) -> np.ndarray:
    """A gray picture of a height and width with faces (image, side, x, y) on it."""
    picture = np.full((*size, 3), 100, np.uint8)
    for image, side, x, y in placed:
        picture[y : y + side, x : x + side] = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return picture


@pytest.mark.parametrize("angle", [-25, 0, 25])
@pytest.mark.parametrize("scale", [0.8, 1.3])
def test_eyes_and_mouth_lie_at_the_template_after_rotation_and_scaling(
    face_extractor, face_image, angle, scale
):
    matrix = cv2.getRotationMatrix2D((80, 80), angle, scale)
    matrix[:, 2] += 80
    turned = cv2.warpAffine(face_image, matrix, (320, 320))
    (face,) = face_extractor._detect(turned, View(0, 0, 320, 320))
    crop = align(turned, anchor_points(face.landmarks), 192)
    (again,) = face_extractor._detect(crop, View(0, 0, 192, 192))
    np.testing.assert_allclose(anchor_points(again.landmarks) / 192, TEMPLATE, atol=0.035)


def test_alignment_is_exact_for_points_that_can_be_matched():
    frame = np.zeros((200, 300, 3), np.uint8)
    angle = np.deg2rad(30)
    turn = 120 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (TEMPLATE - 0.5) @ turn.T + (150, 100)
    for (x, y), color in zip(points, np.eye(3) * 255, strict=True):
        cv2.circle(frame, (round(x), round(y)), 5, color.tolist(), -1)
    crop = align(frame, points, 96).astype(float)
    for (x, y), channel in zip(TEMPLATE * 96, range(3), strict=True):
        rows, columns = np.nonzero(crop[..., channel] > 128)
        assert columns.mean() == pytest.approx(x, abs=1) and rows.mean() == pytest.approx(y, abs=1)


def test_shapes_types_and_ranges_and_zeros_where_nobody_is(face_extractor, face_image):
    faces = face_extractor.extract(np.stack([face_image, np.zeros_like(face_image), face_image]))
    assert faces.found.tolist() == [True, False, True]
    assert faces.crops.shape == (3, 96, 96, 3) and faces.crops.dtype == np.uint8
    assert faces.blendshapes.shape == (3, 52) and faces.blendshapes.dtype == np.float32
    assert not faces.crops[1].any() and not faces.blendshapes[1].any()
    assert faces.blendshapes.min() >= 0 and faces.blendshapes.max() <= 1
    smile = BLENDSHAPE_NAMES.index("mouthSmileLeft")
    assert faces.blendshapes[0, smile] > 0.3  # the astronaut smiles


def test_no_frames_give_no_faces(face_extractor):
    faces = face_extractor.extract(np.zeros((0, 0, 0, 3), np.uint8))
    assert (
        faces.crops.shape == (0, 96, 96, 3) and faces.blendshapes.shape == (0, 52) and len(faces.found) == 0
    )


def test_crop_size_follows_the_settings(face_image):
    with FaceExtractor(ExtractionSettings(face_size=64)) as extractor:
        assert extractor.extract(face_image[None]).crops.shape == (1, 64, 64, 3)


def test_the_largest_face_is_chosen_and_followed_when_another_becomes_larger(face_extractor, face_image):
    red = face_image // np.array([1, 4, 4], np.uint8)  # tints tell who is in the crop
    blue = face_image // np.array([4, 4, 1], np.uint8)
    small, large = 160, 240
    frames = np.stack(
        [
            scene((red, large, 20, 50), (blue, small, 400, 90)),
            scene((red, small, 50, 90), (blue, large, 380, 50)),
            scene((red, small, 70, 90), (blue, large, 380, 50)),
        ]
    )
    faces = face_extractor.extract(frames)
    assert faces.found.all()
    assert all(crop[..., 0].mean() > 1.5 * crop[..., 2].mean() for crop in faces.crops)


def test_a_lost_track_goes_on_with_the_largest_face(face_extractor, face_image):
    red = face_image // np.array([1, 4, 4], np.uint8)
    blue = face_image // np.array([4, 4, 1], np.uint8)
    frames = np.stack([scene((red, 220, 20, 50)), scene((blue, 220, 400, 50))])
    faces = face_extractor.extract(frames)
    assert faces.found.all() and faces.crops[1][..., 2].mean() > 1.5 * faces.crops[1][..., 0].mean()


def test_features_do_not_depend_on_what_was_seen_before(face_extractor, face_image):
    clip = np.stack([face_image, np.roll(face_image, 5, axis=1)])
    other = np.stack([scene((face_image, 220, 20, 50)), scene((face_image, 220, 400, 50))])
    first = face_extractor.extract(clip)
    face_extractor.extract(other)
    again = face_extractor.extract(clip)
    np.testing.assert_array_equal(first.crops, again.crops)
    np.testing.assert_array_equal(first.blendshapes, again.blendshapes)


@pytest.mark.parametrize("x", [20, 270, 500])
def test_a_small_face_in_a_wide_frame_is_found(face_extractor, face_image, x):
    assert face_extractor.extract(scene((face_image, 128, x, 100))[None]).found.all()


@pytest.mark.parametrize("y", [20, 400, 670])
def test_a_small_face_in_a_tall_frame_is_found(face_extractor, face_image, y):
    """A face of 17 % of the width; the picture pasted also shows hair and background."""
    faces = face_extractor.extract(scene((face_image, 174, 200, y), size=(853, 480))[None])
    assert faces.found.all()


def count_detections(face_extractor, monkeypatch) -> list[int]:
    """A list that grows by one entry with each view searched."""
    seen: list[int] = []
    detect = face_extractor._detect_in
    monkeypatch.setattr(face_extractor, "_detect_in", lambda *view: seen.append(1) or detect(*view))
    return seen


@pytest.mark.parametrize("step", [0, 2])
def test_the_search_for_a_small_face_starts_where_it_last_succeeded(
    face_extractor, face_image, monkeypatch, step
):
    frames = np.stack(
        [scene((face_image, 174, 300 + step * number, 100), size=(480, 853)) for number in range(6)]
    )
    with monkeypatch.context() as patch:
        patch.setattr(face_extractor, "_found_again", lambda *_: None)
        thorough = face_extractor.extract(frames)
    seen = count_detections(face_extractor, monkeypatch)
    faces = face_extractor.extract(frames)
    assert faces.found.all() and len(seen) == 5 + 5 * 1
    if step == 0:
        np.testing.assert_array_equal(faces.crops, thorough.crops)
    else:  # squares differ by as much as a face that moves two pixels does
        moved = np.abs(np.diff(thorough.blendshapes, axis=0)).sum(1).max()
        assert np.abs(faces.blendshapes - thorough.blendshapes).sum(1).max() < 1.5 * moved


def test_a_small_face_that_leaves_its_square_is_searched_everywhere(face_extractor, face_image):
    frames = np.stack([scene((face_image, 174, x, 100), size=(480, 853)) for x in (20, 30, 670, 40)])
    faces = face_extractor.extract(frames)
    assert faces.found.all()


def test_with_two_small_faces_both_are_seen_and_one_is_followed(face_extractor, face_image):
    red, blue = face_image // np.array([1, 2, 2], np.uint8), face_image // np.array([2, 2, 1], np.uint8)
    frames = np.stack([scene((red, 220, 20, 100), (blue, 180, 660, 90), size=(480, 853))] * 3)
    faces = face_extractor.extract(frames)
    assert faces.several and faces.found.all()
    assert all(crop[..., 0].mean() > 1.3 * crop[..., 2].mean() for crop in faces.crops)


def test_two_people_differ_from_one_seen_twice_and_from_the_background(face_extractor, face_image):
    def several(*placed):
        return face_extractor.extract(np.stack([scene(*placed)] * 4)).several

    assert several((face_image, 220, 20, 50), (face_image, 180, 400, 50))
    assert not several((face_image, 220, 20, 50))
    assert not several((face_image, 128, 270, 100))  # found in two overlapping squares
    assert not several((face_image, 340, 20, 10), (face_image, 80, 480, 100))


def test_a_passer_by_in_one_frame_is_no_second_person(face_extractor, face_image):
    alone = scene((face_image, 220, 20, 50))
    frames = np.stack([alone] * 7 + [scene((face_image, 220, 20, 50), (face_image, 180, 400, 50))])
    assert not face_extractor.extract(frames).several


def test_a_region_chooses_between_people_side_by_side(face_extractor, face_image):
    red, blue = face_image // np.array([1, 4, 4], np.uint8), face_image // np.array([4, 4, 1], np.uint8)
    frames = np.stack([scene((red, 240, 20, 50), (blue, 180, 400, 50))] * 2)
    whole = face_extractor.extract(frames)
    left = face_extractor.extract(frames, region=(0, 0, 0.5, 1))
    right = face_extractor.extract(frames, region=(0.5, 0, 0.5, 1))
    assert whole.several and not left.several and not right.several
    assert left.found.all() and right.found.all()
    assert (left.crops[..., 0].mean((1, 2)) > 1.5 * left.crops[..., 2].mean((1, 2))).all()
    assert (right.crops[..., 2].mean((1, 2)) > 1.5 * right.crops[..., 0].mean((1, 2))).all()
    assert np.abs(left.blendshapes - whole.blendshapes).sum(1).max() < 2
    assert not face_extractor.extract(frames, region=(0.4, 0, 0.1, 1)).found.any()
    assert not face_extractor.extract(frames, region=(1, 1, 0, 0)).found.any()


@pytest.mark.parametrize(("width", "views"), [(160, 2), (16 * 100, 2 + 27), (30_000, 2 + MAX_SQUARES)])
def test_an_extremely_wide_frame_costs_a_limited_number_of_detections(
    face_extractor, monkeypatch, width, views
):
    seen = count_detections(face_extractor, monkeypatch)
    face_extractor.extract(np.zeros((1, 160 if width == 160 else 100, width, 3), np.uint8))
    assert len(seen) == views


def test_loading_the_model_leaves_the_terminal_clean_but_own_errors_come_through(tmp_path):
    fake = tmp_path / "fake.task"
    fake.write_bytes(b"no model")
    program = (
        "import sys, numpy as np\nfrom feature_extractors import FaceExtractor\n"
        "with FaceExtractor() as e: e.extract(np.zeros((1, 64, 64, 3), np.uint8))\n"
        f"try: FaceExtractor(model_path={str(fake)!r})\n"
        "except ValueError as error: print(error, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.startswith(f"{fake}: not a MediaPipe face landmark model")
    assert len(done.stderr.splitlines()) == 1


LOADING_IN_THREADS = """
import sys
import threading
from feature_extractors import FaceExtractor
from feature_extractors.face import _native_log_silenced

def load():
    with _native_log_silenced():  # one inside another, as when a caller silences the log too
        FaceExtractor().close()

threads = [threading.Thread(target=load) for _ in range(6)]
for thread in threads:
    thread.start()
line = 0
while any(thread.is_alive() for thread in threads):
    line += 1
    sys.stderr.write(f"line {line}\\n")
    threads[line % 6].join(0.005)
print("end", file=sys.stderr)
"""


def test_threads_that_load_models_at_once_lose_nothing_written_to_stderr():
    done = subprocess.run(
        [sys.executable, "-c", LOADING_IN_THREADS], capture_output=True, text=True, check=True
    )
    # MediaPipe writes a notice in several parts, so a line may stand inside one; it is whole all the same.
    numbers = sorted(int(number) for number in re.findall(r"line (\d+)\n", done.stderr))
    assert len(numbers) > 10 and numbers == list(range(1, len(numbers) + 1))
    assert done.stderr.endswith("end\n")


def test_a_notice_in_the_middle_of_a_line_leaves_the_line_whole(capfd):
    with _native_log_silenced():
        for part in (b"half of ", b"W0000 00:00:1795724353.39 22245 manager.cc:121] A notice.\n", b"a line"):
            os.write(2, part)
    assert capfd.readouterr().err == "half of a line"


def test_a_line_of_another_program_stays(capfd):
    line = b"2026-01-31 09:30 copying INFO: [3/10] W0131 done\n"
    with _native_log_silenced():
        os.write(2, line)
    assert capfd.readouterr().err == line.decode()


def test_a_model_is_loaded_without_standard_error():
    program = "import os\nos.close(2)\nfrom feature_extractors import FaceExtractor\nFaceExtractor().close()"
    subprocess.run([sys.executable, "-c", program], check=True)
