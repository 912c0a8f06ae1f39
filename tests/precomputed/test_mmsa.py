# SPDX-License-Identifier: Apache-2.0
import codecs
import os
import pickle
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

from msa_online.corpora.corpus import CorpusError
from msa_online.precomputed import mmsa
from msa_online.precomputed.conversion import convert_features
from msa_online.precomputed.mmsa import READER, read_mmsa_features
from msa_online.precomputed.reading import read_features


class Trap:
    """An object whose unpickling runs a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def content(mmsa_content) -> dict:
    return mmsa_content


@pytest.fixture
def write_pickle(tmp_path):
    def write(content: object, protocol: int = 4):
        path = tmp_path / "features.pkl"
        path.write_bytes(pickle.dumps(content, protocol))
        return path

    return write


def refusal(path) -> str:
    with pytest.raises(CorpusError) as caught:
        read_mmsa_features(path)
    return str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_mmsa_becomes_a_corpus(content, write_pickle, tmp_path, protocol):
    convert_features(write_pickle(content, protocol), tmp_path / "corpus")
    corpus = read_features(tmp_path / "corpus", label_range=(-3, 3))
    assert [len(corpus.split(name)) for name in ("train", "valid", "test")] == [4, 3, 2]
    first = corpus.samples[0]
    assert (first.id, first.text, first.speaker) == ("video0$_$0", "line 0, said", "video0")
    assert (first.dialogue, first.turn) == ("video0", "0")
    assert first.label == pytest.approx(float(content["train"]["regression_labels"][0]))
    assert corpus.steps["text"].lengths.tolist() == [2, 4, 4, 4, 2, 4, 4, 2, 4]
    assert corpus.steps["audio"].lengths.tolist() == [6, 0, 5, 5, 6, 0, 5, 6, 0]
    np.testing.assert_allclose(corpus.steps["vision"].of(5), content["valid"]["vision"][1, :3], rtol=1e-6)
    moods = read_features(tmp_path / "corpus", label_column="annotations")
    assert {sample.label for sample in moods.samples} == {"Positive"}


def test_sequences_of_different_lengths_need_no_padding(content, write_pickle):
    for split in content.values():
        split["audio"] = [np.ones((steps, 3)) for steps in range(1, len(split["id"]) + 1)]
        del split["audio_lengths"]
        content[next(iter(content))] = OrderedDict(content["train"])
    table = read_mmsa_features(write_pickle(content))
    assert table.steps["audio"].lengths.tolist() == [1, 2, 3, 4, 1, 2, 3, 1, 2]


FOREIGN = {  # what makes the object, and the name it has in the pickle
    "a shell command": (lambda mark: Trap(os.system, f"touch {mark}"), r"(posix|nt|os)\.system"),
    "an expression": (lambda mark: Trap(eval, f"open({str(mark)!r}, 'w')"), r"_*builtins?_*\.eval"),
    "a file to write": (lambda mark: Trap(open, str(mark), "w"), r"_*io\.open"),
    "a file to load": (lambda mark: Trap(np.savetxt, str(mark), [1]), r"numpy.*savetxt"),
    "a codec": (lambda mark: Trap(codecs.encode, "text", "rot13"), r"_codecs\.encode to rot13"),
    "a tensor": (lambda mark: torch.zeros(2), r"torch\._utils\._rebuild_tensor_v2"),
    "a path": (lambda mark: mark, r"pathlib\..*Path"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_with_anything_but_data_is_refused_by_name_and_nothing_is_executed(
    content, write_pickle, tmp_path, kind, protocol
):
    mark = tmp_path / "executed"
    make, name = FOREIGN[kind]
    path = write_pickle({**content, "extra": make(mark)}, protocol)
    with pytest.raises(
        CorpusError, match=f"contains {name}, which is neither an array nor plain data. Nothing"
    ):
        convert_features(path, tmp_path / "corpus")
    assert sorted(os.listdir(tmp_path)) == ["features.pkl"]


def test_bytes_are_not_taken_for_addresses_of_objects(write_pickle, tmp_path):
    from numpy._core.multiarray import scalar

    class Pointer:
        def __reduce__(self):
            return scalar, (np.dtype(object), b"\1" * 8)

    assert "neither an array nor plain data" in refusal(write_pickle({"train": Pointer()}))


def in_train(column: bytes) -> bytes:
    """A pickle of one split whose ids are what `column` builds."""
    return b'(dS"train"\n(dS"id"\n' + column + b"ss."


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
ONE_MEGABYTE = np.ones((2500, 100), np.float32)
HARMFUL = {  # a pickle, and the limit that stops it
    "a buffer": (in_train(b"cbuiltins\nbytearray\n(I3000000000\ntR"), "0.3 GB of memory"),
    "an array": (in_train(RECONSTRUCT + b'(I1000000\nI800\ntS"f"\ntR'), "0.3 GB of memory"),
    "an array of objects": (in_train(RECONSTRUCT + b'(I400000000\ntS"O"\ntR'), "0.3 GB of memory"),
    "lists in lists": (b"\x80\x04" + b"]" * 3_000_000 + b"a" * 2_999_999 + b".", "0.3 GB of memory"),
    "one array many times": (
        pickle.dumps({"train": {"id": ["a"] * 5000, "text": [ONE_MEGABYTE] * 5000}}),
        "0.3 GB of memory",
    ),
    "one string many times": (pickle.dumps({"train": {"id": ["x" * 1_000_000] * 1000}}), "0.3 GB on disk"),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_a_pickle_that_needs_far_more_than_its_size_is_refused_naming_file_and_limit(kind, tmp_path):
    path = tmp_path / "features.pkl"
    content, limit = HARMFUL[kind]
    path.write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        convert_features(path, tmp_path / "corpus")
    expected = f"{path} ({len(content):,} bytes) needs more than {limit} to be read, the limit for a pickle"
    assert str(caught.value).startswith(expected)
    assert os.listdir(tmp_path) == ["features.pkl"]


@pytest.mark.parametrize("kind", ["b", "O"])
def test_a_pickle_of_more_samples_than_any_corpus_has_is_refused(kind, tmp_path):
    """A hundred bytes can name sixty million of them."""
    path = tmp_path / "features.pkl"
    count = {"b": b"60000000", "O": b"20000000"}[kind]
    path.write_bytes(in_train(RECONSTRUCT + b"(I" + count + b'\ntS"' + kind.encode() + b'"\ntR'))
    assert refusal(path) == f"{path} has a split of more than 2,000,000 samples: split it into parts"


def test_a_pickle_that_keeps_the_processor_busy_is_refused_naming_the_limit(tmp_path, monkeypatch):
    """Numbers that all have one hash: a set of them takes hours to build."""
    monkeypatch.setattr(mmsa, "SECONDS", 1)
    numbers = b"".join(pickle.dumps(k * (2**61 - 1), 4)[2:-1] for k in range(1, 60_000))
    path = tmp_path / "features.pkl"
    path.write_bytes(b"\x80\x04\x8f(" + numbers + b"\x90.")
    assert "needs more than 2 s of processor time to be read" in refusal(path)


def test_a_large_pickle_of_arrays_may_use_the_memory_its_arrays_need(write_pickle, monkeypatch):
    """The limits grow with the file: three times its size is what an honest one takes."""
    monkeypatch.setattr(mmsa, "SMALL", 1 << 20)
    count = 400
    content = {
        split: {
            "id": [f"{split}{number}" for number in range(count)],
            "regression_labels": np.zeros(count, np.float32),
            "text": np.ones((count, 50, 300), np.float32),  # 24 MB
            "audio": [np.ones((20, 74)) for _ in range(count)],
        }
        for split in ("train", "valid", "test")
    }
    table = read_mmsa_features(write_pickle(content))
    assert len(table.steps["text"].values) == 3 * count * 50


def test_a_long_name_in_a_pickle_is_cut_in_the_message(tmp_path):
    path = tmp_path / "features.pkl"
    path.write_bytes(b"\x80\x04c" + b"a" * 1_000_000 + b"\nb\n.")
    assert len(refusal(path)) < 500


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_pickle_that_is_cut_off_is_refused(content, write_pickle, share):
    path = write_pickle(content)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "cannot be read as a pickle" in refusal(path)


def test_a_file_that_is_no_pickle_is_refused(tmp_path):
    path = tmp_path / "features.pkl"
    path.write_bytes(b"id,label\n1,2\n" * 50)
    assert "cannot be read as a pickle" in refusal(path)
    assert "does not exist" in refusal(tmp_path / "none.pkl")


WITHOUT_FEATURES = (
    *("id", "raw_text", "audio_lengths", "vision_lengths"),
    *("regression_labels", "annotations", "classification_labels"),
)


@pytest.mark.parametrize(
    ("split", "change", "expected"),
    [
        ("test", {"text": np.ones((2, 4, 9))}, "text is 5 and 9 wide"),
        ("test", {"annotations": ["Neutral"]}, "1 annotations for 2 ids"),
        ("test", {"audio_lengths": [6, 7]}, "says 7 steps in row 2"),
        ("test", {"audio_lengths": [6, "b"]}, "test audio_lengths is 'b' in row 2: write whole numbers"),
        (
            "test",
            {"audio_lengths": [6, 2.5]},
            "test audio_lengths says 2.5 steps in row 2, but test audio has 6",
        ),
        ("test", {"audio_lengths": [np.inf, 1]}, "test audio_lengths says inf steps in row 1"),
        ("test", {"audio_lengths": [-1, np.nan]}, r"says -1 steps in row 1, but test audio has 6 \(2 such"),
        ("test", {"audio_lengths": [10**30, 1]}, r"says 1e\+30 steps in row 1"),
        ("test", {"audio_lengths": [None, 1]}, "test audio_lengths is a list of 2: a whole number for each"),
        ("test", {"audio_lengths": 6}, "test audio_lengths is a int: a whole number for each"),
        ("test", {"audio_lengths": []}, "test has 0 audio_lengths for 2 ids"),
        ("test", {"vision": np.ones((3, 6, 2))}, "2 test vision_lengths for 3 samples"),
        ("valid", {"audio": []}, "valid has no audio, though other splits have it: add it, or delete"),
        ("valid", {"audio": "lost"}, "valid audio is a str: an array of numbers is needed"),
        ("valid", {"audio": None}, "valid audio is a NoneType: an array of numbers"),
        ("valid", {"audio": np.array(1.0)}, r"valid audio is an array \(\) of float64"),
        ("valid", {"audio": [1.0, 2.0, 3.0]}, "valid audio of sample 1 is a float: an array of numbers"),
        ("valid", {"audio": np.full((3, 6, 3), "x")}, r"valid audio is an array \(3, 6, 3\) of str32"),
        (
            "valid",
            {"audio": [np.ones((2, 3)), None, np.ones((1, 3))]},
            "valid audio of sample 2 is a NoneType",
        ),
        ("valid", {"audio": [np.ones((2, 3)), {}, np.ones((1, 3))]}, "valid audio of sample 2 is a dict"),
        ("valid", {"audio": [[[1, 2, 3]], [[1], [2, 3]], []]}, "valid audio of sample 2 is a list of 2"),
        ("valid", {"audio": [[[1, 2, 3]], [[1, None, 3]], []]}, "valid audio of sample 2 is a list of 1"),
        (
            "valid",
            {"audio": np.full((3, 6, 3), "1", object)},
            r"valid audio is an array \(3, 6, 3\) of object",
        ),
        (
            "valid",
            {"audio": [np.ones((2, 3)), np.ones((2, 4)), np.ones((1, 3))]},
            "valid audio of sample 2 is 4 wide, and that of sample 1 is 3",
        ),
        ("valid", {"audio": [np.ones((1, 2, 3))] * 3}, r"sample 1 is an array \(1, 2, 3\) of float64"),
        ("valid", {"id": ["a", "b", "\udc80"]}, "id of row 7 is .* no halves of characters"),
        ("valid", {"id": ["a", "b", "c" * 131_073]}, "id of row 7 is .* at most 131,072 characters"),
        ("valid", {"a\0b": [1, 2, 3]}, "cannot be the name of a column: rename the key"),
        ("test", dict.fromkeys(WITHOUT_FEATURES, ()), "0 test audio_lengths for 2 samples"),
        ("train", {"id": 5}, "does not have MMSA's layout.* a key 'id' in each .* contains: train"),
    ],
)
def test_a_pickle_whose_parts_do_not_fit_is_refused(content, write_pickle, split, change, expected):
    content[split] |= change
    with pytest.raises(CorpusError, match=expected):
        read_mmsa_features(write_pickle(content))


FORMS = {  # the same features as an array `(samples, time, width)`, in other forms
    "big-endian": lambda values: values.astype(">f8"),
    "in the order of Fortran": np.asfortranarray,
    "extended precision": lambda values: values.astype(np.longdouble),
    "objects of numbers": lambda values: values.astype(object),
    "a list of arrays": list,
    "a tuple of big-endian arrays": lambda values: tuple(values.astype(">f4")),
    "nested lists": np.ndarray.tolist,
}


@pytest.mark.parametrize("form", FORMS)
def test_features_in_any_form_have_the_lengths_and_values_of_the_array(content, write_pickle, form):
    expected = read_mmsa_features(write_pickle(content)).steps["audio"]
    for split in content.values():
        split["audio"] = FORMS[form](split["audio"])
    steps = read_mmsa_features(write_pickle(content)).steps["audio"]
    np.testing.assert_array_equal(steps.offsets, expected.offsets)
    torch.testing.assert_close(steps.values, expected.values, rtol=0, atol=0)


def test_a_list_of_vectors_has_one_step_a_sample_and_an_empty_one_none(content, write_pickle):
    for split in content.values():
        split["audio"] = [np.arange(3.0) for _ in split["id"]]
        del split["audio_lengths"]
    content["train"]["audio"][1] = np.zeros(0)
    steps = read_mmsa_features(write_pickle(content)).steps["audio"]
    assert steps.lengths.tolist() == [1, 0, *[1] * 7]
    assert steps.of(0).tolist() == [[0.0, 1.0, 2.0]]


def test_empty_lists_in_one_split_have_the_width_of_the_others(content, write_pickle):
    content["valid"]["audio"] = [[], [], []]
    del content["valid"]["audio_lengths"]
    steps = read_mmsa_features(write_pickle(content)).steps["audio"]
    assert (steps.width, steps.lengths.tolist()) == (3, [6, 0, 5, 5, 0, 0, 0, 6, 0])
    for split in content.values():
        split["audio"] = [[] for _ in split["id"]]
        split.pop("audio_lengths", None)
    assert "audio is empty in every sample" in refusal(write_pickle(content))


def test_speakers_of_one_split_leave_those_of_the_others_to_their_ids(content, write_pickle):
    content["train"] |= {"speaker": ["Anna"] * 4, "turn": [7, 8, 9, 10]}
    rows = [cells for _, cells in read_mmsa_features(write_pickle(content)).metadata.rows]
    assert [cells["speaker"] for cells in rows[:4]] == ["Anna"] * 4
    assert [cells["turn"] for cells in rows[:4]] == ["7", "8", "9", "10"]
    for cells in rows:
        assert cells["dialogue"] == cells["id"].partition("$_$")[0]
    for cells in rows[4:]:
        assert (cells["speaker"], "$_$", cells["turn"]) == cells["id"].partition("$_$")


def test_unusable_tokens_do_not_make_a_file_with_features_unusable(content, write_pickle):
    for split in content.values():
        split["text_bert"] = np.ones((len(split["id"]), 5))
    assert "text" in read_mmsa_features(write_pickle(content)).steps
    del content["test"]["text"]
    assert "test text_bert of sample 1 is an array (5,) of float64" in refusal(write_pickle(content))


def test_a_split_without_samples_is_left_out(content, write_pickle):
    content["test"] = {key: cells[:0] for key, cells in content["test"].items()}
    table = read_mmsa_features(write_pickle(content))
    assert {cells["split"] for _, cells in table.metadata.rows} == {"train", "valid"}
    everything = dict.fromkeys(content, content["test"])
    assert "have no samples" in refusal(write_pickle(everything))


def test_labels_that_a_split_lacks_are_broken_rows_and_no_reason_to_take_other_labels(
    content, write_pickle, tmp_path
):
    del content["test"]["regression_labels"]
    content["train"]["regression_labels"][2] = np.nan
    path = write_pickle(content)
    with pytest.raises(CorpusError) as caught:
        convert_features(path, tmp_path / "corpus")
    assert "3 broken rows" in str(caught.value)
    assert "row 3: label 'nan' is not finite" in str(caught.value)
    assert "row 8: the label is empty" in str(caught.value)
    convert_features(path, tmp_path / "corpus", skip_broken=True)
    assert len(read_features(tmp_path / "corpus", label_range=(-3, 3)).samples) == 6


@pytest.mark.parametrize("layout", [{"first": {"id": ["a"]}}, ["train", "valid"], {"train": [1]}, "text"])
def test_a_pickle_of_another_layout_is_refused_naming_what_it_holds(write_pickle, layout):
    assert "does not have MMSA's layout" in refusal(write_pickle(layout))


def test_the_process_that_reads_a_pickle_starts_without_torch():
    code = f"import runpy, sys; runpy.run_path({str(READER)!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
