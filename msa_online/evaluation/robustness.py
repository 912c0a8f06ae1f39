# SPDX-License-Identifier: Apache-2.0
"""How well a model does when it may see only some of the modalities."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from msa_online.configuration_msa import MSAConfig
from msa_online.evaluation.metrics import classification_metrics, regression_metrics
from msa_online.modalities import CONDITIONS
from msa_online.modeling_msa import MSAModel


@dataclass(frozen=True)
class ConditionPredictions:
    """Outputs of the model for a whole split, gathered from all ranks and in dataset order.

    Attributes:
        logits: `(samples, outputs)` float64, by condition.
        labels: `(samples,)`.
    """

    logits: dict[str, np.ndarray]
    labels: np.ndarray


def evaluate_conditions(
    model: MSAModel,
    batches: Iterable[Mapping[str, Tensor]],
    accelerator: Accelerator,
    conditions: Iterable[str] = tuple(CONDITIONS),
) -> dict[str, dict[str, float]]:
    """Metrics of one model under each condition (METHODS 7.3, one model for all).

    Args:
        model: The model, not wrapped.
        batches: Batches of the split, on the device, from a loader the accelerator prepared.
        accelerator: Gives precision and gathers over ranks.
        conditions: Names in `CONDITIONS`.

    Returns:
        The metrics of `metrics_of`, by condition.
    """
    predictions = predict_conditions(model, batches, accelerator, tuple(conditions))
    return {
        condition: metrics_of(logits, predictions.labels, model.config)
        for condition, logits in predictions.logits.items()
    }


@torch.inference_mode()
def predict_conditions(
    model: MSAModel,
    batches: Iterable[Mapping[str, Tensor]],
    accelerator: Accelerator,
    conditions: tuple[str, ...],
) -> ConditionPredictions:
    """Run the encoders once over a split, and the head once for each condition."""
    training = model.training
    model.eval()
    outputs, labels, index = [], [], []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "index")}
        with accelerator.autocast():
            sequences = model.encode(**inputs)
            logits = [_decide_under(model, sequences, CONDITIONS[condition]) for condition in conditions]
        outputs.append(torch.stack(logits, dim=1).float())  # (batch, conditions, outputs)
        labels.append(batch["labels"])
        index.append(batch["index"])
    model.train(training)
    gathered = (accelerator.gather(torch.cat(parts)).cpu().numpy() for parts in (index, outputs, labels))
    index, outputs, labels = gathered
    _, first = np.unique(index, return_index=True)  # ranks repeat samples to fill their last batch
    outputs = outputs[first].astype(np.float64)
    return ConditionPredictions(
        logits={condition: outputs[:, column] for column, condition in enumerate(conditions)},
        labels=labels[first],
    )


def _decide_under(model: MSAModel, sequences: Mapping, visible: tuple[str, ...]) -> Tensor:
    seen = {
        name: sequence.only(torch.full_like(sequence.present, name in visible))
        for name, sequence in sequences.items()
    }
    return model.decide(seen).logits


def metrics_of(logits: np.ndarray, labels: np.ndarray, config: MSAConfig) -> dict[str, float]:
    """Metrics of outputs `(samples, outputs)` against `labels` `(samples,)`, by the task of the model."""
    if config.is_regression:
        return regression_metrics(logits[:, 0], labels, label_range=config.label_range)
    return classification_metrics(logits, labels, num_classes=config.num_labels)


def selection_score(metrics: Mapping[str, float], is_regression: bool) -> float:
    """What the best epoch is chosen by, higher is better: -MAE in regression, else weighted F1."""
    return -metrics["mae"] if is_regression else metrics["f1_weighted"]
