# SPDX-License-Identifier: Apache-2.0
"""Reductions over all processes of a run."""

import torch
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


def across_ranks_rows(values: Tensor) -> Tensor:
    """Rows of all processes in the order of their ranks, `(all rows, ...)`; their numbers may differ."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    count = torch.tensor([len(values)], device=values.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = torch.cat(counts).tolist()
    padded = values.new_zeros(max(sizes), *values.shape[1:])
    padded[: len(values)] = values
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])
