# SPDX-License-Identifier: Apache-2.0
"""Checks of labels and splits: what is legal but probably a mistake, each as one line with counts.

The same speaker, recording or file in two splits makes test scores too good. A class that training never
sees, or that is spelled in two ways, makes them too bad. These are warnings; `--strict` refuses them.
"""

import os
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from msa_online.corpora.corpus import BySplit, CorpusError, Sample
from msa_online.corpora.splits import SPLITS

SMALL_SPLIT = 100  # samples: the standard error of an accuracy is then at most 0.05
SHOWN = 5  # names in a warning


def corpus_warnings(corpus: BySplit, label_range: tuple[float, float] | None) -> list[str]:
    """Warnings about a corpus of clips or features that need no decoding.

    Args:
        corpus: Its samples. Labels that are numbers are checked as scores, others as classes, None not.
        label_range: Smallest and largest legal label of a regression, if it is known.
    """
    samples = corpus.samples
    labels = [sample.label for sample in samples if sample.label is not None]
    warnings = [*_shared_speakers(samples), *_overlapping_windows(samples)]
    if labels and all(isinstance(label, str) for label in labels):
        warnings += _odd_classes([sample for sample in samples if sample.label is not None])
    elif labels and all(isinstance(label, float | int) for label in labels):
        warnings += _one_sided_scores(labels, label_range)
    return warnings


def copy_warnings(corpus: BySplit, contents: Mapping[str, str]) -> list[str]:
    """Warnings about samples with the same bytes in two splits.

    Args:
        corpus: Its samples.
        contents: Hash of the content of each sample, by sample id; "" for samples without content.
    """
    groups = defaultdict(list)
    for sample in corpus.samples:
        if contents[sample.id]:
            groups[contents[sample.id]].append(sample)
    pairs = [
        pair
        for group in groups.values()
        if len(group) > 1
        for pair in _overlaps(group)
        if _file_of(pair[0]) != _file_of(pair[1])
    ]
    if not pairs:
        return []
    count = len({sample.id for pair in pairs for sample in pair})
    return [
        f"{count:,} samples have the same bytes as samples of another split, under other names "
        f"({_pair(pairs[0])}): keep one of each"
    ]


def size_warnings(sizes: Mapping[str, int]) -> list[str]:
    """A warning for each split that is too small to mean anything."""
    return [
        f"{name} has only {size} samples: {_why_small(name, size)}"
        for name, size in sizes.items()
        if size < SMALL_SPLIT
    ]


def refuse_warnings(source: Path, warnings: Sequence[str]) -> None:
    """Refuse a corpus with warnings.

    Raises:
        CorpusError: There are warnings; the message lists all.
    """
    if warnings:
        count = f"{len(warnings)} warning{'s' * (len(warnings) != 1)}"
        raise CorpusError(
            "\n  ".join([f"{source}: {count}, which --strict (data.strict=true) refuses", *warnings])
        )


def _shared_speakers(samples: Sequence[Sample]) -> Iterator[str]:
    splits_of: dict[str, dict[str, str]] = defaultdict(dict)
    for sample in samples:
        if sample.speaker:
            splits_of[_spelling(sample.speaker)].setdefault(sample.split, sample.speaker)
    shared = [of_speaker for of_speaker in splits_of.values() if len(of_speaker) > 1]
    if shared:
        splits = _in_order(shared[0])
        yield (
            f"{len(shared):,} of {len(splits_of):,} speakers are in more than one split (for example "
            f"{shared[0][splits[0]]!r} in {' and '.join(splits)}): scores are too good where voice and face "
            "are known from training; split by speaker"
        )


def _overlapping_windows(samples: Sequence[Sample]) -> Iterator[str]:
    by_file = defaultdict(list)
    for sample in samples:
        by_file[_file_of(sample)].append(sample)
    pairs = [pair for group in by_file.values() if len(group) > 1 for pair in _overlaps(group)]
    if pairs:
        count = len({sample.id for pair in pairs for sample in pair})
        yield (
            f"{count:,} samples overlap samples of another split in the same recording ({_pair(pairs[0])}): "
            "put overlapping windows into one split"
        )


def _overlaps(samples: Sequence[Sample]) -> Iterator[tuple[Sample, Sample]]:
    """For every sample that overlaps samples of another split, in time, a pair with one of these."""
    by_split = defaultdict(list)
    for sample in sorted(samples, key=lambda each: _window_of(each)[0]):
        by_split[sample.split].append(sample)
    for split, others in by_split.items():
        starts = [_window_of(other)[0] for other in others]
        last = list(accumulate(others, lambda one, two: max(one, two, key=lambda each: _window_of(each)[1])))
        for sample in samples:
            start, end = _window_of(sample)
            begun = bisect_left(starts, end)  # so many of the others begin before this one ends
            if sample.split != split and begun and _window_of(last[begun - 1])[1] > start:
                yield last[begun - 1], sample


def _odd_classes(samples: Sequence[Sample]) -> Iterator[str]:
    counts = Counter(sample.label for sample in samples)
    trained = {sample.label for sample in samples if sample.split == "train"}
    if trained and (unseen := {name: count for name, count in counts.items() if name not in trained}):
        yield (
            f"{_classes(unseen)} only outside training: a model can never predict that; add training "
            "clips, or leave these rows out"
        )
    spellings = defaultdict(dict)
    for name, count in counts.items():
        spellings[_spelling(name)][name] = count
    for variants in spellings.values():
        if len(variants) > 1:
            yield f"{_counted(variants)} are different classes, but differ in spelling only: write them alike"
    if single := {name: count for name, count in counts.items() if count == 1}:
        yield (
            f"{len(single):,} of {len(counts):,} classes have one clip only ({_counted(single)}): nothing "
            "can be learned or measured about them; add clips, or leave these rows out"
        )


def _one_sided_scores(labels: Sequence[float], label_range: tuple[float, float] | None) -> Iterator[str]:
    low, high = label_range or (-3.0, 3.0)
    lowest, highest = min(labels), max(labels)
    runs = f"they run from {lowest:g} to {highest:g}, the range is [{low:g}, {high:g}]"
    remedy = "for another scale set data.label_range, for numbers of classes data.task=classification"
    if lowest == highest:
        yield f"all {len(labels):,} labels are {lowest:g}: there is nothing to learn"
    elif low < 0 <= lowest and highest > 0:
        yield f"none of {len(labels):,} labels is negative ({runs}): {remedy}"
    elif lowest < 0 and highest <= 0 < high:
        yield f"none of {len(labels):,} labels is positive ({runs}): {remedy}"


def _why_small(split: str, size: int) -> str:
    if split == "train":
        return f"below {SMALL_SPLIT}, results depend more on these samples and the seed than on the method"
    purpose = "the choice of the best epoch" if split == "valid" else "a comparison of models"
    error = 0.5 / size**0.5
    return (
        f"an accuracy of 0.5 has a standard error of {error:.2f}, too much for {purpose}; have at least "
        f"{SMALL_SPLIT} (0.05)"
    )


def _file_of(sample: Sample) -> str:
    """What two samples of one recording have in common; samples of features stand alone."""
    return sample.id if sample.clip is None else os.path.realpath(sample.clip.path)


def _window_of(sample: Sample) -> tuple[float, float]:
    clip = sample.clip
    if clip is None:
        return 0.0, 1.0
    return clip.start or 0.0, float("inf") if clip.end is None else clip.end


def _spelling(name: str) -> str:
    """A name without what people write differently: case, width, composed letters, spaces and signs."""
    name = "".join(character for character in name if unicodedata.category(character) != "Cf")
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(folded.replace("_", " ").replace("-", " ").split())


def _pair(pair: tuple[Sample, Sample]) -> str:
    first, second = sorted(pair, key=lambda sample: SPLITS.index(sample.split))
    return f"for example {first.id!r} of {first.split} and {second.id!r} of {second.split}"


def _in_order(splits: Mapping[str, object]) -> list[str]:
    return [name for name in SPLITS if name in splits]


def _classes(counts: Mapping[str, int]) -> str:
    subject = "the class" if len(counts) == 1 else f"{len(counts):,} classes,"
    return f"{subject} {_counted(counts)} {'occurs' if len(counts) == 1 else 'occur'}"


def _counted(counts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name!r} ({count:,})" for name, count in list(counts.items())[:SHOWN])
    return shown + (f" and {len(counts) - SHOWN:,} more" if len(counts) > SHOWN else "")
