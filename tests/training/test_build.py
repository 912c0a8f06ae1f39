# SPDX-License-Identifier: Apache-2.0
"""Before the first step: launches that are refused, the model that is built, steps of the data."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console

from msa_online import MSAModel
from msa_online.training.accelerator import start_accelerator
from msa_online.training.config import TrainingArguments
from msa_online.training.config_reader import parse_arguments
from msa_online.training.loop import TrainingLoop
from msa_online.training.model import build_model
from msa_online.training.yaml_reader import ConfigurationError
from msa_online.user_errors import INPUT_ERRORS


@pytest.fixture
def start(monkeypatch, tmp_path):
    """A function that starts Accelerate under an environment as `accelerate launch` sets it."""

    def start_under(environment: dict[str, str], **training) -> None:
        for name, value in {"ACCELERATE_USE_CPU": "true", **environment}.items():
            monkeypatch.setenv(name, value)
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = {"output_dir": str(tmp_path), "mixed_precision": "no", "log_with": None}
        start_accelerator(TrainingArguments(**{**settings, **training}))

    yield start_under
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size=2"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"},
            "dp_shard_size=4",
        ),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"}, "cp_size=2"),
    ],
)
def test_a_launch_that_would_publish_a_part_of_the_model_is_refused(environment, named, start):
    with pytest.raises(ConfigurationError, match=f"^{named}: .*--multi_gpu"):
        start(environment)


def test_the_same_variables_switched_off_change_nothing(start):
    start({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_PARALLELISM_CONFIG": "0"})


def test_what_a_compiled_model_cannot_do_is_refused(start):
    compiled = {"ACCELERATE_DYNAMO_BACKEND": "AOT_EAGER"}
    start(compiled)
    with pytest.raises(ConfigurationError, match=r"measure_gradients=true.*--dynamo_backend no"):
        start(compiled, measure_gradients=True)
    with pytest.raises(ConfigurationError, match=r"regional.*without --dynamo_use_regional_compilation"):
        start({**compiled, "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "true"})


def test_a_run_is_fine_tuned_with_the_folder_of_its_text_encoder_named_again(
    tiny_text_encoder, tiny_corpus, tmp_path
):
    """The checkpoint has the folder's name only: the configuration that made it must still fit it."""
    model = {"text_encoder": str(tiny_text_encoder), "audio_channels": [16, 16], "face_channels": 8}
    document = {"model": model, "data": {"path": str(tiny_corpus)}}
    first, processor = build_model(parse_arguments(document), (), Console(quiet=True))
    first.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    document["training"] = {"init_from": str(tmp_path)}
    second, _ = build_model(parse_arguments(document), (), Console(quiet=True))
    assert type(second) is MSAModel
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    model["text_encoder"] = str(tiny_text_encoder.with_name("another"))
    with pytest.raises(ConfigurationError, match="has text_encoder .* but model.text_encoder is .*another"):
        build_model(parse_arguments(document), (), Console(quiet=True))


# --- how a run divides its data into steps ---

WIDTHS = {"text": 6, "audio": 4, "vision": 5}


@pytest.fixture
def make_document(tmp_path: Path):
    """A function that writes features with splits of the given sizes, and describes a run on them."""

    def make(train: int, valid: int = 8, test: int = 8, **training) -> dict:
        random = np.random.default_rng(0)
        samples = train + valid + test
        arrays = {name: random.normal(size=(samples, 3, width)) for name, width in WIDTHS.items()}
        np.savez(
            tmp_path / "features.npz",
            id=np.array([f"s{number}" for number in range(samples)]),
            label=random.uniform(-3, 3, size=samples).round(3),
            split=np.array(["train"] * train + ["valid"] * valid + ["test"] * test),
            **arrays,
        )
        return {
            "model": {"feature_widths": WIDTHS, "head": "late_fusion", "head_kwargs": {"hidden_size": 8}},
            "data": {"path": str(tmp_path / "features.npz")},
            "training": {"output_dir": str(tmp_path / "run"), "epochs": 2, "log_with": None, **training},
        }

    return make


def test_fewer_samples_than_a_batch_are_one_step_an_epoch(make_document, train, capsys):
    run = train(make_document(20, batch_size=32))
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "train: 20 samples; steps: 1 per epoch, 2 in all; effective batch: 32 = processes 1 x batch 32 x "
        "accumulation 1 (20.0 samples a step on average); padding: 0% of the steps in batches"
    ) in printed
    history = json.loads((run / "history.json").read_text())
    assert len(history) == 2 and all(np.isfinite(epoch["losses"]["loss"]) for epoch in history)


def test_the_learning_rate_follows_the_steps_that_are_taken(make_document, train, monkeypatch):
    """57 samples in batches of 16 are four steps, not three: the schedule ends with the run."""
    rates = []
    step = TrainingLoop._step

    def keep(loop, *arguments):
        record = step(loop, *arguments)
        rates.append(loop.scheduler.get_last_lr()[0])
        return record

    monkeypatch.setattr(TrainingLoop, "_step", keep)
    train(make_document(57, batch_size=16, accumulation=1))
    assert len(rates) == 8 and rates[-1] == 0.0 and min(rates[:-1]) > 0


def test_every_split_that_is_too_small_to_measure_anything_is_named_with_the_reason(
    make_document, train, capsys
):
    train(make_document(57, valid=16, test=100, batch_size=32))
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning: train has only 57 samples: below 100, results depend more on" in printed
    assert (
        "warning: valid has only 16 samples: an accuracy of 0.5 has a standard error of 0.12, too much for "
        "the choice of the best epoch; have at least 100 (0.05)"
    ) in printed
    assert "warning: test" not in printed


def test_fewer_samples_than_batches_of_a_step_are_refused_before_anything_is_written(
    make_document, train, tmp_path
):
    expected = (
        r"the training split has 7 samples, but one optimizer step takes 8 batches of at least one "
        r"sample \(processes 1 x training.accumulation=8\): lower training.accumulation"
    )
    with pytest.raises(INPUT_ERRORS, match=expected):
        train(make_document(7, batch_size=32, accumulation=8))
    assert not (tmp_path / "run").exists()
    assert train(make_document(9, batch_size=1, accumulation=8))
