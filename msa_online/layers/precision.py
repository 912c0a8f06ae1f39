# SPDX-License-Identifier: Apache-2.0
"""Floating-point types inside a forward pass: fp32 for losses, and no wider than the weights."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def in_fp32(values: Tensor) -> Tensor:
    """Half precision raised to fp32, for losses that need it (METHODS 8.5); fp64 stays as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def no_wider(values: Tensor, module: nn.Module) -> Tensor:
    """`values` in the type of the module's weights where that is the narrower: a model in half precision."""
    weights = next(module.parameters()).dtype
    return values.to(weights) if values.dtype.itemsize > weights.itemsize else values


def without_autocast(device: torch.device) -> AbstractContextManager:
    """What is computed within stays in the precision it has (METHODS 8.5), on any device, "meta" included."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
