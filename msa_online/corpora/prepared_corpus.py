# SPDX-License-Identifier: Apache-2.0
"""A prepared corpus: usable samples, their features in the cache, and what each clip lacks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from feature_extractors import FeatureCache
from feature_extractors.clip import (
    NO_AUDIO,
    NO_FACE,
    NO_VIDEO,
    SEVERAL_FACES,
    SILENT_AUDIO,
    ClipExtent,
    printable,
)
from feature_extractors.transcript import DOUBTFUL, Transcript
from msa_online.corpora.corpus import BrokenRow, Corpus, ReadyCorpus, Sample, place
from msa_online.modalities import MODALITIES
from msa_online.processing_msa import Cut, InputLimits, UnknownTokens

EMPTY_TEXT = "empty text"
NOTHING = "no modality at all"
LATE_SOUND = "silent in the part that is read"
LACKS = {"text": (EMPTY_TEXT,), "audio": (NO_AUDIO, SILENT_AUDIO, LATE_SOUND), "vision": (NO_VIDEO, NO_FACE)}
"""Findings that mean that a sample lacks a modality."""
LEFT_OUT = "left out: broken"
TRANSCRIBED = "text recognised by a machine"
NO_SPEECH = "no speech recognised"
DOUBTFUL_TEXT = "recognised text doubtful"
ALL_UNKNOWN = "text all unknown"
PARTLY_UNKNOWN = "text partly unknown"
SHOWN_CLASSES = 12  # of a split, in the table
SHOWN_LINES = 8  # of the rows with a finding, in the table


@dataclass(frozen=True)
class PreparedCorpus(ReadyCorpus):
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
        contents: SHA-256 of the file of each usable sample, by sample id.
        transcripts: What a recogniser heard in each sample that had no text, by sample id.
    """

    corpus: Corpus
    cache: FeatureCache
    keys: dict[str, str]
    found: dict[str, tuple[Sample, ...]]
    extents: dict[str, ClipExtent]
    extracted: int
    seconds: float
    contents: dict[str, str]
    transcripts: dict[str, Transcript] = field(default_factory=dict)

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

    def unknown_tokens(self, limits: InputLimits) -> list[UnknownTokens]:
        """How many tokens of each sample's text a model with these limits does not know."""
        return limits.unknown([sample.text for sample in self.samples])

    def present(self, split: str) -> Tensor:
        """Which modalities each sample of a split has, `(samples, 3)` bool."""
        without = {
            name: {sample.id for finding in LACKS[name] for sample in self.found.get(finding, ())}
            for name in MODALITIES
        }
        return torch.tensor(
            [[sample.id not in without[name] for name in MODALITIES] for sample in self.split(split)]
        )


@dataclass(frozen=True)
class Finding:
    """A finding about some rows.

    Attributes:
        name: What it is: "no face", "text cut at 128 tokens".
        rows: The rows.
        note: Figures on all of them; may be empty.
    """

    name: str
    rows: Sequence[Sample | BrokenRow]
    note: str = ""


def all_findings(prepared: PreparedCorpus, limits: InputLimits) -> list[Finding]:
    """What clips lack, and what a model with these limits does not read or know of them."""
    found = [Finding(name, samples) for name, samples in prepared.found.items()]
    if prepared.broken:
        found.append(Finding(LEFT_OUT, prepared.broken))
    asked = [sample for sample in prepared.samples if sample.id in prepared.transcripts]
    for name, is_text in ((TRANSCRIBED, True), (NO_SPEECH, False)):
        if rows := [sample for sample in asked if bool(sample.text) == is_text]:
            found.append(Finding(name, rows, f"by {prepared.transcripts[rows[0].id].model}"))
    if doubtful := [sample for sample in asked if prepared.transcripts[sample.id].doubt]:
        found.append(Finding(DOUBTFUL_TEXT, doubtful, f"mean probability of a word below {DOUBTFUL:g}"))
    titles = {
        "text": f"text cut at {limits.max_text_tokens:,} tokens",
        "audio": f"sound cut at {limits.max_audio_seconds:g} s",
        "vision": "few frames for the length",
    }
    for name, cuts in prepared.cut(limits).items():
        longest = max((cut for _, cut in cuts), key=lambda cut: cut.length)
        found.append(Finding(titles[name], [sample for sample, _ in cuts], f"longest: {longest.description}"))
    counts = prepared.unknown_tokens(limits)
    pairs = list(zip(prepared.samples, counts, strict=True))
    if wholly := [sample for sample, count in pairs if count.all_unknown]:
        found.append(Finding(ALL_UNKNOWN, wholly))
    if partly := [sample for sample, count in pairs if count.unknown and not count.all_unknown]:
        found.append(Finding(PARTLY_UNKNOWN, partly, f"{unknown_share(counts):.1%} of all tokens"))
    return found


def unknown_share(counts: Sequence[UnknownTokens]) -> float:
    """Share of the tokens of all texts that the tokenizer does not know, in [0, 1]."""
    return sum(count.unknown for count in counts) / max(1, sum(count.tokens for count in counts))


def findings_table(prepared: PreparedCorpus, limits: InputLimits) -> Table:
    """Findings for the terminal."""
    samples, found = prepared.samples, all_findings(prepared, limits)
    table = Table(
        title=Text(
            f"{prepared.source.name}: {len(samples):,} of {prepared.total:,} clips usable, "
            f"{prepared.extracted:,} extracted in {prepared.seconds:.1f} s, "
            f"{prepared.cached:,} cached"
        ),
        caption=_caption(prepared, limits, found),
        title_justify="left",
        caption_justify="left",
        min_width=78,
    )
    table.add_column("finding", no_wrap=True)
    table.add_column("clips", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("lines", overflow="fold")
    many_sources = len({row.source for row in (*samples, *prepared.broken)}) > 1
    for finding in found:
        lines = "; ".join(filter(None, (_lines(finding.rows, many_sources), finding.note)))
        share = f"{len(finding.rows) / prepared.total:.1%}"
        table.add_row(finding.name, f"{len(finding.rows):,}", share, Text(lines))
    if not found:
        table.add_row("nothing is lacking", f"{len(samples):,}", "100.0%", "")
    return table


def findings_counts(prepared: PreparedCorpus, limits: InputLimits) -> dict[str, int | str]:
    """Number of samples with each finding, and the share of unknown tokens, for the record of a run."""
    counts: dict[str, int | str] = {
        finding.name: len(finding.rows) for finding in all_findings(prepared, limits)
    }
    if share := unknown_share(prepared.unknown_tokens(limits)):
        counts["unknown tokens"] = f"{share:.2%}"
    return counts


def findings_record(prepared: PreparedCorpus, limits: InputLimits) -> dict[str, dict[str, Any]]:
    """Findings as plain data: rows by finding, rows with unknown words, and rows that are cut."""
    counts = prepared.unknown_tokens(limits)
    pairs = list(zip(prepared.samples, counts, strict=True))
    return {
        "findings": prepared.findings,
        "unknown_text": {
            "share_of_tokens": unknown_share(counts),
            "all_unknown": [sample.line for sample, count in pairs if count.all_unknown],
            "partly_unknown": [
                sample.line for sample, count in pairs if count.unknown and not count.all_unknown
            ],
        },
        "cut": {
            name: {
                "lines": [sample.line for sample, _ in cuts],
                "longest": max((cut for _, cut in cuts), key=lambda cut: cut.length).description,
            }
            for name, cuts in prepared.cut(limits).items()
        },
        "left_out": [row.line for row in prepared.broken],
    }


def _caption(prepared: PreparedCorpus, limits: InputLimits, found: Sequence[Finding]) -> str | None:
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
    if prepared.cut(limits):
        sentences.append("The model never sees the rest of a clip that is cut or has few frames.")
    if ALL_UNKNOWN in {finding.name for finding in found}:
        sentences.append("All texts that are unknown to the tokenizer look alike to the model.")
    return " ".join(sentences) or None


def _lines(rows: Sequence[Sample | BrokenRow], many_sources: bool) -> str:
    shown = [place(row.source, row.line) if many_sources else str(row.line) for row in rows[:SHOWN_LINES]]
    return ", ".join(shown) + (", …" if len(rows) > SHOWN_LINES else "")


def splits_table(prepared: PreparedCorpus) -> Table:
    """Clips, minutes and labels of each split, for the terminal."""
    table = Table(title="splits", title_justify="left", min_width=78)
    for name in ("split", "clips", "minutes"):
        table.add_column(name, justify="left" if name == "split" else "right", no_wrap=True)
    table.add_column("labels", overflow="fold")
    for name in [*prepared.sizes, "all"]:
        samples = prepared.samples if name == "all" else prepared.split(name)
        minutes = sum(prepared.extents[sample.id].seconds for sample in samples) / 60
        table.add_row(name, f"{len(samples):,}", f"{minutes:,.1f}", Text(_labels(samples)))
    return table


def _labels(samples: Sequence[Sample]) -> str:
    """Labels of some samples in a line: the spread of scores, or the classes with their counts."""
    labels = [sample.label for sample in samples if sample.label is not None]
    without = f"; {len(samples) - len(labels):,} without a label" if len(labels) < len(samples) else ""
    if not labels:
        return "none"
    if isinstance(labels[0], float):
        mean, negative = sum(labels) / len(labels), sum(label < 0 for label in labels) / len(labels)
        zero = labels.count(0.0) / len(labels)
        return (
            f"{min(labels):g} to {max(labels):g}, mean {mean:.2f}, {negative:.0%} negative, {zero:.0%} zero"
            f"{without}"
        )
    counts = Counter(map(printable, labels)).most_common()
    shown = ", ".join(f"{label} {count:,}" for label, count in counts[:SHOWN_CLASSES])
    more = f" and {len(counts) - SHOWN_CLASSES:,} more classes" if len(counts) > SHOWN_CLASSES else ""
    return f"{shown}{more}{without}"
