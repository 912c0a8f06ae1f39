# SPDX-License-Identifier: Apache-2.0
"""OGM-GE: on-the-fly gradient modulation with generalisation enhancement, the plain modulator."""

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
    """Damps the encoder of the modality that predicts best alone, and adds noise to all (METHODS 5).

        score_m = mean probability of the true class, or 1 / MAE, of the modality's own prediction
        c_m     = 1 - tanh(alpha score_m / mean of the other scores)    where m is the better, else 1
        grad    <- c_m grad + N(0, std(grad))

    Deviations: two modalities became any number, each against the mean of the others; convolution kernels
    became every tensor with two dimensions or more, so that text encoders are enhanced as well; the partial
    logits of a shared classifier became the head's own unimodal predictors, so that any head will do;
    regression is judged by its inverse error (as in CP/SL).

    Relations: `ConflictModulator` adds a look at gradient norms to the same coefficients.

    Args:
        modalities: Modalities to compare and to modulate.
        strength: alpha.
        noise: Noise in deviations of the gradient; 0 is OGM without GE.
        epochs: First and last epoch of modulation, from 0; None for all.
        apply: "gradient" as published, or "lr": under Adam only the latter slows a modality for long.

    Raises:
        ValueError: A setting is out of range.
    """

    needs_modality_logits = True

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
        """How well each modality alone predicts the micro-batch."""
        return observe_quality(output, labels, self.modalities)

    def modulate(self, context: ModulationContext) -> Modulation:
        """Damp the better modalities and add noise to all; outside its epochs it only takes the scores."""
        scores = quality_scores(context.statistics, self.modalities)
        coefficients = dict.fromkeys(self.modalities, 1.0)
        rates: dict[str, float] = {}
        if self.acts_in(context.epoch):
            coefficients = damping_coefficients(scores, self.modalities, self.strength)
            rates = apply_coefficients(coefficients, context, apply=self.apply, noise=self.noise)
        return Modulation(rates, balance_log(scores, coefficients))
