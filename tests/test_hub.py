# SPDX-License-Identifier: Apache-2.0
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from msa_online import MSAConfig, MSAModel, MSAPipeline
from msa_online.describe import describe
from msa_online.hub import (
    CheckpointError,
    FineTuning,
    load_checkpoint,
    load_config,
    load_for_fine_tuning,
)
from msa_online.methods import HEADS


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No Hub to be asked, and none to be waited for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def checkpoint(tiny_model, tiny_processor, tmp_path) -> Path:
    """A whole checkpoint of the tiny model; tests damage it."""
    folder = tmp_path / "checkpoint"
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder: Path | str, opener=load_checkpoint) -> str:
    """The message with which a folder is refused: it begins with the folder and has no second line."""
    with pytest.raises(CheckpointError) as caught:
        opener(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ") and "\n" not in message
    return message


def test_a_checkpoint_opens_ready_to_predict(checkpoint, tiny_model, tiny_processor, make_batch):
    model, processor = load_checkpoint(checkpoint)
    assert not model.training
    assert processor.extraction == tiny_processor.extraction
    batch = {name: value for name, value in make_batch().items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, tiny_model(**batch).logits, atol=1e-6, rtol=0)


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    assert "config.json is missing (the folder contains nothing)" in refused(tmp_path, load_config)


def test_a_folder_of_something_else_says_what_it_holds(tmp_path):
    (tmp_path / "metadata.csv").touch()
    (tmp_path / "clips").mkdir()
    assert "config.json is missing (the folder contains clips, metadata.csv)" in refused(
        tmp_path, load_config
    )


def test_a_checkpoint_of_another_kind_is_named_with_what_it_is_good_for(tiny_text_config, tmp_path):
    BertModel(tiny_text_config).save_pretrained(tmp_path)
    message = refused(tmp_path)
    assert "a checkpoint of type 'bert', not 'msa_online'" in message and "model.text_encoder" in message


@pytest.mark.parametrize("name", ["nobody/has-this", "runs/that/is/not/there", "two words"])
def test_what_is_neither_folder_nor_repository_is_said_in_one_line(name):
    assert "neither a checkpoint folder nor a readable repository" in refused(name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_in_place_of_its_folder_is_refused(checkpoint, name):
    refused(checkpoint / name)


@pytest.mark.parametrize("content", ["{", "{}", "[]", ""])
def test_a_damaged_configuration_is_refused(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    refused(checkpoint, load_config)


@pytest.mark.parametrize(
    "change",
    [{"head": "nosuch"}, {"head_kwargs": {"hiden_size": 8}}, {"audio_width": "wide"}],
    ids=lambda it: next(iter(it)),
)
def test_a_configuration_that_builds_no_model_is_refused(checkpoint, change):
    change_config(checkpoint, **change)
    refused(checkpoint)


def test_missing_weights_are_named(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors" in refused(checkpoint)


@pytest.mark.parametrize("damage", ["cut", "pointer"])
def test_damaged_weights_are_named(checkpoint, damage):
    weights = checkpoint / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:  # what `git clone` leaves without LFS
        weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(checkpoint)


def test_pickled_weights_are_never_opened(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    torch.save(MSAModel(load_config(checkpoint)).state_dict(), checkpoint / "pytorch_model.bin")
    assert "model.safetensors" in refused(checkpoint)


@pytest.mark.parametrize(
    "change",
    [{"audio_width": 24}, {"blendshapes": False}, {"head_kwargs": {"hidden_size": 24}}],
    ids=["other width", "weights too many", "other head"],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(checkpoint, change):
    change_config(checkpoint, **change)
    refused(checkpoint)


def change_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


OTHER_HEAD = next((name for name in HEADS if name != "late_fusion"), "late_fusion")


def fine_tune_with_another_head(folder: Path) -> FineTuning:
    return load_for_fine_tuning(folder, changed(load_config(folder), head=OTHER_HEAD))


def changed(config: MSAConfig, **changes) -> MSAConfig:
    return MSAConfig(**{**config.to_dict(), **changes})


OPENERS = {
    "load": load_checkpoint,
    "fine-tune": fine_tune_with_another_head,
    "describe": describe,
    "pipeline": MSAPipeline.from_pretrained,
}
DAMAGE = {
    "an encoder lacks a tensor": lambda weights: {
        name: value for name, value in weights.items() if name != "encoders.audio.convolutions.0.weight"
    },
    "the head lacks a tensor": lambda weights: {
        name: value for name, value in weights.items() if name != "head.classifier.bias"
    },
    "another shape": lambda weights: {**weights, "head.classifier.weight": torch.zeros(5, 5)},
    "a tensor too many": lambda weights: {**weights, "head.more": torch.zeros(1)},
    "probes": lambda weights: {**weights, "probes.text.0.weight": torch.zeros(1)},
}


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_weights_other_than_the_configuration_says_are_refused_whatever_they_are_opened_for(
    damage, opener, checkpoint
):
    OPENERS[opener](checkpoint)
    before = load_file(checkpoint / "model.safetensors")
    change_weights(checkpoint, DAMAGE[damage])
    now = load_file(checkpoint / "model.safetensors")
    assert before.keys() != now.keys() or damage == "another shape"
    assert "do not match config.json in 1 tensors, for example" in refused(checkpoint, OPENERS[opener])


@pytest.mark.parametrize("opener", OPENERS)
def test_weights_saved_from_a_compiled_model_are_named_as_such(opener, checkpoint):
    """Earlier versions published them; transformers opens them with a warning and random weights."""
    change_weights(
        checkpoint, lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()}
    )
    assert "from a compiled model" in refused(checkpoint, OPENERS[opener])


@pytest.mark.needs("fcm")
def test_fine_tuning_says_what_it_takes_over(checkpoint):
    same = load_for_fine_tuning(checkpoint, load_config(checkpoint))
    assert "new" not in str(same) and "->" not in str(same)
    classes = {"label_range": None, "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    start = load_for_fine_tuning(checkpoint, changed(load_config(checkpoint), calibrator="fcm", **classes))
    weights, model = load_file(checkpoint / "model.safetensors"), start.model.state_dict()
    lines = dict(line.strip().split(": ") for line in str(start).splitlines())
    assert list(lines) == ["text encoder", "audio encoder", "vision encoder", "calibrator", "head"]
    for part, prefix in (("text", "encoders.text."), ("vision", "encoders.vision.")):
        tensors = [name for name in weights if name.startswith(prefix)]
        assert lines[f"{part} encoder"] == f"{len(tensors)} tensors loaded"
        assert all(torch.equal(model[name], weights[name]) for name in tensors)
    gates = sum(name.startswith("calibrator.") for name in model)
    assert lines["calibrator"] == f"{gates} new (identity -> fcm)"
    outputs = [name for name in weights if "head." in name and weights[name].shape != model[name].shape]
    kept = sum(name.startswith("head.") for name in weights) - len(outputs)
    assert lines["head"] == f"{kept} tensors loaded, {len(outputs)} new"
    assert f"(late_fusion -> {OTHER_HEAD})" in str(fine_tune_with_another_head(checkpoint))


def test_fine_tuning_that_would_use_nothing_of_an_encoder_is_refused(checkpoint):
    wider = changed(load_config(checkpoint), audio_channels=[24, 40], audio_width=24)
    message = refused(checkpoint, lambda folder: load_for_fine_tuning(folder, wider))
    assert "no layer of the audio encoder matches" in message and "training.init_from" in message
    other = changed(load_config(checkpoint), audio_width=24)  # what comes before the width is used
    assert re.search(
        r"audio encoder: \d+ tensors loaded, \d+ new", str(load_for_fine_tuning(checkpoint, other))
    )


@pytest.mark.parametrize("lost", ["processor_config.json", "tokenizer.json"])
def test_a_checkpoint_without_its_processor_is_refused(checkpoint, lost):
    (checkpoint / lost).unlink()  # other settings of extraction, and the predictions would silently be others
    refused(checkpoint)


def test_a_checkpoint_whose_tokenizer_lost_its_vocabulary_is_refused(checkpoint):
    """transformers would read each text as unknown words."""
    (checkpoint / "tokenizer.json").unlink()
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "BertTokenizer"}))
    assert "its tokenizer has no vocabulary" in refused(checkpoint)


def test_a_processor_with_settings_of_another_version_is_refused(checkpoint):
    path = checkpoint / "processor_config.json"
    path.write_text(path.read_text().replace('"face_size"', '"face_pixels"'))
    refused(checkpoint)


def test_a_checkpoint_in_half_precision_is_scored_and_fine_tuned_in_fp32(checkpoint):
    """Its weights would meet the fp32 or bf16 of autocast, which CPUs refuse for norms."""
    MSAModel.from_pretrained(checkpoint).half().save_pretrained(checkpoint)
    for model in (
        load_checkpoint(checkpoint)[0],
        load_for_fine_tuning(checkpoint, load_config(checkpoint)).model,
    ):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_checkpoint_of_features_opens_without_a_processor(tmp_path):
    widths = {"text": 4, "audio": 3, "vision": 2}
    model = MSAModel(MSAConfig(feature_widths=widths, head_kwargs={"hidden_size": 8}, label_range=[-3, 3]))
    model.save_pretrained(tmp_path)
    opened, processor = load_checkpoint(tmp_path)
    assert processor is None and opened.config.widths == widths


def test_a_copied_checkpoint_brings_its_record_along(checkpoint, tiny_config, tmp_path):
    tiny_config.trained_on = {"data": "me/clips", "splits": {"train": 160}}
    model = MSAModel(tiny_config)
    model.save_pretrained(checkpoint)
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert load_config(copy).trained_on == tiny_config.trained_on
