# SPDX-License-Identifier: Apache-2.0
"""Modalities missing at given rates, with one fixed mask per run (docs/methods/protocols.md)."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from msa_online.corpora.corpus import CorpusError
from msa_online.missing.modalities import InputMask, apply_mask
from msa_online.modalities import CONDITIONS, MODALITIES

ROUNDINGS = ("largest_remainder", "official")


def rate_problems(rates: Mapping[str, float], rounding: str) -> Iterator[str]:
    """Validate missing rates and their rounding; yields a message for each invalid value."""
    if rounding not in ROUNDINGS:
        yield f"rounding is {rounding!r}: one of {', '.join(ROUNDINGS)}"
    for name, rate in rates.items():
        if name not in MODALITIES:
            yield f"rates name {name!r}: one of {', '.join(MODALITIES)}"
        elif not 0 <= rate < 1:
            yield (
                f"the rate of {name} is {rate}: at least 0 and below 1; to train without {name}, set "
                "training.condition"
            )


def pattern_counts(
    samples: int,
    rates: Mapping[str, float],
    rounding: str = "largest_remainder",
    used: Sequence[str] = MODALITIES,
) -> dict[str, int]:
    """Number of samples with each pattern of visible modalities, given the missing rate of each modality.

    A pattern e has the share prod_m [e_m (1 - r_m) + (1 - e_m) r_m] ((3.13) of docs/methods/balm.md). The
    share of the empty pattern goes to the patterns of one modality in equal parts; with three modalities,
    this lowers every realised rate by a third of the product of the rates. Shares are computed with exact
    fractions of the decimal rates: products of floats fall below whole numbers (1000 x 0.5 x 0.7 x 0.7 is
    244.99...).

    Args:
        samples: Number of samples in the split.
        rates: Share of samples that lack each modality, by name, in [0, 1); 0 where not named.
        rounding: "largest_remainder" rounds the expected counts so that no pattern is off by one or more and
            a rate of 0 hides nothing; of equal remainders, the pattern that shows more gets the sample.
            "official" rounds down and gives the rest to the patterns of one modality, odd ones to text, as
            BALM's code intends: even a rate of 0 can then hide a few samples.
        used: Modalities of the run; the others are in no pattern.

    Returns:
        The count of each pattern of used modalities under its name in `CONDITIONS`; they sum to `samples`.

    Raises:
        ValueError: A rate is outside [0, 1), or a modality or the rounding is unknown.
    """
    if problem := next(rate_problems(rates, rounding), None):
        raise ValueError(problem)
    missing = {name: Fraction(str(rates.get(name, 0))) for name in MODALITIES if name in used}
    expected = {
        pattern: samples
        * math.prod(1 - missing[name] if name in visible else missing[name] for name in missing)
        for pattern, visible in CONDITIONS.items()
        if missing.keys() >= set(visible)
    }
    if rounding == "official":
        counts = {pattern: math.floor(count) for pattern, count in expected.items()}
        left = samples - sum(counts.values())
        for name in missing:
            counts[name] += left // len(missing)
        counts[next(iter(missing))] += left % len(missing)
        return counts
    empty = math.floor(samples * math.prod(missing.values()))
    for name in missing:
        expected[name] += Fraction(empty, len(missing))
    counts = {pattern: math.floor(count) for pattern, count in expected.items()}
    left = samples - sum(counts.values())
    by_remainder = sorted(
        counts, key=lambda pattern: (counts[pattern] - expected[pattern], -len(CONDITIONS[pattern]))
    )
    for pattern in by_remainder[:left]:
        counts[pattern] += 1
    return counts


class SplitMask(InputMask):
    """Hides modalities of one split at given rates, with one fixed mask for the whole run.

    The pattern of a sample follows from a hash of seed, split and sample id. It does not depend on the order
    of rows or batches, workers, ranks or interruptions, and the mask needs no file.

    Modalities that a sample lacks in the data stay missing. If the mask would hide all that a sample has, it
    keeps what it has. Both count in `realised`.

    Args:
        ids: Id of each sample; `index` in a batch refers to this list.
        present: Modalities that each sample has in the data, `(samples, 3)` bool.
        rates: Share of samples that lack each modality, by name, in [0, 1).
        split: Name of the split; part of the hash.
        rounding: As in `pattern_counts`.
        seed: Seed of the mask.
        used: Modalities of the run; the others are hidden from all samples.

    Attributes:
        counts: Number of samples of each pattern in the mask.
        kept: The mask, `(samples, 3)` bool; at least one modality of each sample is True.
        seen: Visible modalities of each sample, `(samples, 3)` bool: the mask applied to `present`.
        spared: Number of samples that keep masked modalities, because they have no others.

    Raises:
        CorpusError: The split is too small: a modality with a rate above 0 would be hidden from no sample, or
            a modality from all.
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
        used: Sequence[str] = MODALITIES,
    ) -> None:
        self.used = tuple(used)
        self.rates = {name: rates.get(name, 0.0) if name in self.used else 1.0 for name in MODALITIES}
        self.counts = pattern_counts(len(ids), rates, rounding, self.used)
        shown = [CONDITIONS[pattern] for pattern, count in self.counts.items() for _ in range(count)]
        drawn = sorted(range(len(ids)), key=lambda number: _rank(seed, split, ids[number]))
        self.kept = torch.empty(len(ids), len(MODALITIES), dtype=torch.bool)
        self.kept[drawn] = torch.tensor([[name in visible for name in MODALITIES] for visible in shown])
        present = present & self._visible(present)
        self.seen = apply_mask(present, self.kept)
        self.spared = int((present & ~self.kept & self.seen).any(dim=1).sum())
        self._require_enough(split)

    def _require_enough(self, split: str) -> None:
        for name, rate, hidden in zip(MODALITIES, self.rates.values(), (~self.kept).sum(dim=0), strict=True):
            if name in self.used and ((rate > 0 and hidden == 0) or hidden == len(self.kept)):
                raise CorpusError(
                    f"the {split} split has {len(self.kept)} samples, too few for missing rates of "
                    f"{self.rates}: {name} would be hidden from {int(hidden)} of them; give a larger split "
                    "or other rates"
                )

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hide modalities of a batch."""
        self.kept = self.kept.to(batch["index"].device)
        kept, present = self.kept[batch["index"]], batch["modality_present"]
        return {**batch, "modality_present": apply_mask(present & self._visible(present), kept)}

    def _visible(self, like: Tensor) -> Tensor:
        return torch.tensor([name in self.used for name in MODALITIES], device=like.device)

    @property
    def realised(self) -> dict[str, float]:
        """Share of samples that lack each modality, in the data or by the mask, in [0, 1]."""
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
        "No sample loses all modalities, which lowers the realised rates; modalities that are missing in the "
        "data raise them."
    )
    if spared:
        kept = ", ".join(f"{count:,} {split}" for split, count in spared.items())
        caption += f" Samples that keep masked modalities, because they have no others: {kept}."
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
