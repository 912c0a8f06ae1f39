# SPDX-License-Identifier: Apache-2.0
"""Bricks that two or more methods are built from."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_online.modalities import MODALITIES, ModalitySequence


class MissingTokens(nn.Module):
    """One learned state for each modality, standing in where the modality is absent.

    Args:
        hidden_size: Width of the states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(len(MODALITIES), hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start small, so that an absent modality says little at first."""
        nn.init.normal_(self.tokens, std=0.02)

    def forward(self, name: str, states: Tensor, present: Tensor) -> Tensor:
        """Put the token of `name` into states `(batch, hidden)` where `present` `(batch,)` is False."""
        return torch.where(present.unsqueeze(-1), states, self.tokens[MODALITIES.index(name)])


def masked_mean(sequence: ModalitySequence) -> Tensor:
    """Mean of the observed steps, `(batch, time, width)` to `(batch, width)`; zero where there are none."""
    count = sequence.mask.sum(dim=1, keepdim=True).clamp(min=1)
    return sequence.values.sum(dim=1) / count  # absent steps hold zeros


def task_loss(
    logits: Tensor, labels: Tensor, present: Tensor | None = None, regression_loss: str = "mse"
) -> Tensor:
    """Supervised loss in fp32: squared or absolute error for one output, else cross-entropy.

    Args:
        logits: `(batch, outputs)`.
        labels: `(batch,)`.
        present: `(batch,)` bool; samples that count. All count by default; the loss of none is zero.
        regression_loss: "mse" or "l1".

    Returns:
        Mean over the samples that count, a scalar.
    """
    logits = logits.float()
    if logits.shape[-1] > 1:
        losses = F.cross_entropy(logits, labels, reduction="none")
    else:
        distance = {"mse": F.mse_loss, "l1": F.l1_loss}[regression_loss]
        losses = distance(logits.squeeze(-1), labels.float(), reduction="none")
    if present is None:
        return losses.mean()
    return (losses * present).sum() / present.sum().clamp(min=1)
