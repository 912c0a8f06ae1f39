# SPDX-License-Identifier: Apache-2.0
"""Audio encoder: maps a log-mel spectrogram to a sequence of an eighth of its length."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from feature_extractors.audio import NUM_MELS
from msa_online.configuration_msa import MSAConfig
from msa_online.encoders.affine import InputAffine
from msa_online.front_ends import AVERAGE_LOG_MEL
from msa_online.modalities import ModalitySequence

TYPICAL_LOG_MEL = (AVERAGE_LOG_MEL, 6.0)  # mean and standard deviation in recorded speech


class AudioEncoder(nn.Module):
    """Three strided convolutions over time, each with LayerNorm and GELU, and a projection.

    100 steps a second become 12.5: prosody is slow, and the cost of attention in the heads is quadratic in
    the number of steps. With the default widths the layers have 502,896 parameters and the input scaling two
    (docs/methods/online_setting.md, "The front-ends").

    Args:
        channels: Widths (A1, A2) of the first and of the other convolutions.
        width: Width of the output states.
    """

    input_names = ("audio_values", "audio_mask")

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        first, second = channels
        self.scale = InputAffine(1, *TYPICAL_LOG_MEL)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(inputs, outputs, kernel, stride=2, padding=kernel // 2)
            for inputs, outputs, kernel in ((NUM_MELS, first, 5), (first, second, 3), (second, second, 3))
        )
        self.norms = nn.ModuleList(nn.LayerNorm(outputs) for outputs in (first, second, second))
        self.project = nn.Linear(second, width)

    @classmethod
    def from_config(cls, config: MSAConfig) -> "AudioEncoder":
        """The audio encoder of a model."""
        return cls(config.audio_channels, config.audio_width)

    def forward(self, inputs: dict[str, Tensor]) -> ModalitySequence:
        """Encode `audio_values` `(batch, steps, 80)` with `audio_mask` `(batch, steps)` bool.

        Each stride subsamples the mask: an output step is valid if the step at its centre is. Padding is
        zeroed before each convolution, so that it cannot affect a valid step.

        Returns:
            States `(batch, ceil(steps / 8), width)`.
        """
        mask = inputs["audio_mask"]
        states = self.scale(inputs["audio_values"]) * mask.unsqueeze(-1)  # (batch, steps, 80)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            mask = mask[:, ::2]
            states = norm(convolution(states.mT).mT)
            states = F.gelu(states) * mask.unsqueeze(-1)  # (batch, steps / 2, channels)
        return ModalitySequence.of(self.project(states), mask)
