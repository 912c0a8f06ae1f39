# SPDX-License-Identifier: Apache-2.0
"""Validate configuration values, without loading anything."""

from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.utils import LoggerType

from msa_online.missing.rates import rate_problems
from msa_online.modalities import CONDITIONS, MODALITIES
from msa_online.training.config import MissingArguments, RunArguments, TrainingArguments
from msa_online.training.precision import PRECISIONS

DECAYS = ("linear", "constant")
TASKS = ("regression", "classification")
OF_RAW_CLIPS = ("audio_channels", "audio_width", "face_channels", "face_width", "blendshapes")
EXAMPLE_WIDTHS = "{text: 768, audio: 74, vision: 35}"


def problems(arguments: RunArguments) -> Iterator[str]:
    """Yield a message for each invalid value, with its key, the value and what is allowed."""
    data, training = arguments.data, arguments.training
    yield from _problems_of_inputs(arguments.model, training)
    yield from _problems_of_missing(data.missing, training)
    if not data.split_column:
        yield "data.split_column is empty: name the column of the split"
    if data.task not in TASKS:
        yield f"data.task is {data.task!r}: one of {', '.join(TASKS)}"
    if not data.label_range[0] < data.label_range[1]:
        yield f"data.label_range is {list(data.label_range)}: the lower end comes first"
    if training.mixed_precision not in PRECISIONS:
        yield f"training.mixed_precision is {training.mixed_precision!r}: one of {', '.join(PRECISIONS)}"
    trackers = sorted(str(tracker) for tracker in LoggerType)
    if training.log_with not in (None, *trackers):
        yield f"training.log_with is {training.log_with!r}: null, or one of {', '.join(trackers)}"
    if training.resume and training.overwrite:
        yield "training.resume and training.overwrite exclude each other"
    for name in ("epochs", "batch_size", "accumulation"):
        if getattr(training, name) < 1:
            yield f"training.{name} is {getattr(training, name)}: at least 1"
    for name in ("learning_rate", "text_learning_rate", "clip_norm"):
        if getattr(training, name) <= 0:
            yield f"training.{name} is {getattr(training, name)}: above 0"
    if not 0 <= training.warmup <= 1:
        yield f"training.warmup is {training.warmup}: a share of all steps, between 0 and 1"
    if training.decay not in DECAYS:
        yield f"training.decay is {training.decay!r}: one of {', '.join(DECAYS)}"
    if training.condition not in (None, *CONDITIONS):
        yield f"training.condition is {training.condition!r}: one of {', '.join(CONDITIONS)}, or null for all"
    hiding = [key for key in ("condition", "modality_dropout", "frame_dropout") if getattr(training, key)]
    if len(hiding) > 1:
        yield f"training.{hiding[0]} and training.{hiding[1]} exclude each other"
    if training.seed < 0:
        yield f"training.seed is {training.seed}: at least 0"
    if training.weight_decay < 0:
        yield f"training.weight_decay is {training.weight_decay}: at least 0"
    if not training.output_dir:
        yield "training.output_dir is empty: name the folder of the run"
    if data.max_text_tokens < 3:
        yield f"data.max_text_tokens is {data.max_text_tokens}: at least 3, two of them special tokens"
    if data.max_audio_seconds <= 0:
        yield f"data.max_audio_seconds is {data.max_audio_seconds}: above 0"
    if data.loader_workers < 0:
        yield f"data.loader_workers is {data.loader_workers}: at least 0"
    if data.prepare_workers is not None and data.prepare_workers < 1:
        yield f"data.prepare_workers is {data.prepare_workers}: at least 1, or null for all cores"
    for section in (training, *(training.stages or ())):
        if section.patience is not None and section.patience < 1:
            yield f"training.patience is {section.patience}: at least 1, or null for no early stopping"
    for stage in training.stages or ():
        if stage.epochs < 1:
            yield f"training.stages: stage {stage.name!r} has {stage.epochs} epochs: at least 1"
    for name, rate in training.modality_dropout.items():
        if name not in MODALITIES:
            yield f"training.modality_dropout names {name!r}: one of {', '.join(MODALITIES)}"
        elif not 0 <= rate < 1:
            yield f"training.modality_dropout of {name} is {rate!r}: at least 0 and below 1"


def _problems_of_inputs(model: Mapping[str, Any], training: TrainingArguments) -> Iterator[str]:
    """Problems with the choice between raw clips and precomputed features."""
    text_encoder, widths = model.get("text_encoder"), model.get("feature_widths")
    if not (text_encoder or widths or training.init_from):
        yield (
            "model.text_encoder is missing: name any HuggingFace encoder or a folder, or give "
            f"model.feature_widths, like {EXAMPLE_WIDTHS}, to train on precomputed features"
        )
    if widths is None:
        return
    if text_encoder:
        yield "model.text_encoder and model.feature_widths exclude each other: raw clips, or features"
    if (
        not isinstance(widths, dict)
        or set(widths) != set(MODALITIES)
        or not all(
            isinstance(width, int) and not isinstance(width, bool) and width > 0 for width in widths.values()
        )
    ):
        yield f"model.feature_widths is {widths!r}: a width for each modality, like {EXAMPLE_WIDTHS}"
    if unread := [name for name in OF_RAW_CLIPS if name in model]:
        yield f"model.{unread[0]} applies to raw clips only: leave it out with model.feature_widths"
    if training.freeze_text_encoder:
        yield "training.freeze_text_encoder needs a text encoder, and model.feature_widths has none"


def _problems_of_missing(missing: MissingArguments, training: TrainingArguments) -> Iterator[str]:
    """Problems with the missing rates, and settings that exclude them."""
    problems = rate_problems(missing.by_name, missing.rounding)
    yield from (f"data.missing: {problem}" for problem in problems)
    if missing.seed < 0:
        yield f"data.missing.seed is {missing.seed}: at least 0"
    for key in ("modality_dropout", "frame_dropout", "condition"):
        if missing.rates is not None and getattr(training, key):
            yield (
                f"data.missing.rates and training.{key} exclude each other: what is missing is fixed for the "
                "whole run"
            )
