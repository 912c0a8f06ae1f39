# SPDX-License-Identifier: Apache-2.0
"""Front-end for precomputed features: it standardises them and has no parameters."""

import torch
from torch import Tensor, nn

from msa_online.modalities import ModalitySequence

LIMIT = 10.0  # deviations


class FeatureEncoder(nn.Module):
    """Features of one modality to states of the same width, standardised by the training split.

    Scales of features differ by orders of magnitude between extractors. The statistics are saved with the
    checkpoint, so that predictions use the scaling of training.

    Args:
        name: The modality, whose `<name>_values` and `<name>_mask` it reads.
        width: Features in a step.

    Attributes:
        mean: What is subtracted from each feature, `(width,)`; 0 before `standardize_by`.
        deviation: What each feature is divided by, `(width,)`; 1 before `standardize_by`.
    """

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name = name
        self.input_names = (f"{name}_values", f"{name}_mask")
        # fp32 in a model of half precision too: they have the scale of the data
        self.register_buffer("mean", torch.empty(width, dtype=torch.float32))
        self.register_buffer("deviation", torch.empty(width, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Leave features as they are."""
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.deviation)

    def standardize_by(self, mean: Tensor, deviation: Tensor) -> None:
        """Scale from now on by a mean and a deviation above zero, `(width,)` each."""
        with torch.no_grad():
            self.mean.copy_(mean)
            self.deviation.copy_(deviation)

    def forward(self, inputs: dict[str, Tensor]) -> ModalitySequence:
        """Standardise `<name>_values` `(batch, time, width)` under `<name>_mask` `(batch, time)` bool.

        The result is in fp32, in a model of half precision too.

        What lies further out than `LIMIT` deviations is cut there: a feature that hardly ever moved in
        training would else drown all others on the one sample where it does.
        """
        values = ((inputs[f"{self.name}_values"] - self.mean) / self.deviation).clamp(-LIMIT, LIMIT)
        return ModalitySequence.of(values, inputs[f"{self.name}_mask"])
