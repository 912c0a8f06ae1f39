# SPDX-License-Identifier: Apache-2.0
"""Dialogues: their order, their windows, and one clear line for what cannot be put in order."""

from pathlib import Path

import numpy as np
import pytest

from msa_online.corpora.corpus import Corpus, CorpusError
from msa_online.corpora.dialogues import check_dialogues, dialogue_warnings, places_of, windows_of
from msa_online.corpora.reading import read_corpus
from msa_online.precomputed.reading import read_features

HEADER = "file_name,text,label,split,dialogue,turn"


@pytest.fixture
def corpus_of(tmp_path):
    """A function that reads a corpus of clips from rows like "train dialogue turn"; "-" is an empty cell."""

    def make(*rows: str) -> Corpus:
        lines = [HEADER]
        for number, row in enumerate(rows):
            cells = ["" if cell == "-" else cell for cell in row.split()]
            (tmp_path / f"{number}.mp4").write_bytes(b"media")
            lines.append(",".join([f"{number}.mp4", "a text", "0", *cells]))
        (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return read_corpus(tmp_path, label_range=(-3, 3))

    return make


def complaint(corpus: Corpus) -> str:
    with pytest.raises(CorpusError) as caught:
        check_dialogues(corpus)
    return str(caught.value).replace(str(corpus.source.parent.parent), "")


def test_a_window_has_the_samples_of_one_dialogue_in_the_order_of_their_turns(corpus_of):
    corpus = corpus_of(
        "train a 10", "train b 1", "train a 9", "train - -", "train a -1", "train b 0", "train - 7"
    )
    check_dialogues(corpus)
    assert windows_of(corpus.split("train"), 8) == [[4, 2, 0], [5, 1], [3], [6]]


def test_a_corpus_without_these_columns_has_samples_without_a_dialogue(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"media")
    (tmp_path / "metadata.csv").write_text("file_name,text,label,split\na.mp4,x,0,train\n")
    corpus = read_corpus(tmp_path, label_range=(-3, 3))
    assert [(sample.dialogue, sample.turn) for sample in corpus.samples] == [(None, None)]
    check_dialogues(corpus, required=False)
    message = complaint(corpus)
    assert "no sample has a dialogue" in message and "model.context=none" in message


@pytest.mark.parametrize(
    ("turns", "longest", "sizes"),
    [(7, 7, [7]), (7, 6, [3, 4]), (7, 3, [2, 2, 3]), (7, 1, [1] * 7), (8, 4, [4, 4])],
)
def test_a_long_dialogue_is_cut_into_the_fewest_windows_of_even_sizes(corpus_of, turns, longest, sizes):
    corpus = corpus_of(*(f"train a {turn}" for turn in range(turns)))
    windows = windows_of(corpus.split("train"), longest)
    assert [len(window) for window in windows] == sizes and sum(windows, []) == list(range(turns))


def test_dialogues_that_are_cut_are_named_and_counted(corpus_of):
    rows = [f"train long {turn}" for turn in range(5)] + ["train short 0", "valid fair 0"]
    corpus = corpus_of(*rows, *(f"test fair {turn}" for turn in range(3)))
    assert dialogue_warnings(corpus, 5) == [
        "1 of 3 dialogues are in more than one split (for example 'fair'): a turn sees only those of its own "
        "split; put each dialogue into one split"
    ]
    (line, _) = dialogue_warnings(corpus, 2)
    assert line.startswith("2 of 4 dialogues have more than the 2 turns that the model reads together")
    assert "(most: 'long', 5): they are cut into 5 windows" in line and "model.context_turns" in line
    assert dialogue_warnings(corpus_of("train a 0", "train a 1"), 2) == []


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (
            ["train a 0", "train a -", "train b -", "train b -", "train - -"],
            "metadata.csv line 3: dialogue 'a' has a sample without a turn (3 such samples in 2 dialogues): "
            "number the utterances of each dialogue in the column 'turn'",
        ),
        (
            ["train a 0", "train a M001", "train a nan"],
            "metadata.csv line 3: turn 'M001' of dialogue 'a' is not a number (2 such samples in 1 "
            "dialogue): number the utterances of each dialogue in the column 'turn'",
        ),
        (
            ["train a 1", "valid a 1", "train b 1", "train b 2", "train b 2.0"],
            "metadata.csv line 6: turn 2.0 of dialogue 'b' is also that of ",
        ),
    ],
    ids=["no turn", "no number", "twice"],
)
def test_turns_without_an_order_are_refused_in_one_line(corpus_of, rows, line):
    message = complaint(corpus_of(*rows))
    assert line in message and "\n" not in message


def test_each_kind_of_problem_has_its_line(corpus_of):
    message = complaint(corpus_of("train a 0", "train a 0", "train a x", "train a -"))
    assert len(message.splitlines()) == 3


def test_features_have_dialogues_too(tmp_path):
    arrays = {
        "id": np.array(["x", "y"]),
        "label": np.array([1.0, 2.0]),
        "split": np.array(["train", "train"]),
        "dialogue": np.array(["d", "d"]),
        "turn": np.array([2, 1]),
        "text": np.ones((2, 1, 3), np.float32),
    }
    np.savez(tmp_path / "features.npz", **arrays)
    samples = read_features(Path(tmp_path / "features.npz")).split("train")
    assert windows_of(samples, 8) == [[1, 0]]


def test_speakers_are_numbered_within_a_window_and_asked_for_where_they_are_read(tmp_path):
    rows = ["a,0,Ann", "a,1,Bob", "b,0,Bob", "a,2,Ann", "b,1,", ",,"]
    lines = [f"{HEADER},speaker"]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.mp4").write_bytes(b"media")
        lines.append(f"{number}.mp4,a text,0,train,{row}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = read_corpus(tmp_path, label_range=(-3, 3))
    samples = corpus.split("train")
    found = places_of(samples, windows_of(samples, 8))
    assert [found[at]["speaker"] for at in range(6)] == [0, 1, 0, 0, 1, 0]
    check_dialogues(corpus)
    with pytest.raises(CorpusError) as caught:
        check_dialogues(corpus, speakers=True)
    assert str(caught.value).endswith(
        "metadata.csv line 6: dialogue 'b' has a sample without a speaker (1 such sample in 1 dialogue): say "
        "who speaks in the column 'speaker', or choose a context without speakers (model.context=gru)"
    )
