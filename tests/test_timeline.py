# SPDX-License-Identifier: Apache-2.0
"""A long recording is read to its end, once, in windows that are those of single clips."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feature_extractors import Clip, ClipError, decode
from feature_extractors.collecting import FrameSampler, OverlappingWindows
from feature_extractors.decoding import decode_windows, media_seconds, windows_of
from msa_online import MSAPipeline, Prediction
from msa_online.commands.predict import prediction_lines
from msa_online.timeline import Timeline, WindowPrediction, exceeds_reach, mean_of_windows, predict_timeline
from msa_online_cli import main

PARTS = {"text": 0.0, "audio": 0.5, "vision": -0.25}


@pytest.fixture
def recording(make_clip, face_image, tmp_path) -> Path:
    """Ten seconds of a face whose brightness tells the time, with a tone."""
    shades = np.linspace(0.4, 1, 50)[:, None, None, None]
    frames = (face_image[None] * shades).astype(np.uint8)
    return make_clip(tmp_path / "long.mp4", seconds=10, fps=5, frames=frames)


def test_the_windows_of_one_pass_are_those_that_are_decoded_one_by_one(recording):
    assert media_seconds(Clip(recording)) == pytest.approx(10, abs=0.1)
    windows = list(decode_windows(Clip(recording), 3, 2))
    assert [round(part.start) for part, _ in windows] == [0, 2, 4, 6, 7]
    for part, raw in windows:
        alone = decode(part)
        assert np.array_equal(raw.frames, alone.frames) and np.allclose(raw.timestamps, alone.timestamps)
        assert raw.duration == pytest.approx(3) and len(raw.waveform) == pytest.approx(48_000, abs=2)
        shared = min(len(raw.waveform), len(alone.waveform))
        assert np.corrcoef(raw.waveform[:shared], alone.waveform[:shared])[0, 1] > 0.99


@pytest.mark.parametrize("video", [True, False])
def test_a_recording_with_one_stream_has_windows_too(make_clip, tmp_path, video):
    path = make_clip(
        tmp_path / ("a.mp4" if video else "a.wav"), seconds=4, video=video, audio=None if video else "tone"
    )
    windows = [raw for _, raw in decode_windows(Clip(path), 2, 1)]
    assert len(windows) == 3 and {(raw.has_video, raw.has_audio) for raw in windows} == {(video, not video)}


def test_windows_cover_the_recording_and_end_with_it():
    assert windows_of(0, 3, 5, 2.5) == [(0, 3)]
    assert windows_of(0, 10, 5, 2.5) == [(0, 5), (2.5, 7.5), (5, 10)]
    assert windows_of(0, 11, 5, 2.5)[-2:] == [(5, 10), (6, 11)]
    assert windows_of(0, 10.1, 5, 2.5) == [(0, 5), (2.5, 7.5), (pytest.approx(5.1), 10.1)]


def test_a_picture_shown_for_long_is_in_every_window_that_it_lasts_for():
    class Frame:
        duration = None

        def __init__(self, time):
            self.time = time

    class Converter:
        def receive(self, frame):
            return frame

        convert = receive

    class Sampler(FrameSampler):
        def __init__(self, start, end):
            super().__init__(start, end, 2, None)
            self.times = []

        def add(self, frame, origin):
            self.times.append(frame.time)
            self.done = frame.time >= self.end

    slides = OverlappingWindows([(0, 4), (4, 8), (8, 12)], Sampler, 0.5)
    for time in (0.0, 10.0, 20.0):
        slides.add(Frame(time), 0.0)
    assert [slides.take(0.0).times for _ in range(3)] == [[0.0, 10.0], [0.0, 10.0], [0.0, 10.0, 20.0]]
    assert slides.done


def test_a_timeline_has_the_words_of_each_window_and_their_mean(tiny_model, tiny_processor, recording):
    words = [(0.1, 0.4, "good"), (5.0, 5.5, "bad"), (9.5, 9.9, "movie")]
    with MSAPipeline(tiny_model, tiny_processor) as pipeline:
        assert not exceeds_reach(pipeline, Clip(recording))
        timeline = predict_timeline(pipeline, Clip(recording), seconds=4, step=3, words=words, batch_size=2)
        alone = pipeline(Clip(recording, 3, 7), text="bad")
    assert [window.text for window in timeline.windows] == ["good", "bad", "movie"]
    assert timeline.windows[1].prediction.score == pytest.approx(alone.score, abs=1e-3)
    scores = [window.prediction.score for window in timeline.windows]
    assert timeline.overall.score == pytest.approx(np.mean(scores))
    added = timeline.overall.baseline + sum(timeline.overall.contributions.values())
    assert added == pytest.approx(timeline.overall.score, abs=1e-5)
    assert json.loads(json.dumps(timeline.to_dict()))["windows"][2]["text"] == "movie"
    with pytest.raises(ValueError, match="0 < step <= window"):
        predict_timeline(pipeline, Clip(recording), seconds=2, step=3)


def window(start: float, end: float, score: float, used: tuple[str, ...] = ("audio",)) -> WindowPrediction:
    missing = {name: "silent audio" for name in PARTS if name not in used}
    return WindowPrediction(
        start, end, None, Prediction("a.mp4", score, None, {}, used, missing, 0.25, PARTS)
    )


def test_windows_in_which_nothing_is_seen_or_heard_do_not_dilute_the_mean():
    cut = replace(window(4, 6, -2.0).prediction, findings=("scene cut at 5.1 s",))
    middle = replace(window(4, 6, -2.0), prediction=cut)
    overall = mean_of_windows([window(0, 4, 1.0), middle, window(6, 10, 9.0, ())], "a.mp4")
    assert overall.score == pytest.approx((4 * 1.0 + 2 * -2.0) / 6) and overall.warning is None
    about = "mean of 2 windows; 1 with nothing in them left out"
    assert overall.findings == (about, "scene cuts (in 1 window)")
    silent = mean_of_windows([window(0, 4, 0.25, ()), window(4, 6, 0.25, ())], "a.mp4")
    assert silent.score == 0.25 and "baseline" in silent.warning
    assert silent.findings == ("mean of 2 windows",)


def test_the_overall_class_is_the_most_probable_on_average():
    def of(label: str, sad: float) -> WindowPrediction:
        one = Prediction("a.mp4", None, label, {"sad": sad, "glad": 1 - sad}, tuple(PARTS), {}, 0.5, PARTS)
        return WindowPrediction(0, 5, None, one)

    windows = (of("sad", 0.6), of("sad", 0.6), of("glad", 0.1))
    overall = mean_of_windows(windows, "a.mp4")
    assert overall.label == "glad" and sum(overall.probabilities.values()) == pytest.approx(1)
    lines = prediction_lines([Timeline(windows, overall)])
    assert lines[0].startswith("a.mp4: glad (56.7%") and "  2 windows: sad" in lines


def test_a_clip_beyond_the_reach_of_the_model_is_predicted_in_windows_and_drawn(
    tiny_model, tiny_processor, recording, tmp_path, capsys
):
    tiny_processor.max_audio_seconds = 6.0
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    words = ["predict", str(recording), "--model", str(tmp_path / "model")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "mean of 3 windows" in printed and "lowest" in printed and "read of" not in printed
    assert main([*words, "--text", "a good movie"]) == 0  # a transcript of the whole has no times
    assert "read of audio" in capsys.readouterr().out

    table, plot = tmp_path / "t.csv", tmp_path / "p.svg"
    chosen = ["--window", "4", "--step", "3", "--timeline", str(table), "--plot", str(plot), "--json"]
    assert main([*words, *chosen]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    with open(table, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["start"]) for row in rows] == [0, 3, pytest.approx(6, abs=0.1)]
    assert [float(row["score"]) for row in rows] == [each["score"] for each in shown["windows"]]
    assert float(rows[0]["contributions_audio"]) != 0 and plot.read_text().startswith("<?xml")

    out = ["--out", str(tmp_path / "all.jsonl"), "--workers", "1"]
    assert main([*words, *out]) == 0
    (row,) = map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())
    assert len(row["windows"]) == 3 and row["error"] is None
    assert main([*words, *out, "--window", "4"]) == 0
    assert "0 of them from an earlier run" in capsys.readouterr().out


def test_damage_in_a_long_recording_is_an_error(recording, tmp_path):
    cut = tmp_path / "cut.mkv"
    import av

    with av.open(str(recording)) as source, av.open(str(cut), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.raises(ClipError, match="truncated"):
        list(decode_windows(Clip(cut), 2, 2))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--window", "5", "--text", "good"], "has no times"),
        (["--step", "6"], "longer than a window of 5 s"),
        (["--plot", "p.png", "--out", "r.csv"], "--out FILE.jsonl has all windows"),
        (["--plot", "p.doc"], ".png, .svg, .pdf"),
    ],
)
def test_options_for_windows_that_contradict_are_refused(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["predict", "a.mp4", *words, "--model", "none"])
    assert expected in " ".join(capsys.readouterr().err.split())
