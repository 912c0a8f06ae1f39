# SPDX-License-Identifier: Apache-2.0
"""Read and validate the configuration of a run, before anything is loaded."""

import importlib
import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from huggingface_hub.errors import StrictDataclassError

from feature_extractors import ExtractionSettings
from msa_online.configuration_msa import MSAConfig
from msa_online.context import CONTEXTS
from msa_online.encoders.audio import AudioEncoder
from msa_online.encoders.face import FaceEncoder
from msa_online.methods import CALIBRATORS, HEADS, MODULATORS
from msa_online.modalities import MODALITIES
from msa_online.modeling_msa import look_up
from msa_online.training.config import NOT_SET_IN_YAML, RunArguments, refuse_former_keys
from msa_online.training.config_validation import problems
from msa_online.training.yaml_reader import (
    ConfigurationError,
    apply_change,
    read_document,
    refuse_unknown,
    structure,
    typed,
)


def read_arguments(path: str | Path, changes: Sequence[str] = ()) -> RunArguments:
    """Read a configuration file and apply changes to it.

    Args:
        path: YAML file with the keys of `RunArguments`.
        changes: Items like `training.epochs=3`; the value is read as YAML.

    Raises:
        ConfigurationError: The file cannot be read or is not YAML, a key is unknown, a value has the wrong
            type or is out of range, or a plug-in cannot be imported.
    """
    document = read_document(path)
    for change in changes:
        apply_change(document, change)
    return parse_arguments(document, origin=str(path))


def parse_arguments(document: Mapping[str, Any], origin: str = "configuration") -> RunArguments:
    """Typed arguments from plain data; raises `ConfigurationError` as `read_arguments` does."""
    refuse_former_keys(document, origin)
    arguments = _with_home(structure(RunArguments, document, origin))
    known = [name for name in MSAConfig.__annotations__ if name not in NOT_SET_IN_YAML]
    refuse_unknown(arguments.model, known, origin, "model")
    if problem := next(problems(arguments), None):
        raise ConfigurationError(f"{origin}: {problem}")
    for name, value in arguments.model.items():
        typed(value, MSAConfig.__annotations__[name], origin, "model", name)
    import_plugins(arguments.plugins, f"{origin}: plugins")
    return _with_checked_parts(arguments, origin)


def _with_home(arguments: RunArguments) -> RunArguments:
    """The same run with `~` replaced in folders; a shell does not see it in a file, nor behind `key=`."""
    model, training = arguments.model, arguments.training
    encoders = {
        key: os.path.expanduser(name)
        for modality in MODALITIES
        if isinstance(name := model.get(key := f"{modality}_encoder"), str)
    }
    return replace(
        arguments,
        model={**model, **encoders},
        training=replace(
            training,
            output_dir=os.path.expanduser(training.output_dir),
            init_from=training.init_from and os.path.expanduser(training.init_from),
        ),
    )


def import_plugins(names: Sequence[str], origin: str) -> None:
    """Import modules that add heads, calibrators and modulators to the tables of `msa_online.methods`.

    Args:
        names: Modules or packages that Python can find.
        origin: Where the names come from, for messages.

    Raises:
        ConfigurationError: A module cannot be imported.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, ValueError) as error:  # ValueError: an empty name
            raise ConfigurationError(
                f"{origin}: cannot import {name!r} ({error}): install it, or add its folder to PYTHONPATH"
            ) from error


def _with_checked_parts(arguments: RunArguments, origin: str) -> RunArguments:
    """Build each part of the model once; returns the run with converted keyword arguments of the parts."""
    training = arguments.training
    try:
        ExtractionSettings(**arguments.data.extraction)
        config = MSAConfig(**arguments.model)
        head = look_up(HEADS, "head", config.head)
        calibrator = look_up(CALIBRATORS, "calibrator", config.calibrator)
        context = look_up(CONTEXTS, "context", config.context)
        modulator = look_up(MODULATORS, "modulator", training.modulator)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{origin}: {' '.join(str(error).split())}") from error
    if config.feature_widths is None:
        channels, width = config.audio_channels, config.audio_width
        _build_once(AudioEncoder, (channels, width), {}, origin, "model.audio_channels and model.audio_width")
        channels, width = config.face_channels, config.face_width
        given = (channels, width, config.blendshapes)
        _build_once(FaceEncoder, given, {}, origin, "model.face_channels and model.face_width")
    refuse_unknown(config.loss_weights, head.loss_names, origin, "model.loss_weights")
    weights = typed(config.loss_weights, dict[str, float], origin, "model", "loss_weights")
    head_kwargs, built = _checked(head, (config.widths, 1), config.head_kwargs, origin, "model.head_kwargs")
    if problem := built.weights_problem(weights):
        raise ConfigurationError(f"{origin}: model.loss_weights: {problem}")
    calibrator_kwargs, _ = _checked(
        calibrator, (config.widths,), config.calibrator_kwargs, origin, "model.calibrator_kwargs"
    )
    context_kwargs, _ = _checked(
        context, (config.widths,), config.context_kwargs, origin, "model.context_kwargs"
    )
    keywords = {
        "loss_weights": weights,
        "head_kwargs": head_kwargs,
        "calibrator_kwargs": calibrator_kwargs,
        "context_kwargs": context_kwargs,
    }
    given = {name: value for name, value in keywords.items() if arguments.model.get(name)}
    of_modulator, _ = _checked(modulator, (), training.modulator_kwargs, origin, "training.modulator_kwargs")
    return replace(
        arguments,
        model={**arguments.model, **given},
        training=replace(training, modulator_kwargs=of_modulator),
    )


def _checked(
    part: type, given: tuple[Any, ...], keywords: Mapping[str, Any], origin: str, section: str
) -> tuple[dict[str, Any], Any]:
    """Build a part of the run once, so that it validates its settings; returns its keyword arguments too."""
    hints = get_type_hints(part.__init__)
    refuse_unknown(keywords, list(inspect.signature(part).parameters)[len(given) :], origin, section)
    keywords = {
        name: typed(value, hints.get(name, Any), origin, section, name) for name, value in keywords.items()
    }
    return keywords, _build_once(part, given, keywords, origin, section)


def _build_once(
    part: type, given: tuple[Any, ...], keywords: Mapping[str, Any], origin: str, section: str
) -> Any:
    """Build a part on the meta device and return it; refuse one that fails or has empty weights."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns of empty weights, refused below
            built = part(*given, **keywords)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{origin}: {section}: {' '.join(str(error).split())}") from error
    weights = built.named_parameters() if isinstance(built, torch.nn.Module) else ()
    if empty := next((name for name, weight in weights if not weight.numel()), None):
        raise ConfigurationError(f"{origin}: {section}: {empty} would be empty; sizes are at least 1")
    return built
