# SPDX-License-Identifier: Apache-2.0
"""Face encoder: maps aligned crops and blendshape scores to one state per frame."""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from feature_extractors.clip import NUM_BLENDSHAPES
from msa_online.configuration_msa import MSAConfig
from msa_online.encoders.affine import InputAffine
from msa_online.modalities import ModalitySequence

TYPICAL_PIXEL = (128.0, 64.0)  # mean and standard deviation of 8-bit RGB
TYPICAL_BLENDSHAPE = (0.1, 0.2)
GROUPS = 8


class FaceEncoder(nn.Module):
    """Four strided convolutions on each crop, then one convolution over the frames.

    A 96 x 96 crop shrinks to 6 x 6 before pooling. With the default widths the layers have 507,296 parameters
    and the input scaling six, without the optional blendshape stream (docs/methods/online_setting.md, "The
    front-ends").

    Args:
        channels: Width F of the first convolution; the next have 2F, 4F and 8F.
        width: Width of the output states.
        blendshapes: Add a second stream that reads the blendshape scores.
    """

    def __init__(self, channels: int, width: int, blendshapes: bool) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 4 * channels, 8 * channels)
        self.input_names = ("vision_values", "vision_mask") + ("vision_blendshapes",) * blendshapes
        self.scale = InputAffine(3, *TYPICAL_PIXEL)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            for inputs, outputs in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, outputs) for outputs in widths[1:])
        self.project = nn.Linear(widths[-1], width)
        self.blendshapes = BlendshapeStream(width) if blendshapes else None
        self.over_time = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)

    @classmethod
    def from_config(cls, config: MSAConfig) -> "FaceEncoder":
        """The vision encoder of a model."""
        return cls(config.face_channels, config.face_width, config.blendshapes)

    def forward(self, inputs: dict[str, Tensor]) -> ModalitySequence:
        """Encode crops and scores; frames without a face are masked and do not affect other frames.

        Args:
            inputs: `vision_values` `(batch, frames, height, width, 3)` uint8 RGB, `vision_blendshapes`
                `(batch, frames, 52)` in [0, 1], `vision_mask` `(batch, frames)` bool.

        Returns:
            States `(batch, frames, width)`.
        """
        mask = inputs["vision_mask"]
        batch = mask.shape[0]
        states = self.scale(inputs["vision_values"])
        states = rearrange(states, "b t h w c -> (b t) c h w")  # stays channels-last in memory
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            states = F.gelu(norm(convolution(states)))
        states = self.project(states.mean(dim=(2, 3)))
        states = rearrange(states, "(b t) d -> b t d", b=batch)
        if self.blendshapes is not None:
            states = states + self.blendshapes(inputs["vision_blendshapes"])
        states = states * mask.unsqueeze(-1)  # (batch, frames, width)
        states = self.norm(self.over_time(states.mT).mT)
        return ModalitySequence.of(states, mask)


class BlendshapeStream(nn.Module):
    """A small MLP on the 52 blendshape scores of each frame, `(batch, frames, 52)` to `(..., width)`.

    Args:
        width: Width of the output states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = InputAffine(NUM_BLENDSHAPES, *TYPICAL_BLENDSHAPE)
        self.layers = nn.Sequential(nn.Linear(NUM_BLENDSHAPES, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, scores: Tensor) -> Tensor:
        """Map the scores of each frame to a state."""
        return self.layers(self.scale(scores))
