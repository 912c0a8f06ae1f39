# SPDX-License-Identifier: Apache-2.0
"""A short run of the fuzzer; and it notices what it is there for."""

import argparse
import importlib
from pathlib import Path

import pytest


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    """The script, imported."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("fuzz_media")


def test_damaged_files_are_read_or_refused_as_broken_clips(script, tmp_path, capsys):
    saved = tmp_path / "saved"
    assert script.main(["--files", "60", "--seed", "1111", "--output", str(saved)]) == 0, capsys.readouterr()
    assert "0 broken rules" in capsys.readouterr().out and not saved.exists()


def test_the_files_of_a_seed_are_always_the_same(script, tmp_path):
    intact = [tmp_path / "a.wav", tmp_path / "b.aiff"]
    script.write_clip(intact[0], None, "pcm_s16le")
    script.write_clip(intact[1], None, "pcm_s16be")
    contents = []
    for name, first, count in (("one", 0, 20), ("two", 0, 20), ("last", 19, 1)):
        (tmp_path / name).mkdir()
        options = argparse.Namespace(seed=3, first=first, files=count)
        files = list(script.damaged_files(intact, options, tmp_path / name))
        contents.append([(file.path.name, file.path.read_bytes()) for file in files])
    assert contents[0] == contents[1] and contents[0][-1:] == contents[2]
    assert {name.partition("-")[2].partition(".")[0] for name, _ in contents[0]} == set(script.DAMAGES)
    whole = {path.read_bytes() for path in intact}
    assert sum(content not in whole for _, content in contents[0]) >= 18


def test_a_broken_rule_ends_with_status_1_and_saves_the_file(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "CONTAINERS", {".wav": (None, "pcm_s16le"), ".flac": (None, "flac")})
    monkeypatch.setattr(script, "PICTURES", ())
    arguments = ["--files", "2", "--seed", "7", "--seconds", "0", "--output", str(tmp_path)]
    assert script.main(arguments) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("seed 7: ")]
    assert lines and all(" took 0.0 s" in line for line in lines)
    assert {line.split()[2] for line in lines} == {str(path) for path in tmp_path.iterdir()}


def test_errors_that_are_not_ours_and_lost_clips_are_broken_rules(script, tmp_path, monkeypatch, capsys):
    from feature_extractors import ClipError

    def extract(clips, *_, **__):
        first, second, third, _ = clips
        yield first, ClipError(clips[first].path, "crashed", "the process ended with status 1")
        yield second, ClipError(clips[second].path, "crashed", "the process was killed by SIGSEGV")
        yield third, ClipError(clips[third].path, "undecodable", "cannot be decoded")

    monkeypatch.setattr(script, "extract_in_processes", extract)
    monkeypatch.setattr(script, "CONTAINERS", {})
    monkeypatch.setattr(script, "PICTURES", (".png",))
    assert script.main(["--files", "3", "--output", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "raised another error than ours: the process ended with status 1" in shown
    assert "has no result" in shown and "SIGSEGV" not in shown
    assert "crashed 2, undecodable 1" in shown
    assert len(list(tmp_path.iterdir())) == 3
