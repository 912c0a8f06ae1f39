# SPDX-License-Identifier: Apache-2.0
import csv
import json
import os
import stat

import numpy as np
import pytest

from msa_online.corpora.corpus import CorpusError
from msa_online.precomputed.conversion import convert_features
from msa_online.precomputed.corpus import FeatureSteps
from msa_online.precomputed.files import write_feature_folder
from msa_online.precomputed.pooling import pool
from msa_online.precomputed.reading import read_features


@pytest.fixture
def described(feature_arrays, write_archive, tmp_path):
    """An archive of features and ids alone, and the csv file that describes it in another order."""
    bare = {key: feature_arrays[key] for key in ("id", "text", "audio", "vision")}
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "label", "split", "fold"])
        for name in reversed(feature_arrays["id"]):
            writer.writerow(
                [name, f"said, in {name}", name[1:], "train", ("train", "test")[int(name[1:]) % 2]]
            )
    return write_archive(bare), tmp_path / "rows.csv"


def refusal(source, folder, **options) -> str:
    with pytest.raises(CorpusError) as caught:
        convert_features(source, folder, **options)
    assert not folder.exists() and not [name for name in os.listdir(folder.parent) if name.startswith(".")]
    return str(caught.value)


def test_rows_of_a_csv_file_find_their_features_by_id(described, tmp_path, feature_arrays):
    source, rows = described
    convert_features(source, tmp_path / "corpus", metadata=rows, split_column="fold")
    corpus = read_features(tmp_path / "corpus", label_range=(0, 12))
    sample = next(sample for sample in corpus.samples if sample.id == "s7")
    assert (sample.label, sample.text, sample.split) == (7.0, "said, in s7", "test")
    np.testing.assert_array_equal(corpus.steps["vision"].of(sample.row)[0], feature_arrays["vision"][7])


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_converted_corpus_has_the_permissions_of_the_umask(umask, described, tmp_path):
    source, rows = described
    before = os.umask(umask)
    try:
        convert_features(source, tmp_path / "corpus", metadata=rows)
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "corpus").iterdir()}
    assert "features.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "corpus").stat().st_mode) == 0o777 & ~umask


def test_ids_that_only_one_side_knows_are_named(described, tmp_path, rewrite_rows):
    source, rows = described
    rewrite_rows(rows, lambda cells: [*cells[2:], {**cells[0], "id": "stranger"}])
    message = refusal(source, tmp_path / "corpus", metadata=rows)
    assert "does not name 's10', 's11'" in message and str(source) in message
    rewrite_rows(rows, lambda cells: [*cells, *({**cells[0], "id": name} for name in ("s10", "s11"))])
    assert "names 'stranger', for which" in refusal(source, tmp_path / "corpus", metadata=rows)


def test_an_id_that_is_described_twice_is_refused(described, tmp_path, rewrite_rows):
    source, rows = described
    rewrite_rows(rows, lambda cells: [*cells, cells[0]])
    assert "names 's11' more than once" in refusal(source, tmp_path / "corpus", metadata=rows)


def test_what_else_the_source_says_of_a_sample_is_kept(feature_arrays, write_archive, tmp_path):
    source = write_archive({**feature_arrays, "mood": np.array(["up", "down"] * 6), "speaker": ["a"] * 12})
    convert_features(source, tmp_path / "corpus")
    moods = read_features(tmp_path / "corpus", label_column="mood")
    assert moods.samples[1].label == "down" and moods.samples[1].speaker == "a"
    origin = json.loads((tmp_path / "corpus" / "origin.json").read_text())
    assert origin["source"] == str(source) and origin["widths"] == {"text": 5, "audio": 3, "vision": 2}


def test_infinities_are_refused_or_become_zero_and_are_counted(feature_arrays, write_archive, tmp_path):
    feature_arrays["audio"][[1, 5], 2] = -np.inf
    source = write_archive(feature_arrays)
    message = refusal(source, tmp_path / "corpus")
    assert "2 broken rows" in message and "audio of 's5' contains -inf in step 3" in message
    convert_features(source, tmp_path / "corpus", non_finite="zero")
    assert (read_features(tmp_path / "corpus").steps["audio"].of(1)[2] == 0).all()
    origin = json.loads((tmp_path / "corpus" / "origin.json").read_text())
    assert origin["non-finite numbers replaced by zero"]["audio"] == 6


def test_broken_rows_can_be_left_out_with_their_features(feature_arrays, write_archive, tmp_path):
    feature_arrays["split"][1] = "?"
    convert_features(write_archive(feature_arrays), tmp_path / "corpus", skip_broken=True)
    corpus = read_features(tmp_path / "corpus")
    assert [sample.id for sample in corpus.samples][:2] == ["s0", "s2"]
    np.testing.assert_array_equal(corpus.steps["vision"].of(1)[0], feature_arrays["vision"][2])


def test_a_validation_split_is_taken_from_whole_speakers_of_training(feature_arrays, write_archive, tmp_path):
    feature_arrays["split"] = np.array(["train"] * 10 + ["test"] * 2)
    feature_arrays["speaker"] = np.array([f"speaker {number // 2}" for number in range(12)])
    convert_features(write_archive(feature_arrays), tmp_path / "corpus", valid_share=0.3)
    corpus = read_features(tmp_path / "corpus")
    speakers = {name: {sample.speaker for sample in corpus.split(name)} for name in ("train", "valid")}
    assert len(corpus.split("valid")) == 4 and not speakers["train"] & speakers["valid"]
    assert len(corpus.split("test")) == 2
    source = tmp_path / "corpus"
    assert "has a validation split already" in refusal(source, tmp_path / "again", valid_share=0.3)


def test_an_utterance_is_the_mean_of_text_and_mean_and_deviation_of_the_rest(feature_folder, tmp_path):
    convert_features(feature_folder, tmp_path / "pooled", level="utterance")
    before, after = read_features(feature_folder), read_features(tmp_path / "pooled")
    assert {name: steps.width for name, steps in after.steps.items()} == {"text": 5, "audio": 6, "vision": 2}
    text, audio = (before.steps[name].of(1).numpy() for name in ("text", "audio"))
    np.testing.assert_allclose(after.steps["text"].of(1)[0], text.mean(axis=0), atol=1e-6)
    expected = np.concatenate([audio.mean(axis=0), audio.std(axis=0)])
    np.testing.assert_allclose(after.steps["audio"].of(1)[0], expected, atol=1e-6)
    assert after.steps["audio"].lengths.tolist() == [1, 1, 1, 0, *[1] * 8]  # the fourth has no sound


def test_one_step_alone_gets_no_deviation_beside_it():
    steps = {"audio": FeatureSteps.join([np.ones((1, 3)), np.zeros((0, 3))], 3)}
    assert pool(steps)["audio"] is steps["audio"]


def test_nothing_is_written_over_and_nothing_half_written_is_left(feature_arrays, write_archive, tmp_path):
    source = write_archive(feature_arrays)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    with pytest.raises(CorpusError, match="exists already"):
        convert_features(source, tmp_path / "taken")
    assert os.listdir(tmp_path / "taken") == ["mine.txt"]


def test_parent_folders_are_made_and_a_file_in_the_way_is_named(feature_arrays, write_archive, tmp_path):
    source = write_archive(feature_arrays)
    convert_features(source, tmp_path / "features" / "mosi" / "aligned")
    assert len(read_features(tmp_path / "features" / "mosi" / "aligned").samples) == 12
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match=f"cannot be created: {tmp_path / 'file'} is a file, not a folder"):
        convert_features(source, tmp_path / "file" / "features" / "mosi")


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path):
    steps = {"text": FeatureSteps.join([np.ones((2, 3)), np.ones((1, 3))], 3)}
    with pytest.raises(ValueError, match="mood"):  # metadata.csv is begun by then
        write_feature_folder(tmp_path / "corpus", [{"id": "a"}, {"id": "b", "mood": "calm"}], steps, {})
    assert os.listdir(tmp_path) == []


def test_the_source_is_refused_before_it_is_read_if_it_is_nothing_known(tmp_path):
    (tmp_path / "features.csv").write_text("id\n")
    assert "neither a .pkl in MMSA's layout nor an .npz file" in refusal(
        tmp_path / "features.csv", tmp_path / "corpus"
    )
    assert "does not exist" in refusal(tmp_path / "none.npz", tmp_path / "corpus")


def test_real_utterance_features_of_mosi_are_converted(shared_data, tmp_path):
    folder = shared_data / "mosi"
    convert_features(
        folder / "utterance_features.npz",
        tmp_path / "mosi",
        metadata=folder / "transcripts.csv",
        split_column="split_bclstm",
        valid_share=0.1,
    )
    corpus = read_features(tmp_path / "mosi", label_range=(-3, 3))
    assert {name: steps.width for name, steps in corpus.steps.items()} == {
        "text": 100,
        "audio": 73,
        "vision": 100,
    }
    assert [len(corpus.split(name)) for name in ("train", "valid", "test")] == [1302, 145, 752]
