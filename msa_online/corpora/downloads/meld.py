# SPDX-License-Identifier: Apache-2.0
"""MELD: three tables of utterances, and a folder of clips for each."""

from dataclasses import replace
from pathlib import Path

from msa_online.corpora.downloads.layout import Files, Layout, Reading
from msa_online.corpora.layouts import MELD_METADATA, meld_tables, read_meld

COLUMNS = {"Emotion": "emotion", "Sentiment": "sentiment"}


def _read(root: Path, protocol: str, files: Files) -> Reading:
    reading = Reading()
    table = read_meld(root, None)
    for row in table.broken:
        reading.left_out["a row with a wrong number of cells"].append(f"{row.source.name} line {row.line}")
    fallbacks, twins = 0, 0
    for row in table.rows:
        name = Path(row.file).name
        fallbacks += name.startswith("final_videos_test")
        twins += (root / row.file).with_name(f"final_videos_test{name}").is_file()
        labels = tuple((COLUMNS[column], cell.strip().lower()) for column, cell in row.labels)
        reading.rows.append(replace(row, labels=labels))
    missing = [MELD_METADATA[split] for split, source in meld_tables(root).items() if source is None]
    if missing:
        reading.notes.append(f"{', '.join(missing)} not found: their splits are empty")
    if fallbacks:
        reading.notes.append(f"{fallbacks:,} clips of the test split are named final_videos_test...")
    if twins:
        reading.notes.append(
            f"{twins:,} clips of the test split exist a second time as final_videos_test...; the plainly "
            "named ones were taken. Look at a few of both: users report that the second are the right ones"
        )
    return reading


MELD = Layout(
    title="MELD",
    looks_like="train_sent_emo.csv, dev_sent_emo.csv, test_sent_emo.csv",
    is_here=lambda folder: any(meld_tables(folder).values()),
    read=_read,
    protocols={"official": "the three tables"},
    counts={"official": {"train": 9989, "valid": 1109, "test": 2610}},
)
