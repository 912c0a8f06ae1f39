# SPDX-License-Identifier: Apache-2.0
"""Modalities that are missing at given rates: who lacks what, fixed for a whole run (METHODS 7.5)."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from msa_online.corpora.corpus import CorpusError
from msa_online.missing.modalities import InputMask, left_of
from msa_online.modalities import CONDITIONS, MODALITIES

ROUNDINGS = ("largest_remainder", "official")


def rate_problems(rates: Mapping[str, float], rounding: str) -> Iterator[str]:
    """What is wrong with missing rates by modality or their rounding, with the value and what is allowed."""
    if rounding not in ROUNDINGS:
        yield f"rounding is {rounding!r}: one of {', '.join(ROUNDINGS)}"
    for name, rate in rates.items():
        if name not in MODALITIES:
            yield f"rates name {name!r}: one of {', '.join(MODALITIES)}"
        elif not 0 <= rate < 1:
            yield (
                f"the rate of {name} is {rate}: at least 0 and below 1; to train without {name} altogether, "
                "say training.condition"
            )


def pattern_counts(
    samples: int, rates: Mapping[str, float], rounding: str = "largest_remainder"
) -> dict[str, int]:
    """How many samples show which modalities, when each modality is missing at its own rate.

    A pattern e has the share prod_m [e_m (1 - r_m) + (1 - e_m) r_m] (METHODS 3.13). The share that would show
    nothing goes to the three patterns of one modality, which lowers every realised rate by a third of the
    product of the rates. Shares are computed exactly from the rates as they are written in decimal: products
    of floats land below whole numbers (1000 x 0.5 x 0.7 x 0.7 on 244.99...).

    Args:
        samples: Samples in the split.
        rates: Share of samples that lack each modality, by name, in [0, 1); those not named are never hidden.
        rounding: "largest_remainder" (METHODS A15) rounds the expected counts so that no pattern is off by
            one or more and a rate of 0 hides nothing; equal remainders go to the pattern that shows more.
            "official" rounds down and shares all that is left out among the single modalities, the odd ones
            to text, as BALM's code means to: even a rate of 0 can then hide a few samples.

    Returns:
        The count of each pattern under its name in `CONDITIONS`; they add up to `samples`.

    Raises:
        ValueError: A rate lies outside [0, 1) or is of no modality, or no such rounding.
    """
    if problem := next(rate_problems(rates, rounding), None):
        raise ValueError(problem)
    missing = {name: Fraction(str(rates.get(name, 0))) for name in MODALITIES}
    expected = {
        pattern: samples
        * math.prod(1 - missing[name] if name in visible else missing[name] for name in MODALITIES)
        for pattern, visible in CONDITIONS.items()
    }
    if rounding == "official":
        counts = {pattern: math.floor(count) for pattern, count in expected.items()}
        left = samples - sum(counts.values())
        for name in MODALITIES:
            counts[name] += left // 3
        counts["text"] += left % 3
        return counts
    would_show_nothing = math.floor(samples * math.prod(missing.values()))
    for name in MODALITIES:
        expected[name] += Fraction(would_show_nothing, 3)
    counts = {pattern: math.floor(count) for pattern, count in expected.items()}
    left = samples - sum(counts.values())
    by_remainder = sorted(
        CONDITIONS, key=lambda pattern: (counts[pattern] - expected[pattern], -len(CONDITIONS[pattern]))
    )
    for pattern in by_remainder[:left]:
        counts[pattern] += 1
    return counts


class SplitMask(InputMask):
    """Hides modalities of one split at given rates, the same of each sample throughout a run.

    Which sample gets which pattern follows from a hash of seed, split and sample id: not from the order of
    rows or batches, workers, ranks or an interruption. The seed alone redoes the mask, and no file of it can
    be mistaken for that of other data.

    What a sample lacks by itself it goes on lacking; where the mask would leave nothing, the sample keeps
    what it has. Both count in `realised`.

    Args:
        ids: Id of each sample, in the order that `index` in a batch counts in.
        present: What each sample has by itself, `(samples, 3)` bool.
        rates: Share of samples that lack each modality, by name, in [0, 1).
        split: Name of the split; each has a draw of its own.
        rounding: As in `pattern_counts`.
        seed: Another seed is another draw. Raises `CorpusError` where the split is so small that a modality
            with a rate above 0 would be hidden from no sample, or one would be left to none.

    Attributes:
        counts: Samples of each pattern, before what they lack by themselves.
        kept: What the mask leaves to each sample, `(samples, 3)` bool; something to every one.
        seen: What is to be seen of each sample, `(samples, 3)` bool: mask and natural gaps together.
    """

    def __init__(
        self,
        ids: Sequence[str],
        present: Tensor,
        rates: Mapping[str, float],
        *,
        split: str,
        rounding: str = "largest_remainder",
        seed: int = 1111,
    ) -> None:
        self.rates = {name: rates.get(name, 0.0) for name in MODALITIES}
        self.counts = pattern_counts(len(ids), rates, rounding)
        shown = [CONDITIONS[pattern] for pattern, count in self.counts.items() for _ in range(count)]
        drawn = sorted(range(len(ids)), key=lambda number: _rank(seed, split, ids[number]))
        self.kept = torch.empty(len(ids), len(MODALITIES), dtype=torch.bool)
        self.kept[drawn] = torch.tensor([[name in visible for name in MODALITIES] for visible in shown])
        self.seen = left_of(present, self.kept)
        self.spared = int((present & ~self.kept & self.seen).any(dim=1).sum())
        self._require_enough(split)

    def _require_enough(self, split: str) -> None:
        for name, rate, hidden in zip(MODALITIES, self.rates.values(), (~self.kept).sum(dim=0), strict=True):
            if (rate > 0 and hidden == 0) or hidden == len(self.kept):
                raise CorpusError(
                    f"the {split} split has {len(self.kept)} samples, too few for missing rates of "
                    f"{self.rates}: {name} would be hidden from {int(hidden)} of them; give a larger split "
                    "or other rates"
                )

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch with `modality_present` `(batch, 3)` cleared where the mask hides a modality."""
        self.kept = self.kept.to(batch["index"].device)
        kept = self.kept[batch["index"]]
        return {**batch, "modality_present": left_of(batch["modality_present"], kept)}

    @property
    def realised(self) -> dict[str, float]:
        """Share of samples of which each modality is not to be seen, in [0, 1], for whatever reason."""
        missing = 1 - self.seen.double().mean(dim=0)
        return dict(zip(MODALITIES, missing.tolist(), strict=True))

    @property
    def record(self) -> dict[str, Any]:
        """Counts and realised rates as plain data, for the record of a run."""
        return {"patterns": self.counts, "realised": self.realised, "spared": self.spared}


def _rank(seed: int, split: str, sample: str) -> bytes:
    return hashlib.sha256(repr((seed, split, sample)).encode()).digest()


def rates_table(masks: Mapping[str, SplitMask]) -> Table:
    """Nominal and realised missing rates of each split, in percent, for the terminal."""
    spared = {split: mask.spared for split, mask in masks.items() if mask.spared}
    caption = (
        "No sample is left with nothing, which lowers the realised rates; what samples lack by themselves "
        "raises them."
    )
    if spared:
        kept = ", ".join(f"{count:,} {split}" for split, count in spared.items())
        caption += f" Samples that keep what little they have: {kept}."
    table = Table(
        title="missing modalities, %",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        min_width=78,
    )
    for column in ("", "samples", *MODALITIES, "complete"):
        table.add_column(column, justify="right" if column else "left")
    rates = next(iter(masks.values())).rates
    table.add_row("nominal", "", *(f"{100 * rate:.1f}" for rate in rates.values()), "")
    for split, mask in masks.items():
        realised = [f"{100 * rate:.1f}" for rate in mask.realised.values()]
        complete = f"{int(mask.seen.all(dim=1).sum()):,}"
        table.add_row(f"{split}, realised", f"{len(mask.seen):,}", *realised, complete)
    return table
