# SPDX-License-Identifier: Apache-2.0
"""Names of the splits, and a seeded split for data without one."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

SPLITS = ("train", "valid", "test")
SHARES = {"train": 0.7, "valid": 0.1, "test": 0.2}
SPLIT_NAMES = {
    "train": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}


def split_of(name: str) -> str | None:
    """Translate a name of a split ("Validation", "val", "dev") into ours; None if it is unknown."""
    return SPLIT_NAMES.get(name.strip("\ufeff\u200b\u200e\u200f \t\r\n\u00a0").lower())


def seeded_split(groups: Sequence[str], seed: int) -> list[str]:
    """Split samples 70/10/20 so that no group, such as a speaker, is in two splits.

    Groups are ordered by a hash of the seed and their names, so the result depends neither on the order of
    the rows nor on Python's random generator. Each group goes to the split that is filled least, relative to
    its share. With three groups or more, no split is empty.

    Args:
        groups: Group of every sample.
        seed: Seed of the split.

    Returns:
        Split of every sample.
    """
    sizes = Counter(groups)
    targets = {name: share * len(groups) for name, share in SHARES.items()}
    filled: dict[str, int] = defaultdict(int)
    split_of_group = {}
    for group in sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest()):
        chosen = min(SPLITS, key=lambda name: filled[name] / targets[name])
        filled[chosen] += sizes[group]
        split_of_group[group] = chosen
    return [split_of_group[group] for group in groups]


def tenth_of(groups: Iterable[str], seed: int = 1111) -> set[str]:
    """A seeded tenth of the distinct groups, at least one: validation data where a protocol names none."""
    ordered = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    return set(ordered[: max(1, round(len(ordered) / 10))])
