# SPDX-License-Identifier: Apache-2.0
"""A prepared corpus: usable samples, their features in the cache, and what each clip lacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from feature_extractors import FeatureCache
from feature_extractors.clip import NO_AUDIO, NO_FACE, NO_VIDEO, SEVERAL_FACES, SILENT_AUDIO, ClipExtent
from msa_online.corpora.corpus import BrokenRow, BySplit, Corpus, Sample, place
from msa_online.modalities import MODALITIES
from msa_online.processing_msa import Cut, InputLimits

EMPTY_TEXT = "empty text"
NOTHING = "no modality at all"
LATE_SOUND = "silent in the part that is read"
LACKS = {"text": (EMPTY_TEXT,), "audio": (NO_AUDIO, SILENT_AUDIO, LATE_SOUND), "vision": (NO_VIDEO, NO_FACE)}
"""Findings that mean that a sample lacks a modality."""
LEFT_OUT = "left out: broken"
SHOWN_LINES = 8  # of the rows with a finding, in the table


@dataclass(frozen=True)
class PreparedCorpus(BySplit):
    """A corpus whose features are all in the cache.

    Attributes:
        corpus: The usable samples, and the broken rows that were left out.
        cache: The cache with the features.
        keys: Cache key of each usable sample, by sample id.
        found: Samples by finding: "no face", "no video stream", "no audio stream", "silent audio", "empty
            text". That modality of the sample is masked. "no modality at all" lists samples that lack all
            three. "several faces" and "still picture" mask nothing. Findings that do not occur are left out.
        extents: Amount of each modality in each usable sample, by sample id.
        extracted: Number of samples decoded now; the others were in the cache.
        seconds: Time it took.
    """

    corpus: Corpus
    cache: FeatureCache
    keys: dict[str, str]
    found: dict[str, tuple[Sample, ...]]
    extents: dict[str, ClipExtent]
    extracted: int
    seconds: float

    empty_split_remedy: ClassVar[str] = Corpus.empty_split_remedy

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The usable samples, in the order of their rows."""
        return self.corpus.samples

    @property
    def source(self) -> Path:
        """The file or folder the rows came from."""
        return self.corpus.source

    @property
    def broken(self) -> tuple[BrokenRow, ...]:
        """The rows that were left out, either when reading or when decoding."""
        return self.corpus.broken

    @property
    def total(self) -> int:
        """Number of rows, usable or not."""
        return len(self.samples) + len(self.broken)

    @property
    def cached(self) -> int:
        """Number of usable samples that were in the cache already."""
        return len(self.samples) - self.extracted

    @property
    def findings(self) -> dict[str, list[int]]:
        """The lines of the rows with each finding."""
        return {finding: [sample.line for sample in samples] for finding, samples in self.found.items()}

    def cut(self, limits: InputLimits) -> dict[str, list[tuple[Sample, Cut]]]:
        """Samples that a model with these limits reads only in part, by modality."""
        cuts: dict[str, list[tuple[Sample, Cut]]] = {}
        for sample in self.samples:
            for name, cut in limits.cut(self.extents[sample.id], sample.text).items():
                cuts.setdefault(name, []).append((sample, cut))
        return {name: cuts[name] for name in MODALITIES if name in cuts}

    def present(self, split: str) -> Tensor:
        """Which modalities each sample of a split has, `(samples, 3)` bool."""
        without = {
            name: {sample.id for finding in LACKS[name] for sample in self.found.get(finding, ())}
            for name in MODALITIES
        }
        return torch.tensor(
            [[sample.id not in without[name] for name in MODALITIES] for sample in self.split(split)]
        )


def findings_table(prepared: PreparedCorpus, limits: InputLimits) -> Table:
    """Findings for the terminal: what clips lack, and what a model with these limits does not read."""
    corpus, samples, broken = prepared.corpus, prepared.samples, prepared.broken
    found: dict[str, Sequence[Sample | BrokenRow]] = dict(prepared.found)
    if broken:
        found[LEFT_OUT] = broken
    cuts = prepared.cut(limits)
    table = Table(
        title=Text(
            f"{corpus.source.name}: {len(samples):,} of {prepared.total:,} clips usable, "
            f"{prepared.extracted:,} extracted in {prepared.seconds:.1f} s, "
            f"{prepared.cached:,} cached"
        ),
        caption=_caption(prepared, cuts),
        title_justify="left",
        caption_justify="left",
        min_width=78,
    )
    table.add_column("finding", no_wrap=True)
    table.add_column("clips", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("lines", overflow="fold")
    many_sources = len({row.source for row in (*samples, *broken)}) > 1
    for finding, rows in found.items():
        share = f"{len(rows) / prepared.total:.1%}"
        table.add_row(finding, f"{len(rows):,}", share, _lines(rows, many_sources))
    titles = {
        "text": f"text cut at {limits.max_text_tokens:,} tokens",
        "audio": f"sound cut at {limits.max_audio_seconds:g} s",
        "vision": "few frames for the length",
    }
    for name, of_modality in cuts.items():
        rows = [sample for sample, _ in of_modality]
        longest = max((cut for _, cut in of_modality), key=lambda cut: cut.length)
        lines = f"{_lines(rows, many_sources)}; longest: {longest.description}"
        table.add_row(titles[name], f"{len(rows):,}", f"{len(rows) / prepared.total:.1%}", lines)
    if not found and not cuts:
        table.add_row("nothing is lacking", f"{len(samples):,}", "100.0%", "")
    return table


def findings_record(prepared: PreparedCorpus, limits: InputLimits) -> dict[str, dict[str, Any]]:
    """Findings as plain data: rows by finding, and rows that are cut, by modality, with the longest."""
    return {
        "findings": prepared.findings,
        "cut": {
            name: {
                "lines": [sample.line for sample, _ in cuts],
                "longest": max((cut for _, cut in cuts), key=lambda cut: cut.length).description,
            }
            for name, cuts in prepared.cut(limits).items()
        },
        "left_out": [row.line for row in prepared.broken],
    }


def _caption(prepared: PreparedCorpus, cuts: Mapping[str, object]) -> str | None:
    """How clips with a finding are treated."""
    sentences = []
    if prepared.found:
        sentences.append("A modality that is missing is masked.")
    if NOTHING in prepared.found:
        sentences.append("Without any modality a model can only predict its baseline.")
    if LATE_SOUND in prepared.found:
        sentences.append(
            "Where sound starts later than a model reads, start and end select the part to read."
        )
    if SEVERAL_FACES in prepared.found:
        sentences.append("Of several faces one is tracked: the largest, unless face_choice or region differ.")
    if cuts:
        sentences.append("The model never sees the rest of a clip that is cut or has few frames.")
    return " ".join(sentences) or None


def _lines(rows: Sequence[Sample | BrokenRow], many_sources: bool) -> str:
    shown = [place(row.source, row.line) if many_sources else str(row.line) for row in rows[:SHOWN_LINES]]
    return ", ".join(shown) + (", …" if len(rows) > SHOWN_LINES else "")
