# SPDX-License-Identifier: Apache-2.0
"""Vision encoders from pretrained networks for pictures: one state for each face crop."""

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from msa_online.configuration_msa import MSAConfig, width_of
from msa_online.encoders.face import BlendshapeStream
from msa_online.encoders.pretrained import PretrainedEncoder
from msa_online.modalities import ModalitySequence

PICTURES_AT_ONCE = 32
"""Pictures in one pass through the network, which bounds the memory of a frozen one: a pass with the shapes
of DINOv2-small needs 0.2 GB."""

SWITCHED_OFF = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
"""Settings of DINOv3's pretraining: random coordinates, different in each pass."""


@dataclass(frozen=True)
class Family:
    """What differs between networks for pictures.

    Attributes:
        layers: Path of the list of layers, or of the stages of a convolutional network.
        pooled: State of a picture, `(pictures, width)`, from the network's output.
        pooler: Whether the state passes the network's pooler; one that it does not pass is not built.
        picture_size: Usual height and width of its pictures in pixels; an image processor has the true one.
    """

    layers: str
    pooled: Callable[[Any], Tensor] = lambda output: output.pooler_output.flatten(1)
    pooler: bool = True
    picture_size: int = 224


def _class_token(output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def _attention_pooled(output: Any) -> Tensor:
    """Patches pooled by the network's own attention, or their mean where it was published without."""
    pooled = output.pooler_output
    return output.last_hidden_state.mean(dim=1) if pooled is None else pooled


FAMILIES = {
    "vit": Family("layers", _class_token, pooler=False),
    "deit": Family("layers", _class_token, pooler=False),
    "beit": Family("layers"),  # mean of the patches, or the class token, as the checkpoint was trained
    "dinov2": Family("encoder.layer"),  # class token
    "dinov2_with_registers": Family("encoder.layer"),  # class token
    "dinov3_vit": Family("model.layer"),  # class token
    "clip_vision_model": Family("encoder.layers"),  # class token
    "siglip_vision_model": Family("encoder.layers", _attention_pooled),
    "convnext": Family("encoder.stages"),  # these three: mean over the picture
    "convnextv2": Family("encoder.stages"),
    "dinov3_convnext": Family("model.stages"),
    "face_resnet": Family("blocks", picture_size=150),  # means over the quarters of the picture
}
"""Networks for pictures, by `model_type` of their configuration. The state of a picture passes the network's
last norm and no projection into a space of pictures and texts."""


class ImageEncoder(PretrainedEncoder):
    """A pretrained network on each face crop alone; a LayerNorm and the blendshape stream are learned on top.

    The state of a frame depends on that frame only. Frames without a face are not run, except one if a batch
    has no face at all, so that distributed training finds every parameter in use.

    Random augmentation inside the network is switched off (`SWITCHED_OFF`).

    Args:
        config: Configuration of the network, as published.
        blendshapes: Add a second stream that reads the blendshape scores.
    """

    def __init__(self, config: PretrainedConfig, blendshapes: bool) -> None:
        self.family = FAMILIES[config.model_type]
        config = deepcopy(config)
        for name in vars(config).keys() & set(SWITCHED_OFF):
            setattr(config, name, None)
        super().__init__(config)
        self.input_names = ("vision_values", "vision_mask") + ("vision_blendshapes",) * blendshapes
        accepted = inspect.signature(self.model.forward).parameters
        # positions of a learned grid are resized for pictures of another size than the network's own
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        width = width_of(config)
        self.norm = nn.LayerNorm(width)
        self.blendshapes = BlendshapeStream(width) if blendshapes else None

    @classmethod
    def from_config(cls, config: MSAConfig) -> "ImageEncoder":
        """The vision encoder of a model."""
        return cls(config.vision_config, config.blendshapes)

    def build(self, config: PretrainedConfig) -> PreTrainedModel:
        """The network, without a pooler that no state passes; tokens for masked patches are frozen."""
        options = {} if self.family.pooler else {"add_pooling_layer": False}
        model = AutoModel.from_config(config, dtype=torch.get_default_dtype(), **options)
        for name, parameter in model.named_parameters():
            if name.endswith("mask_token"):
                parameter.requires_grad_(False)
        return model

    @property
    def layers(self) -> nn.ModuleList:
        """Transformer layers, or the stages of a convolutional network, the lowest first."""
        return self.model.get_submodule(self.family.layers)

    def states(self, inputs: dict[str, Tensor]) -> ModalitySequence:
        """Run the network on the crops with a face; to select them, a GPU waits for the host once.

        Args:
            inputs: `vision_values` `(batch, frames, 3, height, width)` as the image processor makes them,
                `vision_mask` `(batch, frames)` bool, `vision_blendshapes` `(batch, frames, 52)` in [0, 1].

        Returns:
            `(batch, frames, width)`, or `(batch, frames, width + 52)` with the blendshape scores behind.
        """
        mask = inputs["vision_mask"]
        pictures, found = inputs["vision_values"].flatten(0, 1), mask.flatten()
        if not torch.compiler.is_compiling():  # how many faces there are is no shape that can be compiled
            first = torch.arange(len(found), device=found.device) == 0
            found = found | (~found.any() & first)
            pictures = pictures[found]
        states = torch.cat([self._states_of(chunk) for chunk in pictures.split(PICTURES_AT_ONCE)])
        if not torch.compiler.is_compiling():
            states = states.new_zeros(len(found), states.shape[-1]).index_put((found,), states)
        states = states.view(*mask.shape, -1)  # (batch, frames, width)
        if self.blendshapes is not None:
            states = torch.cat([states, inputs["vision_blendshapes"].to(states.dtype)], dim=-1)
        return ModalitySequence.of(states, mask)

    def _states_of(self, pictures: Tensor) -> Tensor:
        """States `(pictures, width)` of `(pictures, 3, height, width)`."""
        output = self.model(pixel_values=pictures.to(self.model.dtype), **self.options)
        return self.family.pooled(output)

    def read(self, sequence: ModalitySequence) -> ModalitySequence:
        """Normalise the states and add what the blendshape stream reads; `(batch, frames, width)`."""
        width = self.norm.normalized_shape[0]
        states, scores = sequence.values.split([width, sequence.values.shape[-1] - width], dim=-1)
        values = self.norm(states.to(self.norm.weight.dtype))
        if self.blendshapes is not None:
            values = values + self.blendshapes(scores)
        return sequence.with_values(values)
