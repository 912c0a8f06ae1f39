# SPDX-License-Identifier: Apache-2.0
"""Convert precomputed features from a pickle or an .npz file to a corpus that training reads."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.csv_table import CsvTable, read_csv, require_columns
from msa_online.precomputed.corpus import FeatureSample, FeatureSteps
from msa_online.precomputed.files import (
    COLUMNS,
    PICKLES,
    FeatureTable,
    read_feature_archive,
    read_feature_folder,
    require_new_folder,
    write_feature_folder,
)
from msa_online.precomputed.mmsa import read_mmsa_features
from msa_online.precomputed.pooling import pool
from msa_online.precomputed.reading import check_features
from msa_online.precomputed.token_states import text_states

LABELS = ("label", "regression_labels", "annotations", "classification_labels")
"""Default columns of the label; the first that exists is used."""

SHOWN_IDS = 5


def convert_features(
    source: Path,
    folder: Path,
    *,
    metadata: Path | None = None,
    label_column: str | None = None,
    split_column: str = "split",
    level: str = "sequence",
    text_encoder: str | None = None,
    non_finite: str = "refuse",
    valid_share: float | None = None,
    skip_broken: bool = False,
) -> None:
    """Convert features to a corpus; all problems are reported before anything is written.

    Args:
        source: A pickle in MMSA's layout, an .npz file, or a folder with features.safetensors.
        folder: Folder to write; it is written completely or not at all.
        metadata: A csv file whose rows, matched by id, replace those of the source.
        label_column: Column of the label; by default the first of `LABELS` that exists.
        split_column: Column of the split.
        level: "sequence" keeps the steps; "utterance" pools them with `pool`.
        text_encoder: Folder or name of the encoder whose states for the tokens in `text_bert` become the
            text's features, in place of those of the source.
        non_finite: How to treat NaN and infinities: "refuse" them, or replace each by "zero".
        valid_share: Share of the training samples to move to the validation split, by whole speakers if they
            are known; for data without a validation split.
        skip_broken: Leave out broken rows, instead of raising.

    Raises:
        CorpusError: The source or the folder cannot be used; the message names file, row, value and remedy.
        EncoderError: `text_encoder` is unavailable.
    """
    require_new_folder(folder)
    table = _read(source, tokens=text_encoder is not None)
    if text_encoder is not None and table.tokens is None:
        raise CorpusError(f"{source} has no tokens in a key text_bert: leave out --text-encoder")
    if text_encoder is None and table.tokens is not None and "text" not in table.steps:
        raise CorpusError(
            f"{source} has no features of text, only tokens in text_bert: name the encoder that they were "
            "made for, for example --text-encoder google-bert/bert-base-uncased"
        )
    texts = table  # as the source has them
    if text_encoder is not None:
        table = replace(table, steps={name: steps for name, steps in table.steps.items() if name != "text"})
    if metadata is not None:
        table = _with_metadata(table, read_csv(metadata), source)
    replaced: dict[str, int] = {}
    if non_finite == "zero":
        replaced = {name: int((~torch.isfinite(s.values)).sum()) for name, s in table.steps.items()}
        table = replace(table, steps={name: _with_zeros(steps) for name, steps in table.steps.items()})
    label_column = label_column or next((name for name in LABELS if name in table.metadata.columns), "label")
    samples, broken = check_features(
        table, label_column=label_column, split_column=split_column, label_range=None
    )
    if broken and not (skip_broken and samples):
        raise CorpusError.of_rows(table.metadata.path, broken)
    if valid_share is not None:
        samples = _with_valid(samples, valid_share, table.metadata.path)
    steps = table.steps
    if text_encoder is not None:
        steps = {"text": text_states(texts, text_encoder), **steps}
    if [sample.row for sample in samples] != list(range(len(table.metadata.rows))):
        steps = {
            name: of_modality.take([each.row for each in samples]) for name, of_modality in steps.items()
        }
    if level == "utterance":
        steps = pool(steps)
    origin = {
        "made by": "msa-online convert-features",
        "source": str(source),
        "metadata": str(metadata) if metadata else None,
        "label column": label_column,
        "split column": split_column,
        "level": level,
        "text encoder": text_encoder,
        "non-finite numbers replaced by zero": replaced,
        "share of training taken for validation": valid_share,
        "rows left out": len(broken),
        "widths": {name: of_modality.width for name, of_modality in steps.items()},
    }
    write_feature_folder(folder, _rows(table, samples, label_column, split_column), steps, origin)


def _read(source: Path, *, tokens: bool) -> FeatureTable:
    if source.suffix.lower() in PICKLES:
        return read_mmsa_features(source, tokens=tokens)
    if not source.exists():
        raise CorpusError(f"{source} does not exist: give a .pkl or .npz file")
    if source.is_dir():
        return read_feature_folder(source)
    if source.suffix.lower() != ".npz":
        raise CorpusError(f"{source} is neither a .pkl in MMSA's layout nor an .npz file")
    return read_feature_archive(source)


def _with_metadata(table: FeatureTable, metadata: CsvTable, source: Path) -> FeatureTable:
    """The same features with the rows of another table, matched by id."""
    require_columns(metadata.path, metadata.columns, ["id"])
    if metadata.broken:
        raise CorpusError.of_rows(metadata.path, metadata.broken)
    lines = Counter(cells["id"] for _, cells in metadata.rows)
    if repeated := [name for name, count in lines.items() if count > 1]:
        raise CorpusError(f"{metadata.path} names {_some(repeated)} more than once: keep one row for each id")
    rows = {cells["id"]: (line, cells) for line, cells in metadata.rows}
    ids = [cells["id"] for _, cells in table.metadata.rows]
    if missing := [name for name in ids if name not in rows]:
        raise CorpusError(
            f"{metadata.path} does not name {_some(missing)}, for which {source} has features: add a row for "
            "each id"
        )
    if unknown := sorted(rows.keys() - ids):
        raise CorpusError(
            f"{metadata.path} names {_some(unknown)}, for which {source} has no features: delete these rows"
        )
    return replace(table, metadata=replace(metadata, rows=tuple(rows[name] for name in ids)))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:SHOWN_IDS])
    return shown + (f" and {len(names) - SHOWN_IDS:,} more" if len(names) > SHOWN_IDS else "")


def _with_zeros(steps: FeatureSteps) -> FeatureSteps:
    return replace(steps, values=torch.nan_to_num(steps.values, nan=0.0, posinf=0.0, neginf=0.0))


def _with_valid(samples: Sequence[FeatureSample], share: float, source: Path) -> list[FeatureSample]:
    """Move training samples to "valid", by speaker or else by id, in the order of a hash of their names."""
    sizes = Counter(sample.speaker or sample.id for sample in samples if sample.split == "train")
    if any(sample.split == "valid" for sample in samples):
        raise CorpusError(f"{source} has a validation split already: leave out --valid-share")
    wanted = share * sizes.total()
    moved: set[str] = set()
    for group in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sum(sizes[each] for each in moved) >= wanted:
            break
        moved.add(group)
    return [
        replace(sample, split="valid")
        if sample.split == "train" and (sample.speaker or sample.id) in moved
        else sample
        for sample in samples
    ]


def _rows(
    table: FeatureTable, samples: Sequence[FeatureSample], label_column: str, split_column: str
) -> list[dict[str, str]]:
    """Rows to write: our columns, then the other columns of the source."""
    ours = {*COLUMNS, label_column, split_column}
    others = [name for name in table.metadata.columns if name not in ours and not name.endswith("_lengths")]
    cells = dict(zip(table.places, (row for _, row in table.metadata.rows), strict=True))
    return [
        {
            "id": sample.id,
            "text": sample.text,
            "label": str(sample.label),
            "split": sample.split,
            "speaker": sample.speaker or "",
            **{name: cells[sample.row][name] for name in others if name},
        }
        for sample in samples
    ]
