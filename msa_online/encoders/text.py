# SPDX-License-Identifier: Apache-2.0
"""Text encoder: any HuggingFace encoder, without its pooler."""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

from msa_online.configuration_msa import MSAConfig, width_of
from msa_online.encoders.pretrained import EncoderError, PretrainedEncoder
from msa_online.modalities import ModalitySequence


class TextEncoder(PretrainedEncoder):
    """Maps token ids to token states, with any encoder that `AutoModel` builds.

    The pooler is left out if the architecture allows it: no head reads it, and a parameter without a gradient
    stops distributed training.

    Attributes:
        opened_at: Layer after which a head changes the token states; None if none does, see `open_at`.
    """

    input_names = ("text_input_ids", "text_mask")
    opened_at: int | None = None

    @classmethod
    def from_config(cls, config: MSAConfig) -> "TextEncoder":
        """The text encoder of a model."""
        return cls(config.text_config)

    def build(self, config: PretrainedConfig) -> PreTrainedModel:
        """The network, without its pooler."""
        accepted = inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters
        no_pooler = {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}
        return AutoModel.from_config(config, dtype=torch.get_default_dtype(), **no_pooler)

    @property
    def longest(self) -> float:
        """Longest sequence of tokens that the network has positions for; infinite if they are relative."""
        tables = [
            module
            for name, module in self.model.named_modules()
            if name.endswith(("position_embeddings", "wpe")) and isinstance(module, nn.Embedding)
        ]
        # RoBERTa and MPNet count positions from the number of the padding token
        taken = [0 if table.padding_idx is None else table.padding_idx + 1 for table in tables]
        pairs = zip(tables, taken, strict=True)
        return min((table.num_embeddings - number for table, number in pairs), default=math.inf)

    @property
    def stored_once(self) -> bool:
        """Whether states are computed once: word embeddings cost nothing."""
        return super().stored_once and self.opened_at is None

    def open_at(self, layer: int) -> None:
        """Let a head change the token states after a layer, 0 for the embeddings.

        The states of an opened encoder are word embeddings, which depend on the text alone. `finish` runs the
        network on them when it is known which modalities are visible.

        Raises:
            EncoderError: The network has no such layer, or layers that cannot be told apart.
        """
        config, size = self.model.config, len(self.layers)
        if size != config.num_hidden_layers or self.model.get_input_embeddings().embedding_dim != width_of(
            config
        ):
            raise EncoderError(
                f"a head cannot act inside a text encoder of type {config.model_type!r}, whose layers share "
                "weights or whose word embeddings have another width: choose another encoder"
            )
        if layer >= size:
            raise EncoderError(
                f"a head acts after layer {layer} of the text encoder, which has {size} layers: give a "
                f"number from 0 to {size - 1}"
            )
        self.opened_at = layer

    def states(self, inputs: dict[str, Tensor]) -> ModalitySequence:
        """Encode `text_input_ids` `(batch, tokens)` int64 with `text_mask` `(batch, tokens)` bool."""
        ids, mask = inputs["text_input_ids"], inputs["text_mask"]
        if self.opened_at is not None:
            return ModalitySequence.of(self.model.get_input_embeddings()(ids), mask)
        states = self.model(input_ids=ids, attention_mask=mask.long())
        return ModalitySequence.of(states.last_hidden_state, mask)  # (batch, tokens, width)

    def finish(
        self, embeddings: ModalitySequence, change: Callable[[ModalitySequence], Tensor]
    ) -> ModalitySequence:
        """Run an opened network on its word embeddings.

        Args:
            embeddings: What `states` returned, `(batch, tokens, width)`; samples may be hidden.
            change: Maps the token states after the layer `opened_at` to new ones of the same shape.
        """

        def changed(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            states, *others = args
            return (change(replace(embeddings, values=states)), *others), kwargs

        attended = embeddings.mask | ~embeddings.present.unsqueeze(-1)  # no row without a key: NaN
        hook = self.layers[self.opened_at].register_forward_pre_hook(changed, with_kwargs=True)
        try:
            states = self.model(inputs_embeds=embeddings.values, attention_mask=attended.long())
        finally:
            hook.remove()
        return embeddings.with_values(states.last_hidden_state)


def reads_text_alone(config: PretrainedConfig) -> bool:
    """Whether the network of a configuration maps token ids to states, without a decoder or other towers."""
    if type(config) not in MODEL_MAPPING or config.is_encoder_decoder or config.sub_configs:
        return False
    network = MODEL_MAPPING[type(config)]
    network = network[0] if isinstance(network, tuple) else network
    return network.main_input_name == "input_ids"
