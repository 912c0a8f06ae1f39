# SPDX-License-Identifier: Apache-2.0
"""The learned scaling at the entrance of the audio and face front-ends."""

import torch
from torch import Tensor, nn


class InputAffine(nn.Module):
    """Per-channel `values * weight + bias` on the last axis, started from known statistics of the signal.

    It takes the place of fixed normalisation constants: the figures below only start it.

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
        """Start from zero mean and unit variance under the typical statistics."""
        nn.init.constant_(self.weight, 1.0 / self.deviation)
        nn.init.constant_(self.bias, -self.mean / self.deviation)

    def forward(self, values: Tensor) -> Tensor:
        """Scale `(..., channels)` of any type; the result has that of the weights.

        In a model of half precision the raw signal is scaled in fp32 and rounded once, because half precision
        resolves its range badly.
        """
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        return (values * self.weight.to(exact) + self.bias.to(exact)).to(self.weight.dtype)
