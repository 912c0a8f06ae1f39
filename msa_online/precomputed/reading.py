# SPDX-License-Identifier: Apache-2.0
"""Read and validate a corpus of precomputed features before a run starts."""

import logging
import shlex
from pathlib import Path

from feature_extractors.clip import printable
from msa_online.corpora.corpus import BrokenRow, CorpusError, place
from msa_online.corpora.csv_table import require_columns
from msa_online.corpora.layouts import Row
from msa_online.corpora.reading import FEATURES
from msa_online.corpora.validation import attempt, check_label_column, checked_label, checked_split
from msa_online.precomputed.corpus import FeatureCorpus, FeatureSample
from msa_online.precomputed.files import (
    PICKLES,
    FeatureTable,
    is_precomputed_path,
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
    """Read and validate a corpus of precomputed features.

    Args:
        path: A folder with metadata.csv and features.safetensors, or an .npz file.
        label_column: Column of the label.
        split_column: Column of the split.
        label_range: Smallest and largest legal label; labels become floats. None keeps them as class names.
        skip_broken: Leave out broken rows and log their number, instead of raising.

    Raises:
        CorpusError: Files are missing, damaged or do not match each other; a column is missing; or rows are
            broken, all of which are listed.
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
        logger.warning("%s: left out %s broken rows of %s", printable(source), len(broken), total)
    if not samples:
        raise CorpusError(f"{source} has no usable row", broken)
    return FeatureCorpus(tuple(samples), table.steps, source, tuple(broken))


def check_features(
    table: FeatureTable, *, label_column: str, split_column: str, label_range: tuple[float, float] | None
) -> tuple[list[FeatureSample], list[BrokenRow]]:
    """Convert valid rows to samples, and list all problems of every other row and its features.

    Raises:
        CorpusError: A column is missing.
    """
    metadata = table.metadata
    rows = _rows(table, label_column, split_column)
    non_finite = {name: steps.non_finite() for name, steps in table.steps.items()}
    first_rows: dict[str, int] = {}
    samples, broken = [], list(metadata.broken)
    for row, written in zip(table.places, rows, strict=True):
        line = written.line
        problems = [
            f"{name} of {written.file!r} contains {non_finite[name][row][1]} in step "
            f"{non_finite[name][row][0] + 1}: compute the features again, or replace such values by zero "
            "with `msa-online convert-features --non-finite zero`"
            for name in non_finite
            if row in non_finite[name]
        ]
        label = attempt(problems, checked_label, written, label_range)
        split = attempt(problems, checked_split, written.split)
        if not written.file:
            problems.append("the id is empty: give every sample a unique id")
        elif first_rows.setdefault(written.file, line) != line:
            known = place(metadata.path, first_rows[written.file])
            problems.append(f"id {written.file!r} is that of {known}: give every sample a unique id")
        if problems:
            broken.append(BrokenRow(metadata.path, line, "; ".join(problems)))
        else:
            samples.append(
                FeatureSample(
                    id=written.file,
                    text=written.text,
                    label=label,
                    split=split,
                    speaker=written.speaker.strip() or None,
                    source=metadata.path,
                    line=line,
                    row=row,
                    dialogue=written.dialogue.strip() or None,
                    turn=written.turn.strip() or None,
                )
            )
    return samples, sorted(broken, key=lambda each: each.line)


def _rows(table: FeatureTable, label_column: str, split_column: str) -> list[Row]:
    """The rows as written; `file` is the id of the sample."""
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
            dialogue=cells.get("dialogue", ""),
            turn=cells.get("turn", ""),
        )
        for line, cells in metadata.rows
    ]


def _read_table(path: Path) -> FeatureTable:
    if path.suffix.lower() in PICKLES:
        raise CorpusError(
            f"{path} is a pickle: convert it with `msa-online convert-features "
            f"{shlex.quote(str(path))} FOLDER`"
        )
    if not path.exists():
        raise CorpusError(f"{path} does not exist: give a folder with {FEATURES}, or an .npz file")
    if not is_precomputed_path(path):
        raise CorpusError(
            f"{path} is neither an .npz file nor a folder with {FEATURES}. To extract features from raw "
            f"clips, run `msa-online extract-features {shlex.quote(str(path))} FOLDER --text-encoder NAME`."
        )
    return (read_feature_folder if path.is_dir() else read_feature_archive)(path)
