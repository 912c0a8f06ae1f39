# SPDX-License-Identifier: Apache-2.0
"""What pretrained audio encoders share: which layer is read, and pooling over time."""

from abc import abstractmethod
from copy import deepcopy
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from msa_online.configuration_msa import MSAConfig
from msa_online.encoders.pretrained import EncoderError, PretrainedEncoder
from msa_online.modalities import ModalitySequence

SWITCHED_OFF = {
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "add_adapter": False,
    "use_intermediate_ffn_before_adapter": False,
}
"""Settings of transformers' audio networks that are not used: skipped layers and masked states leave
parameters without a gradient, which stops distributed training; adapters are made for speech recognition."""


class PretrainedAudioEncoder(PretrainedEncoder):
    """A pretrained network on sound, read at one layer or at all, with states averaged over time.

    LayerDrop, SpecAugment and adapters of a published configuration are switched off (`SWITCHED_OFF`).

    The states of a sample do not depend on its padding, nor on the samples it is batched with.

    Args:
        config: Configuration of the network, as published.
        layer: "last": the network's own output. N: `hidden_states[N]` of transformers, 0 for the embeddings;
            layers above are not built, and N equal to the number of layers is the same as "last".
            "weighted": a learned mean of the embeddings and all layers.
        stride: How many consecutive states are averaged; None means `usual_stride`.

    Attributes:
        usual_stride: Makes 10 to 12.5 states a second.

    Raises:
        EncoderError: The network has fewer layers.
    """

    input_names = ("audio_values", "audio_mask")
    usual_stride = 4  # of 50 states a second

    def __init__(
        self, config: PretrainedConfig, layer: str | int = "last", stride: int | None = None
    ) -> None:
        highest = config.num_hidden_layers
        if isinstance(layer, int) and layer > highest:
            raise EncoderError(
                f"model.audio_layer is {layer}, and the {config.model_type!r} encoder has {highest} layers: "
                f"give 0 to {highest}, last or weighted"
            )
        self.is_weighted = layer == "weighted"
        self.is_cut = isinstance(layer, int) and layer < highest
        config = deepcopy(config)
        for name in SWITCHED_OFF.keys() & vars(config).keys():
            setattr(config, name, SWITCHED_OFF[name])
        if self.is_cut:
            config.num_hidden_layers = layer
        super().__init__(config)
        self.stride = self.usual_stride if stride is None else stride
        width = config.hidden_size
        self.layer_weights = LayerWeights(highest + 1) if self.is_weighted else None
        # the scale of hidden states differs between layers; the last state has the network's own norm
        self.norm = nn.LayerNorm(width) if self.is_weighted or self.is_cut else None

    @classmethod
    def from_config(cls, config: MSAConfig) -> "PretrainedAudioEncoder":
        """The audio encoder of a model."""
        return cls(config.audio_config, config.audio_layer, config.audio_stride)

    @abstractmethod
    def build(self, config: PretrainedConfig) -> PreTrainedModel:
        """The network; if `is_cut`, without parts that only its last state passes."""

    @abstractmethod
    def hidden_states(self, values: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Run the network on `audio_values` and `audio_mask` of a batch.

        Returns:
            States `(batch, time, width)`: at least the last, and if `is_weighted` those of all layers, from
            the embeddings upwards; and their mask `(batch, time)` bool.
        """

    @staticmethod
    @abstractmethod
    def default_feature_extractor(config: PretrainedConfig) -> Any:
        """Feature extractor of the family, if none was published with the weights."""

    def states(self, inputs: dict[str, Tensor]) -> ModalitySequence:
        """Run the network and average its states over time, without those of padding.

        Returns:
            `(batch, ceil(time / stride), width)`; if `is_weighted`, `(..., (layers + 1) * width)`: the
            embeddings, then each layer.
        """
        hidden, mask = self.hidden_states(inputs["audio_values"], inputs["audio_mask"])
        values = torch.cat(hidden, dim=-1) if self.is_weighted else hidden[-1]
        return pool(ModalitySequence.of(values, mask), self.stride)

    def read(self, sequence: ModalitySequence) -> ModalitySequence:
        """Weigh the layers and normalise, as `audio_layer` says; `(batch, time, width)`."""
        values = sequence.values
        if self.layer_weights is not None:
            values = self.layer_weights(values)
        return sequence if self.norm is None else sequence.with_values(self.norm(values))


class LayerWeights(nn.Module):
    """A learned mean over layers: weights are a softmax, equal at first.

    Args:
        layers: How many there are.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weigh all layers equally."""
        nn.init.zeros_(self.logits)

    def forward(self, values: Tensor) -> Tensor:
        """Mean `(..., width)` of states `(..., layers * width)`."""
        by_layer = rearrange(values, "... (layers width) -> ... layers width", layers=len(self.logits))
        return torch.einsum("...lw,l->...w", by_layer, self.logits.softmax(dim=0))


def pool(sequence: ModalitySequence, stride: int) -> ModalitySequence:
    """Average the valid states of each `stride` consecutive steps; a group without any is not valid."""
    if stride == 1:
        return sequence
    missing = -sequence.mask.shape[1] % stride
    mask = rearrange(F.pad(sequence.mask, (0, missing)), "b (t s) -> b t s", s=stride)
    values = rearrange(F.pad(sequence.values, (0, 0, 0, missing)), "b (t s) d -> b t s d", s=stride)
    count = mask.sum(dim=2, keepdim=True).clamp(min=1)
    return ModalitySequence.of(values.sum(dim=2) / count, mask.any(dim=2))


def attendable(mask: Tensor) -> Tensor:
    """The mask `(batch, time)`, with the first step where a sample has none: a softmax needs one key."""
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    return mask | (~mask.any(dim=1, keepdim=True) & first)
