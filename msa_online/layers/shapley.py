# SPDX-License-Identifier: Apache-2.0
"""Exact Shapley values: how much each modality adds to what all of them achieve together."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import factorial

import torch
from torch import Tensor

from msa_online.modalities import MODALITIES

SUBSETS: tuple[frozenset[str], ...] = tuple(
    frozenset(chosen) for size in range(len(MODALITIES) + 1) for chosen in combinations(MODALITIES, size)
)
"""All subsets of the modalities, from none to all: whatever is to be shared out needs a value for each."""


def shapley_values(
    worth: Mapping[frozenset[str], Tensor], players: Sequence[str] = MODALITIES
) -> dict[str, Tensor]:
    """Share out the worth of all players among them by what each adds to every subset of the others.

        psi_m = sum over S without m of  |S|! (k - |S| - 1)! / k!  (u(S + m) - u(S))          (METHODS 2.7)

    Exact: 2^k subsets, eight for the three modalities, so nothing is sampled. The shares add up to
    u(all) - u(none); two players that add alike get alike; one that never changes anything gets exactly 0.

    Args:
        worth: u, a tensor of any shape for each subset of the players, the empty one included; all of one
            shape.
        players: Their names.

    Returns:
        Share of each player, of the shape of one worth, in its unit and precision; differentiable.

    Raises:
        ValueError: A subset has no worth.
    """
    count = len(players)
    shares = {}
    for player in players:
        others = [name for name in players if name != player]
        terms = []
        for size in range(count):
            weight = factorial(size) * factorial(count - size - 1) / factorial(count)
            for chosen in combinations(others, size):
                without = frozenset(chosen)
                terms.append(weight * (_worth_of(without | {player}, worth) - _worth_of(without, worth)))
        shares[player] = torch.stack(terms).sum(dim=0)
    return shares


def _worth_of(subset: frozenset[str], worth: Mapping[frozenset[str], Tensor]) -> Tensor:
    if subset not in worth:
        names = " + ".join(sorted(subset)) or "no player at all"
        raise ValueError(f"the worth of {names} is missing: exact Shapley values need every subset's")
    return worth[subset]
