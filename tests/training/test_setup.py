# SPDX-License-Identifier: Apache-2.0
"""Launches that a run refuses at its very start."""

import pytest
from accelerate.state import AcceleratorState

from msa_online.training.arguments import ConfigurationError, TrainingArguments
from msa_online.training.setup import start_accelerator


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
