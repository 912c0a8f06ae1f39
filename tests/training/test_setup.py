# SPDX-License-Identifier: Apache-2.0
"""What happens before the first step: launches that are refused, the model that is built."""

import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console

from msa_online import MSAModel
from msa_online.training.arguments import ConfigurationError, TrainingArguments, parse_arguments
from msa_online.training.setup import build_model, start_accelerator


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
    with pytest.raises(ConfigurationError, match="has text_encoder .* but model.text_encoder says .*another"):
        build_model(parse_arguments(document), (), Console(quiet=True))
