# SPDX-License-Identifier: Apache-2.0
"""Detect diverged runs, and models that are worse than a constant."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch.amp import GradScaler

from msa_online.configuration_msa import MSAConfig
from msa_online.evaluation.conditions import DIVERGED, metrics_of, selection_score
from msa_online.evaluation.tables import HEADLINES, selection_metric

LARGEST_MAE = 10.0
"""Largest validation MAE of a run, in widths of the label range; above it, the run has diverged."""


class DivergedError(RuntimeError):
    """Training has diverged; the message names the epoch, the value and the remedy."""


@dataclass(frozen=True)
class ConstantModel:
    """Predicts the same for every sample: the mean training label, or the most frequent training class.

    A model that is worse has learned nothing.

    Attributes:
        config: Configuration of the model, for the task.
        logits: The constant output, `(outputs,)`.
    """

    config: MSAConfig
    logits: np.ndarray

    @classmethod
    def fit(cls, labels: Sequence[float], config: MSAConfig) -> "ConstantModel":
        """The constant for training labels `(samples,)`, scores or class numbers."""
        if config.is_regression:
            return cls(config, np.array([np.mean(labels)]))
        return cls(config, np.bincount(np.asarray(labels), minlength=config.num_labels).astype(np.float64))

    @property
    def title(self) -> str:
        """Description of the prediction."""
        if self.config.is_regression:
            return f"the mean training label ({self.logits[0]:.3f})"
        return f"the most frequent training class ({self.config.id2label[int(self.logits.argmax())]})"

    def metrics(self, labels: Sequence[float]) -> dict[str, float]:
        """Metrics of the constant on a split with `labels` `(samples,)`; the correlation is 0."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a constant has no correlation
            return metrics_of(np.tile(self.logits, (len(labels), 1)), np.asarray(labels), self.config)


def check_epoch(
    title: str,
    losses: Mapping[str, float],
    metrics: Mapping[str, float],
    label_range: tuple[float, float],
    scaler: GradScaler | None,
) -> None:
    """Stop a run that has diverged, before anything of the epoch is saved.

    Args:
        title: Name of the epoch.
        losses: Training losses of the epoch; empty if every step was skipped.
        metrics: Validation metrics of the epoch.
        label_range: Lowest and highest legal label of a regression.
        scaler: Scaler of fp16; while it searches for its scale, skipped steps are normal.

    Raises:
        DivergedError: No step had a finite gradient, or the validation MAE is far too large.
    """
    if not losses and (scaler is None or scaler.get_scale() < 1):
        raise DivergedError(f"{title}: every step was skipped, because no gradient was finite; {DIVERGED}")
    low, high = label_range
    if "mae" in metrics and metrics["mae"] > LARGEST_MAE * (high - low):
        raise DivergedError(
            f"{title}: validation MAE {metrics['mae']:.3g} for labels from {low:g} to {high:g}; {DIVERGED}"
        )


def is_worse(metrics: Mapping[str, float], constant: Mapping[str, float], is_regression: bool) -> bool:
    """Whether a model is worse than the constant model, by the metric that selects the best epoch."""
    return selection_score(metrics, is_regression) < selection_score(constant, is_regression)


def constant_line(split: str, metrics: Mapping[str, float], constant: Mapping[str, float], title: str) -> str:
    """One line that compares a model with the constant model on a split."""
    is_regression = "mae" in metrics
    name = selection_metric(is_regression)
    measured = f"{split}: {HEADLINES[name]} {metrics[name]:.3f}"
    line = f"{measured}; always predicting {title} gives {constant[name]:.3f}"
    if not is_worse(metrics, constant, is_regression):
        return line
    return f"warning: {line}: the model is worse than that, do not use it; train longer, or check the labels"
