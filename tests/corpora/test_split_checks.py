# SPDX-License-Identifier: Apache-2.0
"""Splits and labels that are legal but probably a mistake: each kind is one line with counts."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.reading import read_corpus
from msa_online.corpora.split_checks import copy_warnings, corpus_warnings, refuse_warnings, size_warnings
from msa_online.corpora.validation import with_scores


def warnings_of(folder: Path, *rows: str, header: str, **arguments) -> list[str]:
    """Warnings about a corpus of these rows; every clip that they name exists."""
    for row in rows:
        (folder / row.split(",")[0]).write_bytes(b"media " + row.encode())
    (folder / "metadata.csv").write_text("\n".join([header, *rows]), "utf-8")
    corpus = read_corpus(folder, **arguments)
    return corpus_warnings(corpus, arguments.get("label_range"))


SCORES = {"label_range": (-3.0, 3.0)}


def test_a_speaker_in_two_splits_is_named_whatever_the_spelling(tmp_path):
    header = "file_name,text,label,split,speaker"
    rows = ["a.mp4,x,-1,train,Anna", "b.mp4,x,1,test,anna ", "c.mp4,x,1,valid,bob", "d.mp4,x,1,train,carl"]
    (warning,) = warnings_of(tmp_path, *rows, header=header, **SCORES)
    assert warning.startswith(
        "1 of 3 speakers are in more than one split (for example 'Anna' in train and test)"
    )
    rows[1] = "b.mp4,x,1,train,anna"
    assert warnings_of(tmp_path, *rows, header=header, **SCORES) == []


WINDOWS = "file_name,text,label,split,start,end"


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        ("0,5", "4,9", True),
        ("4,9", "0,5", True),
        (",", "3,4", True),
        ("3,", ",4", True),
        ("0,5", "5,9", False),
        ("0,1", "8,", False),
    ],
)
def test_windows_of_two_splits_that_overlap_are_counted(tmp_path, first, second, overlap):
    rows = [f"a.mp4,x,-1,train,{first}", f"a.mp4,y,1,test,{second}", "b.mp4,x,1,valid,,"]
    found = warnings_of(tmp_path, *rows, header=WINDOWS, **SCORES)
    assert len(found) == overlap
    if overlap:
        assert found[0].startswith("2 samples overlap samples of another split in the same recording (for")
        assert "of train and 'a.mp4@" in found[0]


def test_every_overlapping_window_is_counted_once(tmp_path):
    rows = ["a.mp4,x,-1,train,0,5", "a.mp4,x,-1,train,0,10", "a.mp4,x,1,train,20,30"]
    rows += ["a.mp4,x,1,test,3,4", "a.mp4,x,1,valid,100,101"]
    (warning,) = warnings_of(tmp_path, *rows, header=WINDOWS, **SCORES)
    assert warning.startswith("3 samples")
    assert "'a.mp4@3.0-4.0' of test" in warning


def test_a_link_to_a_clip_is_the_same_recording(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"media")
    (tmp_path / "link.mp4").symlink_to("a.mp4")
    rows = ["file_name,text,label,split,start,end", "a.mp4,x,-1,train,0,5", "link.mp4,x,1,test,1,2"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    assert "2 samples overlap" in corpus_warnings(read_corpus(tmp_path, **SCORES), (-3.0, 3.0))[0]


def test_copies_under_other_names_are_found_by_their_bytes(tmp_path):
    rows = ["a.mp4,x,-1,train,,", "b.mp4,x,1,test,,", "c.mp4,x,1,train,,", "d.mp4,x,1,valid,5,6"]
    warnings_of(tmp_path, *rows, header=WINDOWS, **SCORES)
    corpus = read_corpus(tmp_path, **SCORES)
    names = [sample.id for sample in corpus.samples]
    assert copy_warnings(corpus, dict(zip(names, "abcd", strict=True))) == []
    (warning,) = copy_warnings(corpus, dict(zip(names, "aaca", strict=True)))
    assert warning.startswith("3 samples have the same bytes as samples of another split, under other names")
    assert copy_warnings(corpus, dict(zip(names, "abac", strict=True))) == []  # both in training
    assert copy_warnings(corpus, dict.fromkeys(names, "")) == []  # nothing in them


LABELS = "file_name,text,label,split"


def test_a_class_that_training_never_sees_is_named(tmp_path):
    rows = ["a.mp4,x,joy,train", "b.mp4,x,joy,train", "c.mp4,x,fear,test", "d.mp4,x,fear,valid"]
    (warning,) = warnings_of(tmp_path, *rows, header=LABELS)
    assert warning.startswith(
        "the class 'fear' (2) occurs only outside training: a model can never predict that"
    )


def test_spellings_of_one_class_are_named_with_their_counts(tmp_path):
    names = ["Happy", "happy", "HAPPY", "very_sad", "very sad", "Ｈappy", "calm", "calm"]
    rows = [f"{number}.mp4,x,{name},train" for number, name in enumerate(names * 2)]
    first, second = warnings_of(tmp_path, *rows, header=LABELS)
    assert first.startswith("'Happy' (2), 'happy' (2), 'HAPPY' (2), 'Ｈappy' (2) are different classes")
    assert second.startswith("'very_sad' (2), 'very sad' (2) are different classes")


def test_classes_of_one_clip_are_counted(tmp_path):
    rows = ["a.mp4,x,joy,train", "b.mp4,x,joy,test", "c.mp4,x,fear,train", "d.mp4,x,awe,train"]
    (warning,) = warnings_of(tmp_path, *rows, header=LABELS)
    assert warning.startswith("2 of 3 classes have one clip only ('fear' (1), 'awe' (1))")


@pytest.mark.parametrize(
    ("labels", "label_range", "start"),
    [
        ((0, 1, 3), (-3.0, 3.0), "none of 3 labels is negative (they run from 0 to 3, the range is [-3, 3])"),
        ((0.2, 0.9, 1), (-1.0, 1.0), "none of 3 labels is negative (they run from 0.2 to 1"),
        ((-3, -1, 0), (-3.0, 3.0), "none of 3 labels is positive"),
        ((1, 1, 1), (-3.0, 3.0), "all 3 labels are 1: there is nothing to learn"),
        ((0, 0, 0), (-3.0, 3.0), "all 3 labels are 0"),
        ((-1, 0, 2), (-3.0, 3.0), None),
        ((1, 3, 5), (1.0, 5.0), None),
    ],
)
def test_scores_that_use_one_side_of_the_range_are_doubted(tmp_path, labels, label_range, start):
    rows = [f"{number}.mp4,x,{label},train" for number, label in enumerate(labels)]
    found = warnings_of(tmp_path, *rows, header=LABELS, label_range=label_range)
    assert [warning.startswith(start) for warning in found] == [True] * bool(start)


def test_labels_of_unknown_kind_are_scores_if_all_are_numbers(tmp_path):
    rows = ["a.mp4,x,0,train", "b.mp4,x,1.5,train", "c.mp4,x,,train"]
    assert (
        "2 of 2 classes have one clip only"
        in warnings_of(tmp_path, *rows, header=LABELS, labels_optional=True).pop()
    )
    corpus = read_corpus(tmp_path, labels_optional=True)
    scores = replace(corpus, samples=tuple(with_scores(corpus.samples)))
    assert [sample.label for sample in scores.samples] == [0.0, 1.5, None]
    (warning,) = corpus_warnings(scores, None)
    assert "none of 2 labels is negative" in warning and "data.task=classification" in warning


def test_small_splits_are_named_with_the_reason():
    small, tiny = size_warnings({"train": 99, "valid": 16, "test": 100})
    assert small.startswith("train has only 99 samples: below 100, results depend more on these samples")
    assert tiny.startswith("valid has only 16 samples: an accuracy of 0.5 has a standard error of 0.12")


def test_strict_refuses_all_warnings_at_once():
    refuse_warnings(Path("metadata.csv"), [])
    with pytest.raises(CorpusError) as caught:
        refuse_warnings(Path("metadata.csv"), ["one", "two"])
    assert str(caught.value).splitlines() == [
        "metadata.csv: 2 warnings, which --strict (data.strict=true) refuses",
        "  one",
        "  two",
    ]


# the commands


@pytest.fixture
def recordings(tmp_path, make_clip, cache_dir) -> Path:
    """Six sounds: two speakers, one of them in two splits; a copy in the test split; odd classes."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in "abcde":
        make_clip(folder / f"{name}.wav", video=False, seconds=0.5 + ord(name) / 1000)
    shutil.copy(folder / "a.wav", folder / "copy.wav")
    rows = ["a,good,Happy,train,ann", "b,bad,happy,train,ann", "c,good,sad,train,bob", "d,bad,sad,valid,bob"]
    rows += ["e,good,angry,test,carl", "copy,\u200b,sad,test,dan"]
    lines = [row.replace(",", ".wav,", 1) for row in rows]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text,label,split,speaker", *lines]), "utf-8")
    return folder


def test_prepare_ends_with_splits_and_warnings_and_refuses_them_on_request(recordings, capsys):
    from msa_online_cli import main

    assert main(["prepare", str(recordings), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "empty text" in printed
    table = printed.partition("splits")[2]
    train = next(line for line in table.splitlines() if line.strip("│┃ ").startswith("train"))
    assert [cell.strip() for cell in train.strip("│").split("│")][1:3] == ["3", "0.0"]
    assert "Happy 1, happy 1, sad 1" in train
    for expected in (
        "warning: 1 of 4 speakers are in more than one split (for example 'bob' in train and valid)",
        "warning: the class 'angry' (1) occurs only outside training",
        "warning: 'Happy' (1), 'happy' (1) are different classes",
        "warning: 3 of 4 classes have one clip only",
        "warning: test has only 2 samples",
        "warning: 2 samples have the same bytes as samples of another split, under other names (for example "
        "'a.wav' of train and 'copy.wav' of test)",
    ):
        assert expected in printed
    assert main(["prepare", str(recordings), "--strict"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "7 warnings, which --strict" in captured.err


def test_strict_passes_data_without_warnings_and_finds_copies_after_extraction(
    tmp_path, make_clip, cache_dir, capsys, monkeypatch
):
    from msa_online.corpora import split_checks
    from msa_online_cli import main

    monkeypatch.setattr(split_checks, "SMALL_SPLIT", 2)
    lines = []
    for number, split in enumerate(["train", "train", "valid", "valid", "test", "test"]):
        make_clip(tmp_path / f"{split}{number}.wav", video=False, seconds=0.5 + number / 100)
        lines.append(f"{split}{number}.wav,x,{(-1.5, 1.5)[number % 2]},{split}")
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text,label,split", *lines]))
    assert main(["prepare", str(tmp_path), "--strict", "--workers", "1"]) == 0
    assert "warning" not in capsys.readouterr().out
    shutil.copy(tmp_path / "valid3.wav", tmp_path / "test5.wav")
    assert main(["prepare", str(tmp_path), "--strict", "--workers", "1"]) == 1
    message = capsys.readouterr().err
    assert (
        "1 warning, which --strict" in message and "'valid3.wav' of valid and 'test5.wav' of test" in message
    )


def test_invisible_characters_in_labels_are_noticed(tmp_path):
    rows = ["a.mp4,x,joy,train", "b.mp4,x,\ufeffjoy\u200b,\u200btrain", "c.mp4,x,jo\u200by,train"]
    rows += ["d.mp4,x,fear,train", "e.mp4,x,fear,train"]
    found = warnings_of(tmp_path, *rows, header=LABELS)
    assert found[0].startswith(r"'joy' (1), '\ufeffjoy\u200b' (1), 'jo\u200by' (1) are different classes")
    scores = ["a.mp4,x,\u200b1.5,train", "b.mp4,x,\u00a0-2\u200e,train"]
    assert warnings_of(tmp_path, *scores, header=LABELS, **SCORES) == []
    assert [sample.label for sample in read_corpus(tmp_path, **SCORES).samples] == [1.5, -2.0]
    (tmp_path / "metadata.csv").write_text(f"{LABELS}\na.mp4,x,\u200b,train\nb.mp4,x,1,train\n", "utf-8")
    with pytest.raises(CorpusError, match="the label is empty"):
        read_corpus(tmp_path, **SCORES)


def test_class_numbers_are_classes_on_request(tmp_path, make_clip, cache_dir, capsys, monkeypatch):
    from msa_online.corpora import split_checks
    from msa_online_cli import main

    monkeypatch.setattr(split_checks, "SMALL_SPLIT", 2)
    lines = [f"{name}.wav,x,{number % 2},train" for number, name in enumerate("abcd")]
    for number, name in enumerate("abcd"):
        make_clip(tmp_path / f"{name}.wav", video=False, seconds=0.5 + number / 100)
    (tmp_path / "metadata.csv").write_text("\n".join([LABELS, *lines]))
    words = ["prepare", str(tmp_path), "--strict", "--workers", "1"]
    assert main(words) == 1 and "none of 4 labels is negative" in capsys.readouterr().err
    assert main([*words, "--task", "classification"]) == 0
    assert "0 2, 1 2" in capsys.readouterr().out
