# SPDX-License-Identifier: Apache-2.0
"""Dialogues: which samples belong to one conversation, in which order, and what a model reads together.

The column `dialogue` names the conversation of a sample; the column `turn`, a number, is its place in it. The
samples of a dialogue that are in one split are put in order of their turns. Gaps between turns do not matter.
The column `speaker` says who speaks.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

from msa_online.corpora.corpus import BySplit, CorpusError, Sample, place
from msa_online.corpora.validation import number_in

NUMBER_THEM = "number the utterances of each dialogue in the column 'turn'"
NAME_THEM = "say who speaks in the column 'speaker', or choose a context without speakers (model.context=gru)"


def check_dialogues(corpus: BySplit, required: bool = True, speakers: bool = False) -> None:
    """Check that the turns of every dialogue can be put in order.

    Args:
        corpus: The samples.
        required: Refuse a corpus without any dialogue.
        speakers: Refuse turns without a speaker.

    Raises:
        CorpusError: No sample has a dialogue; or a sample of a dialogue has no turn, a turn that is not a
            number, or that of another sample; or no speaker where there must be one. One line for each kind
            of problem, with its first row and counts.
    """
    of_dialogues = [sample for sample in corpus.samples if sample.dialogue is not None]
    if required and not of_dialogues:
        raise CorpusError(
            f"{corpus.source}: no sample has a dialogue, which a model with context reads: add the columns "
            "'dialogue' and 'turn', or set model.context=none"
        )
    without = [sample for sample in of_dialogues if sample.turn is None]
    words = [sample for sample in of_dialogues if sample.turn is not None and _turn(sample) is None]
    first: dict[tuple[str, str, float], Sample] = {}
    twice = [
        (sample, first[key])
        for sample in of_dialogues
        if (turn := _turn(sample)) is not None
        and first.setdefault(key := (sample.split, sample.dialogue, turn), sample) is not sample
    ]
    problems = []
    if without:
        where = place(without[0].source, without[0].line)
        problems.append(
            f"{where}: dialogue {without[0].dialogue!r} has a sample without a turn "
            f"({_counted(without)}): {NUMBER_THEM}"
        )
    if words:
        where = place(words[0].source, words[0].line)
        problems.append(
            f"{where}: turn {words[0].turn!r} of dialogue {words[0].dialogue!r} is not a number "
            f"({_counted(words)}): {NUMBER_THEM}"
        )
    if twice:
        sample, earlier = twice[0]
        problems.append(
            f"{place(sample.source, sample.line)}: turn {sample.turn} of dialogue {sample.dialogue!r} is "
            f"also that of {place(earlier.source, earlier.line)} ({_counted([each for each, _ in twice])}): "
            "give each utterance of a dialogue its own turn"
        )
    if speakers and (unnamed := [sample for sample in of_dialogues if sample.speaker is None]):
        problems.append(
            f"{place(unnamed[0].source, unnamed[0].line)}: dialogue {unnamed[0].dialogue!r} has a sample "
            f"without a speaker ({_counted(unnamed)}): {NAME_THEM}"
        )
    if problems:
        raise CorpusError("\n".join(problems))


def dialogue_warnings(corpus: BySplit, longest: int) -> list[str]:
    """Warnings about dialogues that are cut, or that are in two splits.

    Args:
        corpus: A corpus that `check_dialogues` accepts.
        longest: Most turns of a dialogue that the model reads together.
    """
    turns: dict[tuple[str, str], int] = defaultdict(int)
    splits: dict[str, set[str]] = defaultdict(set)
    for sample in corpus.samples:
        if sample.dialogue is not None:
            turns[sample.split, sample.dialogue] += 1
            splits[sample.dialogue].add(sample.split)
    warnings = []
    if too_long := [key for key, count in turns.items() if count > longest]:
        most = max(too_long, key=lambda key: turns[key])
        parts = sum(-(-turns[key] // longest) for key in too_long)
        warnings.append(
            f"{len(too_long):,} of {len(turns):,} dialogues have more than the {longest} turns that the "
            f"model reads together (most: {most[1]!r}, {turns[most]:,}): they are cut into {parts:,} "
            "windows, and no turn sees another window; raise model.context_turns if memory allows"
        )
    if shared := [name for name, of_dialogue in splits.items() if len(of_dialogue) > 1]:
        warnings.append(
            f"{len(shared):,} of {len(splits):,} dialogues are in more than one split (for example "
            f"{shared[0]!r}): a turn sees only those of its own split; put each dialogue into one split"
        )
    return warnings


def windows_of(samples: Sequence[Sample], longest: int) -> list[list[int]]:
    """Divide the samples of a split into windows, which a model with context reads together.

    A window is a dialogue, or a stretch of one: a dialogue of more than `longest` turns is cut into the
    smallest number of windows, whose sizes differ by at most one. A sample without a dialogue is a window.

    Args:
        samples: Samples of a corpus that `check_dialogues` accepts.
        longest: Most samples of a window.

    Returns:
        For each window, the positions of its samples in `samples`, in the order of their turns.
    """
    dialogues: dict[str | int, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        dialogues[position if sample.dialogue is None else sample.dialogue].append(position)
    windows = []
    for positions in dialogues.values():
        if len(positions) > 1:
            positions.sort(key=lambda position: _turn(samples[position]))
        parts = -(-len(positions) // longest)
        cuts = [len(positions) * part // parts for part in range(parts + 1)]
        windows += [positions[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False)]
    return windows


def places_of(samples: Sequence[Sample], windows: Sequence[Sequence[int]]) -> dict[int, dict[str, int]]:
    """Numbers that tell a model which samples it reads together.

    Args:
        samples: The samples.
        windows: Positions of the samples of each window.

    Returns:
        For each position `dialogue`, the number of its window, `turn`, its place in it, and `speaker`, the
        number of its speaker within it, in order of appearance. Samples without a speaker share a number.
    """
    places = {}
    for number, window in enumerate(windows):
        names = dict.fromkeys(samples[position].speaker for position in window)
        numbers = {name: number_of for number_of, name in enumerate(names)}
        for turn, position in enumerate(window):
            speaker = numbers[samples[position].speaker]
            places[position] = {"dialogue": number, "turn": turn, "speaker": speaker}
    return places


def _turn(sample: Sample) -> float | None:
    """The turn of a sample; None if its cell is not a number."""
    turn = number_in(sample.turn) if sample.turn is not None else None
    return turn if turn is not None and math.isfinite(turn) else None


def _counted(samples: Sequence[Sample]) -> str:
    dialogues = {(sample.split, sample.dialogue) for sample in samples}
    return (
        f"{len(samples):,} such sample{'s' * (len(samples) != 1)} in {len(dialogues):,} "
        f"dialogue{'s' * (len(dialogues) != 1)}"
    )
