# SPDX-License-Identifier: Apache-2.0
"""Prototypes: the running mean state of each class in each modality; equations of METHODS 2.3."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_online.layers.losses import mean_where
from msa_online.layers.precision import in_fp32
from msa_online.layers.ranks import across_ranks_sum
from msa_online.modalities import MODALITIES

UNKNOWN = -1e30  # logit of a class without a prototype; finite, so that 0 * log 0 is 0


class PrototypeBanks(nn.Module):
    """Running mean state of each class in each modality, fp32 buffers (2.1).

        c_k <- gamma c_k + (1 - gamma) mean of the step's states of class k;    that mean at first sight

    A step moves them once, by the sums over its micro-batches and over all processes, so that they are the
    same on every rank however a batch is cut.

    Args:
        classes: K_p.
        width: Width of a state.
        momentum: gamma.
    """

    def __init__(self, classes: int, width: int, momentum: float) -> None:
        super().__init__()
        self.classes, self.momentum = classes, momentum
        self.register_buffer("means", torch.empty(len(MODALITIES), classes, width, dtype=torch.float32))
        self._seen: Tensor | None = None  # of the step; no buffer, because DDP would spread rank 0's
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Know no class."""
        nn.init.zeros_(self.means)

    @property
    def known(self) -> Tensor:
        """Which classes have a prototype, `(modalities, classes)` bool: one that nobody has seen is zero."""
        return self.means.any(dim=-1)

    def similarity(self, states: Tensor) -> Tensor:
        """Cosine with the prototypes: `(modalities, batch, width)` to `(modalities, batch, classes)`."""
        return F.normalize(states, dim=-1) @ F.normalize(in_fp32(self.means), dim=-1).mT

    def with_batch(self, states: Tensor, member: Tensor) -> "Prototypes":
        """The prototypes as a batch would move them.

        Args:
            states: h_m, `(modalities, batch, width)`.
            member: Class of each sample in the modalities it has, `(modalities, batch, classes)` bool.
        """
        return self._moved(_sums(states, member))

    def take_in(self, states: Tensor, member: Tensor) -> None:
        """Count a micro-batch, shapes as in `with_batch`, for the step in progress."""
        sums = _sums(states.detach(), member)
        self._seen = sums if self._seen is None else self._seen + sums

    @torch.no_grad()
    def end_step(self, taken: bool) -> None:
        """Move by what was taken in since the last step; or, `taken` False, forget it."""
        seen, self._seen = self._seen, None
        if taken and seen is not None:
            moved = self._moved(across_ranks_sum(seen))
            self.means.copy_(moved.values)

    def _moved(self, sums: Tensor) -> "Prototypes":
        total, count = sums[..., :-1], sums[..., -1]
        mean = total / count.clamp(min=1).unsqueeze(-1)
        there = (count > 0).unsqueeze(-1)
        means = in_fp32(self.means)
        kept = self.momentum * self.known.unsqueeze(-1)  # 0 at first sight
        values = torch.where(there, kept * means + (1 - kept) * mean, means)
        return Prototypes(values, self.known | (count > 0), torch.where(there, mean, 0.0))


@dataclass(frozen=True)
class Prototypes:
    """Prototypes as a batch moves them.

    Attributes:
        values: c_k^m, `(modalities, classes, width)`; differentiable by the batch.
        known: Which there are, `(modalities, classes)` bool.
        of_batch: Mean states of the batch's classes, `(modalities, classes, width)`; zero where it has none.
    """

    values: Tensor
    known: Tensor
    of_batch: Tensor

    def alive(self, gradient: str) -> Tensor:
        """Their values, with the gradient that `cal_gradient` of the head says."""
        if gradient == "ema":
            return self.values
        through = self.of_batch - self.of_batch.detach() if gradient == "straight_through" else 0.0
        return self.values.detach() + through

    def spread(self) -> Tensor:
        """V_m (2.10): variance of all entries of a modality's prototypes, `(modalities,)`; detached."""
        return self.values.detach().flatten(1).var(dim=1, correction=0)


def prototype_contrast(states: Tensor, prototypes: Prototypes, member: Tensor, temperature: float) -> Tensor:
    """PCL (2.2) of each modality: cross-entropy of a state over its similarities with the prototypes.

    Prototypes are constants. Of m classes that all have the same prototype it is log m.

    Args:
        states: h_m, `(modalities, batch, width)`.
        prototypes: Of the modalities.
        member: Class of each sample in the modalities it has, `(modalities, batch, classes)` bool.
        temperature: tau.

    Returns:
        Mean over the samples that have the modality, `(modalities,)`; 0 where none has.
    """
    directions = F.normalize(prototypes.values.detach(), dim=-1)
    logits = (F.normalize(states, dim=-1) @ directions.mT / temperature).masked_fill(
        ~prototypes.known.unsqueeze(1), UNKNOWN
    )
    losses = -(logits.log_softmax(dim=-1) * member).sum(dim=-1)
    return mean_where(losses, member.any(dim=-1))


def prototype_cost(one: Tensor, other: Tensor) -> Tensor:
    """Squared distances of normalised prototypes, `(..., classes, width)` to `(..., classes, classes)`."""
    return 2 - 2 * F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).mT


def _sums(states: Tensor, member: Tensor) -> Tensor:
    """Sum and, in a last column, number of states by class, `(modalities, classes, width + 1)` in fp32."""
    counted = torch.cat([in_fp32(states), torch.ones_like(states[..., :1])], dim=-1)
    return member.to(counted).mT @ counted
