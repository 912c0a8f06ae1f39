# SPDX-License-Identifier: Apache-2.0
import gc
import io
import os
import subprocess
import sys
import wave

import numpy as np
import pytest

from feature_extractors import (
    Clip,
    ClipError,
    ExtractionSettings,
    FaceExtractor,
    Upload,
    clip_of_arrays,
    decode,
)
from feature_extractors.face import _Loan, close_face_extractor_of, face_extractor_of

SETTINGS = ExtractionSettings(num_frames=4, face_size=32)


def noise(rate: int, channels: int = 1, seconds: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(rate)
    return (3000 * random.normal(size=(channels, round(rate * seconds)))).astype(np.int16)


# --- arrays ---


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 3), (48_000, 10)])
def test_sound_of_an_array_is_that_of_its_file(rate, channels, tmp_path):
    sound = noise(rate, channels)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(sound.T).tobytes())
    expected, found = decode(Clip(tmp_path / "a.wav")), clip_of_arrays(SETTINGS, sound, rate)
    np.testing.assert_array_equal(found.waveform, expected.waveform)
    as_floats = clip_of_arrays(SETTINGS, sound.astype(np.float64) / 2**15, rate)
    np.testing.assert_array_equal(as_floats.waveform, expected.waveform)
    assert (found.duration, found.has_audio, found.has_video) == (expected.duration, True, False)


def test_channels_that_cancel_out_leave_one():
    sound = noise(16_000)[0]
    clip = clip_of_arrays(SETTINGS, np.stack([sound, -sound]), 16_000)
    assert clip.findings == ("opposite channels, only channel 1 is used",)
    np.testing.assert_allclose(clip.waveform, sound / 2**15)


def test_pictures_are_sampled_at_midpoints_and_spread_over_the_sound():
    pictures = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 20, 30, 3), np.uint8)
    clip = clip_of_arrays(SETTINGS, noise(16_000, seconds=2)[0], 16_000, pictures)
    assert clip.frames[:, 0, 0, 0].tolist() == [2, 7, 12, 17]
    np.testing.assert_allclose(clip.timestamps, [0.2, 0.7, 1.2, 1.7])
    assert len(clip_of_arrays(SETTINGS, frames=list(pictures[:3])).frames) == 3
    one = clip_of_arrays(SETTINGS, frames=pictures[0])
    assert one.frames.shape == (1, 20, 30, 3) and one.findings == ("still picture",)
    speaking = ExtractionSettings(num_frames=4, face_choice="most_speaking")
    assert len(clip_of_arrays(speaking, frames=pictures).frames) == 12


def test_large_pictures_are_scaled_down_in_shape():
    pictures = np.zeros((2, 600, 800, 3), np.uint8)
    assert clip_of_arrays(SETTINGS, frames=pictures).frames.shape == (2, 480, 640, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "neither audio nor frames"),
        ({"audio": np.zeros(9)}, "sampling_rate is None: give the samples per second"),
        ({"audio": np.zeros(9), "sampling_rate": 0}, "sampling_rate is 0: give a number from 1,000"),
        ({"audio": np.zeros(0), "sampling_rate": 16_000}, "lasts 0 s"),
        (
            {"audio": np.zeros((9_000, 2)), "sampling_rate": 16_000},
            r"shape \(9000, 2\).*\(channels, samples\)",
        ),
        ({"audio": [0.0, float("nan")], "sampling_rate": 16_000}, "sample 1 of the audio is nan"),
        ({"audio": np.zeros(9, bool), "sampling_rate": 16_000}, "audio is bool"),
        ({"frames": np.zeros((2, 3, 8, 8), np.uint8)}, r"shape \(2, 3, 8, 8\): give RGB pictures"),
        ({"frames": np.zeros((2, 8, 8, 3))}, "frames are float64"),
        ({"frames": np.zeros((0, 8, 8, 3), np.uint8)}, r"shape \(0, 8, 8, 3\)"),
        ({"frames": [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)]}, "differ in size"),
        ({"frames": np.zeros((1, 8, 800, 3), np.uint8)}, "aspect ratio"),
    ],
)
def test_arrays_of_another_form_are_refused_with_what_is_needed(given, message):
    with pytest.raises(ValueError, match=message):
        clip_of_arrays(SETTINGS, **given)


# --- bytes and open files ---


def test_an_upload_is_read_once_and_named_in_errors(make_clip, tmp_path):
    content = make_clip(tmp_path / "a.mp4").read_bytes()
    for upload in (Upload(content), Upload(io.BytesIO(content)), Upload(memoryview(content), 0.2, 0.6)):
        with upload.on_disk() as clip:
            assert decode(clip).has_video and clip.start == upload.start
        assert not clip.path.exists()
    (tmp_path / "b.mp4").write_bytes(b"")
    with (
        (tmp_path / "b.mp4").open("rb") as file,
        pytest.raises(ClipError) as raised,
        Upload(file).on_disk() as clip,
    ):
        decode(clip)
    assert raised.value.path == tmp_path / "b.mp4" and "empty" in str(raised.value)
    with pytest.raises(ClipError, match=r"^\(bytes\): "), Upload(b"no media").on_disk() as clip:
        decode(clip)


# --- one extractor for each owner ---


class Owner:
    pass


def test_an_owner_keeps_one_extractor_and_the_next_one_takes_it_over():
    first, second = Owner(), Owner()
    extractor, again, other = (face_extractor_of(owner, SETTINGS) for owner in (first, first, second))
    assert again is extractor and other is not extractor
    del first
    third = Owner()
    assert face_extractor_of(third, SETTINGS) is extractor
    close_face_extractor_of(third)
    close_face_extractor_of(third)
    assert extractor not in _Loan._open and extractor not in _Loan._idle
    assert face_extractor_of(third, SETTINGS) is not extractor
    close_face_extractor_of(second)
    close_face_extractor_of(third)


def test_dropping_an_owner_closes_nothing(monkeypatch):
    """MediaPipe's own thread may run the garbage collector, and would then wait for itself."""
    owner = Owner()
    owner.circle = owner
    extractor = face_extractor_of(owner, SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(FaceExtractor, "close", lambda _: pytest.fail("closed"))
        del owner
        gc.collect()
    assert extractor in _Loan._idle


def test_a_forked_process_opens_its_own():
    owner = Owner()
    face_extractor_of(owner, SETTINGS)
    child = os.fork()
    if not child:
        fresh = face_extractor_of(owner, SETTINGS)
        faces = fresh.extract(np.zeros((1, 64, 64, 3), np.uint8))
        os._exit(int(faces.found.any()))
    assert os.waitpid(child, 0)[1] == 0
    close_face_extractor_of(owner)


def test_what_is_left_open_is_closed_quietly_at_the_end(repository):
    program = (
        "from feature_extractors.face import *; import numpy as np\n"
        "class Owner: pass\n"
        "kept, dropped, closed = Owner(), Owner(), Owner()\n"
        "for each in (kept, dropped, closed): face_extractor_of(each, ExtractionSettings())\n"
        "face_extractor_of(kept, ExtractionSettings()).extract(np.zeros((1, 64, 64, 3), np.uint8))\n"
        "del dropped, each\n"
        "close_face_extractor_of(closed)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0 and "Traceback" not in ended.stderr and "Exception" not in ended.stderr
