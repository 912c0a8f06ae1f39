# SPDX-License-Identifier: Apache-2.0
"""Pickles in the shapes in which MMSA, MMSA-FET and CH-SIMS publish theirs."""

import json
import pickle

import numpy as np
import pytest
import torch

from msa_online.corpora.corpus import CorpusError
from msa_online.encoders.pretrained import EncoderError
from msa_online.precomputed.conversion import convert_features
from msa_online.precomputed.reading import read_features

SIZES = {"train": 4, "valid": 3, "test": 2}
SENTENCES = ("what a good movie", "the end was bad")
SHAPES = {  # steps and width of text, audio, vision
    "aligned_50": ((50, 768), (50, 5), (50, 20)),
    "unaligned_50": ((50, 768), (375, 5), (500, 20)),
    "unaligned_39": ((39, 768), (400, 33), (55, 709)),
}


def padded(random: np.random.Generator, lengths: np.ndarray, steps: int, width: int) -> np.ndarray:
    values = random.normal(size=(len(lengths), steps, width)).astype(np.float32)
    values[np.arange(steps) >= lengths[:, None]] = 0
    return values


@pytest.fixture
def published(tiny_tokenizer):
    """A function that makes the content of a pickle of a published name."""

    def make(name: str) -> dict:
        random = np.random.default_rng(0)
        content = {}
        for split, count in SIZES.items():
            raw = [SENTENCES[number % 2] for number in range(count)]
            made = tiny_tokenizer(raw, padding="max_length", max_length=SHAPES[name][0][0])
            ids = np.array(made["input_ids"])
            mask = np.array(made["attention_mask"])
            lengths = {"text": mask.sum(axis=1), "audio": mask.sum(axis=1), "vision": mask.sum(axis=1)}
            content[split] = {
                "raw_text": np.array(raw, object),
                "id": np.array([f"video{number // 2}$_${number}_{split}" for number in range(count)], object),
                "text_bert": np.stack([ids, mask, np.zeros_like(ids)], axis=1).astype(np.float32),
                "annotations": np.array(["Negative", "Neutral", "Positive", "Positive"][:count], object),
                "classification_labels": np.array([0.0, 1.0, 2.0, 2.0][:count]),
                "regression_labels": np.array([-0.8, 0.0, 0.6, 1.0][:count]),
            }
            if name != "aligned_50":
                lengths["audio"] = random.integers(1, SHAPES[name][1][0], count)
                lengths["vision"] = random.integers(1, SHAPES[name][2][0], count)
                content[split]["audio_lengths"] = lengths["audio"].tolist()
                content[split]["vision_lengths"] = lengths["vision"].tolist()
            if name == "unaligned_39":
                for number, letter in enumerate("TAV"):
                    content[split][f"regression_labels_{letter}"] = np.array([0.2 * number - 0.4] * count)
            for modality, shape in zip(lengths, SHAPES[name], strict=True):
                content[split][modality] = padded(random, lengths[modality], *shape)
        return content

    return make


@pytest.fixture
def converted(tmp_path):
    """A function that writes content as a pickle, converts it and returns the folder."""

    def convert(content: dict, **options):
        (tmp_path / "features.pkl").write_bytes(pickle.dumps(content))
        convert_features(tmp_path / "features.pkl", tmp_path / "corpus", **options)
        return tmp_path / "corpus"

    return convert


def require_steps(corpus, content: dict, modality: str, lengths_of) -> None:
    """Every sample has exactly the steps that it has in the pickle."""
    row = 0
    for split in SIZES:
        for values, length in zip(content[split][modality], lengths_of(content[split]), strict=True):
            np.testing.assert_array_equal(corpus.steps[modality].of(row), values[:length])
            row += 1
    assert row == len(corpus.samples)


@pytest.mark.parametrize("name", SHAPES)
def test_every_sample_of_a_published_pickle_keeps_its_steps_labels_and_split(name, published, converted):
    content = published(name)
    corpus = read_features(converted(content), label_range=(-1, 1))
    assert {modality: steps.width for modality, steps in corpus.steps.items()} == dict(
        zip(("text", "audio", "vision"), (width for _, width in SHAPES[name]), strict=True)
    )
    assert {split: len(corpus.split(split)) for split in SIZES} == SIZES
    assert [sample.label for sample in corpus.split("train")] == [-0.8, 0.0, 0.6, 1.0]
    assert corpus.samples[1].text == SENTENCES[1] and corpus.samples[3].speaker == "video1"
    for modality in corpus.steps:
        key = f"{modality}_lengths"
        require_steps(
            corpus,
            content,
            modality,
            lambda part, key=key: part.get(key, part["text_bert"][:, 1].sum(-1).astype(int)),
        )


def test_the_labels_of_each_modality_of_ch_sims_are_columns_to_train_on(published, converted):
    folder = converted(published("unaligned_39"))
    for number, letter in enumerate("TAV"):
        corpus = read_features(folder, label_column=f"regression_labels_{letter}", label_range=(-1, 1))
        assert {round(sample.label, 6) for sample in corpus.samples} == {round(0.2 * number - 0.4, 6)}


def test_a_pickle_of_classes_alone_has_classes_as_labels(published, converted):
    content = published("aligned_50")
    for part in content.values():
        del part["regression_labels"], part["annotations"]
    corpus = read_features(converted(content))
    assert [sample.label for sample in corpus.split("train")] == ["0", "1", "2", "2"]


@pytest.mark.parametrize("shape", [(-1, 1), (-1, 1, 1)])
def test_labels_in_a_column_of_their_own_are_read(shape, published, converted):
    content = published("aligned_50")
    for part in content.values():
        part["regression_labels"] = part["regression_labels"].reshape(shape)
    assert read_features(converted(content), label_range=(-1, 1)).samples[2].label == 0.6


@pytest.mark.parametrize("order", ["C", "F"])
def test_features_in_lists_are_read_in_any_order_in_memory(order, published, converted):
    content = published("unaligned_50")
    for part in content.values():
        for modality in ("audio", "vision"):
            lengths = part.pop(f"{modality}_lengths")
            part[modality] = [
                np.array(values[:length], order=order)
                for values, length in zip(part[modality], lengths, strict=True)
            ]
        part["text_bert"] = list(part["text_bert"])
    corpus = read_features(converted(content), label_range=(-1, 1))
    require_steps(corpus, content, "audio", lambda part: map(len, part["audio"]))


@pytest.fixture
def tokens_alone(published):
    content = published("aligned_50")
    for part in content.values():
        del part["text"]
    return content


@pytest.mark.parametrize("in_lists", [False, True])
def test_tokens_alone_become_states_of_their_encoder(in_lists, tokens_alone, converted, tiny_text_encoder):
    from transformers import AutoModel

    if in_lists:
        for part in tokens_alone.values():
            part["text_bert"] = list(part["text_bert"])
    folder = converted(tokens_alone, text_encoder=str(tiny_text_encoder))
    corpus = read_features(folder, label_range=(-1, 1))
    network = AutoModel.from_pretrained(tiny_text_encoder, add_pooling_layer=False).eval()
    tokens = torch.tensor(tokens_alone["valid"]["text_bert"][1][0][:6]).long()
    with torch.no_grad():
        expected = network(input_ids=tokens[None]).last_hidden_state[0]
    assert len(corpus.split("valid")[1].text.split()) + 2 == len(tokens)
    torch.testing.assert_close(corpus.steps["text"].of(5), expected, atol=1e-5, rtol=1e-5)
    assert json.loads((folder / "origin.json").read_text())["text encoder"] == str(tiny_text_encoder)


def test_tokens_replace_features_of_text_only_if_an_encoder_is_named(published, converted, tiny_text_encoder):
    content = published("aligned_50")
    content["train"]["text"][:] = np.nan
    corpus = read_features(converted(content, text_encoder=str(tiny_text_encoder)), label_range=(-1, 1))
    assert corpus.steps["text"].width == 32


def test_a_text_without_words_is_absent(tokens_alone, converted, tiny_text_encoder):
    part = tokens_alone["train"]
    part["raw_text"][0] = ""
    part["text_bert"][0, 0, 1:] = [3, *[0] * 48]
    part["text_bert"][0, 1] = [1, 1, *[0] * 48]
    corpus = read_features(converted(tokens_alone, text_encoder=str(tiny_text_encoder)), label_range=(-1, 1))
    assert corpus.present("train")[:, 0].tolist() == [False, True, True, True]


def set_id(value: float):
    def change(content: dict) -> None:
        content["valid"]["text_bert"][1:, 0, 2] = value

    return change


def rename_vocabulary(content: dict) -> None:
    for part in content.values():
        ids = part["text_bert"][:, 0]
        ids[:, 1:3] = ids[:, 2:0:-1]


def drop_rows(content: dict) -> None:
    for part in content.values():
        part["text_bert"] = part["text_bert"][:, :1]


def drop_tokens(content: dict) -> None:
    for part in content.values():
        del part["text_bert"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            set_id(30521),
            "text_bert of 'video0$_$1_valid' has the token id 30521 (2 such samples), and {} has",
        ),
        (set_id(-1), "has the token id -1 (2 such samples)"),
        (set_id(4.5), "has the token id 4.5 (2 such samples)"),
        (set_id(np.nan), "has the token id nan (2 such samples)"),
        (
            rename_vocabulary,
            "are not what the tokenizer of {} makes of raw_text in 9 of 9 samples, for example",
        ),
        (drop_rows, "text_bert has 1 rows in each sample: token ids, attention mask and segments are needed"),
        (drop_tokens, "has no tokens in a key text_bert: leave out --text-encoder"),
    ],
    ids=["too large", "negative", "a fraction", "nan", "other vocabulary", "ids alone", "no tokens"],
)
def test_tokens_of_another_encoder_are_refused(
    change, expected, tokens_alone, converted, tiny_text_encoder, tmp_path
):
    change(tokens_alone)
    with pytest.raises(CorpusError) as caught:
        converted(tokens_alone, text_encoder=str(tiny_text_encoder))
    assert expected.format(tiny_text_encoder) in str(caught.value)
    assert str(tmp_path / "features.pkl") in str(caught.value) and not (tmp_path / "corpus").exists()


def test_tokens_without_an_encoder_are_refused_and_not_dropped(tokens_alone, converted):
    with pytest.raises(CorpusError, match="no features of text, only tokens in text_bert: name the encoder"):
        converted(tokens_alone)


def test_an_encoder_that_does_not_exist_is_named(tokens_alone, converted, tmp_path):
    with pytest.raises(EncoderError, match="no_such_encoder"):
        converted(tokens_alone, text_encoder=str(tmp_path / "no_such_encoder"))


def drop(*keys: str):
    def change(content: dict) -> None:
        for part in content.values():
            for key in keys:
                del part[key]

    return change


def make_long(content: dict) -> None:
    content["test"]["audio_lengths"] = [376, 500]


def make_infinite(content: dict) -> None:
    content["train"]["audio"][[0, 2], 0] = -np.inf


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (drop("id"), "with a key 'id' in each are needed"),
        (drop("text", "text_bert", "audio", "vision"), "contains no features: one of text, audio and vision"),
        (drop("regression_labels", "annotations", "classification_labels"), r"no column 'label'"),
        (make_long, r"test audio_lengths says 376 steps in row 1, but test audio has 375 \(2 such rows\)"),
        (make_infinite, "(?s)2 broken rows.*audio of 'video0.*' contains -inf in step 1.*--non-finite zero"),
    ],
    ids=["no ids", "no features", "no labels", "lengths beyond the array", "infinities"],
)
def test_a_pickle_without_what_training_needs_is_refused_before_training(
    change, expected, published, converted, tmp_path
):
    content = published("unaligned_50")
    change(content)
    with pytest.raises(CorpusError, match=expected) as caught:
        converted(content)
    assert str(tmp_path / "features.pkl") in str(caught.value) and not (tmp_path / "corpus").exists()
    assert "Traceback" not in str(caught.value)
