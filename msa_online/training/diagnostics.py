# SPDX-License-Identifier: Apache-2.0
"""Measure after each epoch whether a joint model neglects modalities (`training.diagnostics`).

- `shares`: the share of each modality in the validation predictions, "share/text".
- `probes`: a linear probe on the state of each modality that the fusion reads, with only that modality
  visible: fit on the frozen states of the training split, scored on validation, "probe/text". It is a mean
  absolute error, or a weighted F1. Beside a model trained on the modality alone it shows what joint training
  has not learned.
- `gradients`: the gradient norm of the parameters that process each modality alone, averaged over the steps
  of the epoch, before modulation and clipping, "modality_gradient/text".

Measuring changes nothing in the run. The values are in the `losses` of history.json, beside the diagnostics
of head and modulator.
"""

from collections.abc import Collection, Mapping

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from msa_online.evaluation.attribution import modality_shares
from msa_online.evaluation.conditions import Batches, decide_under, over_split
from msa_online.evaluation.metrics import classification_metrics
from msa_online.modalities import MODALITIES
from msa_online.modeling_msa import MSAModel

SHARES, PROBES, GRADIENTS = "shares", "probes", "gradients"
DIAGNOSTICS = (SHARES, PROBES, GRADIENTS)
PENALTY = 1.0  # ridge penalty on standardised states; the inverse strength of the logistic regression


def measure_epoch(
    chosen: Collection[str], model: MSAModel, train: Batches, valid: Batches, accelerator: Accelerator
) -> dict[str, float]:
    """The chosen diagnostics of a model after an epoch, by name with a slash.

    Args:
        chosen: Names in `DIAGNOSTICS`; `GRADIENTS` is measured by the loop.
        model: The model, not wrapped.
        train: Batches of the training split in a fixed order.
        valid: Batches of the validation split.
        accelerator: Provides autocast, and gathers over ranks.
    """
    values = {}
    if SHARES in chosen:
        shares = modality_shares(model, valid, accelerator)
        values |= {f"share/{name}": shares[name] for name in MODALITIES}
    if PROBES in chosen:
        values |= probe_modalities(model, train, valid, accelerator)
    return values


def probe_modalities(
    model: MSAModel, train: Batches, valid: Batches, accelerator: Accelerator
) -> dict[str, float]:
    """Score of a linear probe on the frozen states of each modality, by "probe/<name>".

    Modalities that no sample of a split has are left out; arguments as for `measure_epoch`.
    """
    fit_on, fit_labels = _states(model, train, accelerator)
    tested_on, labels = _states(model, valid, accelerator)
    scores = {}
    for name in MODALITIES:
        (states, known), (unseen, tested) = fit_on[name], tested_on[name]
        if known.any() and tested.any():
            spread = states[known].std(axis=0)
            scale = np.where(spread > 0, spread, 1.0)
            centre = states[known].mean(axis=0)
            scores[f"probe/{name}"] = _probe(
                (states[known] - centre) / scale,
                fit_labels[known],
                (unseen[tested] - centre) / scale,
                labels[tested],
                model.config.num_labels if not model.config.is_regression else None,
            )
    return scores


def _probe(
    states: np.ndarray, labels: np.ndarray, unseen: np.ndarray, expected: np.ndarray, classes: int | None
) -> float:
    """Fit a probe and score it: mean absolute error of a ridge regression, or F1 of a logistic regression."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if classes is None:
        return float(np.abs(Ridge(alpha=PENALTY).fit(states, labels).predict(unseen) - expected).mean())
    if len(np.unique(labels)) < 2:
        return classification_metrics(np.full(len(expected), labels[0]), expected, classes)["f1_weighted"]
    predicted = LogisticRegression(C=PENALTY, max_iter=500).fit(states, labels).predict(unseen)
    return classification_metrics(predicted, expected, classes)["f1_weighted"]


def _states(
    model: MSAModel, batches: Batches, accelerator: Accelerator
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """States `(samples, width)` and presence `(samples,)` of each modality alone; and the labels."""
    widths: dict[str, int] = {}

    def states_and_presence(batch: Mapping[str, Tensor]) -> Tensor:
        sequences = model.encode(**batch)
        parts = []
        for name in MODALITIES:
            state = decide_under(model, sequences, (name,)).features[name].float()
            widths[name] = state.shape[1]
            parts += [state, sequences[name].present.unsqueeze(1)]
        return torch.cat(parts, dim=1)

    columns, labels = over_split(model, batches, accelerator, states_and_presence)
    found, start = {}, 0
    for name in MODALITIES:
        end = start + widths[name]
        found[name] = (columns[:, start:end], columns[:, end] > 0)
        start = end + 1
    return found, labels
