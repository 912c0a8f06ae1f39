# SPDX-License-Identifier: Apache-2.0
"""MulT against its equations, computed sample by sample in NumPy (docs/methods/mult.md)."""

import numpy as np
import pytest
import torch

from msa_online.methods import MulTHead
from msa_online.modalities import MODALITIES
from tests.equations import assert_equation

PRESENT = [[True, True, True], [True, False, True], [False, False, True], [False, False, False]]
WIDTHS = {"text": 6, "audio": 5, "vision": 4}
SETTINGS = {"depth": 2, "memory_depth": 2, "heads": 2}


def norm(states: np.ndarray) -> np.ndarray:
    """Layer norm of each step."""
    deviation = np.sqrt(states.var(axis=-1, keepdims=True) + 1e-5)
    return (states - states.mean(axis=-1, keepdims=True)) / deviation


def positions(time: int, width: int) -> np.ndarray:
    waves = np.zeros((time, width))
    for place in range(time):
        for number in range(width):
            angle = place / 10_000 ** (2 * (number // 2) / width)
            waves[place, number] = np.sin(angle) if number % 2 == 0 else np.cos(angle)
    return waves


def convolve(kernel: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Steps `(time, width)` with a kernel `(outputs, width, 3)`; zeros beyond both ends."""
    padded = np.pad(values, ((1, 1), (0, 0)))
    return np.stack([np.einsum("owk,kw->o", kernel, padded[step : step + 3]) for step in range(len(values))])


def layer(weights: dict, name: str, stack: int, states: np.ndarray, source: np.ndarray) -> np.ndarray:
    """(7.3) and (7.4) for one sample: states `(time, width)` read the observed steps of a source."""

    def linear(part: str, rows: np.ndarray) -> np.ndarray:
        return rows @ weights[f"{name}.{part}.weight"][stack] + weights[f"{name}.{part}.bias"][stack]

    width, half = states.shape[-1], states.shape[-1] // 2
    attended = np.zeros_like(states)
    if len(source):
        query, both = linear("query", norm(states)), linear("key_value", norm(source))
        for head in (slice(0, half), slice(half, width)):
            scores = query[:, head] @ both[:, :width][:, head].T / np.sqrt(half)
            shares = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
            attended[:, head] = shares @ both[:, width:][:, head]
    states = states + linear("output", attended)
    return states + linear("narrow", np.maximum(linear("widen", norm(states)), 0))


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_predictions_are_those_of_the_equations_whatever_is_absent(outputs, make_head, make_gappy):
    head, sequences = make_head("mult", outputs, **SETTINGS), make_gappy(4, PRESENT)
    weights = {name: value.numpy() for name, value in head.state_dict().items()}
    output = head(sequences)
    for sample, present in enumerate(PRESENT):
        placed, features = {}, []
        for name, is_there in zip(MODALITIES, present, strict=True):
            mask, values = sequences[name].mask[sample].numpy(), sequences[name].values[sample].numpy()
            steps = convolve(weights[f"projections.{name}.weight"], values)
            placed[name] = (steps * np.sqrt(8) + positions(len(steps), 8))[mask]
            if is_there:
                alone = weights[f"predictors.{name}.weight"] @ steps[mask].mean(axis=0)
                alone = alone + weights[f"predictors.{name}.bias"]
                found = output.modality_logits[name][sample]
                assert_equation("7.7", f"prediction of {name}", found, alone, rtol=1e-6, atol=1e-6)
        for name, is_there in zip(MODALITIES, present, strict=True):
            feature = np.zeros(16)
            if is_there:
                sides = []
                for stack, other in enumerate(key for key in MODALITIES if key != name):
                    states = placed[name]
                    for number in range(SETTINGS["depth"]):
                        states = layer(weights, f"crossings.{name}.{number}", stack, states, placed[other])
                    sides.append(norm(states))
                memory = np.concatenate(sides, axis=-1)
                for number in range(SETTINGS["memory_depth"]):
                    memory = layer(weights, f"memories.{name}.{number}", 0, memory, memory)
                feature = norm(memory)[-1]
            found = output.features[name][sample]
            assert_equation("7.5", f"state of {name} of {present}", found, feature, rtol=1e-6, atol=1e-6)
            features.append(feature)
        joint = np.concatenate(features)
        hidden = np.maximum(weights["fusion.0.weight"] @ joint + weights["fusion.0.bias"], 0)
        fused = joint + weights["fusion.3.weight"] @ hidden + weights["fusion.3.bias"]
        expected = weights["classifier.weight"] @ fused + weights["classifier.bias"]
        assert_equation("7.6", "fused prediction", output.logits[sample], expected, rtol=1e-6, atol=1e-6)


def test_the_unimodal_loss_counts_only_samples_that_have_the_modality(make_head, make_gappy):
    head, sequences = make_head("mult", **SETTINGS), make_gappy(4, PRESENT)
    labels = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    output = head(sequences, labels)
    expected = 0.0
    for column, name in enumerate(MODALITIES):
        rows = [row for row in range(4) if PRESENT[row][column]]
        errors = (output.modality_logits[name][rows, 0] - labels[rows]).detach().numpy() ** 2
        expected += errors.mean()
    assert_equation("7.8", "loss unimodal", output.losses["unimodal"], expected)
    task = ((output.logits[:, 0] - labels).detach().numpy() ** 2).mean()
    assert_equation("7.8", "loss task", output.losses["task"], task)


def test_the_order_of_the_steps_counts(make_head, make_sequences):
    head, sequences = make_head("mult", **SETTINGS), make_sequences(1)
    text = sequences["text"]
    turned = text.with_values(torch.where(text.mask.unsqueeze(-1), text.values.flip(1), 0.0))
    assert text.mask.all()
    assert not torch.allclose(head(sequences | {"text": turned}).logits, head(sequences).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"memory_depth": 0}, "memory_depth=0 must be at least 1"),
        ({"hidden_size": 9}, "hidden_size=9 is not a multiple of heads=8"),
        ({"kernel_size": 2}, "kernel_size=2 must be an odd number"),
        ({"regression_loss": "huber"}, "regression_loss='huber' must be one of mse, l1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MulTHead(WIDTHS, 1, **settings)
