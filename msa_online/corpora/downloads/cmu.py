# SPDX-License-Identifier: Apache-2.0
"""CMU-MOSI and CMU-MOSEI as CMU distributes them: whole videos, transcripts with times, labels apart."""

import ast
import csv
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.csv_table import read_csv
from msa_online.corpora.downloads.layout import BY_SPEAKER, Files, Layout, Reading, anywhere, text_of, visible
from msa_online.corpora.layouts import MMSA_LABELS, Row, names_by_stem
from msa_online.corpora.splits import split_of
from msa_online.extras import why_not_installed

Key = tuple[str, str]  # video and number of the clip in it
EMOTIONS = ("happiness", "sadness", "anger", "surprise", "disgust", "fear")
SAME_TIME = 0.05  # seconds by which a window may differ between transcript and labels
CUT_OUT = ("Segmented", "Full")
MOSI_VALID = """WKA5OygbEKI X3j2zQgwYgE ZAIRrfG22O0 ZUXBRvtny7o _dI--eQ6qVU aiEXnCPZubE atnd_PF-Lbs
bOL9jKpeJRs bvLlb-M3UXU c5xsKMxpXnc"""
MOSI_TEST = """c7UH_rxdZv4 cM3Yna7AavY cW1FSBF59ik cXypl4FnoZo d3_k5Xpfmik d6hH302o4v8 dq3Nf_lMPnE
etzxEpPuc6I f9O3YtZ2VfI f_pcplsH_V0 fvVhgmXxadc iiK8YX8oH1E jUzDDGyPkXU k5Y_838nuGo lXPQBPVc5Cw
nbWiPyCm4g0 nzpVDcQ0ywM ob23OKe5a9Q pLTX3ipuDJI phBUpBr1hSo rnaNMUZpvvg tIrG4oNLFzE tStelxIAHjw
tmZoasNr4rU v0zCBqDeKcE vvZ4IcEtiZc vyB00TXsimI wMbj6ajWbic yDtzw_Y-7RU yvsjCA6Y5Fc zhpQhgha_KU"""


@dataclass(frozen=True)
class Segment:
    """A sentence of a video; times and labels are empty where a file does not give them."""

    text: str = ""
    start: str = ""
    end: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    split: str | None = None


def _read_mosi(root: Path, protocol: str, files: Files) -> Reading:
    reading = Reading()
    segments: dict[Key, Segment] = {}
    for source in visible(root, "Transcript/Segmented/*.annotprocessed"):
        for number, line in enumerate(text_of(source).splitlines(), 1):
            found = re.fullmatch(r"(\d+)_(?:DELIM_)?(.*)", line.strip())
            if found:
                segments[source.stem, found[1]] = Segment(found[2].strip())
            elif line.strip():
                reading.left_out["a line of a transcript without a number"].append(
                    f"{source.name} line {number}"
                )
    labels = files.labels or _first(
        root, "OpinionLevelSentiment.csv", "CMU_MOSI_Opinion_Labels.csd", "label.csv"
    )
    if labels is None:
        raise CorpusError(
            f"{root} has no labels (Labels/OpinionLevelSentiment.csv, CMU_MOSI_Opinion_Labels.csd, or MMSA's "
            "label.csv): name their file with --labels FILE"
        )
    splits = dict.fromkeys(MOSI_VALID.split(), "valid") | dict.fromkeys(MOSI_TEST.split(), "test")
    splits = {video: splits.get(video, "train") for video, _ in segments}
    return _joined(reading, root, _labelled(labels, segments, ("label",)), splits)


def _read_mosei(root: Path, protocol: str, files: Files) -> Reading:
    reading = Reading()
    segments: dict[Key, Segment] = {}
    for source in visible(root, "Transcript/Segmented/Combined/*.txt"):
        for number, line in enumerate(text_of(source).splitlines(), 1):
            cells = line.strip().split("___", 4)
            if len(cells) == 5:
                segments[cells[0], cells[1]] = Segment(cells[4].strip(), cells[2], cells[3])
            elif line.strip():
                where = f"{source.name} line {number}"
                reading.left_out["a line of a transcript without five parts"].append(where)
    labels = files.labels or _first(root, "CMU_MOSEI_Labels.csd", "label.csv")
    if labels is None:
        raise CorpusError(
            f"{root} has no labels (CMU_MOSEI_Labels.csd of the CMU-MultimodalSDK, or MMSA's label.csv): "
            "name their file with --labels FILE"
        )
    labelled = _labelled(labels, segments, ("label", *EMOTIONS))
    splits: Mapping[str, str] = {}
    folds = files.splits or _first(root, "cmu_mosei_std_folds.py")
    if folds:
        splits = _folds(folds)
    elif not any(segment.split for segment in labelled.values()):
        reading.notes.append(
            "no file names the official splits: give cmu_mosei_std_folds.py of the CMU-MultimodalSDK with "
            f"--splits FILE, or MMSA's label.csv with --labels FILE; until then, {BY_SPEAKER}"
        )
    return _joined(reading, root, labelled, splits)


def _first(root: Path, *names: str) -> Path | None:
    return next(
        (path for name in names for path in (*anywhere(root, name), root.parent / name) if path.is_file()),
        None,
    )


def _joined(
    reading: Reading, root: Path, segments: Mapping[Key, Segment], splits: Mapping[str, str]
) -> Reading:
    """Add a row for every segment that has a label and a split."""
    clips = {kind: _videos(root, kind) for kind in CUT_OUT}
    for (video, clip), segment in segments.items():
        name = f"{video}_{clip}"
        whole, cut = clips["Full"].get(video), clips["Segmented"].get(name)
        window = (segment.start, segment.end) if whole and segment.end else ("", "")
        split = splits.get(video, segment.split)
        if not segment.labels:
            reading.left_out["a sentence without a label"].append(name)
        elif split is None and (splits or any(each.split for each in segments.values())):
            reading.left_out["in none of train, valid and test"].append(name)
        else:
            reading.rows.append(
                Row(
                    source=root,
                    line=0,
                    folder=root,
                    file=whole if window[1] else cut or f"Video/Full/{video}.mp4",
                    text=segment.text,
                    split=split,
                    start=window[0],
                    end=window[1],
                    speaker=video,
                    dialogue=video,
                    turn=clip,
                    labels=segment.labels,
                )
            )
    return reading


def _videos(root: Path, kind: str) -> dict[str, str]:
    """Videos of a kind ("Full" or "Segmented"), relative to `root`, by stem."""
    found = {}
    for folder in ("Video", "Videos"):
        for place in (f"{folder}/{kind}", f"{folder}/{kind}/Combined"):
            found |= {stem: f"{place}/{name}" for stem, name in names_by_stem(root / place).items()}
    return found


def _labelled(source: Path, segments: Mapping[Key, Segment], columns: tuple[str, ...]) -> dict[Key, Segment]:
    """The segments with the labels of a file, whatever its format."""
    if source.suffix == ".csd":
        return _with_csd(source, segments, columns)
    if source.name == "OpinionLevelSentiment.csv":
        return _with_opinions(source, segments)
    table = read_csv(source)
    if not {"video_id", "clip_id", "label"} <= set(table.columns):
        raise CorpusError(
            f"{source} is no file of labels: give MMSA's label.csv (video_id, clip_id, label, mode), "
            "OpinionLevelSentiment.csv of CMU-MOSI, or a .csd of the CMU-MultimodalSDK"
        )
    cells_of = {(cells["video_id"], cells["clip_id"]): cells for _, cells in table.rows}
    named = [name for name in MMSA_LABELS if name in table.columns]
    return {
        key: replace(
            segment,
            labels=tuple((name, cells_of[key][name]) for name in named),
            split=cells_of[key].get("mode") or None,
        )
        if key in cells_of
        else segment
        for key, segment in segments.items()
    }


def _with_opinions(source: Path, segments: Mapping[Key, Segment]) -> dict[Key, Segment]:
    """CMU-MOSI's table, which has no header: start, end, video, number of the segment, label."""
    labelled = dict(segments)
    for number, cells in enumerate(csv.reader(io.StringIO(text_of(source))), 1):
        if len(cells) != 5:
            raise CorpusError(
                f"{source} line {number}: {len(cells)} cells, expected start,end,video,segment,label"
            )
        start, end, video, clip, label = (cell.strip() for cell in cells)
        segment = segments.get((video, clip), Segment())
        labelled[video, clip] = replace(segment, start=start, end=end, labels=(("label", label),))
    return labelled


def _with_csd(source: Path, segments: Mapping[Key, Segment], columns: tuple[str, ...]) -> dict[Key, Segment]:
    """Labels of a computational sequence, found by their times; without times, by their order in a video."""
    labelled = dict(segments)
    of_video: dict[str, list[Key]] = {}
    for key in segments:
        of_video.setdefault(key[0], []).append(key)
    for video, intervals, features in _sequence(source):
        timed = [key for key in of_video.get(video, []) if segments[key].end]
        in_order = sorted(of_video.get(video, []), key=lambda key: int(key[1]))
        ranks = sorted(range(len(intervals)), key=lambda index: intervals[index][0])
        for rank, index in enumerate(ranks):
            start, end = (float(second) for second in intervals[index])
            labels = tuple(zip(columns, (f"{value:.6g}" for value in features[index]), strict=False))
            if timed:
                near = min(timed, key=lambda key: abs(float(segments[key].start) - start))
                distance = max(abs(float(segments[near].start) - start), abs(float(segments[near].end) - end))
                if distance <= SAME_TIME:
                    labelled[near] = replace(segments[near], labels=labels)
            elif len(in_order) == len(ranks):
                key = in_order[rank]
                labelled[key] = replace(segments[key], start=f"{start:g}", end=f"{end:g}", labels=labels)
    return labelled


def _sequence(source: Path) -> Iterator[tuple[str, list[list[float]], list[list[float]]]]:
    """Videos of a .csd file with their intervals (segments, 2) and features (segments, values)."""
    if reason := why_not_installed("h5py"):
        raise CorpusError(f"{source} is an HDF5 file: {reason}")
    import h5py

    try:
        with h5py.File(source) as file:
            (sequence,) = file.values()
            for video, entry in sequence["data"].items():
                yield video, entry["intervals"][()].tolist(), entry["features"][()].tolist()
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise CorpusError(f"{source} is not a computational sequence ({error}): download it again") from error


def _folds(source: Path) -> dict[str, str]:
    """The split of every video, from the lists standard_train_fold, standard_valid_fold, standard_test_fold.

    The file is Python; its lists are read and nothing in it is executed.
    """
    splits = {}
    try:
        for node in ast.parse(text_of(source)).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found = re.fullmatch(r"standard_(\w+)_fold", node.targets[0].id)
                if found and (split := split_of(found[1])):
                    splits |= dict.fromkeys(ast.literal_eval(node.value), split)
    except (SyntaxError, ValueError, TypeError) as error:
        raise CorpusError(f"{source} is no list of folds ({error}): download it again") from error
    if set(splits.values()) != {"train", "valid", "test"}:
        raise CorpusError(
            f"{source} has no lists standard_train_fold, standard_valid_fold and standard_test_fold: give "
            "cmu_mosei_std_folds.py of the CMU-MultimodalSDK"
        )
    return splits


MOSI = Layout(
    title="CMU-MOSI",
    looks_like="Transcript/Segmented/*.annotprocessed",
    is_here=lambda folder: bool(visible(folder, "Transcript/Segmented/*.annotprocessed")),
    read=_read_mosi,
    protocols={"official": "the videos of each split in the CMU-MultimodalSDK"},
    counts={"official": {"train": 1284, "valid": 229, "test": 686}},
    takes=("labels",),
)
MOSEI = Layout(
    title="CMU-MOSEI",
    looks_like="Transcript/Segmented/Combined/*.txt",
    is_here=lambda folder: bool(visible(folder, "Transcript/Segmented/Combined/*.txt")),
    read=_read_mosei,
    protocols={"official": "--splits, or the column `mode` of MMSA's label.csv"},
    counts={"official": {"train": 16326, "valid": 1871, "test": 4659}},
    takes=("labels", "splits"),
)
