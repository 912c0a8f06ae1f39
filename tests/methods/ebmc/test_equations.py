# SPDX-License-Identifier: Apache-2.0
"""Properties of EBMC's energies, losses and trust (docs/methods/ebmc.md), in float64."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor

from msa_online.methods.ebmc import (
    EnergyFactors,
    dependence_loss,
    disentanglement_loss,
    distillation_distances,
    energy_gap,
    explained_variance,
    invariance_loss,
    teacher_variance,
    trust_weights,
)
from tests.equations import assert_equation

BATCH, WIDTH = 6, 5
EVERY = torch.ones(3, BATCH, dtype=torch.bool)
FACTORS = EnergyFactors(norm=0.7, loss=1.3, uncertainty=0.6)
KINDS = {  # outputs of the predictor, and classes; one class is a regression
    "probabilistic score": (2, 1),
    "score judged by disagreement": (1, 1),
    "2 classes": (2, 2),
    "4 classes": (4, 4),
    "7 classes": (7, 7),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Energies:
    """Energies of random states under a random linear predictor of each modality."""

    def __init__(self, kind: str, present: Tensor = EVERY, spread: float = 1.0) -> None:
        outputs, classes = KINDS[kind]
        self.states = random(3, BATCH, WIDTH).requires_grad_()
        self.weights = random(3, outputs, WIDTH, seed=1) * spread
        self.biases = random(3, 1, outputs, seed=2)
        self.labels = torch.arange(BATCH) % classes if classes > 1 else torch.linspace(-3, 3, BATCH).double()
        self.present = present

    def __call__(self) -> tuple[Tensor, Tensor]:
        outputs = self.states @ self.weights.mT + self.biases
        return FACTORS(self.states, outputs, self.weights, self.labels, self.present)


@every_kind
def test_the_energys_gradient_in_closed_form_is_the_one_autograd_finds(kind):
    trial = Energies(kind)
    energies, closed = trial()
    (found,) = torch.autograd.grad(energies.sum(), trial.states)
    assert_equation("1.11", "gradient of the energy in closed form", closed, found, rtol=1e-10, atol=1e-12)
    assert closed.abs().min() > 0


def test_the_closed_form_holds_where_a_log_variance_has_reached_its_bounds():
    trial = Energies("probabilistic score", spread=4.0)
    with torch.no_grad():
        trial.states[0, 0] = 0
        trial.biases[0, 0, 1] = 3.0  # exactly on the bound
    energies, closed = trial()
    log_variance = (trial.states @ trial.weights.mT + trial.biases)[..., 1]
    assert (log_variance < -6).any() and (log_variance > 3).any() and (log_variance == 3).any()
    (found,) = torch.autograd.grad(energies.sum(), trial.states)
    assert_equation("1.11", "gradient of the energy in closed form", closed, found, rtol=1e-10, atol=1e-12)


def test_the_closed_form_holds_where_modalities_are_absent():
    present = EVERY.clone()
    present[0, :2] = present[1, 1] = present[:, 3] = False
    trial = Energies("score judged by disagreement", present)
    energies, closed = trial()
    (found,) = torch.autograd.grad(energies.sum(), trial.states)
    assert_equation("1.11", "gradient of the energy in closed form", closed, found, rtol=1e-10, atol=1e-12)


@every_kind
def test_the_gap_pushes_each_state_along_its_energy_by_the_distance_from_the_mean(kind):
    trial = Energies(kind)
    energy = trial()[0].mean(dim=1)
    (by_gap,) = torch.autograd.grad(energy_gap(energy, torch.ones(3).bool()), trial.states, retain_graph=True)
    (by_energy,) = torch.autograd.grad(energy.sum(), trial.states)
    above = (energy - energy.mean()).detach()[:, None, None]
    expected = 2 * 3 * above * by_energy
    assert_equation("1.10", "gradient of the gap", by_gap, expected, rtol=1e-10, atol=1e-14)


@every_kind
def test_a_small_step_down_the_gap_brings_the_energies_together(kind):
    trial = Energies(kind)
    before = trial()[0].mean(dim=1)
    gap = energy_gap(before, torch.ones(3).bool())
    (gradient,) = torch.autograd.grad(gap, trial.states)
    with torch.no_grad():
        trial.states -= 1e-4 * gradient
        after = trial()[0].mean(dim=1)
    assert energy_gap(after, torch.ones(3).bool()) < gap
    assert after.max() < before.max()
    assert after.min() > before.min()  # the weakest energy rises


@pytest.mark.parametrize("seed", range(3))
def test_the_gap_is_three_times_the_squared_distances_from_the_mean_and_knows_no_order(seed):
    energy, everyone = random(3, seed=seed), torch.ones(3).bool()
    gap = energy_gap(energy, everyone)
    expected = 3 * (energy - energy.mean()).square().sum()
    assert_equation("1.8", "gap in its second form", gap, expected, rtol=1e-12, atol=0)
    assert gap > 0
    for order in permutations(range(3)):
        torch.testing.assert_close(energy_gap(energy[list(order)], everyone), gap, rtol=1e-12, atol=0)
    torch.testing.assert_close(energy_gap(energy + 7.0, everyone), gap, rtol=1e-12, atol=0)
    assert energy_gap(energy[:1].expand(3), everyone) == 0


def test_a_modality_without_samples_is_left_out_of_the_gap():
    energy = torch.tensor([5.0, 2.0, 0.0])
    assert energy_gap(energy, torch.tensor([True, True, False])) == 9.0
    assert energy_gap(energy, torch.tensor([True, False, False])) == 0.0


@pytest.mark.parametrize(
    ("floor", "expected"), [(0.1, (0.7756, 0.1917, 0.0327)), (0.0, (0.8155, 0.1592, 0.0252))]
)
def test_trust_has_its_reference_values(floor, expected):
    variance = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).square().reshape(1, 3, 1)
    found = trust_weights(variance, torch.ones(1, 3).bool(), floor)[0]
    assert_equation("1.12", "trust", found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("classes", [1, 4])
def test_trust_is_shared_out_whole_among_those_present(classes):
    variance = random(8, 3, classes).square()
    present = torch.tensor([[column >> place & 1 for place in range(3)] for column in range(8)]).bool()
    trust = trust_weights(variance, present, 0.1)
    torch.testing.assert_close(trust.sum(dim=1), present.any(dim=1).double(), rtol=1e-12, atol=0)
    assert (trust[~present] == 0).all() and (trust[present] > 0).all()
    equal = trust_weights(variance[:, :1].expand(8, 3, classes), present, 0.1)
    shares = present.double() / present.sum(dim=1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(equal, shares, rtol=1e-12, atol=0)


def test_trust_falls_with_every_rise_of_its_own_deviation():
    deviations = torch.linspace(0.01, 20, 100, dtype=torch.float64)
    variance = torch.ones(100, 3, 1, dtype=torch.float64)
    variance[:, 1, 0] = deviations.square()
    trust = trust_weights(variance, torch.ones(100, 3).bool(), 0.1)
    assert (trust[1:, 1] < trust[:-1, 1]).all()
    assert (trust[1:, [0, 2]] > trust[:-1, [0, 2]]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deviations", [(0, 0, 0), (0, 1e4, 1), (1e4, 1e4, 1e4), (200, 300, 400)])
def test_trust_is_finite_for_teachers_beyond_doubt_and_beyond_help(deviations, dtype):
    variance = torch.tensor(deviations, dtype=dtype).square().reshape(1, 3, 1)
    trust = trust_weights(variance, torch.ones(1, 3).bool(), 0.1)
    assert torch.isfinite(trust).all()
    assert trust.sum().item() == pytest.approx(1.0)


def test_a_teachers_variance_is_what_it_says_or_how_far_it_stands_from_the_others():
    everyone = torch.ones(1, 3).bool()
    scores = torch.tensor([[[1.0], [3.0], [8.0]]])
    said = torch.tensor([[[0.0], [-9.0], [9.0]]])  # two beyond the bounds of a log-variance
    found = teacher_variance(scores, said, everyone)[0, :, 0]
    assert found.tolist() == pytest.approx([1.0, math.exp(-6), math.exp(3)], rel=1e-6)
    apart = teacher_variance(scores, said[..., :0], everyone)[0, :, 0]
    assert apart.tolist() == pytest.approx([9.0, 1.0, 16.0])
    without_last = teacher_variance(scores, said[..., :0], torch.tensor([[True, True, False]]))
    assert without_last[0, :2, 0].tolist() == pytest.approx([1.0, 1.0])
    even = teacher_variance(torch.zeros(1, 3, 4), said[..., :0], everyone)
    assert even.flatten().tolist() == pytest.approx([3 / 16] * 12)


@pytest.mark.parametrize("outputs", [1, 4])
def test_a_student_that_says_what_every_teacher_says_has_nothing_to_learn(outputs):
    logits = random(BATCH, outputs)
    told = logits.unsqueeze(1).expand(BATCH, 3, outputs)
    torch.testing.assert_close(
        distillation_distances(logits, told, 2.0), torch.zeros(BATCH, 3).double(), atol=1e-15, rtol=0
    )
    assert (distillation_distances(logits + random(BATCH, outputs, seed=1), told, 2.0) > 0).all()


def alike(rows: Tensor) -> Tensor:
    """Shared parts in which all three modalities of a sample say the same."""
    return rows.expand(3, *rows.shape)


def test_alignment_is_rewarded_and_confusion_is_punished():
    basis = torch.eye(16, dtype=torch.float64)
    present = torch.ones(3, 16, dtype=torch.bool)
    confused = torch.stack([basis.roll(shift, 0) for shift in range(3)])
    losses = [invariance_loss(parts, present, 0.05) for parts in (alike(basis), random(3, 16, 16), confused)]
    assert losses[0].item() == pytest.approx(0.0, abs=1e-7)
    assert losses[0] < losses[1] < losses[2]


def test_the_inverted_contrast_of_the_first_implementation_is_not_ours():
    """Choice E1: three similarities added inside one exponent, the pair itself among its negatives."""

    def inverted(shared: Tensor, temperature: float) -> Tensor:
        unit = shared / shared.norm(dim=-1, keepdim=True)
        rows, own = [], []
        for i in range(unit.shape[1]):
            sums = [
                unit[0, i] @ unit[1, j] + unit[1, i] @ unit[2, j] + unit[0, i] @ unit[2, j]
                for j in range(unit.shape[1])
            ]
            rows.append(torch.stack(sums).div(temperature).logsumexp(dim=0))
            own.append(sums[i] / 3)
        punished = torch.stack(rows).logsumexp(dim=0) - math.log(len(rows))
        return punished - torch.stack(own).mean() / temperature

    aligned, chance = alike(torch.eye(16, dtype=torch.float64)), random(3, 16, 16)
    present = torch.ones(3, 16, dtype=torch.bool)
    assert inverted(aligned, 0.05).item() == pytest.approx(40.0)
    assert inverted(aligned, 0.05) > inverted(chance, 0.05)  # so that training would tear modalities apart
    assert invariance_loss(aligned, present, 0.05) < invariance_loss(chance, present, 0.05)


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_samples_that_all_look_the_same_cannot_be_distinguished(batch):
    present = torch.ones(3, batch, dtype=torch.bool)
    found = invariance_loss(alike(random(1, 8).expand(batch, 8)), present, 0.05)
    assert found.item() == pytest.approx(math.log(batch), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.5])
def test_the_alignment_loss_is_never_negative_nor_infinite(temperature):
    for seed in range(5):
        present = torch.rand(3, 12, generator=torch.Generator().manual_seed(seed)) > 0.4
        loss = invariance_loss(random(3, 12, 6, seed=seed).float(), present, temperature)
        assert 0 <= loss < math.inf
    assert invariance_loss(random(3, 12, 6), torch.zeros(3, 12).bool(), temperature) == 0


def test_private_parts_are_to_be_orthogonal_and_their_signs_do_not_matter():
    apart = torch.eye(3, WIDTH, dtype=torch.float64).unsqueeze(1).expand(3, BATCH, WIDTH)
    assert disentanglement_loss(apart, EVERY) == 0
    same = random(1, BATCH, WIDTH).expand(3, BATCH, WIDTH)
    assert disentanglement_loss(same, EVERY).item() == pytest.approx(1.0, abs=1e-12)
    parts = random(3, BATCH, WIDTH)
    flipped = parts * torch.tensor([-1.0, 1.0, -1.0]).double()[:, None, None]
    torch.testing.assert_close(disentanglement_loss(flipped, EVERY), disentanglement_loss(parts, EVERY))


@every_kind
def test_a_constant_uncertainty_counts_but_has_no_gradient(kind):
    trial = Energies(kind)
    outputs = trial.states @ trial.weights.mT + trial.biases
    given = (trial.states, outputs, trial.weights, trial.labels, EVERY)
    energies, closed = replace(FACTORS, constant_uncertainty=True)(*given)
    torch.testing.assert_close(energies, FACTORS(*given)[0])
    (found,) = torch.autograd.grad(energies.sum(), trial.states, retain_graph=True)
    torch.testing.assert_close(closed, found, rtol=1e-10, atol=1e-12)
    (without,) = torch.autograd.grad(replace(FACTORS, uncertainty=0.0)(*given)[0].sum(), trial.states)
    torch.testing.assert_close(found, without, rtol=1e-10, atol=1e-12)


@every_kind
def test_a_one_sided_gap_pulls_down_what_is_above_and_leaves_the_lowest_alone(kind):
    trial = Energies(kind)
    energy, everyone = trial()[0].mean(dim=1), torch.ones(3).bool()
    gap = energy_gap(energy, everyone, one_sided=True)
    torch.testing.assert_close(gap, energy_gap(energy, everyone))
    (pull,) = torch.autograd.grad(gap, trial.states)
    assert not pull[energy.argmin()].any()
    with torch.no_grad():
        trial.states -= 1e-4 * pull
    after = trial()[0].mean(dim=1)
    assert after.max() < energy.max()
    if kind != "score judged by disagreement":  # there one energy depends on the other modalities
        assert after.min() == energy.min()


def test_private_parts_that_say_the_same_in_other_coordinates_are_dependent():
    parts, batch = random(1, 40, WIDTH)[0], torch.ones(3, 40).bool()
    turn, _ = torch.linalg.qr(random(WIDTH, WIDTH, seed=3))
    turned = torch.stack([parts, parts @ turn * 3 + 5, -parts])
    assert dependence_loss(turned, batch).item() == pytest.approx(1.0, abs=1e-12)
    assert disentanglement_loss(turned[:2], batch[:2]) < 0.6  # a cosine takes them for different
    apart = torch.stack([dependence_loss(random(3, 40, WIDTH, seed=seed), batch) for seed in range(20)])
    assert apart.min() >= 0 and apart.mean() < 0.03


def test_dependence_is_judged_on_the_samples_that_have_both():
    parts, present = random(3, 12, WIDTH), torch.ones(3, 12).bool()
    present[0, :3] = present[1, 9:] = False
    whole = dependence_loss(parts[:2, 3:9], present[:2, 3:9])
    disturbed = parts.clone()
    disturbed[0, :3] = disturbed[1, 9:] = 100.0
    torch.testing.assert_close(dependence_loss(disturbed[:2], present[:2]), whole)
    assert dependence_loss(parts[:, :3], present[:, :3]) == 0  # too few to tell
    same = random(1, 1, WIDTH).expand(3, 12, WIDTH).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dependence_loss(same, EVERY.new_ones(3, 12)), same)
    assert gradient.isfinite().all()


def test_the_explained_variance_of_an_exact_copy_is_one_and_of_the_mean_none():
    states, present = random(3, BATCH, WIDTH), EVERY.clone()
    present[:, 0] = False
    mean = states[:, 1:].mean(dim=1, keepdim=True).expand_as(states)
    wild = states.clone()
    wild[:, 0] = 100.0  # does not count
    for rebuilt, expected in ((wild, 1.0), (mean, 0.0), (2 * mean - states, -3.0)):
        found = explained_variance(rebuilt, states, present)
        torch.testing.assert_close(found, torch.full((3,), expected).double())
    assert explained_variance(wild, states, ~EVERY).tolist() == [0, 0, 0]
