# SPDX-License-Identifier: Apache-2.0
"""RAVDESS: 24 actors speak and sing two sentences; everything is in the names of the files."""

import re
from pathlib import Path

from msa_online.corpora.downloads.layout import BY_SPEAKER, Files, Layout, Reading, visible
from msa_online.corpora.layouts import Row

NAME = re.compile(r"(0[1-3])-(0[12])-(0[1-8])-(0[12])-(0[12])-(0[12])-(\d\d)")
EMOTIONS = ("neutral", "calm", "happiness", "sadness", "anger", "fear", "disgust", "surprise")
SENTENCES = {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."}
PLACES = ("Actor_*/*", "*_[Aa]ctor*/Actor_*/*")  # the second as the archives are unpacked side by side
CHANNELS = {"01": "speech", "02": "song"}
VIDEO_ONLY = "02"


def _read(root: Path, protocol: str, files: Files) -> Reading:
    reading = Reading()
    best: dict[str, Path] = {}  # the most complete file of every recording
    paths = [path for pattern in PLACES for path in visible(root, pattern)]
    for path in sorted(paths, key=lambda path: path.name):
        found = NAME.fullmatch(path.stem)
        if found is None:
            if path.is_file():
                reading.left_out["a name that is not seven numbers"].append(path.name)
        elif protocol not in ("all", CHANNELS[found[2]]):
            reading.left_out[f"{CHANNELS[found[2]]}: not in this protocol"].append(path.name)
        elif best.setdefault(path.stem[3:], path) is not path:
            reading.left_out["another file of the same recording is used"].append(path.name)
    if mute := sum(path.stem.startswith(VIDEO_ONLY) for path in best.values()):
        reading.notes.append(f"{mute:,} recordings are there without sound only")
    for path in best.values():
        _, channel, emotion, intensity, sentence, _, actor = NAME.fullmatch(path.stem).groups()
        labels = {
            "emotion": EMOTIONS[int(emotion) - 1],
            "intensity": {"01": "normal", "02": "strong"}[intensity],
            "channel": CHANNELS[channel],
        }
        reading.rows.append(
            Row(
                source=root,
                line=0,
                folder=root,
                file=path.relative_to(root).as_posix(),
                text=SENTENCES[sentence],
                speaker=f"Actor_{actor}",
                labels=tuple(labels.items()),
            )
        )
    return reading


RAVDESS = Layout(
    title="RAVDESS",
    looks_like="Actor_01/01-01-03-01-01-01-01.mp4",
    is_here=lambda folder: any(
        NAME.fullmatch(path.stem) for pattern in PLACES for path in folder.glob(pattern)
    ),
    read=_read,
    protocols={
        "speech": f"spoken sentences; {BY_SPEAKER}",
        "song": f"sung sentences; {BY_SPEAKER}",
        "all": f"both; {BY_SPEAKER}",
    },
    counts={"speech": {"all": 1440}, "song": {"all": 1012}, "all": {"all": 2452}},
)
