# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest
import torch

from feature_extractors import ExtractionSettings, FeatureCache
from feature_extractors.audio import log_mel
from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.reading import read_corpus
from msa_online.encoders import load_encoder_config
from msa_online.encoders.pretrained import load_tokenizer
from msa_online.encoders.text import TextEncoder
from msa_online.precomputed.audio_descriptors import DESCRIPTORS, audio_descriptors
from msa_online.precomputed.extraction import encode_texts, extract_features
from msa_online.precomputed.reading import read_features


@pytest.fixture
def encoder(tiny_text_encoder):
    encoder = TextEncoder(load_encoder_config("text", str(tiny_text_encoder)))
    encoder.load_pretrained(tiny_text_encoder)
    return load_tokenizer(str(tiny_text_encoder)), encoder


def described(waveform: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(DESCRIPTORS, audio_descriptors(log_mel(waveform)).T, strict=True))


def test_clips_become_a_corpus_of_features(tiny_corpus, tiny_text_encoder, cache_dir, tmp_path):
    corpus = read_corpus(tiny_corpus)
    settings = ExtractionSettings(num_frames=4)
    extract_features(
        corpus, tmp_path / "out", text_encoder=str(tiny_text_encoder), settings=settings, workers=1
    )
    features = read_features(tmp_path / "out", label_range=(-3, 3))
    assert [(each.id, each.text, each.split, each.speaker) for each in features.samples] == [
        (each.id, each.text, each.split, each.speaker) for each in corpus.samples
    ]
    assert features.samples[0].label == float(corpus.samples[0].label)
    assert {name: steps.width for name, steps in features.steps.items()} == {
        "text": 32,
        "audio": 45,
        "vision": 52,
    }
    assert features.steps["text"].lengths[5] == 0  # no words
    assert features.steps["audio"].lengths[3] == 0  # no sound
    assert features.steps["audio"].lengths[0] == 8  # 0.6 s in steps of 80 ms
    clip = corpus.samples[0].clip
    cached = FeatureCache().load(FeatureCache().key(clip, settings))
    np.testing.assert_array_equal(features.steps["vision"].of(0), cached.blendshapes[cached.face_found])
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())
    assert origin["extraction"]["num_frames"] == 4 and origin["text"]["encoder"] == str(tiny_text_encoder)


def test_a_folder_that_is_taken_is_refused_before_the_work_begins(tiny_corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match="exists already"):
        extract_features(read_corpus(tiny_corpus), tmp_path, text_encoder="nobody/asks-for-this")


def test_states_of_a_text_do_not_depend_on_its_neighbours_in_the_batch(encoder):
    texts = ["very good", "", "i loved it and the ending was really great", "bad"]
    together = encode_texts(texts, *encoder)
    assert [len(states) for states in together] == [4, 0, 11, 3]  # with special tokens
    for text, states in zip(texts, together, strict=True):
        np.testing.assert_allclose(encode_texts([text], *encoder)[0], states, atol=1e-5)


def test_states_are_the_last_of_the_published_encoder(encoder):
    tokenizer, text_encoder = encoder[0], encoder[1].eval()
    expected = text_encoder.model(**tokenizer("a great film", return_tensors="pt")).last_hidden_state
    np.testing.assert_allclose(
        encode_texts(["a great film"], *encoder)[0], expected[0].detach().numpy(), atol=1e-5
    )
    assert torch.is_grad_enabled()


def test_a_higher_and_a_louder_tone_are_described_as_such():
    times = np.arange(16_000) / 16_000
    low, high = (0.3 * np.sin(2 * np.pi * pitch * times) for pitch in (300, 3000))
    soft, loud = described(0.1 * low), described(low)
    assert np.median(described(high)["spectral centroid"]) > 5 * np.median(loud["spectral centroid"])
    assert np.median(loud["log energy"] - soft["log energy"]) == pytest.approx(np.log(100), rel=0.05)
    noise = np.random.default_rng(0).normal(size=16_000)
    assert described(0.1 * noise)["spectral flatness"].min() > 10 * np.median(loud["spectral flatness"])


def test_steps_are_averaged_by_eight_and_a_shorter_rest_by_its_own_number():
    spectrum = log_mel(np.random.default_rng(0).normal(size=16_000) * 0.1)
    steps = audio_descriptors(spectrum)
    assert steps.shape == (-(-len(spectrum) // 8), 45) and steps.dtype == np.float32
    energy = np.log(np.exp(spectrum.astype(np.float64)).sum(axis=1))
    column = DESCRIPTORS.index("log energy")
    assert steps[0, column] == pytest.approx(energy[:8].mean(), rel=1e-5)
    assert steps[-1, column] == pytest.approx(energy[(len(spectrum) - 1) // 8 * 8 :].mean(), rel=1e-5)


@pytest.mark.parametrize("samples", [0, 1, 100, 700])
def test_very_short_and_silent_sounds_have_finite_descriptors(samples):
    steps = audio_descriptors(log_mel(np.zeros(samples)))
    assert steps.shape[1] == 45 and np.isfinite(steps).all() and (len(steps) == 0) == (samples == 0)
