# SPDX-License-Identifier: Apache-2.0
"""Hide modalities of samples, in training or for a fixed condition."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from msa_online.modalities import MODALITIES


class InputMask:
    """Selects what is hidden from each sample. This base class hides nothing."""

    @property
    def line(self) -> str:
        """What it hides, for the terminal; empty if there is nothing to print."""
        return ""

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

    A rate is the share of samples that are without the modality in an epoch, on average. No sample loses all
    its modalities. Modalities of a sample are drawn independently under this condition, so the probabilities
    behind the rates are a little higher (`hidden_patterns`).

    The mask of the whole training split is drawn at the start of an epoch. So it depends only on seed, epoch
    and sample, and not on batch order, workers, ranks or interruptions.

    A sample that has two modalities can lose less than one that has three, and a sample with one keeps it.
    Where their rates cannot be reached, they are lowered in proportion; `realised` takes this into account.

    Args:
        rates: Share of samples that lose each modality, by name, in [0, 1); 0 where not named.
        present: Modalities that each training sample has in the data, `(samples, 3)` bool.
        seed: Seed of the run.

    Attributes:
        realised: Expected share of the samples with a modality from which it is hidden, by name; NaN if no
            sample has it.
    """

    def __init__(self, rates: Mapping[str, float], present: Tensor, seed: int) -> None:
        self.rates = np.array([rates.get(name, 0.0) for name in MODALITIES])
        self.present = present.numpy()
        self.seed = seed
        self.kept: Tensor = torch.ones_like(present)
        self._patterns = {}
        hidden = np.zeros(len(MODALITIES))
        for having, samples in zip(*np.unique(self.present, axis=0, return_counts=True), strict=True):
            lost, chances = hidden_patterns(self.rates, having)
            self._patterns[tuple(having)] = lost, chances
            hidden += samples * (chances @ lost)
        with np.errstate(invalid="ignore"):
            shares = hidden / self.present.sum(axis=0)
        self.realised = dict(zip(MODALITIES, shares.tolist(), strict=True))

    def start_epoch(self, epoch: int) -> None:
        """Draw the mask of epoch number `epoch`."""
        draw = np.random.default_rng([self.seed, epoch]).random(len(self.present))
        kept = np.ones_like(self.present)
        for having, (lost, chances) in self._patterns.items():
            those = (self.present == having).all(axis=1)
            number = np.searchsorted(np.cumsum(chances)[:-1], draw[those], side="right")
            kept[those] = ~lost[number]
        self.kept = torch.from_numpy(kept)

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hide modalities of a batch; a sample that would lose all its modalities keeps them."""
        self.kept = self.kept.to(batch["index"].device)
        kept = self.kept[batch["index"]]
        return {**batch, "modality_present": apply_mask(batch["modality_present"], kept)}

    @property
    def line(self) -> str:
        """The realised rates, and those asked for where they are lower."""
        if not self.rates.any():
            return ""
        shown = []
        for name, rate in zip(MODALITIES, self.rates, strict=True):
            share = self.realised[name]
            if rate > 0:
                lower = f" (asked for: {100 * rate:.1f})" if rate - share > 5e-4 else ""
                shown.append(f"{name} {100 * share:.1f}{lower}" if share == share else f"{name} never occurs")
        return f"modality dropout, % of the training samples that have the modality: {', '.join(shown)}"


def dropout_problem(rates: Mapping[str, float], present: Tensor | None = None) -> str | None:
    """Why `rates` cannot be realised, with the remedy; None if they can.

    A sample keeps at least one of its n modalities, so the rates of the n modalities that occur must sum to
    less than n - 1, unless one of them is never hidden. Where one modality occurs alone, nothing is hidden.

    Args:
        rates: Share of samples that lose each modality, by name, in [0, 1).
        present: Modalities of each training sample, `(samples, 3)` bool; None assumes that all occur.
    """
    occurring = [True] * len(MODALITIES) if present is None else present.any(dim=0).tolist()
    hidden = {name: rates.get(name, 0.0) for name, has in zip(MODALITIES, occurring, strict=True) if has}
    total, most = sum(hidden.values()), len(hidden) - 1
    if most < 1 or min(hidden.values()) == 0 or total < most - 1e-9:
        return None
    return (
        f"the rates of {', '.join(hidden)} sum to {total:g}, but each sample keeps at least one of them: "
        f"lower the rates to a sum below {most}"
    )


def hidden_patterns(rates: np.ndarray, having: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sets of modalities that a sample can lose, and their probabilities.

    With probabilities p_m of the modalities that the sample has, each hidden independently under the
    condition that not all are, the share that lose m is (p_m - P) / (1 - P) with P = prod p_m. Setting it to
    the rate r_m gives p_m = r_m + P (1 - r_m), and P is the root of P = prod (r_m + P (1 - r_m)) in [0, 1).
    It exists if the rates sum to less than the number of modalities minus 1, or if one of them is 0.

    Args:
        rates: The rate of each modality, in [0, 1).
        having: Which modalities the sample has, `(3,)` bool.

    Returns:
        Sets `(sets, 3)` bool and their probabilities `(sets,)`, which sum to 1.
    """
    own = np.flatnonzero(having)
    most, wanted = len(own) - 1, rates[own]
    if most < 1:
        return np.zeros((1, len(rates)), dtype=bool), np.ones(1)
    if wanted.min() > 0 and wanted.sum() >= most:
        wanted = wanted * (most / wanted.sum()) * (1 - 1e-6)
    low, high = 0.0, 1.0
    if wanted.min() > 0:
        while np.prod(wanted + high * (1 - wanted)) >= high:  # below 1 itself, which is always a root
            high = 1 - (1 - high) * 0.5 if high < 1 else 0.5
        for _ in range(100):
            middle = (low + high) / 2
            if np.prod(wanted + middle * (1 - wanted)) > middle:
                low = middle
            else:
                high = middle
        chances = wanted + low * (1 - wanted)
    else:
        chances = wanted
    subsets = np.array(list(itertools.product((False, True), repeat=len(own))))[:-1]  # all but the whole
    weights = np.where(subsets, chances, 1 - chances).prod(axis=1)
    lost = np.zeros((len(subsets), len(rates)), dtype=bool)
    lost[:, own] = subsets
    return lost, weights / weights.sum()
