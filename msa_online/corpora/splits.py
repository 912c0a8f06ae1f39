# SPDX-License-Identifier: Apache-2.0
"""Names of the splits, and a seeded split for data that bring none."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

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
    """Translate what data call a split ("Validation", "val", "dev") into ours; None if it is not one."""
    return SPLIT_NAMES.get(name.strip().lower())


def seeded_split(groups: Sequence[str], seed: int) -> list[str]:
    """Share samples out 70/10/20 so that no group, such as a speaker, is in two splits.

    The order of the groups follows from a hash of the seed and their names, so the result depends neither
    on the order of the rows nor on Python's random generator. Each group goes to the split that lacks
    most of its share, which leaves no split empty from three groups on.

    Args:
        groups: The group of every sample.
        seed: Another seed is another split.

    Returns:
        The split of every sample.
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
