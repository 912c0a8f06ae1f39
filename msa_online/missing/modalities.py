# SPDX-License-Identifier: Apache-2.0
"""Hide modalities of samples, in training or for a fixed condition."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msa_online.modalities import MODALITIES


class InputMask:
    """Selects what is hidden from each sample. This base class hides nothing."""

    def start_epoch(self, epoch: int) -> None:
        """Prepare for epoch number `epoch`."""

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hide modalities of a batch: set `modality_present` `(batch, 3)` to False."""
        return dict(batch)

    def over(self, batches: Iterable[Mapping[str, Tensor]]) -> "MaskedBatches":
        """Apply the mask to all batches of a loader; the result can be iterated many times."""
        return MaskedBatches(batches, self)


@dataclass(frozen=True)
class MaskedBatches:
    """Batches with an `InputMask` applied.

    Attributes:
        batches: The original batches.
        input_mask: Selects what is hidden from each sample.
    """

    batches: Iterable[Mapping[str, Tensor]]
    input_mask: InputMask

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.input_mask.apply, self.batches)


def apply_mask(present: Tensor, kept: Tensor) -> Tensor:
    """Apply a mask `kept` to the modalities `present` of samples, `(samples, 3)` bool each.

    A sample that would lose all its modalities keeps them.
    """
    left = present & kept
    return torch.where(left.any(dim=1, keepdim=True), left, present)


class FixedCondition(InputMask):
    """Shows the same modalities of every sample (protocol `per_condition`, docs/methods/protocols.md).

    Args:
        visible: Names of the visible modalities.
    """

    def __init__(self, visible: Iterable[str]) -> None:
        self.visible = torch.tensor([name in visible for name in MODALITIES])

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hide all but the visible modalities; a sample may lose all its modalities."""
        present = batch["modality_present"]
        return {**batch, "modality_present": present & self.visible.to(present.device)}


class ModalityDropout(InputMask):
    """Hides modalities of training samples at random, so that the model learns to predict without them.

    The mask of the whole training split is drawn at the start of an epoch. So it depends only on seed, epoch
    and sample, and not on batch order, workers, ranks or interruptions.

    Args:
        rates: Share of samples that lose each modality, by name, in [0, 1); 0 where not named.
        samples: Size of the training split.
        seed: Seed of the run.
    """

    def __init__(self, rates: Mapping[str, float], samples: int, seed: int) -> None:
        self.rates = np.array([rates.get(name, 0.0) for name in MODALITIES])
        self.samples = samples
        self.seed = seed
        self.kept: Tensor = torch.ones(samples, len(MODALITIES), dtype=torch.bool)

    def start_epoch(self, epoch: int) -> None:
        """Draw the mask of epoch number `epoch`; a sample that would lose all modalities keeps all."""
        draw = np.random.default_rng([self.seed, epoch]).random((self.samples, len(MODALITIES)))
        kept = draw >= self.rates
        kept[~kept.any(axis=1)] = True
        self.kept = torch.from_numpy(kept)

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hide modalities of a batch; a sample that would lose all its modalities keeps them."""
        self.kept = self.kept.to(batch["index"].device)
        kept = self.kept[batch["index"]]
        return {**batch, "modality_present": apply_mask(batch["modality_present"], kept)}
