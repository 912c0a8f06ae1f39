# SPDX-License-Identifier: Apache-2.0
"""The lower part of dlib's face recognition network, as a model of transformers for `ImageEncoder`."""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling


@strict
class FaceResNetConfig(PretrainedConfig):
    """Shape of a `FaceResNet`; the defaults are those of `dlib-face-resnet`.

    Attributes:
        widths: Channels of each stage; each but the first halves the picture.
        depths: Residual blocks of each stage.
        grid: Rows and columns of the cells whose averages are the state of a picture.
    """

    model_type = "face_resnet"

    widths: list[int] | tuple[int, ...] = (32, 64, 128)
    depths: list[int] | tuple[int, ...] = (3, 4, 3)
    grid: int = 2

    @property
    def hidden_size(self) -> int:
        """Width of the state of a picture."""
        return self.widths[-1] * self.grid**2


class ResidualBlock(GradientCheckpointingLayer):
    """Two convolutions beside a shortcut; the scales of dlib's network are part of their weights.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output; more than `inputs` are zero in the shortcut.
        halve: Halve height and width.
    """

    def __init__(self, inputs: int, outputs: int, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        self.more = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=1 + halve, padding=int(not halve))
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        """`(pictures, inputs, height, width)` to `(pictures, outputs, height, width)`, or half the size."""
        values = self.conv2(F.relu(self.conv1(picture)))
        shortcut = F.avg_pool2d(picture, 2) if self.halve else picture
        rows, columns = (shortcut.shape[axis] - values.shape[axis] for axis in (2, 3))
        values = F.pad(values, (0, columns, 0, rows))  # of an even size one more remains in the shortcut
        return F.relu(values + F.pad(shortcut, (0, 0, 0, 0, 0, self.more)))


class FaceResNet(PreTrainedModel):
    """A residual network without its upper part, which only tells people apart; averages over a coarse grid.

    The published network `dlib-face-resnet` (`feature_extractors/face_weights.py`) was trained on pictures of
    150 x 150 pixels.
    """

    config_class = FaceResNetConfig
    base_model_prefix = "face_resnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]

    def __init__(self, config: FaceResNetConfig) -> None:
        super().__init__(config)
        self.stem = nn.Conv2d(3, config.widths[0], 7, stride=2)
        self.blocks = nn.ModuleList()
        inputs = config.widths[0]
        for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            for block in range(depth):
                self.blocks.append(ResidualBlock(inputs, width, halve=stage > 0 and block == 0))
                inputs = width
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Run the network.

        Args:
            pixel_values: `(pictures, 3, height, width)` as the image processor makes them.

        Returns:
            `last_hidden_state` `(pictures, channels, height, width)`; `pooler_output`
            `(pictures, hidden_size)`, the averages over each cell of the grid.
        """
        values = F.max_pool2d(F.relu(self.stem(pixel_values)), 3, stride=2)
        for block in self.blocks:
            values = block(values)
        pooled = F.adaptive_avg_pool2d(values, self.config.grid).flatten(1)
        return BaseModelOutputWithPooling(last_hidden_state=values, pooler_output=pooled)
