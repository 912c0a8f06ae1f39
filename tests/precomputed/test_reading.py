# SPDX-License-Identifier: Apache-2.0
import copy
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from msa_online.batching import FeatureDataset
from msa_online.corpora.corpus import CorpusError, require_splits
from msa_online.precomputed.corpus import (
    FeatureSteps,
    features_table,
    require_widths,
)
from msa_online.precomputed.reading import read_features

RANGE = (-3.0, 3.0)
WIDTHS = {"text": 5, "audio": 3, "vision": 2}


def refusal(path, **options) -> str:
    with pytest.raises(CorpusError) as caught:
        read_features(path, **{"label_range": RANGE, **options})
    return str(caught.value)


# --- what is read ---


def test_emotions_under_a_regression_name_the_other_task_once(feature_arrays, write_archive):
    feature_arrays["emotion"] = np.array(["calm", "angry"] * 6)
    message = refusal(write_archive(feature_arrays), label_column="emotion")
    assert len(message.splitlines()) == 1
    assert "label column 'emotion' contains words ('calm'; 12 of 12 rows)" in message
    assert "data.task=classification" in message


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_a_folder_and_an_archive_give_the_same_samples(kind, feature_folder, feature_arrays, write_archive):
    path = feature_folder if kind == "folder" else write_archive(feature_arrays)
    corpus = read_features(path, label_range=RANGE)
    assert [sample.id for sample in corpus.samples] == feature_arrays["id"].tolist()
    assert [len(corpus.split(name)) for name in ("train", "valid", "test")] == [6, 3, 3]
    assert corpus.samples[0].label == -3.0 and corpus.samples[-1].label == 3.0
    np.testing.assert_array_equal(corpus.steps["text"].of(1), feature_arrays["text"][1, :3])
    np.testing.assert_allclose(corpus.steps["audio"].of(0), feature_arrays["audio"][0], rtol=1e-6)
    np.testing.assert_array_equal(corpus.steps["vision"].of(7), feature_arrays["vision"][7:8])


def test_rows_of_zeros_at_the_end_are_padding_unless_lengths_are_given(feature_arrays, write_archive):
    corpus = read_features(write_archive(feature_arrays), label_range=RANGE)
    assert corpus.steps["audio"].lengths[[0, 3, 4]].tolist() == [6, 0, 2]
    feature_arrays["audio_lengths"] = np.full(12, 5)
    corpus = read_features(write_archive(feature_arrays), label_range=RANGE)
    assert corpus.steps["audio"].lengths.tolist() == [5] * 12


def test_reported_and_masked_modalities_are_the_same(feature_arrays, write_archive):
    del feature_arrays["vision"]
    corpus = read_features(write_archive(feature_arrays), label_range=RANGE)
    dataset = FeatureDataset(corpus, corpus.samples, WIDTHS, None)
    in_batches = torch.stack([dataset[number]["modality_present"] for number in range(12)])
    present = torch.empty_like(in_batches)
    for split in corpus.sizes:
        present[[sample.split == split for sample in corpus.samples]] = corpus.present(split)
    assert torch.equal(present, in_batches)
    assert in_batches.sum(dim=0).tolist() == [12, 11, 0]


def test_class_names_and_another_column_of_splits_can_be_chosen(feature_arrays, write_archive):
    feature_arrays["emotion"] = np.array(["calm", "angry", "sad"] * 4)
    feature_arrays["fold"] = np.array(["dev", "train", "test"] * 4)
    path = write_archive(feature_arrays)
    corpus = read_features(path, label_column="emotion", split_column="fold")
    assert corpus.samples[1].label == "angry" and corpus.samples[0].split == "valid"
    assert read_features(path, label_column="emotion").samples[0].split == "train"


def test_features_of_a_folder_are_not_read_into_memory(feature_folder):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what is mapped")
    corpus = read_features(feature_folder, label_range=RANGE)
    assert str(feature_folder / "features.safetensors") in maps.read_text()
    assert len(corpus.samples) == 12


# --- batches ---


def test_a_batch_pads_what_is_shorter_and_masks_what_is_lacking(feature_folder):
    corpus = read_features(feature_folder, label_range=RANGE)
    dataset = FeatureDataset(corpus, corpus.split("train"), WIDTHS, None)
    assert dataset.lengths == [6, 6, 6, 1, 4, 6]  # of the longest modality
    inputs = [{k: v for k, v in dataset[index].items() if k != "labels"} for index in (0, 3)]
    batch = dataset.processor.pad(inputs)
    assert batch["text_values"].shape == (2, 4, 5) and batch["audio_values"].shape == (2, 6, 3)
    assert batch["text_mask"].sum(dim=1).tolist() == [4, 1]
    assert batch["modality_present"].tolist() == [[True, True, True], [True, False, True]]
    assert (batch["audio_values"][1] == 0).all()


def test_labels_become_numbers_of_classes(feature_arrays, write_archive):
    feature_arrays["label"] = np.array(["calm", "angry", "sad"] * 4)
    corpus = read_features(write_archive(feature_arrays))
    dataset = FeatureDataset(corpus, corpus.samples, WIDTHS, {"angry": 0, "calm": 1, "sad": 2})
    assert dataset[1]["labels"].dtype == torch.int64 and dataset[1]["labels"] == 0


def test_a_corpus_without_a_modality_gives_samples_that_lack_it(feature_arrays, write_archive):
    del feature_arrays["text"], feature_arrays["text_lengths"]
    corpus = read_features(write_archive(feature_arrays), label_range=RANGE)
    sample = FeatureDataset(corpus, corpus.samples, WIDTHS, None)[0]
    assert sample["modality_present"].tolist() == [False, True, True]
    assert sample["text_values"].tolist() == [[0.0] * 5]


# --- statistics ---


def test_statistics_are_those_of_the_training_steps_alone(feature_folder, feature_arrays):
    corpus = read_features(feature_folder, label_range=RANGE)
    mean, deviation = corpus.steps["text"].statistics([sample.row for sample in corpus.split("train")])
    lengths = feature_arrays["text_lengths"][:6]
    valid = np.concatenate([feature_arrays["text"][row, :length] for row, length in enumerate(lengths)])
    np.testing.assert_allclose(mean, valid.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(deviation, valid.std(axis=0), rtol=1e-5)


def test_a_feature_that_never_varies_is_not_blown_up():
    constant = np.full((4, 1), 0.1, np.float32)  # its mean over many steps is not exactly representable
    steps = FeatureSteps.join([np.hstack([constant, np.arange(4.0)[:, None]])] * 999, 2)
    mean, deviation = steps.statistics(range(999))
    assert deviation[0] == 1 and deviation[1] == pytest.approx(np.arange(4).std())
    assert mean[0] == pytest.approx(0.1)


def test_a_modality_that_training_lacks_is_left_as_it_is():
    steps = FeatureSteps.join([np.zeros((0, 2)), np.ones((3, 2))], 2)
    mean, deviation = steps.statistics([0])
    assert mean.tolist() == [0, 0] and deviation.tolist() == [1, 1]


# --- what is refused ---


def test_all_bad_labels_are_listed_at_once(feature_arrays, write_archive):
    feature_arrays["label"][[2, 7]] = [4.5, np.nan]
    message = refusal(write_archive(feature_arrays))
    assert "2 broken rows" in message
    assert (
        "row 3: label '4.5' is outside [-3, 3]" in message and "row 8: label 'nan' is not finite" in message
    )


def test_broken_rows_can_be_left_out_and_the_features_stay_with_their_rows(feature_folder, rewrite_rows):
    def spoil(rows):
        rows[1]["label"] = "very good"
        return rows

    rewrite_rows(feature_folder / "metadata.csv", spoil)
    whole = load_file(feature_folder / "features.safetensors")
    corpus = read_features(feature_folder, label_range=RANGE, skip_broken=True)
    assert [sample.id for sample in corpus.samples][:2] == ["s0", "s2"] and len(corpus.broken) == 1
    start, end = whole["text.offsets"][2], whole["text.offsets"][3]
    assert torch.equal(corpus.steps["text"].of(corpus.samples[1].row), whole["text.values"][start:end])


def test_a_row_with_a_comma_too_many_keeps_its_place_among_the_features(feature_folder):
    path = feature_folder / "metadata.csv"
    lines = path.read_text().splitlines()
    lines[2] += ",more"
    path.write_text("\n".join(lines))
    corpus = read_features(feature_folder, label_range=RANGE, skip_broken=True)
    assert [(sample.id, sample.row) for sample in corpus.samples][:2] == [("s0", 0), ("s2", 2)]


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_a_number_that_is_none_is_refused_naming_sample_modality_and_step(
    feature_arrays, write_archive, value
):
    feature_arrays["audio"][5, 2, 1] = value
    message = refusal(write_archive(feature_arrays))
    assert f"audio of 's5' contains {value} in step 3" in message and "--non-finite zero" in message


def test_texts_as_bytes_are_read_as_utf_8(feature_arrays, write_archive):
    count = len(feature_arrays["id"])
    feature_arrays["id"] = np.array([f"é{number}".encode() for number in range(count)])
    feature_arrays["speaker"] = np.array([b"\xff"] * count)
    corpus = read_features(write_archive(feature_arrays), label_range=(-3, 3))
    assert corpus.samples[0].id == "é0" and corpus.samples[0].speaker == "\N{REPLACEMENT CHARACTER}"


def test_ids_are_refused_that_are_empty_or_taken(feature_arrays, write_archive):
    feature_arrays["id"][[3, 5]] = ["s1", " "]
    message = refusal(write_archive(feature_arrays))
    assert "id 's1' is that of" in message and "row 2" in message and "the id is empty" in message


def test_an_unknown_split_is_refused_with_the_nearest_known_one(feature_arrays, write_archive):
    feature_arrays["split"] = np.where(feature_arrays["split"] == "valid", "vali", feature_arrays["split"])
    message = refusal(write_archive(feature_arrays))
    assert message.count("split 'vali' is unknown (did you mean 'valid'?)") == 3


@pytest.mark.parametrize(
    ("options", "column"),
    [({"label_column": "emotion"}, "emotion"), ({"split_column": "fold"}, "fold")],
)
def test_a_missing_column_is_named_with_those_there_are(feature_folder, options, column):
    message = refusal(feature_folder, **options)
    assert f"no column '{column}'" in message and "id, text, label, split, speaker" in message


def test_an_archive_without_ids_is_refused(feature_arrays, write_archive):
    del feature_arrays["id"]
    assert "has no key 'id'" in refusal(write_archive(feature_arrays))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("label", np.zeros(11), "11 label for 12 ids"),
        ("text", np.zeros((11, 4, 5)), "12 text_lengths|12 samples"),
        ("vision", np.zeros((11, 2)), "vision has 11 samples"),
        ("vision", np.zeros((12, 2, 2, 2)), r"\(12, 2, 2, 2\) of float64"),
        ("vision", np.full((12, 2), "x"), "of <U1"),
        ("text_lengths", np.full(12, 5), "says 5 steps in row 1, but text has 4"),
        ("text_lengths", np.full(12, 0.5), "text_lengths says 0.5 steps in row 1"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(feature_arrays, write_archive, key, value, expected):
    with pytest.raises(CorpusError, match=expected):
        read_features(write_archive({**feature_arrays, key: value}), label_range=RANGE)


def test_objects_in_an_archive_are_refused_and_not_unpickled(feature_arrays, write_archive):
    feature_arrays["label"] = np.array(["calm"] * 12, dtype=object)
    assert "arrays of strings (dtype U)" in refusal(write_archive(feature_arrays))


def header(shape: tuple[int, ...], kind: str | list) -> bytes:
    """The beginning of an array in a file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


IDS = header((2,), "<U1") + "ab".encode("utf-32-le")
HARMFUL = {  # members of an archive, and what its refusal says
    "an array of zeros": (
        {"id": IDS, "text": header((1000, 100_000), "<f4") + bytes(400_000_000)},
        r"unpacks to 0.4 GB, more than the 0.3 GB that an archive of its size may contain",
    ),
    "several arrays of zeros": (
        {f"key{number}": header((1000, 25_000), "<f4") + bytes(100_000_000) for number in range(4)},
        r"unpacks to 0.4 GB, more than the 0.3 GB",
    ),
    "a shape without its numbers": (
        {"id": IDS, "text": header((1_000_000, 1000), "<f4") + b"few"},
        r"the length of text.npy does not match its shape \(1000000, 1000\)",
    ),
    "many cells without a byte": ({"id": header((10**9,), "<U0")}, "id.npy has more than 2,000,000 rows"),
    "many cells of one byte": (
        {"id": header((3_000_000,), "|S1") + bytes(3_000_000)}, "id.npy has more than 2,000,000 rows"
    ),
    "many columns": (
        {f"key{number}": header((2_000_000, 1), "|S1") + bytes(2_000_000) for number in range(11)},
        "has 22,000,000 cells in its columns, more than 20,000,000",
    ),
    "named fields": (
        {"id": IDS, "text": header((2,), [("a", "<f4")]) + bytes(8)}, "text is an array"
    ),
    "a text file": ({"id": IDS, "text": b"no array at all"}, "magic string is not correct"),
    "nothing in each": (
        {key: header((0,), "<U1") for key in ("id", "label", "split")} | {"text": header((0, 4, 5), "<f4")},
        "has no usable row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HARMFUL)
def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused_before_it_does(
    kind, tmp_path, monkeypatch
):
    members, expected = HARMFUL[kind]
    path = tmp_path / "features.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    if "GB" in expected or "cells" in expected or "rows" in expected:
        monkeypatch.setattr(np, "load", None)  # nothing is unpacked
    message = refusal(path)
    assert re.search(expected, message) and str(path) in message and path.stat().st_size < 1_000_000


@pytest.mark.parametrize("shape", ["(" * 8000, "(" + "-" * 8000 + "1,)", "9" * 5000, "(-2,)"])
def test_an_array_whose_header_is_no_header_is_refused(shape, tmp_path):
    """numpy parses it as Python, and any error of the parser may come back."""
    written = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    with zipfile.ZipFile(tmp_path / "features.npz", "w") as archive:
        archive.writestr("id.npy", b"\x93NUMPY\x01\x00" + len(written).to_bytes(2, "little") + written)
    assert "cannot be read as an .npz file" in refusal(tmp_path / "features.npz")


def test_an_archive_of_a_zip_version_to_come_is_refused(feature_arrays, write_archive):
    path = write_archive(feature_arrays)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 200  # version needed to extract
    path.write_bytes(content)
    assert "zip file version 20.0" in refusal(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_an_archive_packed_as_numpy_never_packs_is_refused(method, tmp_path):
    """LZMA may ask for 4 GB for its dictionary alone."""
    with zipfile.ZipFile(tmp_path / "features.npz", "w", method) as archive:
        archive.writestr("id.npy", IDS)
    assert "id.npy is encrypted, or compressed in a way numpy does not use" in refusal(
        tmp_path / "features.npz"
    )


def test_members_that_share_their_bytes_count_each_for_itself(tmp_path):
    """An archive can name the same packed bytes many times over."""
    path = tmp_path / "features.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("key0.npy", header((1000, 10_000), "<f4") + bytes(40_000_000))
        first = archive.infolist()[0]
        for number in range(1, 10):
            again = copy.copy(first)
            again.filename = f"key{number}.npy"
            archive.filelist.append(again)
    assert "unpacks to 0.4 GB" in refusal(path)


def test_an_archive_packed_tightly_by_numpy_is_read(feature_arrays, tmp_path):
    """Padding packs well: an archive may unpack to more than a hundred times its size while it is small."""
    feature_arrays["audio"] = np.zeros((12, 50_000, 3), np.float32)
    feature_arrays["audio"][:, 0] = 1
    np.savez_compressed(tmp_path / "features.npz", **feature_arrays)
    assert (tmp_path / "features.npz").stat().st_size < 7_200_000 / 100
    assert read_features(tmp_path / "features.npz").steps["audio"].lengths.tolist() == [1] * 12


@pytest.mark.parametrize("share", [0, 0.4, 0.97])
def test_an_archive_that_is_cut_off_is_refused(feature_arrays, write_archive, share):
    path = write_archive(feature_arrays)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "cannot be read as an .npz file" in refusal(path)


@pytest.mark.parametrize("share", [0, 0.4, 0.97])
def test_a_folder_whose_features_are_cut_off_is_refused(feature_folder, share):
    path = feature_folder / "features.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "damaged or truncated" in refusal(feature_folder)


def test_a_folder_with_rows_missing_is_refused(feature_folder, rewrite_rows):
    rewrite_rows(feature_folder / "metadata.csv", lambda rows: rows[:-1])
    assert "text has 12 samples, but metadata.csv has 11" in refusal(feature_folder)
    (feature_folder / "metadata.csv").unlink()
    assert "has no metadata.csv" in refusal(feature_folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"text.offsets": None}, "text.values and text.offsets are needed together"),
        ({"txt.values": torch.zeros(1, 1)}, "contains txt.values: known are"),
        ({"vision.values": torch.zeros(12, 2).double()}, "vision.values is .* of torch.float64"),
        ({"vision.offsets": torch.zeros(13, dtype=torch.int64)}, "must rise from 0 to the 12 steps"),
        ({"vision.offsets": torch.arange(13).int()}, "must be int64"),
        (
            dict.fromkeys(map(str, range(100)), torch.zeros(1)),
            "contains 0, 1, 10, 11, 12, 13, 14, 15, 16, 17: k",
        ),
        (dict.fromkeys(map(str, range(20_000)), torch.zeros(1)), r"header of 1,[\d,]+ bytes, too many for 6"),
    ],
)
def test_tensors_of_a_folder_that_do_not_fit_are_refused(feature_folder, changes, expected):
    path = feature_folder / "features.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(CorpusError, match=expected):
        read_features(feature_folder, label_range=RANGE)


def test_what_is_no_corpus_of_features_is_refused_with_the_way_to_one(tmp_path):
    assert "convert-features" in refusal(tmp_path / "mosi.pkl")
    assert "extract-features" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "none")


def test_all_widths_that_differ_from_the_model_are_named_with_both_numbers(feature_folder):
    corpus = read_features(feature_folder, label_range=RANGE)
    with pytest.raises(
        CorpusError, match="text is 5 wide in the data and 768 in the model; audio is 3 .* 74"
    ):
        require_widths(corpus, {"text": 768, "audio": 74, "vision": 2})


def test_an_empty_split_is_refused_with_what_the_others_hold(feature_arrays, write_archive):
    feature_arrays["split"] = np.array(["train"] * 8 + ["test"] * 4)
    corpus = read_features(write_archive(feature_arrays), label_range=RANGE)
    with pytest.raises(CorpusError, match=r"the valid split is empty \(samples: 8 train, 0 valid, 4 test\)"):
        require_splits(corpus, ("train", "valid"))


def test_the_terminal_shows_widths_lengths_and_gaps(feature_arrays, write_archive):
    del feature_arrays["vision"]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(features_table(read_features(write_archive(feature_arrays), label_range=RANGE)))
    for expected in ("12 samples (6 train, 3 valid, 3 test)", "1 (8.3%)", "12 (100.0%)", "not in the data"):
        assert expected in capture.get()
