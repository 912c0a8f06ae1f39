# SPDX-License-Identifier: Apache-2.0
"""Prototypes: running means by class, the loss that calls states to them, their costs."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from msa_online.methods.pase.prototypes import PrototypeBanks, prototype_contrast, prototype_cost
from tests.equations import assert_equation

CLASSES, WIDTH = 4, 6
EXACT = {"atol": 1e-6, "rtol": 0}


def make_banks(momentum: float = 0.9, **settings) -> PrototypeBanks:
    return PrototypeBanks(settings.get("classes", CLASSES), WIDTH, momentum)


def make_states(batch: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, WIDTH, generator=generator)


def membership(classes: list[int], absent: tuple[tuple[int, int], ...] = ()) -> Tensor:
    """Class of each sample in every modality, but for (modality, sample) that are absent."""
    member = F.one_hot(torch.tensor(classes), CLASSES).bool().expand(3, -1, -1).clone()
    for modality, sample in absent:
        member[modality, sample] = False
    return member


BATCH = [0, 0, 1, 3, 1, 0, 3, 0]  # nobody is of class 2
ABSENT = ((1, 0), (1, 3), (1, 6), (2, 2))  # class 3 is not in modality 1 either


def step(banks: PrototypeBanks, states: Tensor, member: Tensor, taken: bool = True) -> None:
    banks.collect(states, member)
    banks.end_step(taken)


def class_mean(states: Tensor, member: Tensor, modality: int, number: int) -> Tensor:
    return states[modality, member[modality, :, number]].mean(dim=0)


def test_a_new_bank_knows_no_class():
    banks = make_banks()
    assert not banks.known.any() and not banks.means.any()
    assert banks.means.shape == (3, CLASSES, WIDTH) and banks.means.dtype == torch.float32
    assert not list(banks.parameters())


def test_the_first_samples_of_a_class_are_its_prototype_and_later_ones_move_it():
    banks, member = make_banks(0.9), membership(BATCH, ABSENT)
    first, then = make_states(seed=0), make_states(seed=1)
    step(banks, first, member)
    expected = torch.zeros(3, CLASSES, WIDTH)
    for modality in range(3):
        for number in range(CLASSES):
            if member[modality, :, number].any():
                expected[modality, number] = class_mean(first, member, modality, number)
    assert_equation("2.1", "prototypes of the first step", banks.means, expected, **EXACT)
    assert banks.known.tolist() == member.any(dim=1).tolist()
    assert not banks.known[1, 3] and not banks.known[:, 2].any()
    later = membership([3] * 8)
    step(banks, then, later)
    for modality in (0, 2):
        moved = 0.9 * expected[modality, 3] + 0.1 * then[modality].mean(dim=0)
        assert_equation("2.1", "prototype of the second step", banks.means[modality, 3], moved, **EXACT)
    torch.testing.assert_close(banks.means[1, 3], then[1].mean(dim=0), **EXACT)  # at first sight
    assert not banks.known[:, 2].any()
    torch.testing.assert_close(banks.means[:, :3], expected[:, :3], atol=0, rtol=0)  # not in the batch


@pytest.mark.parametrize("count", [1, 7])
def test_equal_batches_draw_a_prototype_near_as_the_momentum_says(count):
    banks, member = make_banks(0.8), membership([1] * 8)
    start, states = make_states(seed=0), make_states(seed=1)
    step(banks, start, member)
    for _ in range(count):
        step(banks, states, member)
    kept = 0.8**count
    expected = (1 - kept) * states.mean(dim=1) + kept * start.mean(dim=1)
    torch.testing.assert_close(banks.means[:, 1], expected, **EXACT)


def test_without_momentum_a_prototype_is_the_last_mean():
    banks, member = make_banks(0.0), membership([1] * 8)
    for seed in range(3):
        step(banks, make_states(seed=seed), member)
    torch.testing.assert_close(banks.means[:, 1], make_states(seed=2).mean(dim=1), **EXACT)


def test_the_order_of_samples_and_how_a_batch_is_cut_change_nothing():
    states, member = make_states(), membership(BATCH, ABSENT)
    whole, shuffled, cut = (make_banks() for _ in range(3))
    order = torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])
    for shift in (0.0, 1.0):
        step(whole, states + shift, member)
        step(shuffled, (states + shift)[:, order], member[:, order])
        cut.collect((states + shift)[:, :3], member[:, :3])  # uneven, some classes in one part only
        cut.collect((states + shift)[:, 3:], member[:, 3:])
        cut.end_step(taken=True)
    for other in (shuffled, cut):
        torch.testing.assert_close(other.means, whole.means, **EXACT)
        assert torch.equal(other.known, whole.known)


def test_a_skipped_step_is_forgotten():
    """It was skipped for what is not finite: that must not come back with the next step."""
    banks, member = make_banks(), membership(BATCH)
    step(banks, make_states(), member)
    before = banks.means.clone()
    step(banks, torch.full((3, 8, WIDTH), math.nan), member, taken=False)
    assert torch.equal(banks.means, before)
    other = make_banks()
    step(other, make_states(), member)
    for bank in (banks, other):
        step(bank, make_states(seed=1), member)
    assert torch.equal(banks.means, other.means)


def test_a_step_without_any_batch_changes_nothing():
    banks = make_banks()
    step(banks, make_states(), membership(BATCH))
    before = banks.means.clone()
    banks.end_step(taken=True)
    assert torch.equal(banks.means, before)


def test_only_a_taken_step_moves_them():
    """Losses of a micro-batch see where it would move them; the next must not see them moved."""
    banks, member = make_banks(), membership(BATCH)
    states = make_states()
    seen = banks.with_batch(states, member)
    banks.collect(states, member)
    assert not banks.known.any() and seen.known.any()
    banks.end_step(taken=True)
    torch.testing.assert_close(banks.means, seen.values, **EXACT)
    assert torch.equal(banks.known, seen.known)


def test_no_gradient_goes_into_the_banks():
    banks, member = make_banks(), membership(BATCH)
    states = make_states().requires_grad_()
    step(banks, states, member)
    assert not banks.means.requires_grad and banks.means.grad_fn is None
    banks.with_batch(states, member).values.sum().backward()
    assert banks.means.grad is None and states.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype):
    """2049 is no number of fp16; a sum of many small states would stop growing."""
    banks = make_banks()
    states = torch.ones(3, 4096, WIDTH, dtype=dtype)
    member = F.one_hot(torch.zeros(4096, dtype=torch.long), CLASSES).bool().expand(3, -1, -1)
    step(banks, states, member)
    assert torch.equal(banks.means[:, 0], torch.ones(3, WIDTH)) and banks.means.dtype == torch.float32


@pytest.mark.parametrize(("gradient", "share"), [("straight_through", 1.0), ("ema", 0.1), ("none", 0.0)])
def test_how_much_of_a_gradient_a_batch_gets_on_classes_that_are_known(gradient, share):
    banks, member = make_banks(0.9), membership(BATCH)
    step(banks, make_states(), member)
    states, weight = make_states(seed=1).requires_grad_(), torch.randn(3, CLASSES, WIDTH)
    seen = banks.with_batch(states, member)
    alive = seen.with_gradient(gradient)
    assert torch.equal(alive.detach(), seen.values.detach())
    if gradient == "none":
        assert not alive.requires_grad
        return
    (alive * weight).sum().backward()
    counts = member.sum(dim=1)
    for modality in range(3):
        for sample, number in enumerate(BATCH):
            expected = share * weight[modality, number] / counts[modality, number]
            torch.testing.assert_close(states.grad[modality, sample], expected, **EXACT)


def test_at_first_sight_all_of_a_gradient_reaches_the_batch():
    states, member = make_states().requires_grad_(), membership([1] * 8)
    seen = make_banks().with_batch(states, member)
    (whole,) = torch.autograd.grad(seen.with_gradient("straight_through").sum(), states, retain_graph=True)
    (moved,) = torch.autograd.grad(seen.with_gradient("ema").sum(), states)
    torch.testing.assert_close(moved, whole, **EXACT)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 / 8), **EXACT)


def test_the_spread_is_the_variance_of_all_entries():
    banks = make_banks()
    step(banks, make_states(), membership([0, 1, 2, 3] * 2))
    seen = banks.with_batch(
        make_states().requires_grad_(), membership([0] * 8, tuple((1, n) for n in range(8)))
    )
    spread = seen.spread()
    assert not spread.requires_grad
    for modality in range(3):
        assert spread[modality].item() == pytest.approx(
            seen.values[modality].detach().numpy().var(), rel=1e-5
        )


def naive_contrast(states: Tensor, means: Tensor, known: Tensor, member: Tensor, tau: float) -> list[float]:
    """(2.2), sample by sample."""
    found = []
    for modality in range(3):
        losses = []
        for sample in range(states.shape[1]):
            for number in range(CLASSES):
                if member[modality, sample, number]:
                    exps = {
                        k: math.exp(
                            F.cosine_similarity(states[modality, sample], means[modality, k], 0) / tau
                        )
                        for k in range(CLASSES)
                        if known[modality, k]
                    }
                    losses.append(-math.log(exps[number] / sum(exps.values())))
        found.append(sum(losses) / len(losses) if losses else 0.0)
    return found


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_contrast_is_that_of_the_paper_over_classes_that_are_known(temperature):
    banks, member = make_banks(), membership(BATCH, ABSENT)
    step(banks, make_states(), member)
    states = make_states(seed=1)
    seen = banks.with_batch(states, member)
    found = prototype_contrast(states, seen, member, temperature)
    expected = naive_contrast(states, seen.values, seen.known, member, temperature)
    assert_equation("2.2", "contrast of each modality", found, expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("classes", [[0, 1], [0, 1, 2], [0, 1, 2, 3]])
def test_of_prototypes_that_are_all_alike_the_contrast_is_the_log_of_their_number(classes):
    banks = make_banks()
    alike = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)).expand(3, len(classes), WIDTH)
    step(banks, alike, membership(classes))
    states, member = make_states(len(classes), seed=2), membership(classes)
    constant = banks.with_batch(alike, member)
    found = prototype_contrast(states, constant, member, 0.1)
    assert found.tolist() == pytest.approx([math.log(len(classes))] * 3, rel=1e-5)


def test_the_contrast_falls_as_a_state_comes_to_its_prototype():
    banks, member = make_banks(), membership(BATCH)
    step(banks, make_states(), member)
    seen = banks.with_batch(make_states(), member)
    goal = torch.stack([seen.values[:, number] for number in BATCH], dim=1)
    losses = [
        prototype_contrast(torch.lerp(make_states(seed=1), goal, share), seen, member, 0.1).sum().item()
        for share in (0.0, 0.5, 1.0)
    ]
    assert losses[0] > losses[1] > losses[2]


def test_the_contrast_moves_states_and_no_prototype():
    banks, member = make_banks(), membership(BATCH, ABSENT)
    step(banks, make_states(), member)
    base = make_states(seed=1).requires_grad_()
    seen = banks.with_batch(base, member)
    states = make_states(seed=1).requires_grad_()  # apart from those the prototypes are moved by
    prototype_contrast(states, seen, member, 0.1).sum().backward()
    assert base.grad is None and banks.means.grad is None
    moved = states.grad.abs().sum(dim=-1) > 0
    assert moved.tolist() == member.any(dim=-1).tolist()


def test_without_samples_the_contrast_is_zero_and_finite():
    member = membership(BATCH, tuple((1, sample) for sample in range(8)))
    states = make_states()
    states[1] = 0  # as the head reads it
    states.requires_grad_()
    seen = make_banks().with_batch(states, member)
    found = prototype_contrast(states, seen, member, 0.1)
    assert found[1] == 0 and found[0] > 0
    found.sum().backward()
    assert torch.isfinite(states.grad).all() and not states.grad[1].any()


def test_a_single_class_has_nothing_to_tell_apart():
    states, member = make_states().requires_grad_(), membership([2] * 8)
    found = prototype_contrast(states, make_banks().with_batch(states, member), member, 0.1)
    torch.testing.assert_close(found, torch.zeros(3), **EXACT)
    found.sum().backward()
    assert torch.isfinite(states.grad).all()


def test_costs_are_squared_distances_of_directions():
    one, other = (torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    found = prototype_cost(one, other)
    expected = torch.cdist(F.normalize(one, dim=-1), F.normalize(other, dim=-1)) ** 2
    assert_equation("2.3", "cost between prototypes", found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(prototype_cost(7 * other, 0.1 * one), found.mT, atol=1e-5, rtol=0)
    assert found.min() > -1e-6 and found.max() < 4 + 1e-6


def test_the_cost_of_a_prototype_that_is_zero_has_a_finite_gradient():
    """A class or a modality that was never seen."""
    one = torch.zeros(2, 5, WIDTH, requires_grad=True)
    prototype_cost(one, torch.randn(2, 5, WIDTH)).sum().backward()
    assert torch.isfinite(one.grad).all()
