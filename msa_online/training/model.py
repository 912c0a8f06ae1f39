# SPDX-License-Identifier: Apache-2.0
"""Build the model of a run, new or from a checkpoint."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

from msa_online.configuration_msa import MSAConfig, without_path
from msa_online.corpora.corpus import ReadyCorpus
from msa_online.encoders import load_preprocessors
from msa_online.encoders.pretrained import PretrainedEncoder
from msa_online.encoders.text import TextEncoder
from msa_online.hub import load_config, load_for_fine_tuning
from msa_online.lora import AdapterError, add_lora
from msa_online.missing.rates import SplitMask
from msa_online.modalities import MODALITIES
from msa_online.modeling_msa import PROBES, MSAModel
from msa_online.precomputed.files import is_precomputed_path
from msa_online.processing_msa import MSAProcessor
from msa_online.training.config import ALL, DataArguments, RunArguments, TrainingArguments
from msa_online.training.yaml_reader import ConfigurationError

OF_ENCODERS = ("tokenizer", "audio_feature_extractor", "image_processor")
"""Parts of a processor that belong to the encoders."""

INHERITED = (*(f"{name}_encoder" for name in MODALITIES), "audio_layer", "feature_widths")
"""Settings in which fine-tuning cannot differ from the checkpoint: other weights would be random."""


def build_model(
    arguments: RunArguments, classes: Sequence[str], console: Console
) -> tuple[MSAModel, MSAProcessor | None]:
    """Build a model with pretrained encoders, or from the checkpoint `init_from`, and its processor.

    Fine-tuning prints what was loaded and what is new. A model of precomputed features has no processor.

    Raises:
        EncoderError: An encoder is unavailable.
        CheckpointError: `init_from` is not a checkpoint, is damaged, or has no encoder that can be used.
        ConfigurationError: `init_from` has other encoders or widths than the configuration; the data are
            clips and the model reads features, or the reverse; or the head refuses the weights of its losses
            for the labels of the data.
    """
    training, data = arguments.training, arguments.data
    if training.init_from:
        config = _inherit(arguments, classes)
        _require_same_kind(config.feature_widths, data)
        start = load_for_fine_tuning(training.init_from, config)
        model = start.model
        console.print(f"fine-tuning from {training.init_from}\n{start}", soft_wrap=True, highlight=False)
    else:
        _require_same_kind(arguments.model.get("feature_widths"), data)
        config = arguments.model_config(classes)
        model = MSAModel.from_pretrained_encoders(config)
    if problem := model.head.weights_problem(config.loss_weights):
        raise ConfigurationError(f"model.loss_weights: {problem}")
    if config.feature_widths is not None:
        return model, None
    limit_training(model.encoders, training)
    if training.init_from:
        of_encoders = {name: getattr(start.processor, name) for name in OF_ENCODERS}
    else:
        of_encoders = load_preprocessors(config)
    return model, MSAProcessor(
        extraction=data.extraction,
        max_text_tokens=data.max_text_tokens,
        max_audio_seconds=data.max_audio_seconds,
        **of_encoders,
    )


def require_encoders(arguments: RunArguments) -> None:
    """Check the encoders of a run before its data are read, without their weights.

    Raises:
        CheckpointError: `init_from` is not a checkpoint.
        ConfigurationError: `init_from` has other encoders or widths than the configuration, or texts can be
            longer than the encoder reads, or as in `limit_training`.
        EncoderError: An encoder or its preprocessor is unavailable or unsuitable, also for the head, or the
            encoder is none for its modality.
    """
    classes = ("no", "yes")  # those of the data do not matter here
    if arguments.training.init_from:
        config = _inherit(arguments, classes)
    else:
        config = arguments.model_config(classes)
        load_preprocessors(config)
    with torch.device("meta"):
        encoders = MSAModel(config).encoders
        limit_training(encoders, arguments.training)
    text, tokens = encoders["text"], arguments.data.max_text_tokens
    if isinstance(text, TextEncoder) and tokens > text.longest:
        raise ConfigurationError(
            f"data.max_text_tokens is {tokens:,}, but the text encoder reads at most {text.longest:,}: "
            f"set data.max_text_tokens={text.longest}"
        )


def require_fused(model: MSAModel, condition: str | None, occurring: Collection[str]) -> None:
    """Check that training shows a modality that the head predicts from.

    Args:
        model: The model.
        condition: `training.condition`, for the message.
        occurring: Modalities that occur in training.

    Raises:
        ConfigurationError: It shows none.
    """
    if not {*model.head.fuses} & {*occurring}:
        under = f" under training.condition={condition}" if condition else ""
        raise ConfigurationError(
            f"model.head={model.config.head} predicts from {' and '.join(model.head.fuses)}, which no "
            f"training sample has{under}: use another head"
        )


def limit_training(encoders: Mapping[str, nn.Module], training: TrainingArguments) -> None:
    """Freeze encoders, whole or in part, set up gradient checkpointing, and add adapters.

    Args:
        encoders: Encoders by modality.
        training: Training settings.

    Raises:
        ConfigurationError: An encoder has too few layers or no parameters, or it does not support gradient
            checkpointing, or has no layers to adapt.
    """
    for name, layers in training.frozen_layers.items():
        encoder = encoders[name]
        if isinstance(encoder, PretrainedEncoder):
            if layers == ALL:
                encoder.freeze()
            elif layers <= len(encoder.layers):
                encoder.freeze_below(layers)
            else:
                raise ConfigurationError(
                    f"training.freeze of {name} is {layers}, but its encoder has {len(encoder.layers)} "
                    f"layers: give {ALL}, or at most that"
                )
        elif layers == ALL and any(True for _ in encoder.parameters()):  # trained by `init_from`
            encoder.requires_grad_(False)
        else:
            raise ConfigurationError(
                f"training.freeze of {name} is {layers}, but {_without_layers(encoder)}: leave it out"
            )
    for name in training.gradient_checkpointing:
        encoder = encoders[name]
        if not isinstance(encoder, PretrainedEncoder):
            raise ConfigurationError(
                f"training.gradient_checkpointing names {name}, but {_without_layers(encoder)}: leave it out"
            )
        if isinstance(encoder, TextEncoder) and encoder.opened_at is not None:
            raise ConfigurationError(
                f"training.gradient_checkpointing names {name}, and the head acts inside its encoder: states "
                "that are recomputed would lack what the head changed; leave it out"
            )
        network = encoder.model
        try:
            network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        except ValueError as error:
            raise ConfigurationError(
                f"training.gradient_checkpointing names {name}: {error} Leave it out"
            ) from error
        # for reentrant checkpointing only; it would send gradients through frozen layers
        network.disable_input_require_grads()
    for name, settings in training.lora.items():
        encoder = encoders[name]
        if not isinstance(encoder, PretrainedEncoder):
            raise ConfigurationError(
                f"training.lora names {name}, but {_without_layers(encoder)}: leave it out"
            )
        try:
            add_lora(encoder, settings)
        except AdapterError as error:
            raise ConfigurationError(f"training.lora.{name}: {error}") from error


def _without_layers(encoder: nn.Module) -> str:
    """Why an encoder that is not pretrained has no layers."""
    has_parameters = any(True for _ in encoder.parameters())
    return "its encoder is not pretrained" if has_parameters else "precomputed features have no encoder"


def count_parameters(model: MSAModel) -> dict[str, int]:
    """Parameters of a model in training: `all`, and those that are `trained`; without probes."""
    counted = [each for name, each in model.named_parameters() if not name.startswith(PROBES)]
    return {
        "all": sum(each.numel() for each in counted),
        "trained": sum(each.numel() for each in counted if each.requires_grad),
    }


def parameters_line(model: MSAModel) -> str:
    """How many parameters are trained, and how many of each encoder are not."""
    every = sum(parameter.numel() for parameter in model.parameters())
    frozen = {
        f"{name}_encoder": sum(each.numel() for each in encoder.parameters() if not each.requires_grad)
        for name, encoder in model.encoders.items()
    }
    line = f"training {every - sum(frozen.values()):,} of {every:,} parameters"
    parts = [f"{count:,} of {name}" for name, count in frozen.items() if count]
    return f"{line}; frozen: {', '.join(parts)}" if parts else line


def _require_same_kind(widths: Mapping[str, int] | None, data: DataArguments) -> None:
    """Check that model and data are both of raw clips, or both of features."""
    if widths is None and is_precomputed_path(data.path):
        raise ConfigurationError(
            f"data.path={data.path} holds precomputed features, but the model reads raw clips: set "
            "model.text_encoder=null and their widths in model.feature_widths, or name a corpus of clips"
        )
    if widths is not None and not is_precomputed_path(data.path):
        raise ConfigurationError(
            f"data.path={data.path} holds raw clips, but the model reads precomputed features "
            f"(model.feature_widths): extract them with `msa-online extract-features {data.path} FOLDER "
            "--text-encoder NAME`, or set model.text_encoder instead of the widths"
        )


def _inherit(arguments: RunArguments, classes: Sequence[str]) -> MSAConfig:
    """The configuration of `init_from`, changed by the `model:` section, with the labels of this run."""
    source = arguments.training.init_from
    config = load_config(source)
    for key in INHERITED:
        before = getattr(config, key)
        if without_path(named := arguments.model.get(key, before)) != without_path(before):
            raise ConfigurationError(
                f"training.init_from={source} has {key} {before!r}, but model.{key} is {named!r}: set "
                f"model.{key}={json.dumps(before)}, or train without training.init_from"
            )
    of_old_weights = {"confidence": None, "trained_on": None}
    inherited: dict[str, Any] = {**config.to_dict(), **arguments.model, **of_old_weights}
    for outputs in ("id2label", "label2id", "num_labels", "label_range"):
        inherited.pop(outputs, None)
    for part in ("head", "context"):
        if inherited.get(part, "none") != getattr(config, part):
            inherited[f"{part}_kwargs"] = arguments.model.get(f"{part}_kwargs")
    inherited["plugins"] = list(dict.fromkeys([*(config.plugins or ()), *arguments.plugins]))
    return MSAConfig(**inherited, **arguments.output_fields(classes))


def fit_encoders(
    model: MSAModel,
    data: ReadyCorpus,
    arguments: RunArguments,
    masks: Mapping[str, SplitMask],
) -> None:
    """Standardise precomputed features with the training split; encoders of raw clips learn their scaling.

    Fine-tuning keeps the statistics of `init_from`, which its weights were trained with. Modalities that
    `masks` hide do not count.

    Raises:
        CorpusError: The features have other widths than the model.
    """
    if arguments.data.standardize and not arguments.training.init_from:
        seen = masks["train"].seen if masks else data.present("train")
        for name, (mean, deviation) in data.statistics("train", seen, model.config.widths).items():
            model.encoders[name].standardize_by(mean, deviation)
