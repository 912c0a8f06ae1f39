# SPDX-License-Identifier: Apache-2.0
"""Reductions over all processes of a run."""

import torch.distributed as dist
from torch import Tensor


def across_ranks_minimum(values: Tensor) -> Tensor:
    """Smallest of each value over all processes, the same on every one of them."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


def across_ranks_sum(values: Tensor) -> Tensor:
    """Sum of each value over all processes, the same on every one of them."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values
