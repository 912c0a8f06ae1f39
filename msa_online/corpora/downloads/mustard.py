# SPDX-License-Identifier: Apache-2.0
"""MUStARD: utterances of television series, sarcastic or not."""

import json
import re
from pathlib import Path

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.downloads.layout import BY_SPEAKER, Files, Layout, Reading, anywhere, the_one
from msa_online.corpora.layouts import Row, names_by_stem
from msa_online.corpora.splits import tenth_of

TABLE = "sarcasm_data.json"
TESTED_SHOW = "FRIENDS"


def _read(root: Path, protocol: str, files: Files) -> Reading:
    reading = Reading()
    source = next(anywhere(root, TABLE))
    folder = the_one(root, "utterances_final", "the clips")
    clips = names_by_stem(folder)
    try:
        table = json.loads(source.read_text("utf-8"))
        validation = tenth_of(_speaker(name, cells) for name, cells in table.items() if not _is_tested(cells))
        for name, cells in table.items():
            speaker = _speaker(name, cells)
            split = "test" if _is_tested(cells) else "valid" if speaker in validation else "train"
            reading.rows.append(
                Row(
                    source=source,
                    line=0,
                    folder=root,
                    file=(folder / clips.get(name, f"{name}.mp4")).relative_to(root).as_posix(),
                    text=cells["utterance"],
                    split=split if protocol == "speaker-independent" else None,
                    speaker=speaker,
                    dialogue=name,
                    turn=str(len(cells["context"])),
                    labels=(("sarcasm", "yes" if cells["sarcasm"] else "no"), ("show", cells["show"])),
                )
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(
            f"{source} is not MUStARD's table ({type(error).__name__}: {error}): download it again"
        ) from error
    return reading


def _is_tested(cells: dict) -> bool:
    return cells["show"] == TESTED_SHOW


def _speaker(name: str, cells: dict) -> str:
    """A speaker's name in the show; those without one (PERSON, PERSON1) are others in each scene."""
    person = cells["speaker"]
    return f"{cells['show']} {person}" + (f" {name}" if re.fullmatch(r"PERSON\d*", person) else "")


MUSTARD = Layout(
    title="MUStARD",
    looks_like="sarcasm_data.json and utterances_final/*.mp4",
    is_here=lambda folder: (folder / TABLE).is_file() or (folder / "data" / TABLE).is_file(),
    read=_read,
    protocols={
        "speakers": BY_SPEAKER,
        "speaker-independent": "Friends is the test split; validation: a tenth of the other speakers",
    },
    counts={"speakers": {"all": 690}, "speaker-independent": {"train+valid": 334, "test": 356}},
)
