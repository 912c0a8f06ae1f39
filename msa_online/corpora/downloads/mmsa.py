# SPDX-License-Identifier: Apache-2.0
"""CH-SIMS (v1 and v2), and CMU-MOSI and CMU-MOSEI as the authors of MMSA distribute them."""

from pathlib import Path

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.csv_table import read_csv
from msa_online.corpora.downloads.layout import Files, Layout, Reading
from msa_online.corpora.layouts import mmsa_table, read_mmsa
from msa_online.corpora.splits import split_of


def _kind(folder: Path) -> str | None:
    """Which data set the table of a folder belongs to; None without a table of MMSA's."""
    source = mmsa_table(folder)
    try:
        table = read_csv(source) if source else None
    except CorpusError:  # reading it as this layout reports the error
        return "ch-sims-v2" if source.name == "meta.csv" else "mmsa"
    if table is None or not {"video_id", "clip_id"} <= set(table.columns):
        return None
    videos = {cells["video_id"] for _, cells in table.rows}
    if not any(
        (folder / "Raw" / video).is_dir() for video in videos if video
    ):  # the labels of another layout
        return None
    if "label_T" not in table.columns:
        return "ch-sims-v2" if source.name == "meta.csv" else "mmsa"
    first = table.rows[0][1]["video_id"] if table.rows else ""
    return "ch-sims" if first.startswith("video_") else "ch-sims-v2"


def _read(root: Path, protocol: str, files: Files) -> Reading:
    reading = Reading()
    table = read_mmsa(mmsa_table(root), None)
    for row in table.broken:
        reading.left_out["a row with a wrong number of cells"].append(f"{row.source.name} line {row.line}")
    for row in table.rows:
        label = dict(row.labels).get("label", "").strip()
        name = f"{row.dialogue}/{row.turn}"
        if not label:
            reading.left_out["no label (the unsupervised part)"].append(name)
        elif row.split is None or split_of(row.split) is None:
            reading.left_out["in none of train, valid and test"].append(name)
        else:
            reading.rows.append(row)
    return reading


def _layout(name: str, title: str, looks_like: str, counts: dict[str, int]) -> Layout:
    return Layout(
        title=title,
        looks_like=looks_like,
        is_here=lambda folder: _kind(folder) == name,
        read=_read,
        protocols={"official": "the column `mode`"},
        counts={"official": counts} if counts else {},
    )


CH_SIMS = _layout(
    "ch-sims",
    "CH-SIMS",
    "label.csv with the column label_T, and Raw/video_0001/",
    {"train": 1368, "valid": 456, "test": 457},
)
CH_SIMS_V2 = _layout(
    "ch-sims-v2",
    "CH-SIMS v2",
    "meta.csv or label.csv with the column label_T, and Raw/",
    {"train": 2722, "valid": 647, "test": 1034},
)
MMSA = _layout("mmsa", "CMU-MOSI or CMU-MOSEI in MMSA's layout", "label.csv and Raw/<video_id>/", {})
