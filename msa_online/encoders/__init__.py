# SPDX-License-Identifier: Apache-2.0
"""Learned encoders: one sequence of states for each modality."""

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from msa_online.configuration_msa import MSAConfig
from msa_online.encoders.audio import AudioEncoder
from msa_online.encoders.face import FaceEncoder
from msa_online.encoders.features import FeatureEncoder
from msa_online.encoders.image import FAMILIES, ImageEncoder
from msa_online.encoders.pretrained import (
    UNREADABLE,
    EncoderError,
    first_line_of,
    load_feature_extractor,
    load_image_processor,
    load_tokenizer,
    read_encoder_config,
    require_vocabulary,
)
from msa_online.encoders.spectrogram_transformer import SpectrogramTransformer
from msa_online.encoders.text import TextEncoder, reads_text_alone
from msa_online.encoders.wav2vec2_bert import Wav2Vec2BertEncoder
from msa_online.encoders.waveform import WAVEFORM_TYPES, WaveformEncoder
from msa_online.encoders.whisper import WhisperEncoder
from msa_online.front_ends import longest_sound, sound_shape
from msa_online.modalities import MODALITIES

__all__ = ["ENCODERS", "encoder_class", "load_encoder_config", "load_preprocessors", "make_encoders"]

CONVOLUTIONAL = "convolutional"
"""Learned from scratch, without a configuration of transformers."""

ANY = "any"
"""Every other model type that `AutoModel` builds."""

ENCODERS: dict[str, dict[str, type[nn.Module]]] = {
    "text": {ANY: TextEncoder},
    "audio": {
        CONVOLUTIONAL: AudioEncoder,
        "whisper": WhisperEncoder,
        "wav2vec2-bert": Wav2Vec2BertEncoder,
        "audio-spectrogram-transformer": SpectrogramTransformer,
        **dict.fromkeys(WAVEFORM_TYPES, WaveformEncoder),
    },
    "vision": {CONVOLUTIONAL: FaceEncoder, **dict.fromkeys(FAMILIES, ImageEncoder)},
}
"""Encoders by modality and by the `model_type` of their configuration in transformers."""


def make_encoders(config: MSAConfig) -> nn.ModuleDict:
    """The encoder of each modality, for raw clips or for precomputed features (`feature_widths`).

    Raises:
        EncoderError: An encoder is of a type that its modality does not have, its configuration is
            impossible, or the audio encoder has fewer layers than `audio_layer`.
    """
    if config.feature_widths is not None:
        return nn.ModuleDict({name: FeatureEncoder(name, config.feature_widths[name]) for name in MODALITIES})
    kinds = {name: encoder_class(name, config.encoder_config(name)) for name in MODALITIES}
    return nn.ModuleDict({name: _make(name, kind, config) for name, kind in kinds.items()})


def _make(modality: str, kind: type[nn.Module], config: MSAConfig) -> nn.Module:
    try:
        return kind.from_config(config)
    except EncoderError:
        raise
    except UNREADABLE as error:
        network = config.encoder_config(modality)
        if network is None:
            raise
        raise EncoderError(
            f"the configuration of the {modality} encoder makes no {network.model_type!r} network "
            f"({first_line_of(error)}): give one as it was published, with an attention that it supports"
        ) from error


def encoder_class(modality: str, config: PretrainedConfig | None) -> type[nn.Module]:
    """The class of an encoder.

    Args:
        modality: Name of the modality.
        config: Configuration of a pretrained encoder; None for the one that learns from scratch.

    Raises:
        EncoderError: The modality has no encoder of this type.
    """
    table = ENCODERS[modality]
    kind = CONVOLUTIONAL if config is None else config.model_type
    others = [name for name in MODALITIES if name != modality and kind in ENCODERS[name]]
    if kind not in table and (ANY not in table or others):
        known = ", ".join(sorted(table.keys() - {CONVOLUTIONAL, ANY})) or "none yet"
        remedy = (
            f"give it as model.{others[0]}_encoder"
            if others
            else f"types for {modality} are {known}; null learns one from scratch"
        )
        raise EncoderError(f"a {kind!r} model is no {modality} encoder: {remedy}")
    if kind not in table and not reads_text_alone(config):
        raise EncoderError(
            f"a {kind!r} model is no {modality} encoder: give one of token ids alone, without a decoder and "
            "without other towers, like bert, roberta or deberta-v2"
        )
    return table[kind if kind in table else ANY]


def load_encoder_config(modality: str, name: str) -> PretrainedConfig:
    """Configuration of a pretrained encoder by name or folder, without its weights.

    Of a model with several towers it is the configuration of the one for the modality.

    Raises:
        EncoderError: The encoder is unavailable, or is none for this modality.
    """
    config = read_encoder_config(name)
    tower = f"{modality}_config"
    if modality != "text" and tower in config.sub_configs:
        config = getattr(config, tower)
    try:
        encoder_class(modality, config)
    except EncoderError as error:
        raise EncoderError(f"model.{modality}_encoder is {name!r}: {error}") from error
    return config


def load_preprocessors(config: MSAConfig) -> dict[str, Any]:
    """What turns text, sound and crops into the inputs of the pretrained encoders that `config` names.

    Returns:
        `tokenizer`, `audio_feature_extractor` and `image_processor`, arguments of `MSAProcessor`; None for an
        encoder that learns from scratch. An audio encoder published without one gets that of its family.

    Raises:
        EncoderError: One cannot be read or does not fit its encoder, or a tokenizer or an image processor is
            missing, or sound at another rate than 16 kHz is wanted.
    """
    tokenizer = extractor = processor = None
    if (name := config.text_encoder) is not None:
        tokenizer = load_tokenizer(name)
        require_fitting_tokens(config, tokenizer)
    if (name := config.audio_encoder) is not None:
        kind = encoder_class("audio", config.audio_config)
        extractor = load_feature_extractor(name) or kind.default_feature_extractor(config.audio_config)
    if (name := config.vision_encoder) is not None:
        processor = load_image_processor(name)
    if config.feature_widths is None:
        require_fitting_sound(config, extractor)
    return {"tokenizer": tokenizer, "audio_feature_extractor": extractor, "image_processor": processor}


def require_fitting_tokens(config: MSAConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the text encoder of a model has a state for each token that a tokenizer makes.

    Raises:
        EncoderError: The tokenizer has no vocabulary, or more tokens than the encoder.
    """
    require_vocabulary(tokenizer)
    known = getattr(config.text_config, "vocab_size", None)  # encoders of characters or bytes need none
    special = {*tokenizer.all_special_ids}
    used = {token for token in tokenizer.get_vocab().values() if token not in special}
    highest = max(used.union(tokenizer("")["input_ids"]))  # the special ones that surround a text
    if known is not None and highest >= known:
        raise EncoderError(
            f"the text encoder has {known:,} tokens, and its tokenizer makes numbers up to {highest:,}: put "
            "the tokenizer beside it that it was published with"
        )


def require_fitting_sound(config: MSAConfig, extractor: Any | None) -> None:
    """Check that a feature extractor makes what the audio encoder of a model reads.

    Args:
        config: Configuration of the model.
        extractor: A feature extractor of `SOUND_FRONT_ENDS`; None for our log-mel spectrogram.

    Raises:
        EncoderError: It makes inputs of another shape, or of longer sounds than the encoder reads.
    """
    network = config.audio_config
    usual = None
    if network is not None:
        usual = encoder_class("audio", network).default_feature_extractor(network)
    try:
        needed, made = sound_shape(1.0, usual), sound_shape(1.0, extractor)
    except UNREADABLE as error:
        raise EncoderError(f"the audio encoder's feature extractor cannot be used ({error})") from error
    remedy = "put the preprocessor_config.json beside it that it was published with"
    if made != needed:
        raise EncoderError(
            f"the audio encoder reads a second of sound as values of shape {needed}, and its feature "
            f"extractor makes {made}: {remedy}"
        )
    seconds, longest = longest_sound(extractor), longest_sound(usual)
    if seconds > longest:
        raise EncoderError(
            f"the audio encoder reads at most {longest:g} s of sound, and its feature extractor makes "
            f"{seconds:g} s: {remedy}"
        )
