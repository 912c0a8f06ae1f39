# SPDX-License-Identifier: Apache-2.0
"""IEMOCAP: dialogues of two actors side by side; each utterance has a window and a half of the frame."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from msa_online.corpora.downloads.layout import Files, Layout, Reading, text_of, visible
from msa_online.corpora.layouts import Row
from msa_online.corpora.splits import tenth_of

UTTERANCE = r"(Ses0(\d)([FM])_\w+?)_([FM])(\w+)"  # dialogue (session, leading actor), speaker, number
RATING = re.compile(rf"\[(\S+) - (\S+)\]\t({UTTERANCE})\t(\w+)\t\[(\S+), (\S+), (\S+)\]")
SENTENCE = re.compile(r"(\w+) \[(\S+?)-(\S+?)\]:(.*)")
EMOTIONS = {
    "ang": "anger",
    "hap": "happiness",
    "exc": "excitement",
    "sad": "sadness",
    "neu": "neutral",
    "fru": "frustration",
    "fea": "fear",
    "sur": "surprise",
    "dis": "disgust",
    "oth": "other",
}
ONE_OF_FOUR = {"ang": "anger", "hap": "happiness", "exc": "happiness", "sad": "sadness", "neu": "neutral"}
ONE_OF_SIX = {code: EMOTIONS[code] for code in ("hap", "sad", "neu", "ang", "exc", "fru")}
YES_NO = {"happy": "hap", "sad": "sad", "angry": "ang", "neutral": "neu"}
SESSIONS = (1, 2, 3, 4, 5)
VALIDATION = "validation: a tenth of the training dialogues"


@dataclass(frozen=True)
class Protocol:
    """Classes by the codes of the ratings, and the session that is tested; None writes no split."""

    classes: dict[str, str]
    tested: int | None


PROTOCOLS = {
    **{f"4-class-{session}": Protocol(ONE_OF_FOUR, session) for session in reversed(SESSIONS)},
    "6-class": Protocol(ONE_OF_SIX, 5),
    "binary": Protocol({code: EMOTIONS[code] for code in YES_NO.values()}, 5),
    "all": Protocol(EMOTIONS, None),
}


def _read(root: Path, protocol: str, files: Files) -> Reading:
    reading = Reading()
    chosen = PROTOCOLS[protocol]
    for source in visible(root, "Session[1-5]/dialog/EmoEvaluation/Ses*.txt"):
        session = source.parents[2]
        transcript = session / "dialog" / "transcriptions" / source.name
        sentences = _sentences(reading, transcript) if transcript.is_file() else {}
        ratings = list(RATING.finditer(text_of(source)))
        turns = {rating[3]: turn for turn, rating in enumerate(sorted(ratings, key=_start), 1)}
        for rating in ratings:
            _add(reading, root, session, rating, turns[rating[3]], sentences, chosen)
        unrated = [name for name in sentences if name not in turns]
        reading.left_out["a line of a transcript without a rating"] += unrated
    if chosen.tested:
        _split(reading, chosen.tested)
    if protocol == "binary":
        reading.rows = [_yes_no(row) for row in reading.rows]
        reading.notes.append(
            "the published division into 2,717 / 798 / 938 utterances names none of them and cannot be "
            "repeated: these splits are sessions, and their scores do not compare with published ones"
        )
    return reading


def _start(rating: re.Match) -> float:
    """Start of a rated utterance in seconds; infinity if it is not a number, so it comes last."""
    try:
        return float(rating[1])
    except ValueError:
        return math.inf


def _sentences(reading: Reading, transcript: Path) -> dict[str, tuple[str, str, str]]:
    """Start, end and text of the lines of a transcript, by utterance."""
    found = {}
    for number, line in enumerate(text_of(transcript).splitlines(), 1):
        if sentence := SENTENCE.match(line.strip()):
            name, start, end, text = sentence.groups()
            found[name] = (start, end, text.strip())
        elif line.strip():
            reading.left_out["a line of a transcript without a window"].append(
                f"{transcript.name} line {number}"
            )
    return found


def _add(
    reading: Reading,
    root: Path,
    session: Path,
    rating: re.Match,
    turn: int,
    sentences: dict[str, tuple[str, str, str]],
    protocol: Protocol,
) -> None:
    """Add the row of a rated utterance, or the reason why it is left out; `turn` is its place in time."""
    start, end, name, dialogue, _, leading, speaker, _, code, valence, activation, dominance = rating.groups()
    if code == "xxx":
        reading.left_out["no emotion has a majority (xxx)"].append(name)
        return
    if code not in protocol.classes:
        emotion = EMOTIONS.get(code, code)
        reading.left_out[f"{emotion}: no class of this protocol"].append(name)
        return
    video = session / "dialog" / "avi" / "DivX" / f"{dialogue}.avi"
    sound = session / "sentences" / "wav" / dialogue / f"{name}.wav"
    in_dialogue = video.is_file() or not sound.is_file()
    start, end, text = sentences.get(name, (start, end, ""))
    labels = {"emotion": protocol.classes[code], "valence": valence, "activation": activation}
    reading.rows.append(
        Row(
            source=root,
            line=0,
            folder=root,
            file=(video if in_dialogue else sound).relative_to(root).as_posix(),
            text=text,
            start=start if in_dialogue else "",
            end=end if in_dialogue else "",
            speaker=f"{dialogue[:5]}{speaker}",
            region=("0 0 0.5 1" if speaker == leading else "0.5 0 0.5 1") if in_dialogue else "",
            dialogue=dialogue,
            turn=str(turn),
            labels=(*labels.items(), ("dominance", dominance)),
        )
    )


def _split(reading: Reading, tested: int) -> None:
    test = f"Ses{tested:02}"
    validation = tenth_of(row.dialogue for row in reading.rows if not row.dialogue.startswith(test))
    splits = dict.fromkeys(validation, "valid")
    reading.rows = [
        replace(row, split="test" if row.dialogue.startswith(test) else splits.get(row.dialogue, "train"))
        for row in reading.rows
    ]


def _yes_no(row: Row) -> Row:
    """A row with a column of yes and no for each of four emotions."""
    emotion = dict(row.labels)["emotion"]
    answers = {name: "yes" if EMOTIONS[code] == emotion else "no" for name, code in YES_NO.items()}
    return replace(row, labels=(*answers.items(), *row.labels))


IEMOCAP = Layout(
    title="IEMOCAP",
    looks_like="Session1/dialog/EmoEvaluation/",
    is_here=lambda folder: bool(visible(folder, "Session[1-5]/dialog/EmoEvaluation")),
    read=_read,
    protocols={
        **{
            f"4-class-{session}": f"neutral, happiness with excitement, anger, sadness; session {session} "
            f"is the test split; {VALIDATION}"
            for session in reversed(SESSIONS)
        },
        "6-class": f"with excitement and frustration as classes; session 5 is the test split; {VALIDATION}",
        "binary": f"yes/no columns happy, sad, angry, neutral; session 5 is the test split; {VALIDATION}",
        "all": "all ten emotions, without splits",
    },
    counts={
        **{f"4-class-{session}": {"all": 5531} for session in SESSIONS},
        "6-class": {"train+valid": 5810, "test": 1623},
    },
)
