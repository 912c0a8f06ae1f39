# SPDX-License-Identifier: Apache-2.0
"""A run with LoRA: two processes, interrupted and resumed; what it publishes; settings that are refused."""

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from msa_online.hub import load_checkpoint
from msa_online.lora import LoraSettings, add_lora
from msa_online.training.config_reader import parse_arguments
from msa_online.training.model import build_model
from msa_online.training.optimizer import ADAPTER_RATE, make_optimizer
from msa_online.training.yaml_reader import ConfigurationError
from tests.training_fixtures import STOPPED_AND_RESUMED


def settings(text_encoder, corpus) -> dict:
    return {
        "model": {
            "text_encoder": str(text_encoder),
            "audio_channels": [16, 16],
            "audio_width": 16,
            "face_channels": 8,
            "face_width": 16,
            "head_kwargs": {"hidden_size": 16},
        },
        "data": {"path": str(corpus), "num_frames": 4, "face_size": 32},
        "training": {
            "epochs": 2,
            "batch_size": 2,
            "accumulation": 2,
            "mixed_precision": "no",
            "lora": {"text": {"r": 4, "dropout": 0.1, "target_modules": ["query", "dense"]}},
            "learning_rates": {"text": 1e-2},
            "gradient_checkpointing": ["text"],
            "modulator": "stopping",
            "log_with": None,
        },
    }


@pytest.mark.slow
@pytest.mark.needs("ogm")
def test_two_processes_resume_with_adapters_and_publish_them_merged_and_alone(
    on_two_processes, make_clip, tiny_text_encoder, cache_dir, make_batch, tmp_path, monkeypatch
):
    file = tmp_path / "settings.yaml"
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = ["file_name,text,label,split,speaker"]
    for number in range(12):  # sound alone needs no face detector
        make_clip(corpus / f"{number}.wav", seconds=0.3 + 0.02 * number, video=False)
        split = "valid" if number in (8, 9) else "test" if number > 9 else "train"
        rows.append(
            f"{number}.wav,{'good bad film'[number % 4 * 3 :]} really,{number % 5 - 2},{split},{split}"
        )
    (corpus / "metadata.csv").write_text("\n".join(rows))
    file.write_text(yaml.safe_dump(settings(tiny_text_encoder, corpus)))
    statuses, printed = on_two_processes(STOPPED_AND_RESUMED, tmp_path, file, tmp_path, "ogm")
    assert statuses == [0, 0], "".join(printed)
    assert "frozen: 34,432 of text_encoder" in printed[0]
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        whole, stopped = (load_file(tmp_path / run / name) for run in ("whole", "stopped"))
        assert whole.keys() == stopped.keys()
        assert all(torch.equal(stopped[tensor], value) for tensor, value in whole.items())
    assert not [name for name in load_file(tmp_path / "whole" / "model.safetensors") if "lora" in name]
    modes = {file.stat().st_mode for file in (tmp_path / "whole" / "adapter").iterdir()}
    assert modes == {(tmp_path / "whole" / "config.json").stat().st_mode}  # as the umask has it
    monkeypatch.chdir(tiny_text_encoder.parent)  # the adapter has the last name of the folder only
    batch = {name: value for name, value in make_batch().items() if name != "labels"}
    merged, adapter = (load_checkpoint(tmp_path / "whole" / part)[0] for part in (".", "adapter"))
    assert adapter.config.trained_on["results"] == merged.config.trained_on["results"]
    with torch.no_grad():
        torch.testing.assert_close(adapter(**batch).logits, merged(**batch).logits, atol=1e-5, rtol=0)
    moved = "encoders.text.model.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(
        merged.state_dict()[moved],
        load_file(tiny_text_encoder / "model.safetensors")[moved.removeprefix("encoders.text.model.")],
    )


def test_adapters_learn_at_a_rate_of_their_own(tiny_model):
    add_lora(tiny_model.encoders["text"], LoraSettings(r=2))
    groups = {
        group["name"]: group
        for group in make_optimizer(tiny_model, learning_rate=1e-3, weight_decay=0).param_groups
    }
    assert groups["text_encoder"]["lr"] == ADAPTER_RATE and groups["rest"]["lr"] == 1e-3
    assert len(groups["text_encoder"]["params"]) == 8
    given = make_optimizer(tiny_model, learning_rate=1e-3, learning_rates={"text": 0.5}, weight_decay=0)
    assert {group["lr"] for group in given.param_groups} == {0.5, 1e-3}


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lora": {"face": {}}}, "training.lora names 'face': one of text, audio, vision"),
        ({"lora": {"audio": {}}}, "training.lora names audio, whose encoder is not pretrained"),
        ({"lora": {"text": {}}, "freeze": ["text"]}, "training.lora.text and training.freeze exclude"),
        ({"lora": {"text": {"rank": 4}}}, "unknown key 'training.lora.text.rank'; known are r, alpha"),
        ({"lora": {"text": {"r": 0}}}, "training.lora.text.r is 0: at least 1"),
        ({"lora": {"text": {"alpha": 0}}}, "training.lora.text.alpha is 0: at least 1"),
        ({"lora": {"text": {"dropout": 1}}}, "training.lora.text.dropout is 1.0: at least 0 and below 1"),
        ({"lora": {"text": {"target_modules": 3}}}, "training.lora.text.target_modules is 3, but must be"),
        ({"lora": {"text": 8}}, "training.lora.text must be a section of keys"),
        ({"lora": ["text"]}, "training.lora is"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(training, message, tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        parse_arguments({"model": {"text_encoder": "any"}, "data": {"path": "clips"}, "training": training})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_layers_that_the_encoder_lacks_are_refused(tiny_text_encoder, tiny_corpus):
    document = settings(tiny_text_encoder, tiny_corpus)
    document["training"] = {"lora": {"text": {"target_modules": ["q_proj"]}}}
    with pytest.raises(ConfigurationError, match=r"^training.lora.text: no adapters for \['q_proj'\].*query"):
        build_model(parse_arguments(document), (), Console(quiet=True))
