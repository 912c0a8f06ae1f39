# SPDX-License-Identifier: Apache-2.0
"""What came out of preparing a corpus: the usable samples, where their features lie and what they lack."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from feature_extractors.clip import NO_AUDIO, NO_FACE, NO_VIDEO, SILENT_AUDIO
from msa_online.data.corpus import BrokenRow, Corpus, Sample, place
from msa_online.modalities import MODALITIES

EMPTY_TEXT = "empty text"
LACKS = {"text": (EMPTY_TEXT,), "audio": (NO_AUDIO, SILENT_AUDIO), "vision": (NO_VIDEO, NO_FACE)}
"""The findings that leave a sample without a modality."""
LEFT_OUT = "left out: broken"
SHOWN_LINES = 8  # of the rows with a finding, in the table


@dataclass(frozen=True)
class Preparation:
    """A corpus whose features all lie in the cache.

    Attributes:
        corpus: The usable samples, and the broken rows that were left out on request.
        keys: Cache key of each usable sample, by sample id.
        found: Which samples lack what: "no face", "no video stream", "no audio stream", "silent audio",
            "empty text". They are used with that modality masked. Only findings that occurred are named.
        extracted: Number of samples decoded now; the others were in the cache.
        seconds: How long it took.
    """

    corpus: Corpus
    keys: dict[str, str]
    found: dict[str, tuple[Sample, ...]]
    extracted: int
    seconds: float

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The usable samples, in the order of their rows."""
        return self.corpus.samples

    @property
    def broken(self) -> tuple[BrokenRow, ...]:
        """The rows that were left out, in reading as well as in decoding."""
        return self.corpus.broken

    @property
    def total(self) -> int:
        """Number of rows, usable or not."""
        return len(self.samples) + len(self.broken)

    @property
    def cached(self) -> int:
        """Number of usable samples that were in the cache before."""
        return len(self.samples) - self.extracted

    @property
    def findings(self) -> dict[str, list[int]]:
        """The lines of the rows with each finding."""
        return {finding: [sample.line for sample in samples] for finding, samples in self.found.items()}

    def present(self, samples: Sequence[Sample]) -> Tensor:
        """Which modalities each of `samples` has, `(samples, 3)` bool."""
        without = {
            name: {sample.id for finding in LACKS[name] for sample in self.found.get(finding, ())}
            for name in MODALITIES
        }
        return torch.tensor([[sample.id not in without[name] for name in MODALITIES] for sample in samples])


def findings_table(preparation: Preparation) -> Table:
    """What was found, for the terminal: how often each modality is lacking, and in which rows first."""
    corpus, samples, broken = preparation.corpus, preparation.samples, preparation.broken
    found: dict[str, Sequence[Sample | BrokenRow]] = dict(preparation.found)
    if broken:
        found[LEFT_OUT] = broken
    table = Table(
        title=Text(
            f"{corpus.source.name}: {len(samples):,} of {preparation.total:,} clips usable, "
            f"{preparation.extracted:,} extracted in {preparation.seconds:.1f} s, "
            f"{preparation.cached:,} cached"
        ),
        caption="Clips with a finding are used with that modality masked." if preparation.found else None,
        title_justify="left",
        caption_justify="left",
        min_width=78,
    )
    table.add_column("finding")
    table.add_column("clips", justify="right")
    table.add_column("share", justify="right")
    table.add_column("lines")
    many_sources = len({row.source for row in (*samples, *broken)}) > 1
    for finding, rows in found.items():
        share = f"{len(rows) / preparation.total:.1%}"
        table.add_row(finding, f"{len(rows):,}", share, _lines(rows, many_sources))
    if not found:
        table.add_row("nothing is lacking", f"{len(samples):,}", "100.0%", "")
    return table


def _lines(rows: Sequence[Sample | BrokenRow], many_sources: bool) -> str:
    shown = [place(row.source, row.line) if many_sources else str(row.line) for row in rows[:SHOWN_LINES]]
    return ", ".join(shown) + (", …" if len(rows) > SHOWN_LINES else "")
