# SPDX-License-Identifier: Apache-2.0
"""Scores, coefficients, norms and noise against their equations, (4.8) to (4.10) of docs/methods/cpsl.md."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from msa_online.methods import ModulationContext
from msa_online.methods.gradients import (
    apply_coefficients,
    average_norm,
    damping_coefficients,
    imbalance_degree,
    observe_quality,
    quality_scores,
)
from msa_online.modalities import MODALITIES
from msa_online.modeling_msa import MSAOutput

PAIR = ("audio", "vision")


def make_output(outputs: int, present: torch.Tensor, seed: int = 0) -> MSAOutput:
    """Random unimodal predictions; `present` is `(batch, 3)` bool."""
    generator = torch.Generator().manual_seed(seed)
    logits = {name: torch.randn(len(present), outputs, generator=generator) for name in MODALITIES}
    return MSAOutput(
        modality_logits=logits, present={name: present[:, column] for column, name in enumerate(MODALITIES)}
    )


def windowed(*micro_batches: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means over the micro-batches of a step, as the training loop hands them on."""
    return {name: sum(each[name].item() for each in micro_batches) / 2 for name in micro_batches[0]}


UNEVEN = (
    torch.tensor([[True, True, True], [True, False, True], [True, True, False], [True, False, True]]),
    torch.tensor([[True, True, False], [False, True, False], [True, True, False], [False, True, True]]),
)


def test_in_regression_the_score_is_the_inverse_error_over_the_samples_of_the_step_that_have_it():
    labels = [torch.tensor([-1.5, 0.2, 2.0, 3.0]), torch.tensor([0.0, 1.0, -3.0, 0.7])]
    outputs = [make_output(1, present, seed) for seed, present in enumerate(UNEVEN)]
    statistics = windowed(*(observe_quality(*pair, MODALITIES) for pair in zip(outputs, labels, strict=True)))
    scores = quality_scores(statistics, MODALITIES)
    for name in MODALITIES:
        errors = [
            abs(float(output.modality_logits[name][row, 0]) - float(label[row]))
            for output, label in zip(outputs, labels, strict=True)
            for row in range(4)
            if output.present[name][row]
        ]
        assert scores[name] == pytest.approx(1 / (sum(errors) / len(errors)), rel=1e-6)


def test_in_classification_the_score_is_the_mean_probability_of_the_true_class():
    labels = [torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 0, 2])]
    outputs = [make_output(3, present, seed) for seed, present in enumerate(UNEVEN)]
    statistics = windowed(*(observe_quality(*pair, MODALITIES) for pair in zip(outputs, labels, strict=True)))
    scores = quality_scores(statistics, MODALITIES)
    for name in MODALITIES:
        truths = []
        for output, label in zip(outputs, labels, strict=True):
            for row in range(4):
                powers = [math.exp(value) for value in output.modality_logits[name][row].tolist()]
                if output.present[name][row]:
                    truths.append(powers[label[row]] / sum(powers))
        assert scores[name] == pytest.approx(sum(truths) / len(truths), rel=1e-6)


@pytest.mark.parametrize("outputs", [1, 4])
def test_what_is_predicted_of_absent_samples_does_not_count(outputs):
    labels = torch.tensor([1.0, 2.0, 0.0, 1.0]) if outputs == 1 else torch.tensor([1, 2, 0, 1])
    output, other = make_output(outputs, UNEVEN[0]), make_output(outputs, UNEVEN[0])
    for name in MODALITIES:
        other.modality_logits[name][~other.present[name]] = 1e6
    assert observe_quality(output, labels, MODALITIES) == observe_quality(other, labels, MODALITIES)


def test_sixteen_bit_predictions_are_judged_in_full_precision():
    present = torch.ones(4096, 3, dtype=torch.bool)
    output = make_output(1, present)
    rough = {name: logits.bfloat16() for name, logits in output.modality_logits.items()}
    labels = torch.full((4096,), 2.5)
    seen = observe_quality(MSAOutput(modality_logits=rough, present=output.present), labels, PAIR)
    for name in PAIR:  # a mean of 4096 errors in bf16 would be off by a percent
        exact = (rough[name].double().squeeze(-1) - 2.5).abs().mean().item()
        assert seen[f"error/{name}"].item() == pytest.approx(exact, rel=1e-5)


def scores_of(**errors: float) -> dict[str, float]:
    """Scores from mean absolute errors."""
    statistics = {}
    for name, error in errors.items():
        statistics |= {f"error/{name}": 8 * error, f"observed/{name}": 8.0}
    return quality_scores(statistics, errors)


@pytest.mark.parametrize(
    ("ratio", "coefficient"), [(1 + 1e-9, 0.2384), (1.2, 0.166), (1.5, 0.095), (2, 0.036), (3, 0.005)]
)
def test_coefficients_are_those_of_the_specification(ratio, coefficient):
    found = damping_coefficients(scores_of(audio=0.5, vision=0.5 * ratio), PAIR, 1.0)
    assert found["audio"] == pytest.approx(coefficient, abs=5.1e-4)
    assert found["vision"] == 1.0
    swapped = damping_coefficients(scores_of(audio=0.5 * ratio, vision=0.5), PAIR, 1.0)
    assert swapped == {"audio": found["vision"], "vision": found["audio"]}


def test_the_better_is_damped_within_its_range_and_the_other_left_alone():
    draw = random.Random(0)
    for _ in range(300):
        audio, vision = (10 ** draw.uniform(-3, 2) for _ in range(2))
        strength = draw.uniform(0.05, 3)
        found = damping_coefficients(scores_of(audio=audio, vision=vision), PAIR, strength)
        better, worse = ("audio", "vision") if audio < vision else ("vision", "audio")
        assert found[worse] == 1.0
        assert 0 <= found[better] < 1 - math.tanh(strength)


def test_equally_good_modalities_are_left_alone():
    assert damping_coefficients(scores_of(audio=0.7, vision=0.7), PAIR, 1.0) == {"audio": 1.0, "vision": 1.0}
    three = damping_coefficients(dict.fromkeys(MODALITIES, 0.25), MODALITIES, 1.0)
    assert three == dict.fromkeys(MODALITIES, 1.0)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 40.0])
def test_the_unit_of_the_labels_does_not_matter(scale):
    before = damping_coefficients(scores_of(audio=0.8, vision=1.1), PAIR, 1.0)
    after = damping_coefficients(scores_of(audio=scale * 0.8, vision=scale * 1.1), PAIR, 1.0)
    assert after == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("strength", [0.1, 1.0, 5.0])
def test_a_shift_of_one_makes_the_coefficient_continuous_where_scores_meet(strength):
    ratios = [1 + 1e-7, 1.001, 1.3, 2.0]
    found = [
        damping_coefficients({"audio": ratio, "vision": 1.0}, PAIR, strength, 1.0)["audio"]
        for ratio in ratios
    ]
    assert found == pytest.approx([1 - math.tanh(strength * (ratio - 1)) for ratio in ratios], rel=1e-6)
    assert found[0] == pytest.approx(1.0, abs=1e-5)
    assert damping_coefficients({"audio": 1.0, "vision": 1.0}, PAIR, strength, 1.0)["audio"] == 1.0


@pytest.mark.parametrize("errors", [(0.0, 1.0), (1.0, 0.0), (1e-12, 100.0), (1e-30, 1e-25), (0.0, 0.0)])
def test_a_perfect_modality_breaks_nothing(errors):
    found = damping_coefficients(scores_of(audio=errors[0], vision=errors[1]), PAIR, 1.0)
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in found.values())
    assert max(found.values()) == 1.0


def test_coefficients_grow_smaller_with_the_lead_until_nothing_is_left():
    found = [
        damping_coefficients({"audio": 1.05**power, "vision": 1.0}, PAIR, 1.0)["audio"]
        for power in range(1, 200)
    ]
    assert all(after <= before for before, after in itertools.pairwise(found))
    assert found[-1] == 0.0 and found[50] > 0  # a lead of twelve; in single precision it ends at nine


def test_each_of_three_is_compared_with_the_mean_of_the_two_others():
    found = damping_coefficients({"text": 3.0, "audio": 2.0, "vision": 0.5}, MODALITIES, 0.5)
    assert found["text"] == pytest.approx(1 - math.tanh(0.5 * 3 / 1.25), rel=1e-6)
    assert found["audio"] == pytest.approx(1 - math.tanh(0.5 * 2 / 1.75), rel=1e-6)
    assert found["vision"] == 1.0


def test_a_modality_without_samples_is_neither_changed_nor_compared():
    statistics = {"error/audio": 0.0, "observed/audio": 0.0, "error/vision": 3.0, "observed/vision": 4.0}
    scores = quality_scores(statistics, PAIR)
    assert set(scores) == {"vision"}
    assert damping_coefficients(scores, PAIR, 1.0) == {"audio": 1.0, "vision": 1.0}
    statistics |= {"error/text": 1.0, "observed/text": 4.0}
    found = damping_coefficients(quality_scores(statistics, MODALITIES), MODALITIES, 1.0)
    assert found == {"text": pytest.approx(1 - math.tanh(3), rel=1e-6), "audio": 1.0, "vision": 1.0}
    nothing = dict.fromkeys([f"{kind}/{name}" for kind in ("error", "observed") for name in PAIR], 0.0)
    assert damping_coefficients(quality_scores(nothing, PAIR), PAIR, 1.0) == dict.fromkeys(PAIR, 1.0)
    assert imbalance_degree({}) == 0.0


def test_the_degree_of_imbalance_is_the_relative_spread_of_the_scores():
    assert imbalance_degree({"text": 3.0, "audio": 2.0, "vision": 1.0}) == pytest.approx(0.5)
    assert imbalance_degree({"text": 2.0, "audio": 2.0}) == 0.0
    assert 0 <= imbalance_degree({"text": 1e8, "audio": 1e-8}) < 1 + 1e-12


def make_parameters(*shapes: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> list[Parameter]:
    """Parameters with normal gradients around 0.1."""
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for shape in shapes:
        parameter = Parameter(torch.zeros(shape))
        parameter.grad = scale * torch.randn(shape, generator=generator) + 0.1
        parameters.append(parameter)
    return parameters


def test_the_two_norms_are_the_mean_over_tensors_and_the_root_mean_square_over_elements():
    parameters = [*make_parameters((5, 4), (4,), (3, 2, 2)), Parameter(torch.ones(3))]  # one has no gradient
    squares = [[float(value) ** 2 for value in each.grad.flatten()] for each in parameters[:3]]
    mean = sum(math.sqrt(math.fsum(each)) for each in squares) / 3
    rms = math.sqrt(math.fsum(itertools.chain(*squares)) / 36)
    assert average_norm(parameters, "mean").item() == pytest.approx(mean, rel=1e-6)
    assert average_norm(parameters, "rms").item() == pytest.approx(rms, rel=1e-6)


def test_the_root_mean_square_does_not_depend_on_how_an_encoder_is_cut_into_tensors():
    whole = make_parameters((60, 10))
    pieces = [Parameter(torch.zeros(6, 10)) for _ in range(10)]
    for number, piece in enumerate(pieces):
        piece.grad = whole[0].grad[6 * number : 6 * number + 6]
    assert average_norm(pieces, "rms").item() == pytest.approx(average_norm(whole, "rms").item(), rel=1e-6)
    assert average_norm(pieces, "mean") < average_norm(whole, "mean") / 2  # as printed it does


@pytest.mark.parametrize("kind", ["mean", "rms"])
def test_norms_of_half_precision_gradients_do_not_overflow_and_nothing_has_norm_zero(kind):
    parameter = Parameter(torch.zeros(100_000, dtype=torch.float16))
    parameter.grad = torch.full_like(parameter, 300.0)
    norm = average_norm([parameter], kind)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(300 * math.sqrt(100_000 if kind == "mean" else 1), rel=1e-4)
    assert average_norm([Parameter(torch.ones(3))], kind).item() == average_norm([], kind).item() == 0


def context_of(step: int = 7, seed: int = 3, **owned: list[Parameter]) -> ModulationContext:
    return ModulationContext(owned, {}, stage="train", epoch=0, step=step, seed=seed)


def enhanced(
    parameters: list[Parameter], coefficient: float = 1.0, noise: float = 1.0, name="audio", **where
) -> list[torch.Tensor]:
    """Gradients after modulation; the parameters keep theirs."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None if parameter.grad is None else parameter.grad.clone()
    apply_coefficients(
        {name: coefficient}, context_of(**{name: parameters}, **where), apply="gradient", noise=noise
    )
    after = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    return after


@pytest.mark.parametrize(("coefficient", "noise"), [(1.0, 1.0), (0.1, 1.0), (0.3, 0.5), (0.0, 2.0)])
def test_noise_has_mean_zero_and_the_deviation_of_the_unscaled_gradient(coefficient, noise):
    (parameter,) = make_parameters((400, 250), scale=0.37)
    (after,) = enhanced([parameter], coefficient, noise)
    added = after.double() - coefficient * parameter.grad.double()
    deviation = noise * parameter.grad.double().std(correction=0)
    assert added.std() == pytest.approx(deviation.item(), rel=0.05)
    assert abs(added.mean()) < 5 * deviation / math.sqrt(1e5)
    joint = torch.corrcoef(torch.stack([added.flatten(), parameter.grad.double().flatten()]))
    assert abs(joint[0, 1]) < 0.02  # noise, and no rescaled gradient


def test_every_process_adds_the_same_noise_and_every_step_parameter_and_run_another():
    parameters = make_parameters((200, 50), (200, 50))
    first, second = (after - each.grad for after, each in zip(enhanced(parameters), parameters, strict=True))
    again, _ = (after - each.grad for after, each in zip(enhanced(parameters), parameters, strict=True))
    assert torch.equal(first, again)
    others = [second]
    for where in ({"step": 8}, {"seed": 4}, {"step": 3, "seed": 7}, {"name": "vision"}):
        others.append(enhanced(parameters, **where)[0] - parameters[0].grad)
    for one, other in itertools.combinations([first, *others], 2):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.05


def test_noise_does_not_depend_on_which_other_parameters_have_gradients():
    parameters = make_parameters((6, 5), (4,), (5, 6))
    whole = enhanced(parameters)
    parameters[0].grad = None
    part = enhanced(parameters)
    assert part[0] is None
    assert torch.equal(part[1], whole[1]) and torch.equal(part[2], whole[2])


def test_noise_takes_nothing_from_the_random_numbers_of_the_run():
    parameters = make_parameters((6, 5))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    one = enhanced(parameters)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all() and random.getstate() == states[2]
    torch.manual_seed(2)
    assert torch.equal(enhanced(parameters)[0], one[0])


def test_vectors_and_scalars_are_scaled_and_get_no_noise():
    parameters = make_parameters((8,), (), (4, 2), (2, 2, 3, 3))
    vector, scalar, matrix, kernel = enhanced(parameters, 0.25)
    assert torch.equal(vector, 0.25 * parameters[0].grad)
    assert torch.equal(scalar, 0.25 * parameters[1].grad)
    assert (matrix != 0.25 * parameters[2].grad).all()
    assert (kernel != 0.25 * parameters[3].grad).all()


def test_a_matrix_of_one_element_or_without_spread_is_scaled_and_stays_finite():
    parameters = make_parameters((1, 1), (3, 4), (3, 4))
    parameters[1].grad = torch.full((3, 4), 0.5)
    parameters[2].grad = torch.zeros(3, 4)
    one, flat, zero = enhanced(parameters, 0.5)
    assert torch.equal(one, 0.5 * parameters[0].grad)
    assert torch.equal(flat, torch.full((3, 4), 0.25)) and not zero.any()


def test_without_noise_gradients_are_scaled_and_nothing_else():
    parameters = [*make_parameters((4, 3), (3,)), Parameter(torch.ones(2, 2))]
    matrix, vector, none = enhanced(parameters, 0.3, noise=0)
    assert torch.equal(matrix, parameters[0].grad * 0.3) and torch.equal(vector, parameters[1].grad * 0.3)
    assert none is None
    untouched = enhanced(parameters, 1.0, noise=0)
    assert torch.equal(untouched[0], parameters[0].grad) and torch.equal(untouched[1], parameters[1].grad)


def test_the_learning_rate_is_scaled_in_place_of_the_gradients_and_noise_is_added_all_the_same():
    parameters = make_parameters((6, 5), (5,))
    noisy, _ = enhanced(parameters)
    before = [parameter.grad.clone() for parameter in parameters]
    context = context_of(audio=parameters)
    assert apply_coefficients({"audio": 0.2}, context, apply="lr", noise=0) == {"audio": 0.2}
    assert all(torch.equal(each.grad, old) for each, old in zip(parameters, before, strict=True))
    apply_coefficients({"audio": 0.2}, context, apply="lr", noise=1)
    assert torch.equal(parameters[0].grad, noisy) and torch.equal(parameters[1].grad, before[1])
    assert apply_coefficients({"audio": 0.2}, context, apply="gradient", noise=0) == {}
