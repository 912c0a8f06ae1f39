# SPDX-License-Identifier: Apache-2.0
"""A run over a folder of clips loses no row, whatever stops it, and repeats none that is still right."""

import csv
import resource
from pathlib import Path

import pytest

from feature_extractors import ClipError
from msa_online.pipeline import Prediction
from msa_online.results_file import FORMATS, ResultsError, ResultsFile, row_of
from msa_online_cli import main

PARTS = {"text": 0.0, "audio": 0.25, "vision": -0.125}


def row(number: int) -> dict:
    one = Prediction(
        f"{number}.mp4", 0.5 * number, None, {}, ("audio", "vision"), {"text": "none"}, 0.1, PARTS
    )
    return row_of(one, one.clip, f"key {number}")


BROKEN = row_of(ClipError(Path("b.mp4"), "empty", "the file is empty (0 bytes)"), "b.mp4", "key b")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_run_that_was_stopped_has_all_its_rows_in_the_next_run_and_in_the_file(tmp_path, suffix):
    path = tmp_path / f"results{suffix}"
    stopped = ResultsFile(path)
    for each in (row(1), BROKEN, row(2)):
        stopped.add(each)
    stopped.close()
    with open(stopped.journal, "ab") as journal:
        journal.write(b'{"clip": "3.mp4", "sco')  # power cut
    again = ResultsFile(path)
    assert list(again.rows) == ["key 1", "key 2"] and not path.exists()
    again.add(row(3))
    again.finish([again.rows["key 1"], BROKEN, again.rows["key 2"], row(3)])
    assert not again.journal.exists()
    kept = ResultsFile(path).rows
    assert list(kept) == ["key 1", "key 2", "key 3"]
    assert [float(each["score"]) for each in kept.values()] == [0.5, 1.0, 1.5]
    vision = [
        each["contributions"]["vision"] if suffix == ".jsonl" else each["contributions_vision"]
        for each in kept.values()
    ]
    assert {float(each) for each in vision} == {-0.125}
    ResultsFile(path).finish(list(kept.values()))  # rows that were read are written as they were
    assert ResultsFile(path).rows == kept


def test_a_full_disk_loses_no_row_and_says_where_they_are(tmp_path):
    path = tmp_path / "results.csv"
    file = ResultsFile(path)
    file.finish([row(0)])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(ResultsError, match=r"results.csv.partial cannot be written .* are kept in"):
            for number in range(1, 9):
                file.add(row(number))
        with pytest.raises(ResultsError, match="free disk space"):
            file.finish([row(number) for number in range(40)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] != [path.name]
    again = ResultsFile(path)
    stored = len(again.rows)
    assert stored > 1
    again.add(row(8))
    assert len(ResultsFile(path).rows) == stored + 1


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "clip,score\na,1\n"), ("a.jsonl", "no json"), ("a.parquet", "")]
)
def test_a_file_of_something_else_is_never_overwritten(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ResultsError, match="another name"):
        ResultsFile(path)


def test_a_folder_is_predicted_once_and_what_changed_again(
    tmp_path, tiny_model, tiny_processor, make_clip, capsys, cache_dir
):
    model, clips, out = tmp_path / "model", tmp_path / "clips", tmp_path / "results.csv"
    tiny_model.save_pretrained(model)
    tiny_processor.save_pretrained(model)
    (clips / "below").mkdir(parents=True)
    for name in ("a.wav", "below/b.wav"):
        make_clip(clips / name, video=False)
    (clips / "broken 1.mp4").write_text("Dear reader, this is no video.")
    (clips / "metadata.csv").write_text(
        "file_name,text,start,end\na.wav,a good movie,0,0.5\na.wav,,0.5,1\nno.wav,x,,\n"
    )
    words = ["predict", str(clips), "--model", str(model), "--out", str(out), "--workers", "1"]

    def rows() -> list[dict[str, str]]:
        with open(out, newline="") as stream:
            return list(csv.DictReader(stream))

    assert main(words) == 1
    printed = capsys.readouterr()
    assert "2 of 5 clips cannot be used: see the column error" in printed.err
    first, second, below, broken, absent = rows()
    assert (first["text"], first["end"], first["error"]) == ("a good movie", "0.5", "")
    assert first["modalities"] == "text; audio" and second["modalities"] == below["modalities"] == "audio"
    assert "cannot be decoded" in broken["error"] and "metadata.csv, line 4" in absent["clip"]

    (clips / "broken 1.mp4").unlink()
    (clips / "metadata.csv").write_text("file_name,text,start,end\na.wav,a bad movie,0,0.5\na.wav,,0.5,1\n")
    assert main(words) == 0
    assert "3 clips, 2 of them from an earlier run" in capsys.readouterr().out
    again = rows()
    assert again[1:] == [second, below] and again[0]["score"] != first["score"]

    tiny_model.head.get_parameter(next(name for name, _ in tiny_model.head.named_parameters())).data += 1
    tiny_model.save_pretrained(model)
    assert main(words) == 0
    assert "3 clips, 0 of them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.mp4", "--workers", "2"], "--workers needs --out"),
        (["folder", "--text", "good"], "--texts"),
        (["a.mp4", "--text", "good", "--texts", "t.csv"], "give one of them"),
    ],
)
def test_options_that_contradict_are_refused_before_the_model_is_read(
    words, expected, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit):
        main(["predict", *words, "--model", "none"])
    assert expected in capsys.readouterr().err


def test_a_folder_without_clips_and_a_format_that_is_unknown_are_refused(capsys, tmp_path):
    assert main(["predict", str(tmp_path), "--model", "none"]) == 1
    assert "has no media files" in capsys.readouterr().err
    assert main(["predict", str(tmp_path), "--model", "none", "--out", str(tmp_path / "a.xls")]) == 1
    assert ".csv, .jsonl, .parquet" in capsys.readouterr().err
