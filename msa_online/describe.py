# SPDX-License-Identifier: Apache-2.0
"""Describe a model without loading its weights: parts, parameter counts, shapes from clip to logits."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from feature_extractors import ExtractionSettings
from msa_online.confidence import Confidence
from msa_online.configuration_msa import MSAConfig
from msa_online.encoders import encoder_class
from msa_online.encoders.image import FAMILIES
from msa_online.front_ends import sound_shape
from msa_online.hub import load_config, require_own_weights
from msa_online.modalities import ModalitySequence
from msa_online.modeling_msa import PROBES, MSAModel
from msa_online.training.config import TrainingArguments
from msa_online.training.config_reader import read_arguments
from msa_online.training.model import limit_training
from msa_online.training.yaml_reader import ConfigurationError

EXAMPLE_SECONDS = 4
EXAMPLE_TOKENS = 20  # also the number of steps of precomputed features
EXAMPLE_CLASSES = 2
SHOWN_APART = ("results", "shares", "confidence", "constant", "comparison", "missing")
"""Keys of a training record that `record_lines` leaves out; its protocol contains the rates of `missing`."""


@dataclass(frozen=True)
class Description:
    """Description of a model.

    Attributes:
        parameters: Parameter count of each part, and their sum as `total`.
        frozen: Count of those that are not trained, and their sum as `total`: what a configuration freezes,
            and constants of an encoder.
        shapes: Output shape of each step, in order, for one clip of four seconds or features of 20 steps.
        trained_on: Record of training and scores of a checkpoint; empty for a configuration.
        confidence: Certainty of its predictions; None if it was not fitted.
    """

    parameters: dict[str, int]
    frozen: dict[str, int]
    shapes: dict[str, list[int]]
    trained_on: dict[str, Any]
    confidence: Confidence | None


def describe(source: str | Path) -> Description:
    """Describe a configuration file (`.yaml`), a checkpoint folder or a Hub repository.

    Of a repository only the configuration is downloaded; of weights in a folder only the header is read.

    Raises:
        ConfigurationError: The configuration file cannot be used.
        CheckpointError: The folder or repository is not a checkpoint, or its weights belong to another model.
    """
    config, settings, training = _read(source)
    with torch.device("meta"):
        try:
            model = MSAModel(config)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{source}: no model can be built from it: {error}") from error
        if Path(source).is_dir():
            require_own_weights(Path(source), model)
        limit_training(model.encoders, training)
        frozen = count_parameters(model, only_frozen=True)
        return Description(
            count_parameters(model),
            frozen,
            _shapes(model, settings),
            config.trained_on or {},
            Confidence.of(config.confidence),
        )


def _read(source: str | Path) -> tuple[MSAConfig, ExtractionSettings, TrainingArguments]:
    if Path(source).suffix not in (".yaml", ".yml"):
        config = load_config(source)
        return config, _settings(config, {}), TrainingArguments()
    arguments = read_arguments(source)
    if arguments.model.get("text_encoder") or arguments.model.get("feature_widths"):
        # the number of classes is known from the data only
        config = arguments.model_config([f"class {number}" for number in range(EXAMPLE_CLASSES)])
    else:
        config = load_config(arguments.training.init_from)
    return config, _settings(config, arguments.data.extraction), arguments.training


def _settings(config: MSAConfig, extraction: Mapping[str, Any]) -> ExtractionSettings:
    network = config.vision_config
    size = {} if network is None else {"face_size": FAMILIES[network.model_type].picture_size}
    return ExtractionSettings(**{**size, **extraction})


def count_parameters(model: MSAModel, only_frozen: bool = False) -> dict[str, int]:
    """Parameter counts of each encoder, calibrator, context and each part of the head, and their `total`.

    Probes are not counted: only a modulator uses them, in training.
    """
    counts: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        if not (name.startswith(PROBES) or (only_frozen and parameter.requires_grad)):
            counts[_part_of(name)] += parameter.numel()
    return {"total": sum(counts.values()), **counts}


def _part_of(name: str) -> str:
    top, part, *_ = name.split(".")
    return f"{part}_encoder" if top == "encoders" else f"{top}.{part}"


def _shapes(model: MSAModel, settings: ExtractionSettings) -> dict[str, list[int]]:
    """Shapes for one example, computed by running all but the encoders on the meta device."""
    of_kind = _clip_shapes if model.config.feature_widths is None else _feature_shapes
    inputs, sequences = of_kind(model, settings)
    output = model.head(model.calibrator(sequences))  # a text encoder that is part of `decide` is left out
    return {
        **inputs,
        **{f"{name} states": list(sequence.values.shape[1:]) for name, sequence in sequences.items()},
        "fused": list(output.fused.shape[1:]),
        "logits": list(output.logits.shape[1:]),
    }


def _clip_shapes(
    model: MSAModel, settings: ExtractionSettings
) -> tuple[dict[str, list[int]], dict[str, ModalitySequence]]:
    """Shapes of the inputs of one clip, and empty states of its modalities; no network runs."""
    sound, steps = _sound_shape(model.config)
    frames, size = settings.num_frames, settings.face_size
    shapes = {
        "token ids": [EXAMPLE_TOKENS],
        "log-mel" if model.config.audio_config is None else "sound": list(sound),
        "face crops": [frames, size, size, 3],
    }
    if (network := model.config.vision_config) is not None:
        size = FAMILIES[network.model_type].picture_size
        shapes["pictures"] = [frames, 3, size, size]
    lengths = {"text": EXAMPLE_TOKENS, "audio": steps, "vision": frames}
    states = {name: torch.zeros(1, lengths[name], width) for name, width in model.config.widths.items()}
    return shapes, {
        name: ModalitySequence.of(values, torch.ones(values.shape[:2], dtype=torch.bool))
        for name, values in states.items()
    }


def _sound_shape(config: MSAConfig) -> tuple[tuple[int, ...], int]:
    """Shape of the sound of the example as the audio encoder reads it, and how many states it becomes."""
    kind = encoder_class("audio", config.audio_config)
    if config.audio_config is None:
        extractor, encoder = None, kind.from_config(config)
    else:
        extractor = kind.default_feature_extractor(config.audio_config)
        with torch.device("cpu"):  # the embeddings alone, as masks need values; layers keep the length
            encoder = kind(config.audio_config, 0, config.audio_stride)
    shape = sound_shape(EXAMPLE_SECONDS, extractor)
    device = next(encoder.parameters()).device
    inputs = {
        "audio_values": torch.zeros(1, *shape, device=device),
        "audio_mask": torch.ones(1, shape[0], dtype=torch.bool, device=device),
    }
    with torch.no_grad():
        return shape, encoder(inputs).values.shape[1]


def _feature_shapes(
    model: MSAModel, settings: ExtractionSettings
) -> tuple[dict[str, list[int]], dict[str, ModalitySequence]]:
    """Shapes and states of precomputed features; the extraction settings do not apply."""
    sequences, shapes = {}, {}
    for name, width in model.config.widths.items():
        shapes[f"{name} features"] = [EXAMPLE_TOKENS, width]
        inputs = {
            f"{name}_values": torch.zeros(1, EXAMPLE_TOKENS, width),
            f"{name}_mask": torch.ones(1, EXAMPLE_TOKENS, dtype=torch.bool),
        }
        sequences[name] = model.encoders[name](inputs)
    return shapes, sequences


def description_tables(description: Description, source: str) -> list[Table]:
    """Parameters and shapes as tables for the terminal."""
    parts = Table(title=Text(f"{source}: parameters"), title_justify="left")
    parts.add_column("part")
    parts.add_column("parameters", justify="right")
    if description.frozen["total"]:
        parts.add_column("frozen", justify="right")
    counts = [name for name in description.parameters if name != "total"]
    for name in (*counts, "total"):
        if name == "total":
            parts.add_section()
        columns = (description.parameters[name], description.frozen.get(name, 0))
        parts.add_row(name, *(f"{count:,}" for count in columns[: len(parts.columns) - 1]))
    clip, features = (
        f"shapes for one clip of {EXAMPLE_SECONDS} s",
        f"shapes for features of {EXAMPLE_TOKENS} steps",
    )
    title = clip if "token ids" in description.shapes else features
    shapes = Table(title=title, title_justify="left")
    shapes.add_column("step")
    shapes.add_column("shape")
    for name, shape in description.shapes.items():
        shapes.add_row(name, " x ".join(map(str, shape)))
    return [parts, shapes]


def record_lines(description: Description) -> list[str]:
    """Training record of a checkpoint as lines for the terminal, without the scores.

    It is not a table, because columns would break its paths and commands.
    """
    record = {name: value for name, value in description.trained_on.items() if name not in SHOWN_APART}
    width = max(map(len, record), default=0)
    lines = ["trained on"] if record else []
    for name, value in record.items():
        shown = (
            ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else value
        )
        lines.append(f"  {name:<{width}}  {shown}")
    return lines
