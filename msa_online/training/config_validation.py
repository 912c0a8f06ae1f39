# SPDX-License-Identifier: Apache-2.0
"""Validate configuration values, without loading anything."""

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from accelerate.utils import LoggerType

from msa_online.missing.modalities import dropout_problem
from msa_online.missing.rates import rate_problems
from msa_online.modalities import CONDITIONS, MODALITIES
from msa_online.model_card import REPOSITORY
from msa_online.training.config import (
    ALL,
    OVER_CONDITIONS,
    MissingArguments,
    RunArguments,
    TrainingArguments,
)
from msa_online.training.diagnostics import DIAGNOSTICS, SHARES
from msa_online.training.precision import PRECISIONS

CHOICES = {  # None is null in YAML
    "data.task": ("regression", "classification"),
    "training.mixed_precision": PRECISIONS,
    "training.log_with": (None, *sorted(map(str, LoggerType))),
    "training.decay": ("linear", "constant"),
    "training.cache_states": ("auto", "off"),
    "training.condition": (None, *CONDITIONS),
    "training.selection": ("complete", OVER_CONDITIONS),
}
LOWEST = {  # where null is allowed, it has no limit
    "data.max_text_tokens": 3,  # two of them are special tokens
    "data.loader_workers": 0,
    "data.prepare_workers": 1,
    "data.missing.seed": 0,
    "training.seed": 0,
    "training.epochs": 1,
    "training.patience": 1,
    "training.batch_size": 1,
    "training.accumulation": 1,
    "training.weight_decay": 0,
}
SEEDS = 2**32
"""How many seeds there are, from 0: optuna and t-SNE seed numpy's `RandomState`, which takes no others."""
HIGHEST = {"data.missing.seed": SEEDS - 1, "training.seed": SEEDS - 1}
LONGEST_NAME = 200  # bytes of a folder's name; files beside it have longer ones
ABOVE_ZERO = (
    *("training.learning_rate", "training.clip_norm"),
    "data.max_audio_seconds",
)
NOT_EMPTY = ("data.split_column", "training.output_dir")
OF_RAW_CLIPS = (
    *("audio_layer", "audio_stride", "audio_channels", "audio_width"),
    *("face_channels", "face_width", "blendshapes"),
)
OF_PRETRAINED = {"audio": ("audio_layer", "audio_stride")}
OF_CONVOLUTIONS = {"audio": ("audio_channels", "audio_width"), "vision": ("face_channels", "face_width")}
"""Settings that apply to a pretrained encoder of a modality only, or to convolutions only."""
EXAMPLE_WIDTHS = "{text: 768, audio: 74, vision: 35}"


def problems(arguments: RunArguments) -> Iterator[str]:
    """Yield a message for each invalid value, with its key, the value and what is allowed."""
    data, training = arguments.data, arguments.training
    yield from _problems_of_inputs(arguments.model, training)
    yield from _problems_of_encoders(arguments.model, training)
    yield from _problems_of_lora(training)
    yield from _problems_of_missing(data.missing, training)
    for key, choices in CHOICES.items():
        if (value := attrgetter(key)(arguments)) not in choices:
            allowed = ("null" if choice is None else choice for choice in choices)
            yield f"{key} is {value!r}: one of {', '.join(allowed)}"
    for key, lowest in LOWEST.items():
        if (value := attrgetter(key)(arguments)) is not None and value < lowest:
            yield f"{key} is {value}: at least {lowest}"
    for key, highest in HIGHEST.items():
        if (value := attrgetter(key)(arguments)) > highest:
            yield f"{key} is {value}: at most {highest}"
    for key in ABOVE_ZERO:
        if (value := attrgetter(key)(arguments)) <= 0:
            yield f"{key} is {value}: above 0"
    for key in NOT_EMPTY:
        if not attrgetter(key)(arguments):
            yield f"{key} is empty: give a name"
    if any(
        len(part.encode("utf-8", "surrogatepass")) > LONGEST_NAME for part in Path(training.output_dir).parts
    ):
        yield f"training.output_dir is {training.output_dir!r}: names of at most {LONGEST_NAME} bytes"
    if "\0" in training.output_dir:
        yield f"training.output_dir is {training.output_dir!r}: leave out the zero byte"
    if not data.label_range[0] < data.label_range[1]:
        yield f"data.label_range is {list(data.label_range)}: the lower end comes first"
    if not 0 <= training.warmup <= 1:
        yield f"training.warmup is {training.warmup}: a share of all steps, between 0 and 1"
    if training.push_to_hub is not None and not REPOSITORY.fullmatch(training.push_to_hub):
        yield f"training.push_to_hub is {training.push_to_hub!r}: a repository like ORG/NAME"
    if training.resume and training.overwrite:
        yield "training.resume and training.overwrite exclude each other"
    hiding = [key for key in ("condition", "modality_dropout", "frame_dropout") if getattr(training, key)]
    if len(hiding) > 1:
        yield f"training.{hiding[0]} and training.{hiding[1]} exclude each other"
    if training.selection == OVER_CONDITIONS and (training.condition or data.missing.rates is not None):
        other = "training.condition" if training.condition else "data.missing.rates"
        yield f"training.selection={OVER_CONDITIONS} and {other} exclude each other"
    for name in training.diagnostics:
        if name not in DIAGNOSTICS:
            yield f"training.diagnostics names {name!r}: any of {', '.join(DIAGNOSTICS)}"
        elif name == SHARES and training.condition:
            yield (
                "training.diagnostics names shares, but a model of training.condition predicts under that "
                "condition only: leave it out"
            )
    for stage in training.stages or ():
        for name in ("epochs", "patience"):
            if (value := getattr(stage, name)) is not None and value < 1:
                yield f"training.stages: {name} of stage {stage.name!r} is {value}: at least 1"
    for name, rate in training.modality_dropout.items():
        if name not in MODALITIES:
            yield f"training.modality_dropout names {name!r}: one of {', '.join(MODALITIES)}"
        elif not 0 <= rate < 1:
            yield f"training.modality_dropout of {name} is {rate!r}: at least 0 and below 1"
    if problem := dropout_problem(training.modality_dropout):
        yield f"training.modality_dropout: {problem}"


def _problems_of_inputs(model: Mapping[str, Any], training: TrainingArguments) -> Iterator[str]:
    """Problems with the choice between raw clips and precomputed features."""
    text_encoder, widths = model.get("text_encoder"), model.get("feature_widths")
    if not (text_encoder or widths or training.init_from):
        yield (
            "model.text_encoder is missing: name any HuggingFace encoder or a folder, or give "
            f"model.feature_widths, like {EXAMPLE_WIDTHS}, to train on precomputed features"
        )
    named = [name for name in MODALITIES if model.get(f"{name}_encoder")]
    if empty := [name for name in MODALITIES if model.get(f"{name}_encoder") == ""]:
        yield f"model.{empty[0]}_encoder is empty: give a name or a folder, or null"
    if widths is None:
        yield from _problems_of_kinds(model, named, training)
        return
    for name in named:
        yield f"model.{name}_encoder and model.feature_widths exclude each other: raw clips, or features"
    fits = isinstance(widths, dict) and set(widths) == set(MODALITIES)
    if not fits or not all(type(width) is int and width > 0 for width in widths.values()):
        yield f"model.feature_widths is {widths!r}: a width for each modality, like {EXAMPLE_WIDTHS}"
    if unread := [name for name in OF_RAW_CLIPS if name in model]:
        yield f"model.{unread[0]} applies to raw clips only: leave it out with model.feature_widths"


def _problems_of_kinds(
    model: Mapping[str, Any], pretrained: Sequence[str], training: TrainingArguments
) -> Iterator[str]:
    """Settings of audio and vision encoders of another kind than the run has."""
    for name, keys in OF_CONVOLUTIONS.items():
        if name in pretrained and (unread := [key for key in keys if key in model]):
            yield (
                f"model.{unread[0]} applies to convolutions only: leave it out with model.{name}_encoder, "
                "whose width is its own"
            )
    for name, keys in OF_PRETRAINED.items():
        # a checkpoint to start from may have an encoder that the configuration does not name
        named = name in pretrained or training.init_from
        if not named and (unread := [key for key in keys if key in model]):
            yield f"model.{unread[0]} applies to pretrained encoders only: name one in model.{name}_encoder"


def _problems_of_encoders(model: Mapping[str, Any], training: TrainingArguments) -> Iterator[str]:
    """Problems with what is trained of each encoder, and how fast."""
    if not 0 < training.layer_decay <= 1:
        yield f"training.layer_decay is {training.layer_decay}: above 0 and at most 1"
    for name, layers in training.frozen_layers.items():
        if layers != ALL and (isinstance(layers, str) or layers < 0):
            yield f"training.freeze of {name} is {layers!r}: {ALL}, or a number of layers from 0 on"
    pretrained = ("freeze", "gradient_checkpointing", "lora")
    for key in ("learning_rates", *pretrained):
        for name in getattr(training, key):
            if name not in MODALITIES:
                yield f"training.{key} names {name!r}: one of {', '.join(MODALITIES)}"
            elif model.get("feature_widths") is not None:
                yield f"training.{key} names {name}, but a model of precomputed features has no encoders"
            # a checkpoint to start from may have an encoder that the configuration does not name
            elif key in pretrained and not (model.get(f"{name}_encoder") or training.init_from):
                yield (
                    f"training.{key} names {name}, whose encoder is not pretrained: leave it out, or name "
                    f"one in model.{name}_encoder"
                )
    for name, rate in training.learning_rates.items():
        if rate <= 0:
            yield f"training.learning_rates of {name} is {rate}: above 0"


def _problems_of_lora(training: TrainingArguments) -> Iterator[str]:
    """Problems with how encoders are adapted."""
    for name, settings in training.lora.items():
        key = f"training.lora.{name}"
        if name in training.freeze:
            yield f"{key} and training.freeze exclude each other: LoRA freezes the weights itself"
        if settings.r < 1:
            yield f"{key}.r is {settings.r}: at least 1"
        if settings.alpha is not None and settings.alpha < 1:
            yield f"{key}.alpha is {settings.alpha}: at least 1"
        if not 0 <= settings.dropout < 1:
            yield f"{key}.dropout is {settings.dropout}: at least 0 and below 1"


def _problems_of_missing(missing: MissingArguments, training: TrainingArguments) -> Iterator[str]:
    """Problems with the missing rates, and settings that exclude them."""
    problems = rate_problems(missing.by_name, missing.rounding)
    yield from (f"data.missing: {problem}" for problem in problems)
    for key in ("modality_dropout", "frame_dropout"):
        if missing.rates is not None and getattr(training, key):
            yield (
                f"data.missing.rates and training.{key} exclude each other: what is missing is fixed for the "
                "whole run"
            )
    if missing.rates is not None and training.condition:
        named = missing.rates if isinstance(missing.rates, dict) else {}
        used = CONDITIONS.get(training.condition, MODALITIES)
        if len(used) == 1 and missing.by_name.get(used[0]):
            yield (
                f"data.missing.rates hides {used[0]}, the only modality of training.condition: no sample can "
                "lose it; name two or three modalities"
            )
        if unused := [name for name in named if name not in used]:
            yield (
                f"data.missing.rates names {unused[0]}, which training.condition={training.condition} never "
                "shows: leave it out"
            )
