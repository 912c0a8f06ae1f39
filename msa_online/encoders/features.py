# SPDX-License-Identifier: Apache-2.0
"""Encoder of precomputed features: standardises them, without parameters."""

import torch
from torch import Tensor, nn

from msa_online.modalities import ModalitySequence

LIMIT = 10.0  # standard deviations


class FeatureEncoder(nn.Module):
    """Standardises the features of one modality with the statistics of the training split.

    Features of different extractors differ in scale by orders of magnitude. The statistics are saved with the
    checkpoint, so that predictions use the scaling of training.

    Args:
        name: The modality; it reads `<name>_values` and `<name>_mask`.
        width: Number of features in a step.

    Attributes:
        mean: Mean of each feature, `(width,)`; 0 before `standardize_by`.
        deviation: Standard deviation of each feature, `(width,)`; 1 before `standardize_by`.
    """

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name = name
        self.input_names = (f"{name}_values", f"{name}_mask")
        # fp32 even in a half-precision model: they have the scale of the data
        self.register_buffer("mean", torch.empty(width, dtype=torch.float32))
        self.register_buffer("deviation", torch.empty(width, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set mean 0 and deviation 1."""
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.deviation)

    def standardize_by(self, mean: Tensor, deviation: Tensor) -> None:
        """Set mean and standard deviation, `(width,)` each; the deviation must be above zero."""
        with torch.no_grad():
            self.mean.copy_(mean)
            self.deviation.copy_(deviation)

    def forward(self, inputs: dict[str, Tensor]) -> ModalitySequence:
        """Standardise `<name>_values` `(batch, time, width)` with `<name>_mask` `(batch, time)` bool.

        The result is fp32, even in a half-precision model.

        Values are clipped at `LIMIT` standard deviations: a feature that hardly varies in training could
        otherwise dominate all others in the one sample where it does.
        """
        values = ((inputs[f"{self.name}_values"] - self.mean) / self.deviation).clamp(-LIMIT, LIMIT)
        return ModalitySequence.of(values, inputs[f"{self.name}_mask"])
