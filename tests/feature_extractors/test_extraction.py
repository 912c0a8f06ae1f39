# SPDX-License-Identifier: Apache-2.0
"""From a clip to features, written and real: what is missing is found, nothing depends on order."""

import csv
import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from feature_extractors import Clip, ClipFeatures, ExtractionSettings, FaceExtractor, decode, extract

SETTINGS = ExtractionSettings()


@pytest.fixture(scope="module")
def face_extractor():
    with FaceExtractor(SETTINGS) as extractor:
        yield extractor


def assert_equal(ours: ClipFeatures, theirs: ClipFeatures) -> None:
    for field in dataclasses.fields(ClipFeatures):
        np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name), field.name)


@pytest.mark.parametrize(
    ("options", "findings"),
    [
        ({}, ()),
        ({"audio": None}, ("no audio stream",)),
        ({"audio": "silent"}, ("silent audio",)),
        ({"video": False}, ("no video stream",)),
        ({"frames": np.zeros((8, 160, 160, 3), np.uint8)}, ("no face",)),
        ({"frames": np.zeros((8, 160, 160, 3), np.uint8), "audio": None}, ("no face", "no audio stream")),
    ],
)
def test_what_a_clip_lacks_is_found_and_is_no_error(tmp_path, make_clip, face_extractor, options, findings):
    path = make_clip(tmp_path / "clip.mkv", fps=8, **options)
    features = extract(Clip(path), SETTINGS, face_extractor)
    assert features.findings == findings
    assert features.has_audio == (not {"no audio stream", "silent audio"} & set(findings))
    assert features.has_face == (not {"no video stream", "no face"} & set(findings))
    assert features.timestamps.dtype == np.float32 and len(features.timestamps) == len(features.face_crops)
    assert np.isfinite(features.log_mel).all() and features.log_mel.dtype == np.float32


def test_an_absent_clip_has_no_steps_no_frames_and_no_findings():
    features = ClipFeatures.absent(ExtractionSettings(face_size=48, num_mels=40))
    assert features.log_mel.shape == (0, 40) and features.face_crops.shape == (0, 48, 48, 3)
    assert not features.has_audio and not features.has_face and features.findings == ()


def test_an_extractor_for_another_crop_size_is_refused(tmp_path, make_clip, face_extractor):
    path = make_clip(tmp_path / "clip.mkv", seconds=0.2)
    with pytest.raises(ValueError, match="crops of 96 pixels but settings.face_size is 64"):
        extract(Clip(path), ExtractionSettings(face_size=64), face_extractor)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_frames", 0), ("face_size", 2.5), ("num_mels", True), ("hop_ms", 0), ("window_ms", float("nan"))],
)
def test_impossible_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        ExtractionSettings(**{name: value})


def test_importing_the_package_loads_nothing_heavy():
    program = (
        "import sys, feature_extractors\n"
        "print({'torch', 'av', 'cv2', 'mediapipe', 'librosa', 'rich', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def real_clips(folder):
    return sorted(path for path in folder.iterdir() if path.suffix in (".mp4", ".flv", ".mpg"))


@pytest.mark.parametrize("corpus", ["crema_d", "grid"])
def test_every_real_recording_shows_a_face_in_every_frame_and_is_heard(shared_data, face_extractor, corpus):
    clips = real_clips(shared_data / corpus)
    assert clips
    for path in clips:
        features = extract(Clip(path), SETTINGS, face_extractor)
        assert features.findings == (), path.name
        assert features.face_found.sum() == len(features.face_found) == 8, path.name
        middles = features.duration * (np.arange(8) + 0.5) / 8
        assert np.abs(features.timestamps - middles).max() < 0.1, path.name
        assert len(features.log_mel) == pytest.approx(100 * features.duration, abs=3), path.name
        crops = features.face_crops.astype(float)
        assert crops.std() > 20 and np.abs(np.diff(crops.mean((1, 2, 3)))).max() < 25, path.name


@pytest.mark.parametrize(
    ("name", "findings"),
    [
        ("no_face.mp4", ("no face",)),
        ("face_no_audio_stream.mp4", ("no audio stream",)),
        ("face_silent_audio.mp4", ("silent audio",)),
    ],
)
def test_edge_cases_are_used_with_what_they_lack_masked(shared_data, face_extractor, name, findings):
    features = extract(Clip(shared_data / "edge_cases" / name), SETTINGS, face_extractor)
    assert features.findings == findings


def test_order_does_not_matter_on_real_clips(shared_data, face_extractor):
    with open(shared_data / "composite" / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))[::400]
    clips = [Clip(shared_data / "composite" / row["file_name"]) for row in rows]
    forward = [extract(clip, SETTINGS, face_extractor) for clip in clips]
    backward = [extract(clip, SETTINGS, face_extractor) for clip in reversed(clips)][::-1]
    for ours, theirs in zip(forward, backward, strict=True):
        assert_equal(ours, theirs)


def test_happy_and_angry_faces_differ_in_the_smile(shared_data, face_extractor):
    from feature_extractors import BLENDSHAPE_NAMES

    smile = BLENDSHAPE_NAMES.index("mouthSmileLeft")
    happy, angry = (
        extract(Clip(shared_data / "crema_d" / f"1001_DFA_{emotion}_XX.flv"), SETTINGS, face_extractor)
        for emotion in ("HAP", "ANG")
    )
    assert happy.blendshapes[:, smile].mean() > angry.blendshapes[:, smile].mean() + 0.2


def test_a_window_of_a_real_long_clip(shared_data):
    raw = decode(Clip(shared_data / "edge_cases" / "face_silent_audio.mp4", 10, 12), num_frames=4)
    assert raw.timestamps == pytest.approx([0.25, 0.75, 1.25, 1.75], abs=0.05)
    assert raw.duration == 2 and len(raw.waveform) == 32_000
