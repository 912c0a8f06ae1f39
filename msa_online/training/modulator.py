# SPDX-License-Identifier: Apache-2.0
"""Build the gradient modulator of a run, and check it against model, schedule and data."""

from collections.abc import Sequence
from inspect import signature

import torch
from accelerate import Accelerator
from rich.console import Console

from msa_online.methods import MODULATORS, GradientModulator
from msa_online.modalities import MODALITIES, ModalitySequence
from msa_online.modeling_msa import MSAModel, MSAOutput
from msa_online.training.accelerator import is_compiled
from msa_online.training.config import TrainingArguments
from msa_online.training.yaml_reader import ConfigurationError


def make_modulator(
    training: TrainingArguments, model: MSAModel, epochs: int, accelerator: Accelerator
) -> GradientModulator:
    """Build the modulator of a run and attach it to the model.

    Args:
        training: Training settings, with the name of the modulator.
        model: The model.
        epochs: Number of epochs of the run.
        accelerator: Tells whether the model is compiled.

    Raises:
        ConfigurationError: The model predicts without a modality that the modulator acts on, has no trained
            parameters of it, or lacks unimodal predictions that it needs; its epochs start after the last
            epoch; the model is compiled and the modulator needs inner states; or the modulator refuses the
            model.
    """
    modulator = MODULATORS[training.modulator](**training.modulator_kwargs)
    name = f"training.modulator={training.modulator}"
    if modulator.differentiates_features and is_compiled(accelerator):
        raise ConfigurationError(
            f"{name} takes gradients by states inside the model, which torch.compile does not allow: launch "
            "with --dynamo_backend no, or set training.modulator=identity"
        )
    if unread := [modality for modality in modulator.modalities if modality not in model.head.fuses]:
        raise ConfigurationError(
            f"{name} balances {', '.join(modulator.modalities)}, but model.head={model.config.head} "
            f"predicts without {' and '.join(unread)}: use another head, or training.modulator=identity"
        )
    owned = model.modality_parameters()
    for modality in modulator.modalities:
        if not any(parameter.requires_grad for parameter in owned[modality]):
            able = [other for other in MODALITIES if any(value.requires_grad for value in owned[other])]
            remedy = f"set training.modulator_kwargs.modalities={able}".replace("'", "")
            if "modalities" not in signature(type(modulator)).parameters:
                remedy = "use another head, or training.modulator=identity"
            raise ConfigurationError(
                f"{name} acts on {modality}, but model.head={model.config.head} has no trained parameters of "
                f"its own for {modality}: {remedy}"
            )
    output = _dry_run(model)
    if modulator.needs_modality_logits:
        lacking = set(modulator.modalities) - set(output.modality_logits)
        if lacking:
            raise ConfigurationError(
                f"{name} compares modalities by their own predictions, but model.head={model.config.head} "
                f"predicts nothing from {', '.join(sorted(lacking))} alone: use a head with unimodal "
                "predictors, like late_fusion, or training.modulator=identity"
            )
    if modulator.epochs is not None and modulator.epochs[0] >= epochs:
        raise ConfigurationError(
            f"{name} acts from epoch {modulator.epochs[0]} on, but the run has {epochs} epochs, counted from "
            "0: lower training.modulator_kwargs.epochs, or set null for all epochs"
        )
    widths = {name: state.shape[-1] for name, state in output.features.items()}
    try:
        modulator.attach(model, widths, output.fused.shape[-1])
    except ValueError as error:
        raise ConfigurationError(f"{name}: {error}") from error
    return modulator


def fit_modulator(
    modulator: GradientModulator, training: TrainingArguments, occurring: Sequence[str], console: Console
) -> None:
    """Make a modulator leave out the modalities that never occur in training, and print which.

    Args:
        modulator: The modulator, attached to the model.
        training: Training settings, with its name and possibly its modalities.
        occurring: Modalities that occur in training.
        console: Console for the message.

    Raises:
        ConfigurationError: The configuration names a modality that never occurs, or fewer than two are left.
    """
    absent = [name for name in modulator.modalities if name not in occurring]
    if not absent:
        return
    left = [name for name in modulator.modalities if name in occurring]
    none_has = f"no training sample has {' or '.join(absent)}"
    if training.condition:
        none_has += f" under training.condition={training.condition}"
    if len(left) < 2:
        raise ConfigurationError(
            f"training.modulator={training.modulator} compares {', '.join(modulator.modalities)}, but "
            f"{none_has}, which leaves fewer than two to compare: set training.modulator=identity"
        )
    if "modalities" in training.modulator_kwargs:
        raise ConfigurationError(
            f"training.modulator_kwargs.modalities names {', '.join(absent)}, but {none_has}: set "
            f"training.modulator_kwargs.modalities=[{', '.join(left)}]"
        )
    modulator.leave_out(absent)
    console.print(
        f"training.modulator={training.modulator} acts on {' and '.join(left)}: {none_has}", soft_wrap=True
    )


@torch.no_grad()
def _dry_run(model: MSAModel) -> MSAOutput:
    """Output of the model for one empty sample, for the names and widths in it."""
    empty = {
        name: ModalitySequence.of(torch.zeros(1, 1, width), torch.zeros(1, 1, dtype=torch.bool))
        for name, width in model.config.widths.items()
    }
    training = model.training
    output = model.eval().decide(empty)
    model.train(training)
    return output
