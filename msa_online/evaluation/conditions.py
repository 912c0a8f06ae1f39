# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a model under modality conditions and with missing frames."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from msa_online.confidence import Confidence, fit_confidence, measure_confidence
from msa_online.configuration_msa import MSAConfig
from msa_online.evaluation.metrics import (
    class_metrics,
    classification_metrics,
    regression_metrics,
    undefined_metrics,
)
from msa_online.evaluation.tables import selection_metric
from msa_online.layers.losses import sample_losses
from msa_online.missing.frames import FRAME_RATES, LEVELS, FrameDrop
from msa_online.modalities import COMPLETE, CONDITIONS, MODALITIES, NOTHING, VISIBLE_SETS, ModalitySequence
from msa_online.modeling_msa import MSAModel, MSAOutput

DIVERGED = (
    "training has diverged: train again with a lower training.learning_rate, training.learning_rates or "
    "training.clip_norm, or with training.mixed_precision=no"
)
"""Cause and remedy of predictions that are not finite."""

LABELS = "labels"
"""Key of the labels in saved predictions."""

PADDING = -1  # in place of a sample, where ranks have different numbers of them

Batches = Iterable[Mapping[str, Tensor]]
"""Batches of a split, on the device, from a loader prepared by the accelerator."""


class UndefinedScoreError(ValueError):
    """A split has no score: some predictions are not finite, or no sample has any modality."""


@dataclass(frozen=True)
class ConditionPredictions:
    """Outputs of the model for a whole split, in dataset order.

    Attributes:
        logits: `(samples, outputs)` float64, by condition.
        seen: Which of `MODALITIES` each sample shows, `(samples, 3)` bool, by condition.
        labels: `(samples,)`.
    """

    logits: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]
    labels: np.ndarray

    def metrics(self, config: MSAConfig) -> dict[str, dict[str, float]]:
        """Metrics of `metrics_of` by condition; `NOTHING` is not one."""
        return {
            condition: metrics_of(logits, self.labels, config) for condition, logits in self._conditions()
        }

    def nonzero_metrics(self, config: MSAConfig) -> dict[str, dict[str, float]]:
        """Metrics of a regression by condition, on the samples whose label is not 0."""
        return {
            condition: regression_metrics(
                logits[:, 0], self.labels, style="nonzero", label_range=config.label_range
            )
            for condition, logits in self._conditions()
        }

    def class_metrics(self, config: MSAConfig) -> dict[str, dict[str, dict[str, float]]]:
        """Metrics of each class by condition, see `metrics.class_metrics`."""
        names = [config.id2label[number] for number in range(config.num_labels)]
        return {
            condition: class_metrics(logits, self.labels, names) for condition, logits in self._conditions()
        }

    def _conditions(self) -> list[tuple[str, np.ndarray]]:
        """The logits of each condition; `NOTHING` is not one."""
        return [(name, logits) for name, logits in self.logits.items() if name != NOTHING]

    def arrays(self) -> dict[str, np.ndarray]:
        """Logits by condition and the labels, as arrays to save; `NOTHING` is left out."""
        logits = {name: each.astype(np.float32) for name, each in self._conditions()}
        return {**logits, LABELS: self.labels}

    def fit_confidence(self, split: str) -> Confidence:
        """Intervals or temperatures of these predictions, by set of modalities."""
        return fit_confidence(self.logits, self.seen, self.labels, split)

    def measure_confidence(self, confidence: Confidence, config: MSAConfig) -> dict[str, dict[str, float]]:
        """Measures of `measure_confidence` by condition."""
        return {
            name: measure_confidence(confidence, logits, self.seen[name], self.labels, config.label_range)
            for name, logits in self.logits.items()
        }


def predict_conditions(
    model: MSAModel, batches: Batches, accelerator: Accelerator, conditions: tuple[str, ...]
) -> ConditionPredictions:
    """Predict a split under each condition (docs/methods/protocols.md, "Seven modality conditions").

    The encoders run once, and the head once for each condition.

    Args:
        model: The model, not wrapped.
        batches: Batches of the split.
        accelerator: Provides autocast, and gathers over ranks.
        conditions: Names in `VISIBLE_SETS`.
    """

    def logits_and_presence(batch: Mapping[str, Tensor]) -> Tensor:
        sequences = model.encode(**batch)
        present = torch.stack([sequences[name].present for name in MODALITIES], dim=1)
        under_each = [decide_under(model, sequences, VISIBLE_SETS[name]).logits for name in conditions]
        return torch.stack([torch.cat([logits, present], dim=1) for logits in under_each], dim=1)

    outputs, labels = over_split(model, batches, accelerator, logits_and_presence)
    logits, present = outputs[..., : -len(MODALITIES)], outputs[:, 0, -len(MODALITIES) :] > 0
    visible = {name: np.isin(MODALITIES, VISIBLE_SETS[name]) for name in conditions}
    return ConditionPredictions(
        {name: logits[:, column] for column, name in enumerate(conditions)},
        {name: present & visible[name] for name in conditions},
        labels,
    )


def evaluate_frame_rates(
    model: MSAModel,
    batches: Batches,
    accelerator: Accelerator,
    drop: FrameDrop,
    *,
    level: str = "input",
    rates: Sequence[float] = FRAME_RATES,
) -> dict[str, dict[str, float]]:
    """Metrics of one model at each rate of missing words, sounds and faces, and their mean.

    The protocol is that of docs/methods/protocols.md, "Missing words, sounds and faces".

    Args:
        model: The model, not wrapped.
        batches: Batches of the split.
        accelerator: Provides autocast, and gathers over ranks.
        drop: Selects the dropped positions of each sample.
        level: "input" drops before the encoders, which then run once for each rate; "feature" sets encoder
            states to zero.
        rates: Shares of positions to drop, in [0, 1).

    Returns:
        The metrics of `metrics_of` under each rate as text ("0.1"), and their means under "mean".

    Raises:
        ValueError: The level is unknown, or a rate is outside [0, 1).
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}: it must be one of {', '.join(LEVELS)}")
    if invalid := [rate for rate in rates if not 0 <= rate < 1]:
        raise ValueError(f"rate {invalid[0]} must be at least 0 and below 1")

    def logits_at_each(batch: Mapping[str, Tensor]) -> Tensor:
        if level == "input":
            return torch.stack([model(**drop.from_inputs(batch, rate)).logits for rate in rates], dim=1)
        sequences, index = model.encode(**batch), batch["index"]
        dropped = (drop.from_states(sequences, index, rate) for rate in rates)
        return torch.stack([model.decide(states).logits for states in dropped], dim=1)

    logits, labels = over_split(model, batches, accelerator, logits_at_each)
    results = {
        str(rate): metrics_of(logits[:, column], labels, model.config) for column, rate in enumerate(rates)
    }
    means = {
        name: float(np.mean([metrics[name] for metrics in results.values()]))
        for name in results[str(rates[0])]
    }
    return {**results, "mean": means}


def validate(
    model: MSAModel, batches: Batches, accelerator: Accelerator, conditions: Sequence[str] = (COMPLETE,)
) -> dict[str, float]:
    """Validation metrics of the current training stage.

    They are means over `conditions` of those of the fused prediction. In a stage that does not train the
    fused prediction, they are means over the modalities' own predictions, each on the samples that have the
    modality. "loss" is the supervised loss, to be compared with that of training.

    Raises:
        UndefinedScoreError: A prediction is not finite, or no sample has any modality.
    """

    def logits_and_presence(batch: Mapping[str, Tensor]) -> Tensor:
        sequences = model.encode(**batch)
        outputs = [decide_under(model, sequences, CONDITIONS[condition]) for condition in conditions]
        if outputs[0].fused_valid:
            logits = torch.stack([output.logits for output in outputs], dim=1)
            return torch.cat([logits, torch.ones_like(logits[..., :1])], dim=-1)
        alone = []
        for name, logits in outputs[0].modality_logits.items():
            present = sequences[name].present.unsqueeze(-1)
            alone.append(torch.cat([logits.where(present, 0.0), present], dim=-1))
        return torch.stack(alone, dim=1)  # (batch, predictions, outputs + 1)

    outputs, labels = over_split(model, batches, accelerator, logits_and_presence)
    logits, observed = outputs[..., :-1], outputs[..., -1] > 0
    each = [
        {
            "loss": _loss_of(logits[seen, column], labels[seen], model.config),
            **metrics_of(logits[seen, column], labels[seen], model.config),
        }
        for column, seen in enumerate(observed.T)
        if seen.any()
    ]
    if not each:
        raise UndefinedScoreError(
            "no validation sample has text, sound or a face: there is nothing to validate on"
        )
    return {name: float(np.mean([metrics[name] for metrics in each])) for name in each[0]}


@torch.inference_mode()
def over_split(
    model: MSAModel,
    batches: Batches,
    accelerator: Accelerator,
    compute: Callable[[Mapping[str, Tensor]], Tensor],
) -> tuple[np.ndarray, np.ndarray]:
    """Call `compute` on every batch of a split, with the model in evaluation mode.

    Args:
        model: The model, not wrapped.
        batches: Batches of the split.
        accelerator: Provides autocast, and gathers over ranks.
        compute: Takes the inputs of a batch and its `index`, and returns `(batch, ...)`.

    Returns:
        The results `(samples, ...)` float64 and the labels `(samples,)` of all ranks, in dataset order, each
        sample once.

    Raises:
        UndefinedScoreError: A result is not finite.
    """
    training = model.training
    model.eval()
    results, labels, index = [], [], []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with accelerator.autocast():
            results.append(compute(inputs).float())
        labels.append(batch["labels"])
        index.append(batch["index"])
    model.train(training)
    index, results, labels = (_gather(torch.cat(parts), accelerator) for parts in (index, results, labels))
    _, first = np.unique(index, return_index=True)  # ranks repeat samples to fill their last batch
    first = first[index[first] != PADDING]
    results = results[first].astype(np.float64)
    finite = np.isfinite(results).reshape(len(results), -1).all(axis=1)
    if not finite.all():
        found = (
            f"{np.count_nonzero(~finite):,} of {len(finite):,} samples have predictions that are not finite"
        )
        raise UndefinedScoreError(f"{found}; {DIVERGED}")
    return results, labels[first]


def _gather(values: Tensor, accelerator: Accelerator) -> np.ndarray:
    """Rows of all ranks; those with fewer, as dialogues differ in their turns, are filled with `PADDING`."""
    return accelerator.gather(accelerator.pad_across_processes(values, pad_index=PADDING)).cpu().numpy()


def decide_under(
    model: MSAModel, sequences: Mapping[str, ModalitySequence], visible: Iterable[str]
) -> MSAOutput:
    """Decide on encoded sequences with only the modalities `visible`."""
    seen = {
        name: sequence.only(torch.full_like(sequence.present, name in visible))
        for name, sequence in sequences.items()
    }
    return model.decide(seen)


def metrics_of(logits: np.ndarray, labels: np.ndarray, config: MSAConfig) -> dict[str, float]:
    """Metrics of outputs `(samples, outputs)` and `labels` `(samples,)` for the task of the model."""
    if config.is_regression:
        return regression_metrics(logits[:, 0], labels, label_range=config.label_range)
    return classification_metrics(logits, labels, num_classes=config.num_labels)


def _loss_of(logits: np.ndarray, labels: np.ndarray, config: MSAConfig) -> float:
    """Mean supervised loss of outputs `(samples, outputs)`, of the kind that the head trains with."""
    kind = config.head_kwargs.get("regression_loss", "mse")
    return float(sample_losses(torch.from_numpy(logits), torch.from_numpy(labels), kind).mean())


def undefined_of(labels: Sequence[float], config: MSAConfig) -> dict[str, str]:
    """Metrics that are undefined on a split with `labels` `(samples,)`, with the reason."""
    return undefined_metrics(labels) if config.is_regression else {}


def selection_score(metrics: Mapping[str, float], is_regression: bool) -> float:
    """Score that selects the best epoch, higher is better: -MAE in regression, else weighted F1."""
    score = metrics[selection_metric(is_regression)]
    return -score if is_regression else score
