# SPDX-License-Identifier: Apache-2.0
"""From a clip to features, written and real: what is missing is found, nothing depends on order."""

import csv
import dataclasses
import subprocess
import sys

import cv2
import numpy as np
import pytest

from feature_extractors import (
    Clip,
    ClipError,
    ClipFeatures,
    ExtractionSettings,
    FaceExtractor,
    decode,
    extract,
)

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
    assert features.waveform.dtype == np.int16


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Frames (frames, height, width, 3) next to each other, as of two people in one picture."""
    return np.concatenate([left, right], axis=2)


def test_several_faces_are_reported_and_a_region_decides(tmp_path, make_clip, face_image, face_extractor):
    red, blue = face_image // np.array([1, 2, 2], np.uint8), face_image // np.array([2, 2, 1], np.uint8)
    frames = side_by_side(*(np.broadcast_to(face, (8, *face.shape)) for face in (red, blue)))
    path = make_clip(tmp_path / "clip.mp4", frames=frames, size=(320, 160), fps=8)
    assert extract(Clip(path), SETTINGS, face_extractor).findings == ("several faces",)
    for region, channel in (((0, 0, 0.5, 1), 0), ((0.5, 0, 0.5, 1), 2)):
        features = extract(Clip(path, region=region), SETTINGS, face_extractor)
        assert features.findings == () and features.face_found.all()
        assert (
            features.face_crops[..., channel].mean((1, 2))
            > 1.3 * features.face_crops[..., 2 - channel].mean((1, 2))
        ).all()


@pytest.mark.parametrize(
    "region", [(0.5, 0, 0.6, 1), (0, 0, 0, 1), (-0.1, 0, 0.5, 1), (0, 0, float("nan"), 1), (0, 1)]
)
def test_a_region_that_is_no_part_of_the_frame_is_refused(tmp_path, make_clip, face_extractor, region):
    path = make_clip(tmp_path / "clip.mp4", seconds=0.2)
    with pytest.raises(ClipError, match="the region is .*; give x, y, width and height as shares"):
        extract(Clip(path, region=region), SETTINGS, face_extractor)


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_a_still_picture_is_said_to_be_one(tmp_path, make_clip, face_image, face_extractor, suffix):
    path = tmp_path / f"clip{suffix}"
    if suffix == ".png":
        cv2.imwrite(str(path), face_image[..., ::-1])
    else:
        make_clip(path, frames=face_image[None], fps=25)  # one picture and a second of sound
    features = extract(Clip(path), SETTINGS, face_extractor)
    assert "still picture" in features.findings and features.has_face
    make_clip(tmp_path / "moving.mp4", seconds=0.1)
    assert extract(Clip(tmp_path / "moving.mp4"), SETTINGS, face_extractor).findings == ()


@pytest.mark.parametrize("speaker", [0, 1])
def test_the_face_that_speaks_is_tracked_although_the_other_is_larger(
    shared_data, tmp_path, make_clip, face_image, speaker
):
    """A real speaker next to a larger, still picture of another one."""
    speaking = decode(Clip(shared_data / "crema_d" / "1001_DFA_HAP_XX.flv"), num_frames=60)
    times = np.linspace(0, len(speaking.frames) - 1, round(speaking.duration * 25)).astype(int)
    talker = speaking.frames[times][:, :, 60:420]  # 360 x 360
    other = np.full_like(talker, 100)
    other[:] = cv2.resize(face_image, (360, 360))
    sound = np.repeat(speaking.waveform, 3)  # at 48 kHz
    pair = (talker, other) if speaker == 0 else (other, talker)
    path = make_clip(tmp_path / "clip.mp4", frames=side_by_side(*pair), size=(720, 360), audio=sound)
    by_size = ExtractionSettings()
    by_speech = ExtractionSettings(face_choice="most_speaking")
    with FaceExtractor(by_size) as face_extractor:
        largest = extract(Clip(path), by_size, face_extractor)
        chosen = extract(Clip(path), by_speech, face_extractor)
        alone = extract(Clip(path, region=(0.5 * speaker, 0, 0.5, 1)), by_size, face_extractor)
    assert "several faces" in largest.findings and "several faces" in chosen.findings
    assert chosen.face_found.all() and chosen.timestamps.tolist() == largest.timestamps.tolist()
    assert np.abs(chosen.blendshapes - alone.blendshapes).sum(1).max() < 2
    assert np.abs(largest.blendshapes - alone.blendshapes).sum(1).min() > 2


def test_an_absent_clip_has_no_sound_no_frames_and_no_findings():
    features = ClipFeatures.absent(ExtractionSettings(face_size=48))
    assert len(features.waveform) == 0 and features.face_crops.shape == (0, 48, 48, 3)
    assert not features.has_audio and not features.has_face and features.findings == ()


def test_an_extractor_for_another_crop_size_is_refused(tmp_path, make_clip, face_extractor):
    path = make_clip(tmp_path / "clip.mkv", seconds=0.2)
    with pytest.raises(ValueError, match="crops of 96 pixels but settings.face_size is 64"):
        extract(Clip(path), ExtractionSettings(face_size=64), face_extractor)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("face_choice", "loudest"),
        ("num_frames", 0),
        ("face_size", 2.5),
        ("max_height", True),
    ],
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
        assert len(features.waveform) == pytest.approx(16_000 * features.duration, abs=480), path.name
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
