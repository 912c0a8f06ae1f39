# SPDX-License-Identifier: Apache-2.0
"""ITHP against its equations, computed step by step in NumPy (docs/methods/ithp.md)."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from msa_online import MSAConfig, MSAModel
from msa_online.methods import MODULATORS, ITHPHead
from msa_online.modalities import MODALITIES
from msa_online.training.config import TrainingArguments
from msa_online.training.model import require_fused
from msa_online.training.modulator import make_modulator
from msa_online.training.yaml_reader import ConfigurationError
from tests.equations import assert_equation

PRESENT = [[True, True, True], [True, False, True], [False, True, True], [False, False, False]]
WIDTHS = {"text": 6, "audio": 5, "vision": 4}
LABELS = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
ORDERS = {"text first": MODALITIES, "vision first": ("vision", "text", "audio")}


def linear(weights: dict, name: str, values: np.ndarray) -> np.ndarray:
    return weights[f"{name}.weight"] @ values + weights[f"{name}.bias"]


def normal(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / np.sqrt(values.var() + 1e-5)


def norm(weights: dict, name: str, values: np.ndarray) -> np.ndarray:
    return weights[f"{name}.weight"] * normal(values) + weights[f"{name}.bias"]


def gaussian(weights: dict, level: int, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hidden = np.maximum(linear(weights, f"bottlenecks.{level}.trunk.0", values), 0)
    raw = linear(weights, f"bottlenecks.{level}.log_variance", hidden)
    return linear(weights, f"bottlenecks.{level}.mean", hidden), 5 * np.tanh(raw / 5)


def steps_of(sequence, sample: int) -> np.ndarray:
    """Observed steps of a sample."""
    return sequence.values[sample][sequence.mask[sample]].numpy()


def target_of(sequence, sample: int, step: int, count: int) -> np.ndarray | None:
    """(10.2): observed steps of a modality during step number `step` of `count` equally long ones."""
    observed = np.flatnonzero(sequence.mask[sample])
    if not len(observed):
        return None
    length = observed[-1] + 1
    during = range(step * length // count, -(-(step + 1) * length // count))
    values = [sequence.values[sample, at].numpy() for at in observed if at in during]
    return normal(np.mean(values, axis=0)) if values else None


@pytest.fixture(params=ORDERS)
def trial(request, make_head, make_gappy):
    """A head, a batch, what the head returned for it, and its weights in NumPy."""
    order = ORDERS[request.param]
    head, sequences = make_head("ithp", order=order, moved=("norm.",)), make_gappy(4, PRESENT)
    weights = {name: value.numpy() for name, value in head.state_dict().items()}
    return head, sequences, head(sequences, LABELS), weights


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_the_prediction_is_that_of_the_prime_modality(pooling, trial, make_head):
    head, sequences, _, weights = trial
    prime = head.prime
    order = [prime, *head.targets]
    output = make_head("ithp", order=order, moved=("norm.",), pooling=pooling)(sequences)
    for sample, present in enumerate(PRESENT):
        states = []
        for step in steps_of(sequences[prime], sample):
            first, _ = gaussian(weights, 0, step)
            second, _ = gaussian(weights, 1, first)
            states.append(norm(weights, "norm", step + linear(weights, "expansion", second)))
        pooled = np.zeros(WIDTHS[prime])
        if states:
            pooled = states[0] if pooling == "first" else np.mean(states, axis=0)
        assert bool(states) == present[MODALITIES.index(prime)]
        assert_equation("10.5", "h", output.features[prime][sample], pooled)
        expected = linear(weights, "classifier", np.tanh(linear(weights, "pooler", pooled)))
        assert_equation("10.5", "prediction", output.logits[sample], expected)
        assert torch.equal(output.modality_logits[prime], output.logits)


def test_the_other_modalities_have_predictions_of_their_own(trial):
    head, sequences, output, weights = trial
    for name in head.targets:
        for sample in range(4):
            steps = steps_of(sequences[name], sample)
            mean = steps.mean(axis=0) if len(steps) else np.zeros(WIDTHS[name])
            inner = linear(weights, f"predictors.{name}.0", mean)
            inner = torch.nn.functional.gelu(torch.from_numpy(inner)).numpy()
            found = output.modality_logits[name][sample]
            assert_equation("10.5", f"of {name} alone", found, linear(weights, f"predictors.{name}.3", inner))


def test_the_bottleneck_loss_counts_each_observed_step_once(trial):
    head, sequences, output, weights = trial
    divergences, errors = ([], []), ([], [])
    for sample in range(4):
        steps = steps_of(sequences[head.prime], sample)
        for number, step in enumerate(steps):
            state = step
            for level, name in enumerate(head.targets):
                state, log_variance = gaussian(weights, level, state)
                divergence = 0.5 * (state**2 + np.exp(log_variance) - log_variance - 1)
                divergences[level].append(divergence.mean())
                target = target_of(sequences[name], sample, number, len(steps))
                if target is not None:
                    inner = np.maximum(linear(weights, f"decoders.{level}.0", state), 0)
                    rebuilt = linear(weights, f"decoders.{level}.3", inner)
                    errors[level].append(((rebuilt - target) ** 2).mean())
    (first, second), (first_error, second_error) = (
        list(map(np.mean, each)) for each in (divergences, errors)
    )
    found = output.diagnostics
    assert_equation("10.3", "divergences", [found["kl/first"], found["kl/second"]], [first, second])
    assert_equation("10.3", "errors", [found["mse/first"], found["mse/second"]], [first_error, second_error])
    expected = 2 / 40 * (first + 8 * first_error + 0.3 * (second + 32 * second_error))
    assert_equation("10.4", "loss bottleneck", output.losses["bottleneck"], expected)
    alone = 0.0
    for name in head.targets:
        rows = [row for row in range(4) if PRESENT[row][MODALITIES.index(name)]]
        scores = output.modality_logits[name].squeeze(-1)
        alone += ((scores - LABELS)[rows] ** 2).mean()
    assert_equation("10.5", "loss unimodal", output.losses["unimodal"], alone)


def test_in_training_states_are_samples_with_the_variance_of_the_bottleneck(make_head):
    head = make_head("ithp").train()
    torch.manual_seed(0)
    mean, log_variance = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0])
    drawn = head._sample(mean.expand(40_000, 2), log_variance.expand(40_000, 2))
    torch.testing.assert_close(drawn.mean(dim=0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.var(dim=0), log_variance.exp(), atol=0.03, rtol=0)


def test_targets_are_constants_so_that_encoders_cannot_meet_the_error_by_shrinking(make_head, make_sequences):
    head, sequences = make_head("ithp"), make_sequences(4)
    for sequence in sequences.values():
        sequence.values.requires_grad_()
    loss = head(sequences, LABELS).losses["bottleneck"]
    values = [sequence.values for sequence in sequences.values()]
    text, audio, vision = torch.autograd.grad(loss, values, allow_unused=True)
    assert text.any() and audio is None and vision is None


@pytest.mark.parametrize("modulator", [name for name in MODULATORS if name != "identity"])
def test_a_modulator_that_would_have_nothing_to_balance_is_refused(modulator):
    config = MSAConfig(feature_widths=WIDTHS, head="ithp", head_kwargs={"hidden_size": 8})
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ConfigurationError, match="model.head=ithp predicts without .*audio and vision: use"):
        make_modulator(TrainingArguments(modulator=modulator), MSAModel(config), 30, Accelerator(cpu=True))


def test_a_run_that_never_shows_the_prime_modality_is_refused():
    config = MSAConfig(feature_widths=WIDTHS, head="ithp", head_kwargs={"hidden_size": 8})
    expected = (
        "model.head=ithp predicts from text, which no training sample has under training.condition=audio: "
    )
    with pytest.raises(ConfigurationError, match=expected):
        require_fused(MSAModel(config), "audio", ["audio"])
    require_fused(MSAModel(config), None, ["text", "vision"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": ["text", "audio"]}, "order=.'text', 'audio'. must name each of text, audio, vision once"),
        ({"order": ["audio", "text", "vision"], "alignment": "words"}, "needs the text as prime modality"),
        ({"alignment": "uneven"}, "alignment='uneven' must be one of even, words"),
        ({"pooling": "last"}, "pooling='last' must be one of mean, first"),
        ({"regression_loss": "huber"}, "regression_loss='huber' must be one of mse, l1"),
        ({"beta": 0}, "beta=0 must be above 0"),
        ({"gamma": float("inf")}, "gamma=inf must be above 0"),
        ({"second_level": -1}, "second_level=-1 must be at least 0"),
        ({"hidden_size": 1}, "hidden_size=1 must be at least 2"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ITHPHead(WIDTHS, 1, **settings)
