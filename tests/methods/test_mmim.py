# SPDX-License-Identifier: Apache-2.0
"""MMIM against its equations, computed sample by sample in NumPy (docs/methods/mmim.md)."""

from math import erf

import numpy as np
import pytest
import torch

from msa_online.methods.mmim import MMIMHead, class_entropy, contrast
from msa_online.modalities import MODALITIES
from tests.equations import assert_equation

PRESENT = [
    [True, True, True],
    [True, False, True],
    [False, False, True],
    [True, True, True],
    [True, True, True],
]
LABELS = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)
WIDTHS = {"text": 6, "audio": 5, "vision": 4}


def linear(weights: dict, name: str, values: np.ndarray) -> np.ndarray:
    return weights[f"{name}.weight"] @ values + weights[f"{name}.bias"]


def gelu(values: np.ndarray) -> np.ndarray:
    return np.array([0.5 * value * (1 + erf(value / np.sqrt(2))) for value in values])


def mlp(weights: dict, name: str, values: np.ndarray) -> np.ndarray:
    return linear(weights, f"{name}.2", np.tanh(linear(weights, f"{name}.0", values)))


def log_density(weights: dict, name: str, given: np.ndarray, target: np.ndarray) -> float:
    """log q of (8.3) without its constant."""
    mean = mlp(weights, f"likelihoods.{name}.mean", given)
    spread = 5 * np.tanh(mlp(weights, f"likelihoods.{name}.log_variance", given) / 5)
    return sum(
        -((y - m) ** 2) / (2 * np.exp(v)) - v / 2 for y, m, v in zip(target, mean, spread, strict=True)
    )


def entropy(states: np.ndarray, classes: np.ndarray) -> float:
    """(8.5): the mean over the classes of half the log determinant of a covariance with a ridge."""
    halves = []
    for label in np.unique(classes):
        own = states[classes == label]
        if len(own) > 1:
            covariance = np.cov(own.T, bias=True) + 1e-3 * np.eye(states.shape[1])
            halves.append(np.linalg.slogdet(covariance)[1] / 2)
    return float(np.mean(halves)) if halves else 0.0


@pytest.fixture
def trial(make_head, make_gappy):
    """A head, what it returned, its weights in NumPy, and the states of its output in NumPy."""
    head = make_head("mmim")
    output = head(make_gappy(5, PRESENT), LABELS)
    weights = {name: value.numpy() for name, value in head.state_dict().items()}
    return head, output, weights, {name: state.detach().numpy() for name, state in output.features.items()}


def rows_with(*names: str) -> list[int]:
    return [row for row in range(5) if all(PRESENT[row][MODALITIES.index(name)] for name in names)]


def test_the_predictions_are_those_of_the_equations_whatever_is_absent(trial, make_gappy):
    _, output, weights, _ = trial
    sequences = make_gappy(5, PRESENT)
    for sample, present in enumerate(PRESENT):
        states = []
        for name, is_there in zip(MODALITIES, present, strict=True):
            state = np.zeros(8)
            if is_there:
                mean = sequences[name].values[sample][sequences[name].mask[sample]].numpy().mean(axis=0)
                normal = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5)  # LayerNorm starts as the identity
                state = gelu(linear(weights, f"projections.{name}.1", normal))
            assert_equation("8.1", f"state of {name}", output.features[name][sample], state)
            alone = linear(weights, f"predictors.{name}", state)
            assert_equation("8.2", f"prediction of {name}", output.modality_logits[name][sample], alone)
            states.append(state)
        fused = gelu(linear(weights, "fusion.0", np.concatenate(states)))
        assert_equation("8.2", "fused", output.logits[sample], linear(weights, "classifier", fused))


def test_information_is_the_bound_on_the_samples_that_have_both(trial):
    _, output, weights, states = trial
    total, fit = 0.0, 0.0
    for name in ("audio", "vision"):
        rows = rows_with("text", name)
        mean = np.mean([log_density(weights, name, states["text"][row], states[name][row]) for row in rows])
        total += mean + entropy(states[name][rows], LABELS.numpy()[rows] > 0)
        fit += mean
    assert_equation("8.4", "loss likelihood", output.losses["likelihood"], -fit)
    assert_equation("8.5", "loss information", output.losses["information"], -total)


def test_contrast_seeks_each_state_among_those_of_the_batch(trial):
    _, output, weights, states = trial
    fused, expected = output.fused.detach().numpy(), 0.0
    for name in MODALITIES:
        rows, terms = rows_with(name), []
        for row in rows:
            sought = mlp(weights, f"contrasts.{name}", fused[row])
            scores = [
                sought @ states[name][other] / np.linalg.norm(sought) / np.linalg.norm(states[name][other])
                for other in rows
            ]
            terms.append(np.log(sum(np.exp(score) for score in scores)) - scores[rows.index(row)])
        expected += np.mean(terms)
    assert_equation("8.6", "loss contrast", output.losses["contrast"], expected)


def test_each_side_of_the_bound_is_fitted_by_its_own_loss(trial):
    """The predictors q would otherwise learn to raise the bound, and the states to be predictable alone."""
    head, output, _, _ = trial
    predictors, others = {}, {}
    for name, parameter in head.named_parameters():
        (predictors if name.startswith("likelihoods.") else others)[name] = parameter
    for loss, idle, moved in (("information", predictors, others), ("likelihood", others, predictors)):
        gradients = {
            key: torch.autograd.grad(
                output.losses[loss], list(values.values()), retain_graph=True, allow_unused=True
            )
            for key, values in (("idle", idle), ("moved", moved))
        }
        assert all(gradient is None or not gradient.any() for gradient in gradients["idle"])
        assert any(gradient is not None and gradient.any() for gradient in gradients["moved"])


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_few_samples_give_finite_losses_and_gradients(rows):
    states = torch.rand(3, 4, requires_grad=True)
    counted = torch.arange(3) < rows
    members = torch.stack([counted, torch.zeros_like(counted)], dim=-1)
    total = class_entropy(states, members) + contrast(states, states * counted.unsqueeze(-1), counted)
    total.backward()
    assert total.isfinite() and states.grad.isfinite().all()


def test_bounds_whose_predictors_are_never_fitted_are_refused():
    head = MMIMHead(WIDTHS, 1, hidden_size=8)
    assert "loss_weights.likelihood=0" in head.weights_problem({"likelihood": 0})
    assert head.weights_problem({"likelihood": 0, "information": 0}) is None
    assert head.weights_problem({}) is None


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="regression_loss='huber' must be one of mse, l1"):
        MMIMHead(WIDTHS, 1, regression_loss="huber")
