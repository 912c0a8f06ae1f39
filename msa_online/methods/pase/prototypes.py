# SPDX-License-Identifier: Apache-2.0
"""Prototypes of PaSE: the running mean state of each class in each modality.

Equation numbers are those of docs/methods/pase.md.
"""

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

        c_k <- gamma c_k + (1 - gamma) mean of the step's states of class k;    at first, the mean itself

    They are updated once per optimizer step, from sums over its micro-batches and over all processes. So they
    are equal on all ranks, however the batch is divided.

    Args:
        classes: K_p, number of classes.
        width: Width of a state.
        momentum: gamma.
    """

    def __init__(self, classes: int, width: int, momentum: float) -> None:
        super().__init__()
        self.classes, self.momentum = classes, momentum
        self.register_buffer("means", torch.empty(len(MODALITIES), classes, width, dtype=torch.float32))
        self._sums: Tensor | None = None  # of the step; no buffer, because DDP would broadcast rank 0's
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start without prototypes."""
        nn.init.zeros_(self.means)

    @property
    def known(self) -> Tensor:
        """Which classes have a prototype, `(modalities, classes)` bool; those of unseen classes are zero."""
        return self.means.any(dim=-1)

    def similarity(self, states: Tensor) -> Tensor:
        """Cosine with the prototypes: `(modalities, batch, width)` to `(modalities, batch, classes)`."""
        return F.normalize(states, dim=-1) @ F.normalize(in_fp32(self.means), dim=-1).mT

    def with_batch(self, states: Tensor, member: Tensor) -> "Prototypes":
        """The prototypes as a batch would update them (2.1); changes nothing.

        Args:
            states: h_m, `(modalities, batch, width)`.
            member: One-hot class of each sample, `(modalities, batch, classes)` bool; False throughout where
                the sample lacks the modality.
        """
        return self._updated(_sums(states, member))

    def collect(self, states: Tensor, member: Tensor) -> None:
        """Add a micro-batch to the step in progress; arguments as in `with_batch`."""
        sums = _sums(states.detach(), member)
        self._sums = sums if self._sums is None else self._sums + sums

    @torch.no_grad()
    def end_step(self, taken: bool) -> None:
        """Update with what was collected since the last step, or discard it if `taken` is False."""
        sums, self._sums = self._sums, None
        if taken and sums is not None:
            self.means.copy_(self._updated(across_ranks_sum(sums)).values)

    def _updated(self, sums: Tensor) -> "Prototypes":
        total, count = sums[..., :-1], sums[..., -1]
        mean = total / count.clamp(min=1).unsqueeze(-1)
        seen = (count > 0).unsqueeze(-1)
        means = in_fp32(self.means)
        kept = self.momentum * self.known.unsqueeze(-1)  # 0 for a new prototype
        values = torch.where(seen, kept * means + (1 - kept) * mean, means)
        return Prototypes(values, self.known | (count > 0), torch.where(seen, mean, 0.0))


@dataclass(frozen=True)
class Prototypes:
    """Prototypes as a batch updates them.

    Attributes:
        values: c_k^m, `(modalities, classes, width)`; differentiable by the states of the batch.
        known: Which prototypes exist, `(modalities, classes)` bool.
        of_batch: Mean state of each class in the batch, `(modalities, classes, width)`; zero for a class that
            does not occur.
    """

    values: Tensor
    known: Tensor
    of_batch: Tensor

    def with_gradient(self, gradient: str) -> Tensor:
        """The values, with the gradient selected by the head's `cal_gradient`."""
        if gradient == "ema":
            return self.values
        through = self.of_batch - self.of_batch.detach() if gradient == "straight_through" else 0.0
        return self.values.detach() + through

    def spread(self) -> Tensor:
        """V_m (2.10): variance over all entries of a modality's prototypes, `(modalities,)`; detached."""
        return self.values.detach().flatten(1).var(dim=1, correction=0)


def prototype_contrast(states: Tensor, prototypes: Prototypes, member: Tensor, temperature: float) -> Tensor:
    """PCL (2.2) of each modality: cross-entropy over the similarities of a state with the prototypes.

    Prototypes are constants here. If n classes share one prototype, the loss is log n.

    Args:
        states: h_m, `(modalities, batch, width)`.
        prototypes: Prototypes of all modalities.
        member: One-hot class of each sample, as in `PrototypeBanks.with_batch`.
        temperature: tau.

    Returns:
        Mean over the samples that have the modality, `(modalities,)`; 0 if none has it.
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
    """Sum and, in the last column, number of states by class, `(modalities, classes, width + 1)` in fp32."""
    counted = torch.cat([in_fp32(states), torch.ones_like(states[..., :1])], dim=-1)
    return member.to(counted).mT @ counted
