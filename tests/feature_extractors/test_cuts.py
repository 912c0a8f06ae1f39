# SPDX-License-Identifier: Apache-2.0
"""After a cut another person may be where the first one was: the track starts again, and the user is told."""

from pathlib import Path

import av
import numpy as np
import pytest

from feature_extractors import Clip, ExtractionSettings, FaceExtractor, decode, extract
from feature_extractors.clip import kind_of, scene_cuts_finding
from feature_extractors.cuts import CutDetector


def pictures_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def two_speakers(shared_data, make_clip, tmp_path_factory) -> Path:
    """Two recordings of the GRID corpus in front of one background, 3 s each, joined."""
    parts = [pictures_of(shared_data / "grid" / name)[:75] for name in ("bbaf2n.mpg", "lwbsza.mpg")]
    path = tmp_path_factory.mktemp("cuts") / "two.mp4"
    return make_clip(path, frames=np.concatenate(parts), size=(360, 288), seconds=6)


def test_a_cut_between_two_real_speakers_is_found_and_named(two_speakers):
    raw = decode(Clip(two_speakers))
    assert raw.cuts == (pytest.approx(3.0, abs=0.05),) and raw.findings == ("scene cut at 3.0 s",)
    part = decode(Clip(two_speakers, 1, 6))
    assert part.cuts == (pytest.approx(2.0, abs=0.05),) and part.findings == ("scene cut at 3.0 s",)
    assert decode(Clip(two_speakers, 3.5, 6)).findings == ()


@pytest.mark.parametrize("choice", ["largest", "most_speaking"])
def test_the_features_of_a_clip_with_a_cut_name_it(two_speakers, choice):
    settings = ExtractionSettings(num_frames=4, face_choice=choice)
    with FaceExtractor(settings) as faces:
        features = extract(Clip(two_speakers), settings, faces)
    assert features.face_found.all() and "scene cut at 3.0 s" in features.findings


def test_real_recordings_without_a_cut_have_none(shared_data):
    paths = sorted((shared_data / "crema_d").glob("*.flv"))[:2]
    paths += sorted((shared_data / "grid").glob("*.mpg"))[:3] + sorted((shared_data / "edge_cases").glob("*"))
    assert {path.name: decode(Clip(path)).cuts for path in paths} == {path.name: () for path in paths}


def test_a_face_at_the_same_place_after_a_cut_starts_a_new_track(face_image):
    """Before the cut a small face; after it a small one at the same place, and a large one."""
    import cv2

    def scene(*faces: tuple[int, int]) -> np.ndarray:
        picture = np.full((320, 640, 3), 90, np.uint8)
        for left, size in faces:
            picture[80 : 80 + size, left : left + size] = cv2.resize(face_image, (size, size))
        return picture

    frames = np.stack([scene((60, 120))] * 2 + [scene((60, 120), (380, 220))] * 2)
    with FaceExtractor(ExtractionSettings()) as extractor:
        one = extractor.extract(frames)
        cut = extractor.extract(frames, scenes=np.array([0, 0, 1, 1]))
    assert one.found.all() and cut.found.all()
    assert np.array_equal(one.crops[:2], cut.crops[:2])
    assert not np.array_equal(one.crops[2:], cut.crops[2:])


def detected(pictures: list[np.ndarray]) -> list[float]:
    detector = CutDetector()
    for time, picture in enumerate(pictures):
        detector.add(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"), float(time))
    return detector.times


def test_flashes_fades_and_pans_are_no_cuts():
    random = np.random.default_rng(0)
    wide = np.kron(random.integers(0, 255, (12, 60, 3)), np.ones((20, 20, 1))).astype(np.uint8)
    still, other = wide[:, :320], wide[:, 800:1120]
    assert detected([still] * 6 + [other] * 6) == [6.0]
    assert detected([still] * 6 + [np.full_like(still, 255)] + [still] * 6) == []
    assert detected([(still * share).astype(np.uint8) for share in np.linspace(1, 0, 15)]) == []
    assert detected([wide[:, 10 * step : 10 * step + 320] for step in range(30)]) == []
    assert detected([still] * 2) == [] and detected([]) == []


def test_many_cuts_are_one_short_line_and_one_kind():
    assert scene_cuts_finding([1.0, 2.25]) == "scene cuts at 1.0, 2.2 s"
    many = scene_cuts_finding([float(second) for second in range(1, 13)])
    assert many == "scene cuts at 1.0, 2.0, 3.0, 4.0, 5.0 s and 7 more"
    assert kind_of(many) == kind_of("scene cut at 3.2 s") == "scene cuts" and kind_of("no face") == "no face"
