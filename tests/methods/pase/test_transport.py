# SPDX-License-Identifier: Apache-2.0
"""Transport plans against an independent solver, at their limits and where they could overflow."""

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from msa_online.methods.pase.transport import transport_plan


def random_cost(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(shape, generator=generator, dtype=torch.float64)


def random_mass(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mass = 0.2 + torch.rand(shape, generator=generator, dtype=torch.float64)
    return mass / mass.sum(dim=-1, keepdim=True)


def uniform(size: int) -> Tensor:
    return torch.full((size,), 1 / size, dtype=torch.float64)


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (1, 4)])
def test_plans_are_those_of_another_solver(shape, epsilon):
    for seed in range(2):
        cost = random_cost(*shape, seed=seed)
        rows, columns = random_mass(shape[0], seed=10 + seed), random_mass(shape[1], seed=20 + seed)
        expected = ot.sinkhorn(
            rows.numpy(), columns.numpy(), cost.numpy(), epsilon,
            method="sinkhorn_log", numItermax=20_000, stopThr=1e-14,
        )  # fmt: skip
        found = transport_plan(cost, rows, columns, epsilon=epsilon, iterations=5000, unrolled=0)
        np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plan_meets_the_columns_at_once_and_the_rows_as_it_converges(dtype):
    """Costs as between unit vectors, which the head gives; uniform masses, which it gives too."""
    generator = torch.Generator().manual_seed(3)
    points = torch.nn.functional.normalize(torch.randn(2, 20, 5, 16, generator=generator), dim=-1).to(dtype)
    cost = 2 - 2 * points[0] @ points[1].mT
    mass = torch.full((20, 5), 0.2, dtype=dtype)
    for iterations, tolerance in ((200, 2e-3), (3000, 1e-4)):
        plan = transport_plan(cost, mass, mass, iterations=iterations)
        assert plan.dtype == dtype and (plan >= 0).all()
        torch.testing.assert_close(plan.sum(dim=-2), mass, atol=1e-6, rtol=0)
        torch.testing.assert_close(plan.sum(dim=-1), mass, atol=tolerance, rtol=0)


def test_where_entropy_is_everything_each_row_spreads_like_the_columns():
    rows, columns = random_mass(4), random_mass(6, seed=2)
    plan = transport_plan(random_cost(4, 6), rows, columns, epsilon=1e6)
    torch.testing.assert_close(plan, rows[:, None] * columns, atol=1e-6, rtol=0)


def test_where_entropy_is_nothing_each_class_goes_to_its_own():
    cost = 1 + random_cost(5, 5)
    cost.fill_diagonal_(0)
    plan = transport_plan(cost, uniform(5), uniform(5), epsilon=1e-3)
    torch.testing.assert_close(plan, torch.eye(5, dtype=torch.float64) / 5, atol=1e-9, rtol=0)


def test_the_way_back_is_the_way_there_turned_around():
    cost, rows, columns = random_cost(4, 6), random_mass(4), random_mass(6, seed=2)
    there = transport_plan(cost, rows, columns, epsilon=0.2, iterations=5000)
    back = transport_plan(cost.T, columns, rows, epsilon=0.2, iterations=5000)
    torch.testing.assert_close(back.T, there, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e4, 1e5])
def test_costs_far_above_the_entropy_neither_overflow_nor_vanish(scale, dtype):
    cost = random_cost(5, 5) / 4 * scale * 0.05
    cost[2, 3] = scale * 0.05
    cost = cost.to(dtype).requires_grad_()
    mass = uniform(5).to(dtype)
    plan = transport_plan(cost, mass, mass)
    assert plan.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(plan).all()
    assert plan.sum().item() == pytest.approx(1, abs=2e-3)  # as far as the precision holds one fifth
    (plan * cost).sum().backward()
    assert torch.isfinite(cost.grad).all() and cost.grad.any()


def test_rows_and_columns_without_mass_take_no_part():
    cost = random_cost(5, 4).requires_grad_()
    rows, columns = random_mass(5), random_mass(4, seed=2)
    rows[[1, 3]], columns[2] = 0, 0
    rows, columns = rows / rows.sum(), columns / columns.sum()
    plan = transport_plan(cost, rows, columns, epsilon=0.2)
    assert not plan[[1, 3]].any() and not plan[:, 2].any()
    without = transport_plan(cost[[0, 2, 4]][:, [0, 1, 3]], rows[[0, 2, 4]], columns[[0, 1, 3]], epsilon=0.2)
    torch.testing.assert_close(plan[[0, 2, 4]][:, [0, 1, 3]], without, atol=1e-12, rtol=0)
    plan.square().sum().backward()
    assert torch.isfinite(cost.grad).all()
    assert not cost.grad[[1, 3]].any() and not cost.grad[:, 2].any() and cost.grad.any()


def test_where_nothing_has_mass_nothing_is_carried():
    cost = random_cost(3, 5, 5).requires_grad_()
    mass = torch.stack([torch.zeros(5), torch.full((5,), 0.2), torch.zeros(5)]).double()
    plan = transport_plan(cost, mass, mass)
    assert not plan[[0, 2]].any() and plan[1].sum().item() == pytest.approx(1)
    plan.square().sum().backward()
    assert torch.isfinite(cost.grad).all()
    assert not cost.grad[[0, 2]].any() and cost.grad[1].any()


def test_plans_of_a_batch_are_those_of_each_alone():
    cost, rows, columns = random_cost(2, 3, 4, 5), random_mass(2, 3, 4), random_mass(2, 3, 5)
    plans = transport_plan(cost, rows, columns)
    for place in ((0, 0), (0, 2), (1, 1)):
        alone = transport_plan(cost[place], rows[place], columns[place])
        torch.testing.assert_close(plans[place], alone, atol=1e-14, rtol=0)


def slope(cost: Tensor, weight: Tensor, mass: Tensor, **settings) -> Tensor:
    cost = cost.clone().requires_grad_()
    (transport_plan(cost, mass, mass, epsilon=0.2, **settings) * weight).sum().backward()
    return cost.grad


def test_the_gradient_through_the_last_iterations_is_that_of_the_plan():
    cost, weight, mass = random_cost(5, 5), random_cost(5, 5, seed=7), random_mass(5)
    found = slope(cost, weight, mass)
    whole = slope(cost, weight, mass, iterations=400, unrolled=400)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-4)
    step = 1e-5
    for row, column in ((0, 0), (1, 4), (3, 2)):
        values = []
        for shift in (step, -step):
            moved = cost.clone()
            moved[row, column] += shift
            plan = transport_plan(moved, mass, mass, epsilon=0.2, iterations=2000)
            values.append((plan * weight).sum().item())
        expected = (values[0] - values[1]) / (2 * step)
        assert found[row, column].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_iterations_before_the_last_ones_keep_no_graph():
    """Their memory would grow with every step of a run's longest part."""

    def size(function, seen):  # nodes of a graph
        if function is None or function in seen:
            return 0
        seen.add(function)
        return 1 + sum(size(following, seen) for following, _ in function.next_functions)

    cost, mass = random_cost(3, 3).requires_grad_(), uniform(3)
    sizes = [
        size(transport_plan(cost, mass, mass, iterations=iterations, unrolled=5).grad_fn, set())
        for iterations in (5, 200)
    ]
    assert sizes[0] == sizes[1]
