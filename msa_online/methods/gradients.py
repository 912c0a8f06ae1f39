# SPDX-License-Identifier: Apache-2.0
"""Functions that gradient modulators share: score modalities, measure and scale gradients, add noise.

Equation numbers are those of docs/methods/cpsl.md.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from msa_online.layers.arguments import check_choice
from msa_online.layers.precision import in_fp32
from msa_online.methods.base import ModulationContext
from msa_online.modalities import MODALITIES

EPSILON = 1e-8  # in scores and ratios, which are Python floats
APPLICATIONS = ("gradient", "lr")
NORMS = ("mean", "rms")


def observe_quality(output: Any, labels: Tensor, modalities: Iterable[str]) -> dict[str, Tensor]:
    """Measure how well each modality alone predicts a micro-batch; input of `quality_scores`.

    Args:
        output: `MSAOutput`; its `modality_logits` are scored on the samples that have the modality.
        labels: `(batch,)`; floats mean regression.
        modalities: Modalities to score.

    Returns:
        Detached scalars. `error/<name>` (absolute error) or `truth/<name>` (probability of the true class)
        are means over all samples of the micro-batch; a sample without the modality counts as zero.
        `observed/<name>` is the share of samples that have the modality.
    """
    statistics = {}
    for name in modalities:
        logits, present = in_fp32(output.modality_logits[name].detach()), output.present[name]
        if labels.is_floating_point():
            kind, quality = "error", (logits.squeeze(-1) - labels).abs()
        else:
            kind, quality = "truth", logits.softmax(dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        statistics[f"{kind}/{name}"] = (quality * present).mean()
        statistics[f"observed/{name}"] = present.float().mean()
    return statistics


def quality_scores(statistics: Mapping[str, float], modalities: Iterable[str]) -> dict[str, float]:
    """Score of each modality alone: inverse mean absolute error, or mean probability of the true class (4.8).

    A modality that no sample of the step has gets no score.
    """
    scores = {}
    for name in modalities:
        if share := statistics[f"observed/{name}"]:
            truth, error = statistics.get(f"truth/{name}"), statistics.get(f"error/{name}")
            scores[name] = truth / share if error is None else 1 / (error / share + EPSILON)
    return scores


def mean_of_others(values: Mapping[str, float], name: str) -> float | None:
    """Mean of the values of all modalities but `name`; None if there are no others or `name` has no value."""
    others = [value for other, value in values.items() if other != name]
    return sum(others) / len(others) if others and name in values else None


def damping_coefficients(
    scores: Mapping[str, float], modalities: Iterable[str], strength: float, shift: float = 0.0
) -> dict[str, float]:
    """Coefficient of each modality. It falls as the modality outperforms the others (4.8).

        c_m = 1 - tanh(alpha ReLU(score_m / mean of other scores - shift))    if m is better, else 1

    Args:
        scores: Score of each modality, above 0.
        modalities: Modalities that get a coefficient; it is 1 without a score or without other scores.
        strength: alpha.
        shift: 0 as printed: the coefficient jumps from 1 to 1 - tanh(alpha) at equal scores. 1 makes it
            continuous there.
    """
    coefficients = {}
    for name in modalities:
        others = mean_of_others(scores, name)
        dominant = others is not None and scores[name] > others
        ratio = scores[name] / (others + EPSILON) if dominant else 0.0
        coefficients[name] = 1 - math.tanh(strength * max(ratio - shift, 0.0)) if dominant else 1.0
    return coefficients


def imbalance_degree(scores: Mapping[str, float]) -> float:
    """Spread of the scores, (largest - smallest) / (largest + smallest), in [0, 1); 0 if all are equal."""
    if not scores:
        return 0.0
    largest, smallest = max(scores.values()), min(scores.values())
    return (largest - smallest) / (largest + smallest + EPSILON)


def balance_log(scores: Mapping[str, float], coefficients: Mapping[str, float]) -> dict[str, float]:
    """Log entries of a step: scores, coefficients and the degree of imbalance."""
    return {
        **{f"score/{name}": score for name, score in scores.items()},
        **{f"coefficient/{name}": value for name, value in coefficients.items()},
        "imbalance/degree": imbalance_degree(scores),
    }


def gradients_of(parameters: Iterable[Parameter]) -> list[Tensor]:
    """Gradients of the parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def average_norm(parameters: Iterable[Parameter], kind: str) -> Tensor:
    """Size of the gradients of a modality in fp32, a scalar; 0 without gradients ((4.9), choice Q4).

    Args:
        parameters: Parameters of the modality.
        kind: "mean": mean of the tensors' L2 norms, as printed. "rms": root mean square over all elements,
            a fair comparison of encoders of different depth and width.
    """
    gradients = gradients_of(parameters)
    if not gradients:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))
    if kind == "mean":
        return norms.mean()
    return norms.square().sum().div(sum(gradient.numel() for gradient in gradients)).sqrt()


def apply_coefficients(
    coefficients: Mapping[str, float], context: ModulationContext, *, apply: str, noise: float
) -> dict[str, float]:
    """Scale each modality's gradients and add noise to them (4.10).

        grad <- c_m grad + N(0, noise std(grad))        noise only for tensors with two dimensions or more

    The noise comes from its own generator, seeded by run, step, modality and parameter, so that all ranks add
    the same.

    Args:
        coefficients: c_m; a coefficient of 1 leaves gradients bit-equal.
        context: Parameters of each modality, step and seed.
        apply: "gradient"; or "lr", which leaves gradients unscaled and returns factors for the learning
            rates, because Adam cancels a constant factor on gradients (docs/methods/numerics.md).
        noise: Standard deviation of the noise, relative to that of each tensor's unscaled gradient; 0 adds
            none.

    Returns:
        Factor on the learning rate of each modality; empty under "gradient".
    """
    for name, coefficient in coefficients.items():
        parameters = context.modality_parameters[name]
        gradients = gradients_of(parameters)
        noisy = [
            (number, parameter.grad, parameter.grad.std(correction=0))
            for number, parameter in enumerate(parameters if noise else ())
            if parameter.grad is not None and parameter.ndim >= 2
        ]
        if apply == "gradient" and coefficient != 1 and gradients:
            torch._foreach_mul_(gradients, coefficient)
        for number, gradient, deviation in noisy:
            seed = (context.seed, context.step, MODALITIES.index(name), number)
            gradient.addcmul_(_normal_like(gradient, seed), deviation * noise)
    return dict(coefficients) if apply == "lr" else {}


def _normal_like(values: Tensor, seed: Sequence[int]) -> Tensor:
    """Standard normal noise that depends only on the seed and the shape."""
    generator = torch.Generator(values.device)
    generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
    return torch.randn(values.shape, generator=generator, device=values.device, dtype=values.dtype)


def check_settings(
    modalities: Sequence[str], epochs: Sequence[int] | None, apply: str, noise: float, strength: float
) -> None:
    """Validate the settings that several modulators share.

    Raises:
        ValueError: A setting is out of range; names the setting, its value and what is allowed.
    """
    check_modalities(modalities)
    check_window(epochs)
    check_choice("apply", apply, APPLICATIONS)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise={noise} must be at least 0, in standard deviations of the gradient")
    if not 0 < strength < math.inf:
        raise ValueError(f"strength={strength} must be above 0")


def check_modalities(modalities: Sequence[str]) -> None:
    """Validate the modalities to compare; raises `ValueError` as `check_settings` does."""
    if isinstance(modalities, str):
        raise ValueError(f"modalities={modalities!r} must be a list, like [{', '.join(MODALITIES)}]")
    if unknown := [name for name in modalities if name not in MODALITIES]:
        raise ValueError(f"modalities name {unknown[0]!r}: choose among {', '.join(MODALITIES)}")
    if len(set(modalities)) < 2 or len(set(modalities)) < len(modalities):
        raise ValueError(f"modalities={list(modalities)} must name at least two to compare, each once")


def check_window(epochs: Sequence[int] | None) -> None:
    """Validate a range of epochs; raises `ValueError` as `check_settings` does."""
    if epochs is not None and not (
        isinstance(epochs, Sequence) and len(epochs) == 2 and 0 <= epochs[0] <= epochs[1]
    ):
        raise ValueError(f"epochs={epochs!r} is no range: give the first and the last epoch, like [0, 25]")
