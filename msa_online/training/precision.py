# SPDX-License-Identifier: Apache-2.0
"""Choose the mixed precision of a run, by what the device computes natively."""

import os
from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

PRECISIONS = ("auto", "no", "fp16", "bf16")
TITLES = {"no": "fp32"}
EMULATED_BF16 = (
    "this processor emulates bf16, which can take 10 to 50 times as long as fp32; choose auto or no for speed"
)


@dataclass(frozen=True)
class Precision:
    """The mixed precision of a run.

    Attributes:
        name: "no", "fp16" or "bf16", or another one given to `accelerate launch`.
        reason: Why it was chosen.
        warning: Warning for the user, or None.
    """

    name: str
    reason: str
    warning: str | None = None

    def __str__(self) -> str:
        return f"{TITLES.get(self.name, self.name)} ({self.reason})"


def choose_precision(requested: str, key: str) -> Precision:
    """Precision for this process's device; starts the process group if Accelerate has not yet.

    Args:
        requested: One of `PRECISIONS`. "auto" follows an explicit fp16, bf16 or fp8 of `accelerate launch`.
            Otherwise it takes bf16 if the device computes it natively, else fp16 on a GPU and fp32 on a CPU.
        key: Name of the setting `requested`, for messages.

    Raises:
        ValueError: fp16 on a CPU, where Accelerate would silently compute in fp32.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # needed for a process group on CPUs
    device = PartialState(cpu=on_cpu).device
    reason = key
    # the launcher's "no" cannot be distinguished from its default
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if requested == "auto" and launched != "no":
        requested, reason = launched, "accelerate launch"
    if requested == "auto":
        return native_precision(device)
    if requested == "fp16" and device.type == "cpu":
        raise ValueError(f"fp16 needs a GPU ({reason} requests it): on a CPU set {key}=auto or no")
    emulated = requested == "bf16" and device.type == "cpu" and not cpu_computes_bf16()
    return Precision(requested, reason, EMULATED_BF16 if emulated else None)


def native_precision(device: torch.device) -> Precision:
    """The fastest precision that `device` computes natively; fp32 if it has no faster one."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "auto: this GPU computes bf16")
        return Precision("fp16", "auto: this GPU does not compute bf16")
    if device.type == "cpu" and cpu_computes_bf16():
        return Precision("bf16", "auto: this processor computes bf16")
    if device.type == "cpu":
        return Precision("no", "auto: this processor would emulate bf16")
    return Precision("no", f"auto: the safe choice on {device.type}")


def cpu_computes_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware (AVX-512 BF16, AMX, or Arm's bf16).

    oneDNN must be allowed to use it: `ONEDNN_MAX_CPU_ISA` can forbid it.
    """
    found = torch.cpu.get_capabilities()
    native = any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return native and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
