# SPDX-License-Identifier: Apache-2.0
"""States of frozen encoders on disk: what is stored, found again, and computed again."""

import pickle
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import WhisperConfig

from feature_extractors import CacheError, FeatureCache
from msa_online import MSAConfig
from msa_online.batching import ClipDataset
from msa_online.corpora.cache_filling import prepare
from msa_online.corpora.reading import read_corpus
from msa_online.encoders import make_encoders
from msa_online.encoders.pretrained import EncoderError
from msa_online.modalities import MODALITIES
from msa_online.precomputed import states as states_module
from msa_online.precomputed.states import FrozenEncoder, StateStore


@pytest.fixture(scope="module")
def features_of_clips(tmp_path_factory):
    """Features of the tiny corpus: they are extracted once for all tests of this file."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def prepared(tiny_corpus, tiny_processor, features_of_clips, tmp_path):
    """The tiny corpus, with its features in a cache of this test."""
    corpus, settings = read_corpus(tiny_corpus, label_range=(-3, 3)), tiny_processor.settings
    prepare(corpus, FeatureCache(features_of_clips), settings, workers=1)
    shutil.copytree(features_of_clips, tmp_path / "cache")
    return prepare(corpus, FeatureCache(tmp_path / "cache"), settings, workers=1)


@pytest.fixture
def text_config(tiny_text_config):
    return MSAConfig(text_config=tiny_text_config, label_range=[-3, 3])


@pytest.fixture
def freeze(text_config, tiny_processor, prepared):
    """A function that builds the frozen text encoder of a seed, with the tiny corpus."""

    def build(seed: int = 0, precision: str = "no") -> FrozenEncoder:
        torch.manual_seed(seed)
        encoder = make_encoders(text_config)["text"]
        encoder.freeze()
        return FrozenEncoder("text", encoder, text_config, tiny_processor, prepared, precision)

    return build


def files_of(frozen: FrozenEncoder) -> list:
    return sorted(frozen.store.folder.glob("*"))


def test_stored_states_are_those_of_each_sample_alone(freeze, prepared, tiny_processor):
    frozen = freeze()
    frozen.compute(frozen.missing)
    for sample in prepared.samples:
        values, mask = frozen.states.of(sample.id)
        if not sample.text:
            assert len(values) == 0
            continue
        alone = tiny_processor.pad([tiny_processor.encode(None, sample.text, ("text",))])
        expected = frozen.encoder.states(dict(alone))
        assert mask.all()
        torch.testing.assert_close(values, expected.values[0].detach(), atol=1e-5, rtol=0)
    assert frozen.missing == [] and freeze().missing == []


def test_other_weights_and_another_precision_find_no_states(freeze):
    frozen = freeze()
    all_keys = frozen.missing
    frozen.compute(all_keys)
    assert freeze(seed=1).missing == freeze(precision="bf16").missing == all_keys


def test_settings_that_mean_the_same_find_the_same_states(tiny_text_config, tiny_processor, prepared):
    network = WhisperConfig(
        d_model=8, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=16, max_source_positions=40
    )

    def folder(**settings) -> Path:
        torch.manual_seed(0)
        config = MSAConfig(text_config=tiny_text_config, audio_config=network, **settings)
        encoder = make_encoders(config)["audio"]
        encoder.freeze()
        return FrozenEncoder("audio", encoder, config, tiny_processor, prepared).store.folder

    usual = folder()
    assert folder(audio_stride=4) == folder(audio_layer=2) == usual
    assert len({usual, folder(audio_stride=2), folder(audio_layer=1), folder(audio_layer="weighted")}) == 4


def test_equal_texts_are_computed_once(freeze, prepared):
    frozen = freeze()
    words = {sample.text for sample in prepared.samples if sample.text}
    assert len(frozen.missing) == len(words)


def flip_a_bit(file, others):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1  # safetensors itself does not notice
    file.write_bytes(content)


def truncate(file, others):
    file.write_bytes(file.read_bytes()[:-100])


def empty(file, others):
    file.write_bytes(b"")


def swap_with_another_encoder(file, others):
    shutil.copy(others, file)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, swap_with_another_encoder])
def test_a_damaged_or_foreign_file_is_deleted_and_its_states_are_computed_again(freeze, damage):
    frozen, another = freeze(), freeze(seed=1)
    for each in (frozen, another):
        each.compute(each.missing)
    (file,), (others,) = files_of(frozen), files_of(another)
    damage(file, others)
    again = freeze()
    assert len(again.missing) == len(set(frozen.keys.values())) and not file.exists()
    again.compute(again.missing)
    assert freeze().missing == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"values": torch.ones(6, 4, 2)},  # three dimensions
        {"values": torch.ones(5, 4)},  # shorter than the mask
        {"values": torch.ones(6, 4, dtype=torch.int32)},
        {"mask": torch.ones(6)},
        {"ends": torch.tensor([4, 9])},  # beyond the values
        {"ends": torch.tensor([7, 6])},  # backwards
        {"ends": torch.tensor([6, 6])},  # a sample without states
        {"ends": torch.tensor([6])},  # fewer than keys
        {"ends": torch.tensor([4.0, 6.0])},
    ],
)
def test_parts_that_do_not_fit_together_are_refused_whatever_the_checksum_says(tmp_path, wrong):
    store = StateStore(FeatureCache(tmp_path), "digest")
    parts = {"values": torch.ones(6, 4), "mask": torch.ones(6).bool(), "ends": torch.tensor([4, 6])}
    store.folder.mkdir(parents=True)
    for name, content in (("right", parts), ("wrong", parts | wrong)):
        keys = f"{name}a {name}b"
        about = {"keys": keys, "checksum": str(store._checksum(content, keys))}
        save_file(content, store.folder / f"{name}.safetensors", about)
    store.refresh()
    assert "righta" in store and "wronga" not in store
    assert store.of("rightb")[0].shape == (2, 4)


def test_a_file_that_cannot_be_opened_now_is_not_deleted(freeze, tmp_path):
    """Its disk may be unmounted, or the process may have too many open files."""
    frozen = freeze()
    frozen.compute(frozen.missing)
    (file,) = files_of(frozen)
    elsewhere = tmp_path / "elsewhere.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.symlink_to(elsewhere)
    assert freeze().missing and file.is_symlink()
    elsewhere.write_bytes(content)
    assert freeze().missing == []


def test_states_that_are_not_finite_are_refused_and_not_stored(freeze):
    frozen = freeze(precision="fp16")
    next(frozen.encoder.parameters()).data.fill_(float("inf"))
    with pytest.raises(EncoderError, match="text .*clip_.*not finite: set training.mixed_precision=no"):
        frozen.compute(frozen.missing)
    assert files_of(frozen) == []


def test_an_interrupted_computation_continues(freeze, monkeypatch):
    monkeypatch.setitem(states_module.TOGETHER, "text", 4)
    monkeypatch.setattr(states_module, "FILE_BYTES", 0)  # a file for each batch
    frozen = freeze()
    whole = len(frozen.missing)
    compute, calls = frozen.encoder.states, []

    def interrupted(inputs):
        calls.append(inputs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(inputs)

    monkeypatch.setattr(frozen.encoder, "states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        frozen.compute(frozen.missing)
    again = freeze()
    assert len(again.missing) == whole - 8
    again.compute(again.missing)
    assert freeze().missing == []


def test_a_disk_without_space_is_reported_with_the_remedy_before_it_is_full(freeze, monkeypatch):
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(states_module.shutil, "disk_usage", lambda folder: usage(100))
    frozen = freeze()
    with pytest.raises(CacheError, match="100 bytes free: .*training.cache_states=off"):
        frozen.compute(frozen.missing)
    assert files_of(frozen) == []


def test_a_worker_of_a_loader_reads_the_same_states(freeze):
    frozen = freeze()
    frozen.compute(frozen.missing)
    name = next(iter(frozen.keys))
    mine = frozen.states.of(name)
    # multiprocessing pickles what a loader gives to a worker that it spawns
    other = pickle.loads(pickle.dumps(frozen.states))
    assert len(pickle.dumps(frozen.states)) < 20_000  # the states themselves are not sent
    assert all(torch.equal(a, b) for a, b in zip(mine, other.of(name), strict=True))


def test_deleted_states_are_reported_with_what_to_do(freeze):
    frozen = freeze()
    frozen.compute(frozen.missing)
    unread = freeze().states
    shutil.rmtree(frozen.store.folder)
    with pytest.raises(CacheError, match="start again to compute them"):
        unread.of(next(iter(unread.keys)))


def test_a_dataset_reads_states_in_place_of_inputs_and_knows_what_a_sample_lacks(
    freeze, prepared, tiny_processor
):
    frozen = freeze()
    frozen.compute(frozen.missing)
    make = [prepared.samples, prepared.keys, prepared.cache, tiny_processor, None]
    plain, cached = ClipDataset(*make), ClipDataset(*make, {"text": frozen.states})
    for index in (0, 3, 5):  # without sound, without words
        inputs, expected = cached[index], plain[index]
        assert "text_input_ids" not in inputs
        assert inputs["text_states"].shape[1:] == (32,)
        assert torch.equal(inputs["modality_present"], expected["modality_present"])
        assert all(torch.equal(inputs[key], expected[key]) for key in expected.keys() & inputs.keys())
    batch = tiny_processor.pad([cached.inputs(index) for index in (4, 5)])
    assert batch["text_states"].shape[:2] == batch["text_states_mask"].shape
    assert batch["text_states_mask"].sum(dim=1).tolist() == [
        len(frozen.states.of(prepared.samples[4].id)[0]),
        0,
    ]
    assert "text_mask" not in batch


def test_a_dataset_of_states_alone_reads_no_clip(freeze, prepared, tiny_processor):
    """The features of the clips may even be gone."""
    frozen = freeze()
    frozen.compute(frozen.missing)
    states = dict.fromkeys(MODALITIES, frozen.states)
    dataset = ClipDataset(prepared.samples, prepared.keys, prepared.cache, tiny_processor, None, states)
    for folder in prepared.cache.folder.iterdir():
        if folder.name != "states":
            shutil.rmtree(folder)
    assert set(dataset.inputs(0)) == {
        "modality_present",
        *(f"{name}_{part}" for name in MODALITIES for part in ("states", "states_mask")),
    }
