# SPDX-License-Identifier: Apache-2.0
"""InputMask modalities of samples on purpose."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msa_online.modalities import MODALITIES


class InputMask:
    """Decides what is hidden from which sample; this base hides nothing."""

    def start_epoch(self, epoch: int) -> None:
        """Get ready for epoch number `epoch`."""

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with `modality_present` `(batch, 3)` cleared where a modality is to be hidden."""
        return dict(batch)

    def over(self, batches: Iterable[Mapping[str, Tensor]]) -> "MaskedBatches":
        """The batches of a loader with everything hidden that is to be; can be gone through many times."""
        return MaskedBatches(batches, self)


@dataclass(frozen=True)
class MaskedBatches:
    """Batches of which something is hidden, whoever reads them.

    Attributes:
        batches: The batches as they are.
        hiding: Says what is hidden from which sample.
    """

    batches: Iterable[Mapping[str, Tensor]]
    input_mask: InputMask

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self.input_mask.apply, self.batches)


def left_of(present: Tensor, kept: Tensor) -> Tensor:
    """What a mask `kept` leaves of what is `present`, `(samples, 3)` bool each.

    A sample that would be left with nothing, because it lacks the others, keeps what it has.
    """
    left = present & kept
    return torch.where(left.any(dim=1, keepdim=True), left, present)


class FixedCondition(InputMask):
    """Shows the same modalities of every sample (protocol `per_condition`, METHODS E18).

    Args:
        visible: Names of the modalities to be seen.
    """

    def __init__(self, visible: Iterable[str]) -> None:
        self.visible = torch.tensor([name in visible for name in MODALITIES])

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hide all but the visible modalities; a sample that has none of those is left with nothing."""
        present = batch["modality_present"]
        return {**batch, "modality_present": present & self.visible.to(present.device)}


class ModalityDropout(InputMask):
    """Hides modalities of training samples at random, so that each learns to stand alone.

    One draw covers the whole training split for an epoch. What is hidden from a sample therefore depends on
    nothing but the seed, the epoch and the sample: not on batch order, workers, ranks or an interruption.

    Args:
        rates: Share of samples that lose each modality, by name, in [0, 1); those not named lose nothing.
        samples: Size of the training split.
        seed: Seed of the run.
    """

    def __init__(self, rates: Mapping[str, float], samples: int, seed: int) -> None:
        self.rates = np.array([rates.get(name, 0.0) for name in MODALITIES])
        self.samples = samples
        self.seed = seed
        self.kept: Tensor = torch.ones(samples, len(MODALITIES), dtype=torch.bool)

    def start_epoch(self, epoch: int) -> None:
        """Draw anew for epoch number `epoch`; a sample that would lose everything keeps everything."""
        draw = np.random.default_rng([self.seed, epoch]).random((self.samples, len(MODALITIES)))
        kept = draw >= self.rates
        kept[~kept.any(axis=1)] = True
        self.kept = torch.from_numpy(kept)

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with `modality_present` `(batch, 3)` cleared where a modality is to be hidden.

        A sample that would be left with nothing, because it lacks the others, keeps what it has.
        """
        self.kept = self.kept.to(batch["index"].device)
        kept = self.kept[batch["index"]]
        return {**batch, "modality_present": left_of(batch["modality_present"], kept)}
