# SPDX-License-Identifier: Apache-2.0
"""MISA against its equations, computed sample by sample in NumPy (docs/methods/misa.md)."""

from itertools import combinations

import numpy as np
import pytest
import torch

from msa_online.methods import MISAHead
from msa_online.methods.misa import difference, reconstruction, similarity
from msa_online.modalities import MODALITIES
from tests.equations import assert_equation

PRESENT = [[True, True, True], [True, False, True], [False, False, True], [False, False, False]]
WIDTHS = {"text": 6, "audio": 5, "vision": 4}
PAIRS = list(combinations(MODALITIES, 2))


def linear(weights: dict, name: str, values: np.ndarray) -> np.ndarray:
    return weights[f"{name}.weight"] @ values + weights[f"{name}.bias"]


def norm(weights: dict, name: str, values: np.ndarray) -> np.ndarray:
    normal = (values - values.mean()) / np.sqrt(values.var() + 1e-5)
    return weights[f"{name}.weight"] * normal + weights[f"{name}.bias"]


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def attend(weights: dict, states: list[np.ndarray]) -> list[np.ndarray]:
    """The transformer layer over the states of one sample, with two heads."""
    width = len(states[0])
    both = [linear(weights, "transformer.0.query_key", state) for state in states]
    values = [linear(weights, "transformer.0.value", state) for state in states]
    passed = []
    for number, state in enumerate(states):
        parts = []
        for head in (slice(0, width // 2), slice(width // 2, width)):
            query = both[number][:width][head]
            scores = np.array([query @ each[width:][head] for each in both]) / np.sqrt(width // 2)
            shares = np.exp(scores) / np.exp(scores).sum()
            parts.append(sum(share * value[head] for share, value in zip(shares, values, strict=True)))
        attended = linear(weights, "transformer.0.output", np.concatenate(parts))
        first = norm(weights, "transformer.0.attention_norm", state + attended)
        inner = np.maximum(linear(weights, "transformer.0.widen", first), 0)
        passed.append(
            norm(weights, "transformer.0.norm", first + linear(weights, "transformer.0.narrow", inner))
        )
    return passed


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_predictions_are_those_of_the_equations_whatever_is_absent(outputs, make_head, make_gappy):
    head, sequences = (
        make_head("misa", outputs, moved=("transformer.0.", "projections.")),
        make_gappy(4, PRESENT),
    )
    weights = {name: value.numpy() for name, value in head.state_dict().items()}
    output = head(sequences)
    for sample, present in enumerate(PRESENT):
        there = [name for name, is_there in zip(MODALITIES, present, strict=True) if is_there]
        shared, private = {}, {}
        for name in there:
            steps = sequences[name].values[sample][sequences[name].mask[sample]].numpy()
            hidden = np.maximum(linear(weights, f"projections.{name}.0", steps.mean(axis=0)), 0)
            pooled = norm(weights, f"projections.{name}.2", hidden)
            shared[name] = sigmoid(linear(weights, "shared.0", pooled))
            private[name] = sigmoid(linear(weights, f"private.{name}.0", pooled))
            both = np.concatenate([shared[name], private[name]])
            assert_equation("6.2", f"states of {name}", output.features[name][sample], both)
            alone = linear(weights, f"predictors.{name}", both)
            assert_equation("6.4", f"prediction of {name}", output.modality_logits[name][sample], alone)
        states = [*shared.values(), *private.values()]
        fused = iter(attend(weights, states) if states else [])
        slots = [next(fused) if is_there else np.zeros(8) for is_there in present * 2]
        joint = np.maximum(linear(weights, "fusion.0", np.concatenate(slots)), 0)
        expected = linear(weights, "classifier", joint)
        assert_equation("6.3", f"prediction of {there}", output.logits[sample], expected)


@pytest.fixture
def batch():
    """Shared and private states and u_m of nine samples, some absent."""
    generator = torch.Generator().manual_seed(1)
    present = torch.rand(9, 3, generator=generator) < 0.7

    def draw() -> dict[str, torch.Tensor]:
        return {name: torch.rand(9, 4, generator=generator, dtype=torch.float64) for name in MODALITIES}

    return draw(), draw(), draw(), {name: present[:, column] for column, name in enumerate(MODALITIES)}


def test_the_similarity_loss_compares_five_moments_of_the_samples_that_have_each_modality(batch):
    shared, _, _, present = batch
    expected = []
    for pair in PAIRS:
        one, other = (shared[name][present[name]].numpy() for name in pair)
        total = np.linalg.norm(one.mean(0) - other.mean(0))
        for order in range(2, 6):
            moments = [((states - states.mean(0)) ** order).mean(0) for states in (one, other)]
            total += np.linalg.norm(moments[0] - moments[1])
        expected.append(total)
    assert_equation("6.5", "similarity", similarity(shared, present), np.mean(expected))


def test_the_difference_loss_is_the_overlap_of_centred_states_of_norm_one(batch):
    shared, private, _, present = batch

    def overlap(one: str, first: dict, other: str, second: dict) -> float:
        rows = [row for row in range(9) if present[one][row] and present[other][row]]
        sides = []
        for states in (first[one], second[other]):
            centred = states[rows].numpy() - states[rows].numpy().mean(0)
            sides.append([row / np.linalg.norm(row) for row in centred])
        crossed = sum(np.outer(one, other) for one, other in zip(*sides, strict=True))
        return (crossed**2).mean()

    expected = sum(overlap(name, shared, name, private) for name in MODALITIES)
    expected += sum(overlap(one, private, other, private) for one, other in PAIRS)
    assert_equation("6.6", "difference", difference(shared, private, present), expected, rtol=1e-7)


def test_the_reconstruction_loss_counts_only_samples_that_have_the_modality(batch):
    pooled, rebuilt, _, present = batch
    errors = [((pooled[name] - rebuilt[name])[present[name]].numpy() ** 2).mean() for name in MODALITIES]
    assert_equation("6.7", "reconstruction", reconstruction(pooled, rebuilt, present), np.mean(errors))


def test_what_absent_samples_hold_changes_no_loss_of_the_states(batch):
    shared, private, pooled, present = batch

    def losses() -> list[float]:
        return [
            similarity(shared, present).item(),
            difference(shared, private, present).item(),
            reconstruction(pooled, shared, present).item(),
        ]

    before = losses()
    for states in (shared, private, pooled):
        for name in MODALITIES:
            states[name][~present[name]] = 7.0
    assert losses() == before


@pytest.mark.parametrize("rows", [0, 1])
def test_one_sample_or_none_gives_finite_losses_and_gradients(rows):
    states = {name: torch.rand(3, 4, requires_grad=True) for name in MODALITIES}
    present = {name: torch.arange(3) < rows for name in MODALITIES}
    total = similarity(states, present) + difference(states, states, present)
    total.backward()
    assert total.isfinite() and all(state.grad.isfinite().all() for state in states.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"hidden_size": 9}, "hidden_size=9 is not a multiple of heads=2"),
        ({"regression_loss": "huber"}, "regression_loss='huber' must be one of mse, l1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MISAHead(WIDTHS, 1, **settings)
