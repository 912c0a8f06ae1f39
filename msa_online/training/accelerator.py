# SPDX-License-Identifier: Apache-2.0
"""Start Accelerate: processes and precision; refuse unsupported launches."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DynamoBackend, parse_flag_from_env

from msa_online.training.config import TrainingArguments
from msa_online.training.precision import choose_precision
from msa_online.training.yaml_reader import ConfigurationError

# backends, and sizes of parallelism, that divide a model among processes; keys as in Accelerate's environment
SHARDING = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
DIVIDED = ("DP_SHARD", "TP", "CP", "SP")
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
RETURNED_FROM = 4 << 20  # bytes; malloc reuses smaller blocks itself


def start_accelerator(training: TrainingArguments) -> Accelerator:
    """Start Accelerate with the settings of configuration and launcher; print processes and precision.

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
        # some parameters get no gradient in some stages
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
    """Refuse launches that divide the model among processes: checkpoints would contain one part only."""
    used = [name for key, name in SHARDING.items() if parse_flag_from_env(f"ACCELERATE_USE_{key}")]
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = {key: os.environ.get(f"PARALLELISM_CONFIG_{key}_SIZE", "1") for key in DIVIDED}
        used += [f"{key.lower()}_size={size}" for key, size in sizes.items() if size != "1"]
    if used:
        raise ConfigurationError(
            f"{', '.join(used)}: each process, and each checkpoint, would hold only a part of the model; "
            "launch with data parallelism only (--multi_gpu), or on one process"
        )


def is_compiled(accelerator: Accelerator) -> bool:
    """Whether `accelerate launch` requests torch.compile."""
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
            "training.measure_gradients=true runs backward once for each loss, which torch.compile does not "
            "support: launch with --dynamo_backend no"
        )


def _return_freed_memory() -> None:
    """Make glibc return freed tensors to the system at once; does nothing with other C libraries.

    By default it keeps the memory of the batch with the longest texts: a process that trains MPNet-base then
    takes 5.7 GB instead of 3 to 4.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, RETURNED_FROM)


def seed_everything(seed: int) -> None:
    """Seed torch's random generator, for initialisation and dropout."""
    torch.manual_seed(seed)


def device_name(device: torch.device) -> str:
    """Model of the GPU or CPU that computes, for the record; the kind of device if the system names none."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processors = Path("/proc/cpuinfo")  # Linux; elsewhere the platform knows
    if device.type == "cpu" and processors.exists():
        named = re.search(r"^model name\s*:\s*(.+)", processors.read_text("utf-8"), re.MULTILINE)
        return named[1] if named else platform.machine()
    return platform.processor() or device.type
