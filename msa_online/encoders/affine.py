# SPDX-License-Identifier: Apache-2.0
"""Learned scaling of the inputs of the audio and face encoders."""

import torch
from torch import Tensor, nn


class InputAffine(nn.Module):
    """Per-channel `values * weight + bias` on the last axis, initialised from typical statistics.

    It replaces fixed normalisation constants: mean and deviation only set the initial values.

    Args:
        channels: Number of channels, each with its own weight and bias.
        mean: Typical mean of the raw signal.
        deviation: Typical standard deviation of the raw signal.
    """

    def __init__(self, channels: int, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise to zero mean and unit variance under the typical statistics."""
        nn.init.constant_(self.weight, 1.0 / self.deviation)
        nn.init.constant_(self.bias, -self.mean / self.deviation)

    def forward(self, values: Tensor) -> Tensor:
        """Scale `(..., channels)` of any type; the result has the type of the weights.

        In a half-precision model the raw signal is scaled in fp32 and rounded once, because half precision
        resolves its range poorly.
        """
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        return (values * self.weight.to(exact) + self.bias.to(exact)).to(self.weight.dtype)
