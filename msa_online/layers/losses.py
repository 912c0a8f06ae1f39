# SPDX-License-Identifier: Apache-2.0
"""Supervised losses, per sample and averaged over the samples that count."""

from collections.abc import Mapping

import torch
from torch import Tensor

from msa_online.layers.precision import in_fp32

REGRESSION_LOSSES = ("mse", "l1")


def task_loss(
    logits: Tensor, labels: Tensor, present: Tensor | None = None, regression_loss: str = "mse"
) -> Tensor:
    """Supervised loss in fp32: squared or absolute error for one output, else cross-entropy.

    Args:
        logits: `(batch, outputs)`.
        labels: `(batch,)`.
        present: `(batch,)` bool; samples that count. All count by default. The loss is zero if none counts.
        regression_loss: "mse" or "l1".

    Returns:
        Mean over the samples that count, a scalar.
    """
    losses = sample_losses(logits, labels, regression_loss)
    return losses.mean() if present is None else mean_where(losses, present)


def loss_alone(
    modality_logits: Mapping[str, Tensor],
    labels: Tensor,
    present: Mapping[str, Tensor],
    regression_loss: str = "mse",
) -> Tensor:
    """Sum over modalities of the supervised loss of each one's own prediction, on the samples that have it.

    Args:
        modality_logits: `(batch, outputs)` each.
        labels: `(batch,)`.
        present: `(batch,)` bool each.
        regression_loss: As in `task_loss`.
    """
    alone = [
        task_loss(logits, labels, present[name], regression_loss) for name, logits in modality_logits.items()
    ]
    return torch.stack(alone).sum()


def sample_losses(logits: Tensor, labels: Tensor, regression_loss: str = "mse") -> Tensor:
    """Supervised loss of each sample in fp32: `(..., batch, outputs)` and `(batch,)` to `(..., batch)`."""
    logits = in_fp32(logits)
    if logits.shape[-1] > 1:
        classes = labels.expand(logits.shape[:-1]).unsqueeze(-1)
        return -logits.log_softmax(dim=-1).gather(-1, classes).squeeze(-1)
    error = logits.squeeze(-1) - labels.to(logits)
    return error.square() if regression_loss == "mse" else error.abs()


def mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of `values` over the last axis where `counted` (bool, same shape) is True; 0 if none is True."""
    return (values * counted).sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)
