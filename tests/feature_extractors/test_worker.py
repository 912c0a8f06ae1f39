# SPDX-License-Identifier: Apache-2.0
"""Extraction in processes: a clip that hangs or kills its process is named, and all others are extracted."""

import multiprocessing
import os
import signal
import threading
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from feature_extractors import (
    CacheError,
    Clip,
    ClipError,
    ClipExtent,
    ExtractionSettings,
    FeatureCache,
    worker,
)
from feature_extractors.worker import WorkerError, extract_in_processes

SETTINGS = ExtractionSettings(num_frames=1, face_size=32)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, make_clip) -> dict[str, Clip]:
    """Four good clips by a key."""
    folder = tmp_path_factory.mktemp("clips")
    paths = [make_clip(folder / f"{name}.mp4", seconds=0.4, fps=10) for name in "abcd"]
    return {path.stem * 64: Clip(path) for path in paths}


def only_process() -> int:
    (process,) = multiprocessing.active_children()
    return process.pid


def test_all_clips_are_extracted_and_their_findings_returned(clips, tmp_path, make_clip, capfd):
    cache = FeatureCache(tmp_path / "cache")
    black = np.zeros((8, 160, 160, 3), np.uint8)
    faceless = {"e" * 64: Clip(make_clip(tmp_path / "faceless.mp4", frames=black, audio=None))}
    results = dict(extract_in_processes(clips | faceless, cache, SETTINGS, workers=2))
    findings = {key: found for key, (found, _) in results.items()}
    assert findings == dict.fromkeys(clips, ()) | {"e" * 64: ("no face", "no audio stream")}
    for key, result in results.items():
        features = cache.load(key)
        assert result == (features.findings, ClipExtent.of(features))
    assert multiprocessing.active_children() == []
    assert capfd.readouterr().err == ""  # of the processes too


def test_a_process_that_hangs_is_ended_and_its_clip_is_reported(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "GRACE_SECONDS", -115.0)  # five seconds are left of two minutes
    results = {}
    with closing(extract_in_processes(clips, FeatureCache(tmp_path), SETTINGS, workers=1)) as arriving:
        for key, result in arriving:
            if not results:  # the process has no clip now and hangs with the next one
                os.kill(only_process(), signal.SIGSTOP)
            results[key] = result
    first, hanging, *others = clips
    assert results[hanging].problem == "too slow" and results[hanging].path == clips[hanging].path
    assert "takes longer than the 120 s allowed" in str(results[hanging])
    assert {results[key][0] for key in (first, *others)} == {()}


def test_a_clip_whose_process_was_killed_is_tried_again(clips, tmp_path):
    results = {}
    with closing(extract_in_processes(clips, FeatureCache(tmp_path), SETTINGS, workers=1)) as arriving:
        for key, result in arriving:
            if not results:
                os.kill(only_process(), signal.SIGKILL)
            results[key] = result
    assert {key: found for key, (found, _) in results.items()} == dict.fromkeys(clips, ())
    assert list(results)[-1] == list(clips)[1]  # the one whose process was killed comes last


def test_clips_that_need_too_much_memory_are_reported_by_a_process_that_lives_on(clips, tmp_path, capfd):
    two = dict(list(clips.items())[:2])
    unbearable = ExtractionSettings(num_frames=10**12)
    results = dict(extract_in_processes(two, FeatureCache(tmp_path), unbearable, workers=1))
    for key, clip in two.items():
        assert isinstance(results[key], ClipError) and results[key].path == clip.path
        assert results[key].problem == "too much memory"
    assert capfd.readouterr().err == ""


def test_clips_that_end_their_process_are_reported_with_the_reason(clips, tmp_path):
    two = {key: replace(clip, start="no number") for key, clip in list(clips.items())[:2]}
    results = dict(extract_in_processes(two, FeatureCache(tmp_path), SETTINGS, workers=2))
    for key, clip in two.items():
        assert isinstance(results[key], ClipError) and results[key].path == clip.path
        assert results[key].problem == "crashed"
        assert "the process that extracted it ended with status 1; convert it" in str(results[key])


def test_broken_clips_are_results_and_a_full_disk_is_an_error(clips, tmp_path):
    (tmp_path / "empty.mp4").touch()
    ((_, error),) = extract_in_processes(
        {"f" * 64: Clip(tmp_path / "empty.mp4")}, FeatureCache(tmp_path), SETTINGS, 1
    )
    assert error.problem == "empty"
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="cannot write the feature cache"):
        dict(extract_in_processes(clips, FeatureCache(tmp_path / "file"), SETTINGS, workers=1))


def test_a_face_model_that_cannot_be_loaded_is_one_message(clips, tmp_path, monkeypatch):
    (tmp_path / "fake.task").write_text("no model")
    monkeypatch.setenv("MSA_MODEL_FACE_LANDMARKER", str(tmp_path / "fake.task"))
    with pytest.raises(WorkerError, match=r"fake\.task: not a MediaPipe face landmark model"):
        dict(extract_in_processes(clips, FeatureCache(tmp_path), SETTINGS, workers=1))


def test_extraction_gives_up_when_processes_are_killed_while_they_start(clips, tmp_path):
    done = threading.Event()

    def kill_all():
        while not done.is_set():
            for process in multiprocessing.active_children():
                process.kill()
            time.sleep(0.01)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(
            WorkerError, match="3 processes .* killed while they started, .*SIGKILL.* fewer workers"
        ):
            dict(extract_in_processes(clips, FeatureCache(tmp_path), SETTINGS, workers=1))
    finally:
        done.set()
        killer.join()


def test_stopping_early_finishes_what_is_begun_and_leaves_no_process(clips, tmp_path):
    cache = FeatureCache(tmp_path)
    with closing(extract_in_processes(clips, cache, SETTINGS, workers=1)) as arriving:
        next(arriving)
    assert multiprocessing.active_children() == []
    stored = [key for key in clips if cache.load(key) is not None]
    assert stored == list(clips)[: len(stored)] and len(stored) < len(clips)
