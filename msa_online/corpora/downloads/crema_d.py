# SPDX-License-Identifier: Apache-2.0
"""CREMA-D: 91 actors, 12 sentences, 6 emotions; everything is in the names of the files."""

import re
from collections.abc import Mapping
from pathlib import Path

from msa_online.corpora.csv_table import read_csv
from msa_online.corpora.downloads.layout import BY_SPEAKER, Files, Layout, Reading, anywhere
from msa_online.corpora.layouts import Row, names_by_stem

NAME = re.compile(r"(\d{4})_([A-Z]{3})_(ANG|DIS|FEA|HAP|NEU|SAD)_(LO|MD|HI|XX?)")
FOLDERS = ("VideoFlash", ".", "AudioWAV", "AudioMP3")
EMOTIONS = {
    "ANG": "anger",
    "DIS": "disgust",
    "FEA": "fear",
    "HAP": "happiness",
    "NEU": "neutral",
    "SAD": "sadness",
}
INTENSITIES = {"LO": "low", "MD": "medium", "HI": "high", "XX": "unspecified", "X": "unspecified"}
SENTENCES = {
    "IEO": "It's eleven o'clock.",
    "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.",
    "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.",
    "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.",
    "WSI": "We'll stop in a couple of minutes.",
}
KNOWN_FAULTS = {"1064_IEO_DIS_MD": "all emotions in one recording", "1076_MTI_SAD_XX": "no speech"}


def _clips(folder: Path) -> dict[str, str]:
    return {stem: name for stem, name in names_by_stem(folder).items() if NAME.fullmatch(stem)}


def _read(root: Path, protocol: str, files: Files) -> Reading:
    reading = Reading()
    place = next(name for name in FOLDERS if _clips(root / name))
    perceived = _perceived(root)
    for stem, file in sorted(names_by_stem(root / place).items()):
        found = NAME.fullmatch(stem)
        if found is None or found[2] not in SENTENCES:
            if place != ".":
                reading.left_out["a name that is not ACTOR_SENTENCE_EMOTION_LEVEL"].append(file)
            continue
        labels = {"emotion": EMOTIONS[found[3]], "intensity": INTENSITIES[found[4]]}
        if perceived:
            labels["perceived"] = perceived.get(stem, "")
        reading.rows.append(
            Row(
                source=root,
                line=0,
                folder=root,
                file=file if place == "." else f"{place}/{file}",
                text=SENTENCES[found[2]],
                speaker=found[1],
                labels=tuple(labels.items()),
            )
        )
        if stem in KNOWN_FAULTS:
            reading.notes.append(
                f"{stem} is known to be faulty ({KNOWN_FAULTS[stem]}): consider deleting its row"
            )
    if place.startswith("Audio"):
        reading.notes.append(f"VideoFlash/ is not there: the rows name the sounds in {place}/")
    return reading


def _perceived(root: Path) -> Mapping[str, str]:
    """The emotion that most raters saw and heard, by clip; empty for ties. Needs summaryTable.csv."""
    source = next(anywhere(root, "summaryTable.csv"), None)
    if source is None:
        return {}
    letters = {emotion[0].upper(): emotion for emotion in EMOTIONS.values()}
    return {
        cells["FileName"]: letters.get(cells["MultiModalVote"], "")
        for _, cells in read_csv(source).rows
        if "FileName" in cells and "MultiModalVote" in cells
    }


CREMA_D = Layout(
    title="CREMA-D",
    looks_like="VideoFlash/1001_DFA_ANG_XX.flv",
    is_here=lambda folder: any(_clips(folder / name) for name in FOLDERS),
    read=_read,
    protocols={"speakers": BY_SPEAKER},
    counts={"speakers": {"all": 7442}},
)
