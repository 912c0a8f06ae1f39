# SPDX-License-Identifier: Apache-2.0
"""Read and check a corpus of features, so that no run stops half-way over a value that was wrong before."""

import logging
from pathlib import Path

from msa_online.corpora.corpus import BrokenRow, CorpusError, place
from msa_online.corpora.csv_table import require_columns
from msa_online.corpora.layouts import Row
from msa_online.corpora.validation import attempt, check_label_column, checked_label, checked_split
from msa_online.precomputed.corpus import FeatureCorpus, FeatureSample
from msa_online.precomputed.files import (
    FEATURES,
    PICKLES,
    FeatureTable,
    means_features,
    read_feature_archive,
    read_feature_folder,
)

logger = logging.getLogger(__name__)


def read_features(
    path: str | Path,
    *,
    label_column: str = "label",
    split_column: str = "split",
    label_range: tuple[float, float] | None = None,
    skip_broken: bool = False,
) -> FeatureCorpus:
    """Read and check a corpus of features made elsewhere.

    Args:
        path: A folder with metadata.csv and features.safetensors, or an .npz file.
        label_column: The column that holds the label.
        split_column: The column that holds the split.
        label_range: Smallest and largest legal label; labels become floats. None keeps them as class names.
        skip_broken: Leave broken rows out, counted in the log, instead of raising.

    Raises:
        CorpusError: Files are missing, damaged or do not fit each other, a column is missing, or rows are
            broken: all of them are listed.
    """
    local = Path(path).expanduser()
    table = _read_table(local)
    check_label_column(_rows(table, label_column, split_column), label_column, label_range, skip_broken)
    samples, broken = check_features(
        table, label_column=label_column, split_column=split_column, label_range=label_range
    )
    source = table.metadata.path
    if broken and not skip_broken:
        raise CorpusError.of_rows(source, broken)
    if broken:
        total = len(broken) + len(samples)
        logger.warning("%s: left out %s broken rows of %s", source, len(broken), total)
    if not samples:
        raise CorpusError(f"{source} has no usable row", broken)
    return FeatureCorpus(tuple(samples), table.steps, source, tuple(broken))


def check_features(
    table: FeatureTable, *, label_column: str, split_column: str, label_range: tuple[float, float] | None
) -> tuple[list[FeatureSample], list[BrokenRow]]:
    """Turn rows into samples, and say of every other row all that is wrong with it or with its features.

    Raises:
        CorpusError: A column is missing.
    """
    metadata = table.metadata
    rows = _rows(table, label_column, split_column)
    strange = {name: steps.non_finite() for name, steps in table.steps.items()}
    first_rows: dict[str, int] = {}
    samples, broken = [], list(metadata.broken)
    for row, written in zip(table.places, rows, strict=True):
        line = written.line
        problems = [
            f"{name} of {written.file!r} holds {strange[name][row][1]} in step {strange[name][row][0] + 1}: "
            "make the features again, or take zeros with `msa-online convert-features --non-finite zero`"
            for name in strange
            if row in strange[name]
        ]
        label = attempt(problems, checked_label, written, label_range)
        split = attempt(problems, checked_split, written.split)
        if not written.file:
            problems.append("the id is empty: give every sample one of its own")
        elif first_rows.setdefault(written.file, line) != line:
            known = place(metadata.path, first_rows[written.file])
            problems.append(f"id {written.file!r} is that of {known}: give every sample one of its own")
        if problems:
            broken.append(BrokenRow(metadata.path, line, "; ".join(problems)))
        else:
            speaker = written.speaker.strip() or None
            samples.append(
                FeatureSample(written.file, written.text, label, split, speaker, metadata.path, line, row)
            )
    return samples, sorted(broken, key=lambda each: each.line)


def _rows(table: FeatureTable, label_column: str, split_column: str) -> list[Row]:
    """The rows as written; the id of a sample stands where clips have their file."""
    metadata = table.metadata
    require_columns(metadata.path, metadata.columns, ("id", label_column, split_column))
    return [
        Row(
            source=metadata.path,
            line=line,
            folder=metadata.path.parent,
            file=cells["id"].strip(),
            text=cells.get("text", ""),
            label=cells[label_column],
            split=cells[split_column],
            speaker=cells.get("speaker", ""),
        )
        for line, cells in metadata.rows
    ]


def _read_table(path: Path) -> FeatureTable:
    if path.suffix in PICKLES:
        raise CorpusError(
            f"{path} is a pickle: make a folder of it with `msa-online convert-features {path} FOLDER`"
        )
    if not path.exists():
        raise CorpusError(f"{path} does not exist: give a folder with {FEATURES}, or an .npz file")
    if not means_features(path):
        raise CorpusError(
            f"{path} holds no features, neither {FEATURES} nor an .npz file. Make them of raw clips with "
            f"`msa-online extract-features {path} FOLDER --text-encoder NAME`."
        )
    return (read_feature_folder if path.is_dir() else read_feature_archive)(path)
