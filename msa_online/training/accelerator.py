# SPDX-License-Identifier: Apache-2.0
"""Start Accelerate: processes, precision, and what this project cannot train with."""

import ctypes
import os
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend, parse_flag_from_env

from msa_online.training.config import TrainingArguments
from msa_online.training.precision import choose_precision
from msa_online.training.yaml_reader import ConfigurationError

# names of ways to divide a model in Accelerate's environment, and of the sizes that do so
SHARDING = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
DIVIDED = ("DP_SHARD", "TP", "CP", "SP")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
RETURNED_FROM = 4 << 20  # bytes; smaller blocks are reused by malloc itself


def start_accelerator(training: TrainingArguments) -> Accelerator:
    """Start Accelerate as the configuration and `accelerate launch` ask, and print processes and precision.

    Raises:
        ConfigurationError: fp16 without a GPU, which would silently compute in fp32; a launch that divides
            the model among processes; or settings that do not work with torch.compile.
    """
    _refuse_divided_models()
    try:
        precision = choose_precision(training.mixed_precision, "training.mixed_precision")
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    accelerator = Accelerator(
        mixed_precision=precision.name,
        gradient_accumulation_steps=training.accumulation,
        log_with=training.log_with,
        project_dir=f"{training.output_dir}/logs",
        step_scheduler_with_optimizer=False,
        # stages, and heads that ignore part of an encoder, leave parameters without a gradient
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    accelerator.print(f"{processes} on {accelerator.device.type}, {precision}")
    if precision.warning:
        accelerator.print(f"warning: {precision.warning}")
    _check_compilation(training, accelerator)
    if accelerator.device.type == "cpu" and sys.platform == "linux":
        _return_freed_memory()
    return accelerator


def _refuse_divided_models() -> None:
    """Refuse launches that leave a part of the model on each process, which would be published as a whole."""
    used = [name for key, name in SHARDING.items() if parse_flag_from_env(f"ACCELERATE_USE_{key}")]
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = {key: os.environ.get(f"PARALLELISM_CONFIG_{key}_SIZE", "1") for key in DIVIDED}
        used += [f"{key.lower()}_size={size}" for key, size in sizes.items() if size != "1"]
    if used:
        raise ConfigurationError(
            f"{', '.join(used)}: a process would hold a part of the model only, and checkpoints would hold "
            "that part; launch with data parallelism alone (--multi_gpu), or on one process"
        )


def is_compiled(accelerator: Accelerator) -> bool:
    """Whether `accelerate launch` asks for torch.compile."""
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO


def _check_compilation(training: TrainingArguments, accelerator: Accelerator) -> None:
    if not is_compiled(accelerator):
        return
    if accelerator.state.dynamo_plugin.use_regional_compilation:
        raise ConfigurationError(
            "regional compilation replaces layers that heads address by name: launch without "
            "--dynamo_use_regional_compilation, which compiles the whole model"
        )
    if training.measure_gradients:
        raise ConfigurationError(
            "training.measure_gradients=true goes back through the model once for each loss, which "
            "torch.compile does not allow: launch with --dynamo_backend no"
        )


def _return_freed_memory() -> None:
    """Have glibc give freed tensors back to the system at once; other C libraries are left alone.

    Left to itself it keeps what the batch of the longest texts once needed: a process that trains MPNet-base
    then holds 5.7 GB instead of 3 to 4.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, RETURNED_FROM)


def seed_everything(seed: int) -> None:
    """Seed torch's random numbers: what a model starts from, and its dropout."""
    torch.manual_seed(seed)
