# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Time complete training steps with each gradient modulator, and without.

    python scripts/benchmark_modulators.py                                       late fusion on raw inputs
    python scripts/benchmark_modulators.py --config configs/cpsl_offline.yaml    CP/SL on precomputed features

A step is that of a run: forward, backward, the statistics of the modulator, its change of gradients, clipping
and AdamW, in the loop of training. The modulators share one model and alternate in one process, so those that
add probes to the model are left out. A modulator that adds noise is also timed without noise; one that
measures at an interval measures in every step. Weights and inputs are random, nothing is downloaded. The
results are medians over the rounds.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr
from inspect import signature
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch
from accelerate import Accelerator
from rich.console import Console
from timing import (
    CONFIGS,
    TYPES,
    name_of_machine,
    random_clips,
    random_features,
    table_of_medians,
    time_in_turns,
    training_step,
)

from msa_online import MSAConfig, MSAModel
from msa_online.encoders import load_encoder_config
from msa_online.methods import MODULATORS, GradientModulator
from msa_online.missing.modalities import InputMask
from msa_online.modalities import MODALITIES
from msa_online.training.config_reader import read_arguments
from msa_online.training.loop import TrainingLoop
from msa_online.training.optimizer import make_optimizer, make_scheduler
from msa_online.user_errors import run_command


def compare(options: argparse.Namespace, console: Console) -> None:
    """Time a step of one model with each modulator, and print a table."""
    precision = "no" if options.precision == "fp32" else options.precision
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision=precision)
    config = model_config(options.config, options.text_encoder)
    torch.manual_seed(0)
    model = MSAModel(config)
    modulators = make_modulators(model)
    if config.feature_widths:
        steps = dict.fromkeys(MODALITIES, options.tokens)
        batch = random_features(config.feature_widths, options.batch, steps, accelerator.device)
        inputs = f"features of {options.tokens} steps a modality"
    else:
        batch = random_clips(options, accelerator.device, config.text_config.vocab_size)
        inputs = f"{options.text_encoder}, {options.tokens} tokens, {options.mel_steps} mel steps, "
        inputs += f"{options.frames} face crops"
    loops = make_loops(model, modulators, accelerator)
    steps = {name: training_step(loop, batch) for name, loop in loops.items()}
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        medians = time_in_turns(steps, options.rounds)  # each step is an epoch, with a progress bar
    acting = "; ".join(f"{name} acts on {', '.join(each.modalities)}" for name, each in modulators.items())
    console.print(
        f"{name_of_machine(accelerator.device)}; head {config.head}, {options.precision}, batch "
        f"{options.batch}, {inputs}; {acting}; medians of {options.rounds} rounds, ms"
    )
    console.print(table_of_medians(medians, against="identity"))
    if skipped := sum(loop.progress.skipped for loop in loops.values()):
        console.print(f"{skipped} steps were skipped over gradients that were not finite: they count as fast")


def model_config(path: Path, text_encoder: str) -> MSAConfig:
    """The model of a configuration; if it reads raw text, with an encoder of the shape of `text_encoder`.

    Raises:
        EncoderError: The configuration of the text encoder is unavailable.
    """
    settings = read_arguments(path).model
    if "feature_widths" not in settings:
        text_config = load_encoder_config("text", text_encoder)
        settings = {**settings, "text_encoder": text_encoder, "text_config": text_config}
    return MSAConfig(**settings)


def make_modulators(model: MSAModel) -> dict[str, GradientModulator]:
    """All modulators that act on this model without probes, by the name of their row."""
    owned = [name for name, parameters in model.modality_parameters().items() if parameters]
    found = {}
    for name, kind in MODULATORS.items():
        takes = signature(kind).parameters
        settings = {"interval": 1} if "interval" in takes else {}
        if not set(kind(**settings).modalities) <= set(owned) and "modalities" in takes:
            settings["modalities"] = owned
        modulator = kind(**settings)
        with torch.no_grad():
            modulator.attach(model, dict.fromkeys(MODALITIES, 1), 1)
        if model.probes:
            model.probes.clear()
            continue
        if not set(modulator.modalities) <= set(owned):
            continue
        found[name] = modulator
        if "noise" in takes:
            found[f"{name} without noise"] = kind(**settings, noise=0.0)
    return found


def make_loops(
    model: MSAModel, modulators: Mapping[str, GradientModulator], accelerator: Accelerator
) -> dict[str, TrainingLoop]:
    """A training loop for each modulator around one model and one optimizer."""
    optimizer = make_optimizer(model, learning_rate=1e-5, learning_rates={"text": 1e-5}, weight_decay=0.01)
    scheduler = make_scheduler(optimizer, steps=1, warmup=0.0, decay="constant")
    model, optimizer = accelerator.prepare(model, optimizer)
    return {
        name: TrainingLoop(
            accelerator, model, optimizer, scheduler, modulator, input_mask=InputMask(), clip_norm=1.0, seed=0
        )
        for name, modulator in modulators.items()
    }


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if found is None else [found.type, "cpu"]
    parser.add_argument(
        "--config", type=Path, default=CONFIGS / "late_fusion.yaml", help="configuration of the model"
    )
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--precision", choices=TYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32, help="samples in a batch")
    parser.add_argument("--tokens", type=int, default=50, help="tokens; of features, steps of each modality")
    online = parser.add_argument_group("on raw inputs")
    online.add_argument("--text-encoder", default="bert-base-uncased", help="shape of the text encoder")
    online.add_argument("--mel-steps", type=int, default=400)
    online.add_argument("--frames", type=int, default=8, help="face crops, 96 x 96")
    options = parser.parse_args(argv)
    for name in ("rounds", "batch", "tokens", "mel_steps", "frames"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.precision == "fp16" and options.device == "cpu":
        parser.error("--precision fp16 needs a GPU: on a CPU say bf16")
    return run_command(lambda: compare(options, Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
