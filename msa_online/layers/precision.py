# SPDX-License-Identifier: Apache-2.0
"""Floating-point types inside a forward pass (docs/methods/numerics.md, "Precision")."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def in_fp32(values: Tensor) -> Tensor:
    """Convert half precision to fp32, for losses; fp32 and fp64 stay as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def no_wider(values: Tensor, module: nn.Module) -> Tensor:
    """Convert `values` to the type of the module's weights if that is narrower: in a half-precision model."""
    weights = next(module.parameters()).dtype
    return values.to(weights) if values.dtype.itemsize > weights.itemsize else values


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Context manager that turns autocast off on any device; the "meta" device, too, is accepted."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
