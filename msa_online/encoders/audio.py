# SPDX-License-Identifier: Apache-2.0
"""Audio front-end: log-mel spectrogram to a sequence an eighth as long."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from msa_online.encoders.affine import InputAffine
from msa_online.modalities import ModalitySequence

NUM_MELS = 80
# mean and deviation of natural-log mel power over recorded speech, pauses included
TYPICAL_LOG_MEL = (-11.0, 6.0)


class AudioEncoder(nn.Module):
    """Three strided convolutions over time, each with LayerNorm and GELU, and a projection (METHODS 6.3).

    100 steps a second become 12.5: the stacks behind it attend over every pair of steps, and prosody is slow.
    With the default widths the layers hold 502,896 parameters, and the input scaling two.

    Args:
        channels: Widths (A1, A2) of the first and of the other convolutions.
        width: Width of the states that come out.
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

    def forward(self, inputs: dict[str, Tensor]) -> ModalitySequence:
        """Encode `audio_values` `(batch, steps, 80)` under `audio_mask` `(batch, steps)` bool.

        The mask is recomputed through every stride: a step of the output is valid when the step at its centre
        was. Padding is zeroed before each convolution, so that it cannot reach a valid step.

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
