# SPDX-License-Identifier: Apache-2.0
"""OGM-GE: on-the-fly gradient modulation with generalisation enhancement (CVPR 2022).

Equation numbers are those of docs/methods/ogm.md.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from msa_online.methods.base import GradientModulator, Modulation, ModulationContext
from msa_online.methods.gradients import (
    apply_coefficients,
    balance_log,
    check_settings,
    damping_coefficients,
    observe_quality,
    quality_scores,
)
from msa_online.modalities import MODALITIES


class OGMModulator(GradientModulator):
    """Damps the gradients of the modality that predicts best alone, and adds noise to those of all.

        score_m = mean probability of the true class, or 1 / MAE, of m's own prediction                (5.4)
        c_m     = 1 - tanh(alpha score_m / mean of the other scores)    if m is better, else 1         (5.5)
        grad    <- c_m grad + N(0, std(grad))                                                          (5.6)

    Deviations and readings: any number of modalities, each compared with the mean of the others (paper: two);
    noise on all tensors with two dimensions or more, so that text encoders get it too (published code:
    convolution kernels); scores from the head's unimodal predictors, so that any head works (published code:
    the modality's part of a shared classifier); regression is scored by the inverse error, as in CP/SL.

    Relations: `ConflictModulator` uses the same coefficients and also compares gradient norms.

    Args:
        modalities: Modalities to compare and to modulate.
        strength: alpha.
        noise: Standard deviation of the noise, relative to that of the gradient; 0 is OGM without GE.
        epochs: First and last epoch of modulation, from 0; None for all.
        apply: "gradient" as published, or "lr": under Adam only "lr" has a lasting effect.

    Raises:
        ValueError: A setting is out of range.
    """

    needs_modality_logits = True
    paper = (
        "Peng, Wei, Deng, Wang, Hu: Balanced Multimodal Learning via On-the-Fly Gradient Modulation, CVPR "
        "2022, https://arxiv.org/abs/2203.15332"
    )

    def __init__(
        self,
        *,
        modalities: Sequence[str] = MODALITIES,
        strength: float = 1.0,
        noise: float = 1.0,
        epochs: Sequence[int] | None = None,
        apply: str = "gradient",
    ) -> None:
        check_settings(modalities, epochs, apply, noise, strength)
        self.modalities = tuple(modalities)
        self.epochs = None if epochs is None else tuple(epochs)
        self.strength, self.noise, self.apply = strength, noise, apply

    def observe(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """Measure how well each modality alone predicts the micro-batch."""
        return observe_quality(output, labels, self.modalities)

    def modulate(self, context: ModulationContext) -> Modulation:
        """Damp the better modalities and add noise to all; outside `epochs`, only record the scores."""
        scores = quality_scores(context.statistics, self.modalities)
        coefficients = dict.fromkeys(self.modalities, 1.0)
        rates: dict[str, float] = {}
        if self.acts_in(context.epoch):
            coefficients = damping_coefficients(scores, self.modalities, self.strength)
            rates = apply_coefficients(coefficients, context, apply=self.apply, noise=self.noise)
        return Modulation(rates, balance_log(scores, coefficients))
