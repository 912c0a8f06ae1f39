# SPDX-License-Identifier: Apache-2.0
"""MER2023: Chinese clips of one speaker each, a table of labels for training and for each of three tests."""

from pathlib import Path

from msa_online.corpora.csv_table import read_csv, require_columns
from msa_online.corpora.downloads.layout import Files, Layout, Reading, anywhere, columns_of, the_one
from msa_online.corpora.layouts import Row, names_by_stem
from msa_online.corpora.splits import tenth_of

TESTS = {"multi": "test1", "noise": "test2", "semi": "test3"}
EMOTIONS = {
    "neutral": "neutral",
    "angry": "anger",
    "happy": "happiness",
    "sad": "sadness",
    "worried": "worry",
    "surprise": "surprise",
}
SENTENCE_COLUMNS = ("sentence", "chinese", "text")


def _read(root: Path, protocol: str, files: Files) -> Reading:
    reading = Reading()
    sentences = _sentences(root)
    for part in ("train", TESTS[protocol]):
        table = read_csv(the_one(root, f"{part}-label.csv", "labels"))
        require_columns(table.path, table.columns, ["name", "discrete"])
        for row in table.broken:
            reading.left_out["a row with a wrong number of cells"].append(
                f"{table.path.name} line {row.line}"
            )
        folder = next((path for path in anywhere(root, part) if path.is_dir()), root / part)
        clips = names_by_stem(folder)
        validation = tenth_of(cells["name"] for _, cells in table.rows)
        for line, cells in table.rows:
            name = cells["name"].strip()
            emotion = cells["discrete"].strip().lower()
            labels = {"emotion": EMOTIONS.get(emotion, emotion)}
            if "valence" in table.columns:
                labels["valence"] = cells["valence"]
            training = "valid" if cells["name"] in validation else "train"
            reading.rows.append(
                Row(
                    source=table.path,
                    line=line,
                    folder=root,
                    file=(folder / clips.get(name, f"{name}.avi")).relative_to(root).as_posix(),
                    text=sentences.get(name, ""),
                    split=training if part == "train" else "test",
                    labels=tuple(labels.items()),
                )
            )
    if not sentences:
        reading.notes.append(
            "the download has no transcripts, so the text of all clips is empty: put transcription.csv with "
            "the columns name and sentence beside the labels, and import again"
        )
    return reading


def _sentences(root: Path) -> dict[str, str]:
    """Transcripts by clip, from a transcription.csv as the organisers' baseline writes it."""
    source = next(anywhere(root, "transcription.csv"), None)
    if source is None:
        return {}
    table = read_csv(source)
    column = next((name for name in SENTENCE_COLUMNS if name in table.columns), SENTENCE_COLUMNS[0])
    require_columns(source, table.columns, ["name", column])
    return {cells["name"]: cells[column] for _, cells in table.rows}


MER2023 = Layout(
    title="MER2023",
    looks_like="train-label.csv and train/*.avi",
    is_here=lambda folder: any(
        {"name", "discrete"} <= columns_of(path)
        for pattern in ("train-label.csv", "*/train-label.csv")
        for path in folder.glob(pattern)
    ),
    read=_read,
    protocols={
        name: f"test split MER-{name.upper()}; validation: a tenth of the training clips" for name in TESTS
    },
    counts={
        name: {"train+valid": 3373, "test": test}
        for name, test in {"multi": 411, "noise": 412, "semi": 834}.items()
    },
)
