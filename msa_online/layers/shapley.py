# SPDX-License-Identifier: Apache-2.0
"""Exact Shapley values: the contribution of each modality to what all of them achieve together."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import factorial

import torch
from torch import Tensor

from msa_online.modalities import MODALITIES

SUBSETS: tuple[frozenset[str], ...] = tuple(
    frozenset(chosen) for size in range(len(MODALITIES) + 1) for chosen in combinations(MODALITIES, size)
)
"""All subsets of the modalities, from none to all; `shapley_values` needs the worth of each."""


def shapley_values(
    worth: Mapping[frozenset[str], Tensor], players: Sequence[str] = MODALITIES
) -> dict[str, Tensor]:
    """Divide the worth of all players among them by what each adds to every subset of the others.

        psi_m = sum over S without m of  |S|! (k - |S| - 1)! / k!  (u(S + m) - u(S))

    This is (2.7) of docs/methods/pase.md. The values are exact: all 2^k subsets are evaluated, eight for
    three modalities. They sum to u(all) - u(none); players with equal contributions get equal values; a
    player that never changes anything gets exactly 0.

    Args:
        worth: u, a tensor for each subset of the players, the empty one included; all of one shape.
        players: Names of the players.

    Returns:
        Value of each player, in the shape, unit and precision of `worth`; differentiable.

    Raises:
        ValueError: The worth of a subset is missing.
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
        names = " + ".join(sorted(subset)) or "the empty subset"
        raise ValueError(f"the worth of {names} is missing: exact Shapley values need that of every subset")
    return worth[subset]
