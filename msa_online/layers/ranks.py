# SPDX-License-Identifier: Apache-2.0
"""Reductions over all processes of a run."""

import torch.distributed as dist
from torch import Tensor


def across_ranks_minimum(values: Tensor) -> Tensor:
    """Element-wise minimum over all processes, in place; all processes get the same."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return values


def across_ranks_sum(values: Tensor) -> Tensor:
    """Element-wise sum over all processes, in place; all processes get the same."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values
