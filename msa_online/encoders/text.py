# SPDX-License-Identifier: Apache-2.0
"""Text encoder: any HuggingFace encoder, without its pooler."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from feature_extractors.assets import asset_path, get_asset
from feature_extractors.catalogue import ASSETS, asset_of_model
from feature_extractors.sources import why_hub_is_silent
from msa_online.modalities import ModalitySequence

KNOWN_TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "bert-base-uncased": {"model_type": "bert"},
    "microsoft/deberta-v3-base": {
        "model_type": "deberta-v2",
        "vocab_size": 128_100,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "max_relative_positions": -1,
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
    },
    "sentence-transformers/all-MiniLM-L6-v2": {
        "model_type": "bert",
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "sentence-transformers/all-mpnet-base-v2": {
        "model_type": "mpnet",
        "vocab_size": 30_527,
        "max_position_embeddings": 514,
        "layer_norm_eps": 1e-5,
    },
}
"""Shapes of common encoders, so that models can be described and tested without the Hub."""


class TextEncoderError(OSError):
    """A text encoder is unavailable; the message says what was tried, and the remedy."""


class TextEncoder(nn.Module):
    """Maps token ids to token states, with any encoder that `AutoModel` builds.

    The pooler is left out if the architecture allows it: no head reads it, and a parameter without a gradient
    stops distributed training.

    Parameters have torch's default type (fp32), whatever type the encoder was published in.

    Args:
        config: Configuration of the HuggingFace encoder.
    """

    input_names = ("text_input_ids", "text_mask")

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.frozen = False
        dtype = torch.get_default_dtype()
        self.model = AutoModel.from_config(config, dtype=dtype, **_without_pooler(config))

    def forward(self, inputs: dict[str, Tensor]) -> ModalitySequence:
        """Encode `text_input_ids` `(batch, tokens)` int64 with `text_mask` `(batch, tokens)` bool."""
        states = self.model(input_ids=inputs["text_input_ids"], attention_mask=inputs["text_mask"].long())
        return ModalitySequence.of(states.last_hidden_state, inputs["text_mask"])  # (batch, tokens, width)

    def load_pretrained(self, source: str | Path) -> None:
        """Load the weights of a pretrained encoder of the same architecture, by folder or name.

        Raises:
            TextEncoderError: The weights are neither on disk nor available from the Hub.
        """
        options = _without_pooler(self.model.config)
        pretrained = _load(AutoModel, str(source), find_text_encoder(str(source), download=True), **options)
        self.model.load_state_dict(pretrained.state_dict())

    def freeze(self) -> None:
        """Freeze the weights: no gradients, and no dropout in training."""
        self.frozen = True
        self.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TextEncoder":
        """Set training mode; a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)


def find_text_encoder(name: str, download: bool = False) -> str:
    """Where to load a text encoder from: a folder, our cache of models, or its name on the Hub.

    Args:
        name: A folder, or a name on the Hub.
        download: Download an encoder of `ASSETS` that is not in the cache.

    Raises:
        AssetError: `download` is set and no source has the encoder.
    """
    if Path(name).is_dir() or not (asset := asset_of_model(name)):
        return name
    return str((get_asset if download else asset_path)(asset) or name)


def load_text_config(name: str) -> PretrainedConfig:
    """Configuration of a text encoder by name, without its weights.

    Raises:
        TextEncoderError: The name is neither a folder nor a known encoder, and the Hub does not return it.
    """
    source = find_text_encoder(name)
    known = {key.rsplit("/", 1)[-1]: value for key, value in KNOWN_TEXT_CONFIGS.items()}
    if not Path(source).is_dir() and (shape := known.get(name.rsplit("/", 1)[-1])):
        return AutoConfig.for_model(**shape)
    return _load(AutoConfig, name, source)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a text encoder by name.

    Raises:
        TextEncoderError: The tokenizer is neither on disk nor available from the Hub.
    """
    return _load(AutoTokenizer, name, find_text_encoder(name, download=True))


def _load(kind: type, name: str, source: str, **kwargs: Any) -> Any:
    local = Path(source).is_dir() or bool(why_hub_is_silent())
    try:
        return kind.from_pretrained(source, local_files_only=local, **kwargs)
    except (OSError, ValueError) as error:
        carried = {asset.hub_id for asset in ASSETS.values()}
        raise TextEncoderError(
            f"text encoder {name!r} is neither a folder nor in the cache of models, and the Hub did not "
            f"return it ({str(error).splitlines()[0]}). Give a folder with the encoder, go online, or "
            f"download {', '.join(KNOWN_TEXT_CONFIGS.keys() & carried)} with `msa-online get-models`."
        ) from error


def _without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    accepted = inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}
