# SPDX-License-Identifier: Apache-2.0
"""How much of a model's predictions comes from which modality."""

from collections.abc import Mapping

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from msa_online.balancing.shapley import SUBSETS, shapley_values
from msa_online.evaluation.robustness import Batches, decide_under, over_split
from msa_online.modalities import MODALITIES
from msa_online.modeling_msa import MSAModel


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
    answers, _ = over_split(model, batches, accelerator, lambda batch: contributions(model, batch))
    sizes = np.abs(answers).mean(axis=0)
    total = sizes.sum()
    shares = sizes / total if total > 0 else sizes
    means = answers.mean(axis=0)
    return {name: float(share) for name, share in zip(MODALITIES, shares, strict=True)} | {
        f"mean/{name}": float(mean) for name, mean in zip(MODALITIES, means, strict=True)
    }


def contributions(model: MSAModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Shapley value of each modality in the fused prediction for each sample of a batch.

    In regression the prediction shared out is the score. In classification it is the probability of the class
    that is predicted when everything is seen: logits would not do, since a constant added to all of them
    changes no prediction.

    The encoders run once, the head under each of the eight subsets, none included.

    Args:
        model: The model, in evaluation mode.
        batch: Inputs as `MSAModel.forward` takes them.

    Returns:
        `(batch, modalities)` fp32; a row adds up to the prediction with everything seen less that with
        nothing seen.
    """
    sequences = model.encode(**batch)
    logits = {subset: decide_under(model, sequences, subset).logits.float() for subset in SUBSETS}
    if model.config.is_regression:
        worth = {subset: values.squeeze(-1) for subset, values in logits.items()}
    else:
        predicted = logits[SUBSETS[-1]].argmax(dim=-1, keepdim=True)
        worth = {
            subset: values.softmax(dim=-1).gather(-1, predicted).squeeze(-1)
            for subset, values in logits.items()
        }
    shares = shapley_values(worth)
    return torch.stack([shares[name] for name in MODALITIES], dim=-1)
