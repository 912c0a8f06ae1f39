# SPDX-License-Identifier: Apache-2.0
"""`python -m feature_extractors`: says what was found, draws it, exits 1 with one line on broken clips."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from feature_extractors.__main__ import main


def test_the_table_shows_what_was_found(tmp_path, make_clip, capsys):
    assert main([str(make_clip(tmp_path / "clip.mp4", seconds=1))]) == 0
    shown = capsys.readouterr().out
    for words in ("1.0", "video + audio", "8 of 160 x 160", "face in 8 of 8", "mouthSmile", "dB", "none"):
        assert words in shown


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"audio": None}, "no audio stream"),
        ({"audio": "silent"}, "silent audio"),
        ({"video": False}, "no video stream"),
        ({"frames": np.zeros((8, 160, 160, 3), np.uint8), "fps": 8}, "no face"),
    ],
)
def test_it_succeeds_on_clips_that_lack_something(tmp_path, make_clip, capsys, options, finding):
    sheet = tmp_path / "sheet.png"
    assert main([str(make_clip(tmp_path / "clip.mkv", **options)), "--save-contact-sheet", str(sheet)]) == 0
    assert finding in capsys.readouterr().out
    assert sheet.exists() == (finding != "no video stream")


def test_the_contact_sheet_shows_frames_and_crops(tmp_path, make_clip, face_image):
    frames = np.stack([face_image] * 4 + [np.zeros_like(face_image)] * 4)
    path = make_clip(tmp_path / "clip.mkv", frames=frames, fps=8)
    target = tmp_path / "pictures" / "of faces" / "sheet.png"  # folders that are not there yet
    assert main([str(path), "--save-contact-sheet", str(target)]) == 0
    sheet = cv2.imread(str(target))
    assert 300 < sheet.shape[0] < 1000 and 1000 < sheet.shape[1] <= 1600
    shown = cv2.resize(face_image, (168, 168), interpolation=cv2.INTER_AREA)[..., ::-1]
    match = cv2.matchTemplate(sheet, np.ascontiguousarray(shown), cv2.TM_CCOEFF_NORMED)
    assert (match > 0.95).any()


@pytest.mark.parametrize("window", [["--start", "2", "--end", "1"], ["--start", "5"]])
def test_a_bad_window_is_one_line_and_exit_code_1(tmp_path, make_clip, capsys, window):
    assert main([str(make_clip(tmp_path / "clip.mp4", seconds=0.3)), *window]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "clip.mp4" in error and len(error.splitlines()) == 1


def test_a_broken_file_is_one_line_and_exit_code_1_from_the_shell(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"nonsense" * 100)
    command = [sys.executable, "-m", "feature_extractors", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {path}: cannot be decoded") and done.stderr.count("\n") == 1


def test_a_missing_face_model_names_the_remedy(tmp_path, make_clip, capsys, monkeypatch):
    monkeypatch.setenv("MSA_MODEL_FACE_LANDMARKER", str(tmp_path / "nowhere.task"))
    assert main([str(make_clip(tmp_path / "clip.mp4", seconds=0.3))]) == 1
    assert "MSA_MODEL_FACE_LANDMARKER" in capsys.readouterr().err
