# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from feature_extractors import ExtractionSettings, FeatureCache
from feature_extractors.audio import log_mel
from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.reading import read_corpus
from msa_online.encoders.pretrained import EncoderError
from msa_online.front_ends import picture_inputs
from msa_online.modalities import MODALITIES
from msa_online.precomputed.audio_descriptors import DESCRIPTORS, audio_descriptors
from msa_online.precomputed.extraction import extract_features
from msa_online.precomputed.reading import read_features


@pytest.fixture(scope="module")
def tiny_whisper(tmp_path_factory) -> Path:
    """A folder with a small random Whisper and its feature extractor, as a published one has them."""
    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        vocab_size=20,
        num_mel_bins=80,
        **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "decoder_start")},
    )
    folder = tmp_path_factory.mktemp("tiny_whisper")
    torch.manual_seed(0)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory) -> Path:
    """A folder with a small random ViT and its image processor."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32
    )
    folder = tmp_path_factory.mktemp("tiny_vit")
    torch.manual_seed(0)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def described(waveform: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(DESCRIPTORS, audio_descriptors(log_mel(waveform)).T, strict=True))


def test_clips_become_a_corpus_of_features(tiny_corpus, tiny_text_encoder, cache_dir, tmp_path):
    corpus = read_corpus(tiny_corpus)
    settings = {"num_frames": 4}
    extract_features(
        corpus, tmp_path / "out", text_encoder=str(tiny_text_encoder), extraction=settings, workers=1
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
    cached = FeatureCache().load(FeatureCache().key(clip, ExtractionSettings(**settings)))
    np.testing.assert_array_equal(features.steps["vision"].of(0), cached.blendshapes[cached.face_found])
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())
    assert origin["extraction"]["num_frames"] == 4 and origin["text"]["encoder"] == str(tiny_text_encoder)


def test_states_are_those_of_the_published_encoders(
    tiny_corpus, tiny_text_encoder, tiny_whisper, tiny_vit, cache_dir, tmp_path
):
    """Each sample's states equal those of the networks run on it alone, whatever it is batched with."""
    corpus = read_corpus(tiny_corpus)
    done = extract_features(
        corpus,
        tmp_path / "out",
        text_encoder=str(tiny_text_encoder),
        audio_encoder=str(tiny_whisper),
        vision_encoder=str(tiny_vit),
        audio_stride=2,
        extraction={"num_frames": 2},
        workers=1,
    )
    steps = read_features(tmp_path / "out", label_range=(-3, 3)).steps
    assert [steps[name].width for name in MODALITIES] == [32, 16, 16 + 52]
    bert = AutoModel.from_pretrained(tiny_text_encoder).eval()
    tokenizer = done.processor.tokenizer
    for row in (0, 1, 2):
        words = tokenizer(corpus.samples[row].text, return_tensors="pt")
        expected = bert(input_ids=words["input_ids"]).last_hidden_state[0].detach()
        torch.testing.assert_close(steps["text"].of(row), expected, atol=1e-5, rtol=0)
    assert steps["text"].lengths[5] == steps["audio"].lengths[3] == 0  # no words; no sound
    assert steps["audio"].lengths[0] in (15, 16)  # 0.6 s at 50 Hz, by two; the codec pads
    key = done.prepared.keys[done.prepared.samples[0].id]
    features = done.prepared.cache.load(key)
    values = torch.from_numpy(picture_inputs(features, done.processor.image_processor))
    vit = ViTModel.from_pretrained(tiny_vit, add_pooling_layer=False).eval()
    expected = vit(pixel_values=values).last_hidden_state[:, 0].detach()
    torch.testing.assert_close(steps["vision"].of(0)[:, :16], expected, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(steps["vision"].of(0)[:, 16:], features.blendshapes)
    origin = json.loads((tmp_path / "out" / "origin.json").read_text())
    assert (origin["audio"]["layer"], origin["audio"]["stride"]) == ("last", 2)
    assert "then its 52 blendshape scores" in origin["vision"]["states"]
    assert set(origin["cpu_seconds"]) == set(MODALITIES) and torch.is_grad_enabled()


def test_a_learned_mean_of_layers_cannot_be_extracted(tiny_corpus, tmp_path):
    with pytest.raises(EncoderError, match=r"learned in training: extract one layer .*freeze=\[audio\]"):
        extract_features(
            read_corpus(tiny_corpus),
            tmp_path / "out",
            text_encoder="nobody/asks-for-this",
            audio_encoder="nor/for-this",
            audio_layer="weighted",
        )


def test_a_folder_that_is_taken_is_refused_before_the_work_begins(tiny_corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match="exists already"):
        extract_features(read_corpus(tiny_corpus), tmp_path, text_encoder="nobody/asks-for-this")


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
