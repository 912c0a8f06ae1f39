# SPDX-License-Identifier: Apache-2.0
"""How much of a model's predictions comes from which modality."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from msa_online.evaluation.conditions import Batches, decide_under, over_split
from msa_online.layers.shapley import SUBSETS, shapley_values
from msa_online.modalities import MODALITIES, ModalitySequence
from msa_online.modeling_msa import MSAModel

NOTHING, *_, EVERYTHING = SUBSETS


@dataclass(frozen=True)
class Attribution:
    """What the predictions for a batch are, and how much of each comes from which modality.

    Attributes:
        outputs: What the model says with everything seen: scores `(batch, 1)` in units of the label, or
            probabilities `(batch, classes)`.
        predicted: Column of `outputs` that is shared out, `(batch,)` int64: the most probable class, 0 in
            regression.
        baseline: That output with nothing seen, `(batch,)`.
        contributions: What each modality adds to it, in the order of `MODALITIES`, `(batch, modalities)`; a
            row adds up to the output shared out less its baseline, and what a sample lacks has exactly 0.
    """

    outputs: Tensor
    predicted: Tensor
    baseline: Tensor
    contributions: Tensor

    def of_sample(self, row: int) -> "Attribution":
        """The same for one sample, without the dimension of the batch."""
        return Attribution(**{name: values[row] for name, values in vars(self).items()})


def modality_shares(model: MSAModel, batches: Batches, accelerator: Accelerator) -> dict[str, float]:
    """Share of each modality in what a model predicts on a split, by exact Shapley values.

        phi_m,i = Shapley value of modality m in the prediction for sample i, over the eight subsets
        share_m = mean_i |phi_m,i| / sum_m' mean_i |phi_m',i|

    Absolute values, because a modality that pushes half of the samples up and half of them down decides as
    much as one that always pushes up. What a sample lacks contributes 0 to it. A share says what moves the
    prediction, not what makes it right.

    Args:
        model: The model, not wrapped.
        batches: Batches of the split.
        accelerator: Gives precision and gathers over ranks.

    Returns:
        The share of each modality under its name, in [0, 1], adding up to 1 (all 0 where the prediction is
        the same whatever is seen); and its mean contribution over the split under "mean/" and its name, in
        units of the label, or of probability in classification.
    """
    answers, _ = over_split(model, batches, accelerator, lambda batch: attribute(model, batch).contributions)
    sizes = np.abs(answers).mean(axis=0)
    total = sizes.sum()
    shares = sizes / total if total > 0 else sizes
    means = answers.mean(axis=0)
    return {name: float(share) for name, share in zip(MODALITIES, shares, strict=True)} | {
        f"mean/{name}": float(mean) for name, mean in zip(MODALITIES, means, strict=True)
    }


def attribute(model: MSAModel, batch: Mapping[str, Tensor]) -> Attribution:
    """Share out the fused prediction for each sample of a batch among the modalities, exactly (METHODS 2.7).

    In regression the score is shared out. In classification it is the probability of the class that is
    predicted when everything is seen: logits would not do, since a constant added to all of them changes no
    prediction.

    The encoders run once, the head under each of the eight subsets, none included.

    Args:
        model: The model, in evaluation mode.
        batch: Inputs as `MSAModel.forward` takes them.

    Returns:
        The prediction with everything seen, and what of it comes from where.
    """
    sequences = model.encode(**batch)
    outputs = {subset: _outputs(model, sequences, subset) for subset in SUBSETS}
    predicted = outputs[EVERYTHING].argmax(dim=-1)  # the one output of a regression is number 0
    worth = {
        subset: values.gather(-1, predicted.unsqueeze(-1)).squeeze(-1) for subset, values in outputs.items()
    }
    shares = shapley_values(worth)
    # a head may round by what else is in the batch; what a sample lacks is exactly nothing all the same
    lacking = {name: ~sequences[name].present for name in MODALITIES}
    contributions = [shares[name].masked_fill(lacking[name], 0.0) for name in MODALITIES]
    return Attribution(outputs[EVERYTHING], predicted, worth[NOTHING], torch.stack(contributions, dim=-1))


def _outputs(model: MSAModel, sequences: Mapping[str, ModalitySequence], visible: frozenset[str]) -> Tensor:
    """Scores or probabilities with only some modalities visible, `(batch, outputs)`, at least in fp32."""
    logits = decide_under(model, sequences, visible).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if model.config.is_regression else logits.softmax(dim=-1)
