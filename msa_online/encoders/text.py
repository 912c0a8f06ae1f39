# SPDX-License-Identifier: Apache-2.0
"""Text encoder: any HuggingFace encoder, without its pooler."""

import inspect
import math

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

from msa_online.configuration_msa import MSAConfig
from msa_online.encoders.pretrained import PretrainedEncoder
from msa_online.modalities import ModalitySequence


class TextEncoder(PretrainedEncoder):
    """Maps token ids to token states, with any encoder that `AutoModel` builds.

    The pooler is left out if the architecture allows it: no head reads it, and a parameter without a gradient
    stops distributed training.
    """

    input_names = ("text_input_ids", "text_mask")

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

    def states(self, inputs: dict[str, Tensor]) -> ModalitySequence:
        """Encode `text_input_ids` `(batch, tokens)` int64 with `text_mask` `(batch, tokens)` bool."""
        states = self.model(input_ids=inputs["text_input_ids"], attention_mask=inputs["text_mask"].long())
        return ModalitySequence.of(states.last_hidden_state, inputs["text_mask"])  # (batch, tokens, width)


def reads_text_alone(config: PretrainedConfig) -> bool:
    """Whether the network of a configuration maps token ids to states, without a decoder or other towers."""
    if type(config) not in MODEL_MAPPING or config.is_encoder_decoder or config.sub_configs:
        return False
    network = MODEL_MAPPING[type(config)]
    network = network[0] if isinstance(network, tuple) else network
    return network.main_input_name == "input_ids"
