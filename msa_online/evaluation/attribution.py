# SPDX-License-Identifier: Apache-2.0
"""Contribution of each modality to the predictions of a model."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from msa_online.confidence import Confidence
from msa_online.evaluation.conditions import Batches, decide_under, over_split
from msa_online.layers.shapley import SUBSETS, shapley_values
from msa_online.modalities import MODALITIES, ModalitySequence
from msa_online.modeling_msa import MSAModel

NOTHING, *_, EVERYTHING = SUBSETS


@dataclass(frozen=True)
class Attribution:
    """Predictions for a batch, and the contribution of each modality.

    Attributes:
        outputs: Outputs with all modalities: scores `(batch, 1)` in units of the label, or probabilities
            `(batch, classes)`.
        predicted: Column of `outputs` that is attributed, `(batch,)` int64: the most probable class, 0 in
            regression.
        baseline: The same output without any modality, `(batch,)`; None if nothing is attributed.
        contributions: What each modality adds, in the order of `MODALITIES`, `(batch, modalities)`. A row
            sums to the attributed output minus its baseline; a modality that the sample lacks has exactly 0.
            None if nothing is attributed.
    """

    outputs: Tensor
    predicted: Tensor
    baseline: Tensor | None = None
    contributions: Tensor | None = None

    def of_sample(self, row: int) -> "Attribution":
        """The attribution of one sample, without the batch dimension."""
        return Attribution(
            **{name: values if values is None else values[row] for name, values in vars(self).items()}
        )


def modality_shares(model: MSAModel, batches: Batches, accelerator: Accelerator) -> dict[str, float]:
    """Share of each modality in the predictions of a model on a split, by exact Shapley values.

        phi_m,i = Shapley value of modality m in the prediction for sample i, over the eight subsets
        share_m = mean_i |phi_m,i| / sum_m' mean_i |phi_m',i|

    Absolute values are used because a modality that raises half of the predictions and lowers the other half
    matters as much as one that always raises them. A modality that a sample lacks contributes 0. A share
    shows what moves the prediction, not what makes it correct.

    Args:
        model: The model, not wrapped.
        batches: Batches of the split.
        accelerator: Provides autocast, and gathers over ranks.

    Returns:
        The share of each modality under its name, in [0, 1] and summing to 1 (all 0 if the prediction never
        changes); and its mean contribution over the split under "mean/<name>", in units of the label, or of
        probability in classification.
    """
    contributions, _ = over_split(
        model, batches, accelerator, lambda batch: attribute(model, batch).contributions
    )
    sizes = np.abs(contributions).mean(axis=0)
    total = sizes.sum()
    shares = sizes / total if total > 0 else sizes
    means = contributions.mean(axis=0)
    return {name: float(share) for name, share in zip(MODALITIES, shares, strict=True)} | {
        f"mean/{name}": float(mean) for name, mean in zip(MODALITIES, means, strict=True)
    }


def attribute(model: MSAModel, batch: Mapping[str, Tensor]) -> Attribution:
    """Attribute the fused prediction of each sample to the modalities, by exact Shapley values.

    These are the values (2.7) of docs/methods/pase.md. In regression the score is attributed. In
    classification it is the probability of the class that is predicted with all modalities. Logits would not
    do: a constant added to all of them changes no prediction.

    The encoders run once; the head runs for each of the eight subsets, the empty one included.

    Args:
        model: The model, in evaluation mode.
        batch: Inputs of `MSAModel.forward`.

    Returns:
        The prediction with all modalities, and the contribution of each.
    """
    sequences = model.encode(**batch)
    outputs = {subset: _outputs(model, sequences, subset) for subset in SUBSETS}
    predicted = outputs[EVERYTHING].argmax(dim=-1)  # the one output of a regression is number 0
    worth = {
        subset: values.gather(-1, predicted.unsqueeze(-1)).squeeze(-1) for subset, values in outputs.items()
    }
    shares = shapley_values(worth)
    # rounding may depend on the rest of the batch; a missing modality must still contribute exactly 0
    missing = {name: ~sequences[name].present for name in MODALITIES}
    contributions = [shares[name].masked_fill(missing[name], 0.0) for name in MODALITIES]
    return Attribution(outputs[EVERYTHING], predicted, worth[NOTHING], torch.stack(contributions, dim=-1))


def predict(model: MSAModel, batch: Mapping[str, Tensor]) -> Attribution:
    """The predictions that `attribute` returns, without contributions: the head runs once."""
    outputs = _outputs(model, model.encode(**batch), EVERYTHING)
    return Attribution(outputs, outputs.argmax(dim=-1))


def _outputs(model: MSAModel, sequences: Mapping[str, ModalitySequence], visible: frozenset[str]) -> Tensor:
    """Scores or probabilities with only some modalities visible, `(batch, outputs)`, in fp32 or wider.

    Probabilities are calibrated if the checkpoint has temperatures.
    """
    logits = decide_under(model, sequences, visible).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if model.config.is_regression:
        return logits
    if confidence := Confidence.of(model.config.confidence):
        seen = [sequences[name].present & (name in visible) for name in MODALITIES]
        code = sum(present * 2**number for number, present in enumerate(seen))
        logits = logits / logits.new_tensor(confidence.temperature_by_code())[code].unsqueeze(-1)
    return logits.softmax(dim=-1)
