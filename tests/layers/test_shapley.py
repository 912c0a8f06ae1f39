# SPDX-License-Identifier: Apache-2.0
from itertools import permutations

import pytest
import torch
from torch import Tensor

from msa_online.layers.shapley import SUBSETS, shapley_values
from msa_online.modalities import MODALITIES

ALL, NONE = frozenset(MODALITIES), frozenset()
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def random_worth(*shape: int, seed: int = 0) -> dict[frozenset[str], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {subset: torch.randn(shape, generator=generator, dtype=torch.float64) for subset in SUBSETS}


def mean_over_all_orders(worth: dict[frozenset[str], Tensor]) -> dict[str, Tensor]:
    """The definition: what a player adds to those who came before, averaged over the six orders of coming."""
    shares = {name: torch.zeros_like(worth[NONE]) for name in MODALITIES}
    for order in permutations(MODALITIES):
        for place, name in enumerate(order):
            before = frozenset(order[:place])
            shares[name] += (worth[before | {name}] - worth[before]) / 6
    return shares


def test_there_are_eight_subsets_from_none_to_all():
    assert len(set(SUBSETS)) == 8 and SUBSETS[0] == NONE and SUBSETS[-1] == ALL


@pytest.mark.parametrize("shape", [(), (5,), (4, 3)])
def test_shares_are_those_of_the_definition_for_worths_of_any_shape(shape):
    worth = random_worth(*shape)
    shares, expected = shapley_values(worth), mean_over_all_orders(worth)
    assert list(shares) == list(MODALITIES)
    for name in MODALITIES:
        torch.testing.assert_close(shares[name], expected[name], **EXACT)


def test_nothing_is_lost_or_invented_in_sharing():
    worth = random_worth(7)
    total = sum(shapley_values(worth).values())
    torch.testing.assert_close(total, worth[ALL] - worth[NONE], **EXACT)


def test_modalities_that_add_alike_get_alike():
    worth = random_worth(7)
    swap = {"audio": "vision", "vision": "audio", "text": "text"}
    for subset in SUBSETS:  # make audio and vision interchangeable
        worth[frozenset(swap[name] for name in subset)] = worth[subset]
    shares = shapley_values(worth)
    torch.testing.assert_close(shares["audio"], shares["vision"], **EXACT)
    assert not torch.allclose(shares["audio"], shares["text"])


def test_a_modality_that_changes_nothing_gets_exactly_nothing():
    worth = random_worth(7)
    for subset in SUBSETS:
        worth[subset | {"vision"}] = worth[subset - {"vision"}]
    assert torch.equal(shapley_values(worth)["vision"], torch.zeros(7, dtype=torch.float64))


def test_the_shares_of_a_sum_are_the_sums_of_the_shares():
    first, second = random_worth(7, seed=1), random_worth(7, seed=2)
    together = shapley_values({subset: first[subset] + second[subset] for subset in SUBSETS})
    for name in MODALITIES:
        expected = shapley_values(first)[name] + shapley_values(second)[name]
        torch.testing.assert_close(together[name], expected, **EXACT)


def test_a_worth_that_adds_up_is_shared_out_as_it_was_put_in():
    alone = {"text": 5.0, "audio": -1.0, "vision": 2.0}
    worth = {subset: torch.tensor(sum(map(alone.get, subset)), dtype=torch.float64) for subset in SUBSETS}
    assert {name: share.item() for name, share in shapley_values(worth).items()} == pytest.approx(alone)


def test_shares_pass_gradients_back():
    worth = {subset: value.requires_grad_() for subset, value in random_worth().items()}
    shapley_values(worth)["text"].backward()
    assert worth[ALL].grad.item() == pytest.approx(1 / 3)
    assert worth[frozenset({"text", "audio"})].grad.item() == pytest.approx(1 / 6)
    assert worth[NONE].grad.item() == pytest.approx(-1 / 3)


def test_a_forgotten_subset_is_named():
    worth = random_worth()
    del worth[frozenset({"text", "audio"})]
    with pytest.raises(ValueError, match=r"audio \+ text is missing"):
        shapley_values(worth)
    with pytest.raises(ValueError, match="the empty subset is missing"):
        shapley_values({subset: value for subset, value in random_worth().items() if subset})
