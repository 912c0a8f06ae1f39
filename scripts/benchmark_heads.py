# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Time complete training steps of the methods side by side, and measure what they keep in memory.

    python scripts/benchmark_heads.py                                        precomputed features
    python scripts/benchmark_heads.py mult --steps 50 375 500                one method, long sequences
    python scripts/benchmark_heads.py --study control --widths 64 48 48 --steps 1 1 1      variants of a study
    python scripts/benchmark_heads.py misa self_mm --text-encoder bert-base-uncased        raw inputs

A method is a configuration of `configs/`: its head, calibrator, loss weights and modulator. Methods with
stages are timed in the last one, with a teacher. A step is that of a run: forward, backward, the modulator,
clipping and AdamW. Steps alternate in one process. Weights and inputs are random, nothing is downloaded.

Without a text encoder, the model reads features; a head that acts inside the text encoder shifts the features
(`layer: null`). The table has the step, its CPU time (which other programs on the machine change little), the
parameters, and the memory that a forward pass keeps for backward.

With one, the model reads tokens, sound and face crops, and trains an encoder of that shape. The table
compares the step with those of its parts: fine-tuning of the encoder alone (with a linear layer, in a plain
loop), and the same model with given states in place of the encoder's. The ratio is the whole divided by the
sum of the two. Heads that act inside the text encoder cannot read given states and are left out.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from timing import (
    CONFIGS,
    Clock,
    Step,
    name_of_machine,
    random_clips,
    random_features,
    time_in_turns,
    training_step,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModel

from msa_online import MSAConfig, MSAModel
from msa_online.encoders import load_encoder_config
from msa_online.methods import HEADS, BalancingHead
from msa_online.missing.modalities import InputMask
from msa_online.modalities import MODALITIES
from msa_online.shipped_configs import find_configuration
from msa_online.studies.study import read_study
from msa_online.training.config import RunArguments
from msa_online.training.config_reader import read_arguments
from msa_online.training.loop import TrainingLoop
from msa_online.training.modulator import make_modulator
from msa_online.training.optimizer import make_optimizer, make_scheduler
from msa_online.user_errors import run_command

WITHIN = {name for name, head in HEADS.items() if head.shift_text is not BalancingHead.shift_text}
METHODS = [name for name in (*HEADS, "balm") if (CONFIGS / f"{name}.yaml").is_file()]
OF_METHOD = ("head", "head_kwargs", "calibrator", "calibrator_kwargs", "loss_weights")
PLAIN = "text encoder alone"
EPOCHS = 100  # of the run that is imitated; modulators may act in a window


def compare_on_features(options: argparse.Namespace, console: Console) -> None:
    """A table of step, parameters and memory of each method on features."""
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision="no")
    widths, steps = (dict(zip(MODALITIES, each, strict=True)) for each in (options.widths, options.steps))
    batch = random_features(widths, options.batch, steps, accelerator.device)
    loops, steps_of, memory = {}, {}, {}
    for name, arguments in methods_of(options).items():
        model = MSAModel(MSAConfig(feature_widths=widths, **on_features(arguments)))
        loops[name] = make_loop(model, arguments, batch, accelerator)
        own = with_teacher(loops[name].bare_model, batch)
        memory[name] = kept_for_backward(loops[name].bare_model, own)
        steps_of[name] = training_step(loops[name], own)
    medians = time_quietly(steps_of, options.rounds)
    described = ", ".join(f"{name} {steps[name]} x {widths[name]}" for name in MODALITIES)
    console.print(
        f"{name_of_machine(accelerator.device)}; fp32, batch {options.batch}, steps x width: {described}; "
        f"medians of {options.rounds} rounds"
    )
    table = Table("method", "step, ms", "CPU, ms", "parameters", "kept for backward, MB")
    for name, loop in loops.items():
        parameters = sum(parameter.numel() for parameter in loop.bare_model.parameters())
        step, cpu = medians[name]["step"], medians[name]["CPU"]
        table.add_row(name, f"{step:.1f}", f"{cpu:.1f}", f"{parameters:,}", f"{memory[name] / 1e6:.1f}")
    console.print(table)


def compare_with_parts(options: argparse.Namespace, console: Console) -> None:
    """A table of the step of each model with a text encoder, and of its two parts.

    Raises:
        EncoderError: The configuration of the text encoder is unavailable.
    """
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision="no")
    device, shape = accelerator.device, load_encoder_config("text", options.text_encoder)
    batch = random_clips(options, device, shape.vocab_size)
    states = torch.randn(options.batch, options.tokens, shape.hidden_size, device=device)
    given = {name: value for name, value in batch.items() if not name.startswith("text_")}
    given |= {"text_states": states, "text_states_mask": batch["text_mask"]}
    steps = {PLAIN: plain_step(AutoModel.from_config(shape, add_pooling_layer=False).to(device), batch)}
    for name in options.methods:
        arguments = read_arguments(CONFIGS / f"{name}.yaml")
        config = MSAConfig(text_encoder=options.text_encoder, text_config=shape, **of_method(arguments))
        for part, inputs in ((name, batch), (rest(name), given)):
            model = MSAModel(config)
            if inputs is given:
                model.encoders["text"].freeze()
            loop = make_loop(model, arguments, inputs, accelerator)
            steps[part] = training_step(loop, with_teacher(loop.bare_model, inputs))
    medians = time_quietly(steps, options.rounds)
    console.print(
        f"{name_of_machine(device)}; fp32, batch {options.batch}, {options.text_encoder}, {options.tokens} "
        f"tokens, {options.mel_steps} mel steps, {options.frames} face crops; medians of {options.rounds} "
        "rounds, ms"
    )
    marks = [*medians[PLAIN]]
    table = Table("", *(cell for mark in marks for cell in (mark, "ratio to the sum")))
    table.add_row(PLAIN, *(cell for mark in marks for cell in (f"{medians[PLAIN][mark]:.0f}", "")))
    for name in options.methods:
        whole, without = medians[name], medians[rest(name)]
        ratios = {mark: whole[mark] / (without[mark] + medians[PLAIN][mark]) for mark in marks}
        table.add_row(rest(name), *(cell for mark in marks for cell in (f"{without[mark]:.0f}", "")))
        table.add_row(
            name, *(cell for mark in marks for cell in (f"{whole[mark]:.0f}", f"{ratios[mark]:.2f}"))
        )
    console.print(table)


def methods_of(options: argparse.Namespace) -> dict[str, RunArguments]:
    """The chosen methods by name: shipped configurations, or the variants of a study."""
    if options.study:
        study = read_study(find_configuration(options.study, "ablations/"))
        return {run.variant: run.arguments for run in study.runs() if run.seed == study.seeds[0]}
    return {name: read_arguments(CONFIGS / f"{name}.yaml") for name in options.methods}


def of_method(arguments: RunArguments) -> dict:
    """What a configuration says about the method; its encoders are left out."""
    return {key: value for key, value in arguments.model.items() if key in OF_METHOD}


def on_features(arguments: RunArguments) -> dict:
    """What a configuration says about the method, for a model without a text encoder to act in."""
    method = of_method(arguments)
    if method["head"] in WITHIN:
        method["head_kwargs"] = {**method.get("head_kwargs", {}), "layer": None}
    return method


def rest(name: str) -> str:
    """Name of the step of a model without its text encoder."""
    return f"{name} without its text encoder"


def make_loop(
    model: MSAModel, arguments: RunArguments, batch: Mapping[str, Tensor], accelerator: Accelerator
) -> TrainingLoop:
    """The loop of a run that trains this model on one batch, with the modulator of the configuration."""
    modulator = make_modulator(arguments.training, model, EPOCHS, accelerator)
    optimizer = make_optimizer(model, learning_rate=1e-5, learning_rates={}, weight_decay=0.01)
    scheduler = make_scheduler(optimizer, steps=1, warmup=0.0, decay="constant")
    model, optimizer = accelerator.prepare(model, optimizer)
    loop = TrainingLoop(
        accelerator, model, optimizer, scheduler, modulator, input_mask=InputMask(), clip_norm=1.0, seed=0
    )
    loop.bare_model.head.start_training(batch["labels"])
    return loop


def with_teacher(model: MSAModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch, with a teacher's targets if the head has a teacher."""
    if not model.head.teachers:
        return dict(batch)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "index")}
    with torch.no_grad():
        return {**batch, "teacher": model.eval().teach(**inputs)}


def plain_step(encoder: nn.Module, batch: Mapping[str, Tensor]) -> Step:
    """A step of fine-tuning a text encoder with a linear layer on its mean state, without this project."""
    device = batch["labels"].device
    classifier = nn.Linear(encoder.config.hidden_size, 1, device=device)
    parameters = [*encoder.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    encoder.train()

    def step() -> dict[str, float]:
        clock = Clock(device)
        states = encoder(batch["text_input_ids"], attention_mask=batch["text_mask"].long()).last_hidden_state
        loss = (classifier(states.mean(dim=1)).squeeze(-1) - batch["labels"]).square().mean()
        loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return {"step": clock.read(), "CPU": clock.read_cpu()}

    return step


def kept_for_backward(model: MSAModel, batch: Mapping[str, Tensor]) -> int:
    """Bytes that a forward pass in training keeps for backward, without weights and inputs."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**batch, output_internals=True)  # alive until the bytes are counted
    for tensor in (*model.parameters(), *model.buffers(), *batch.values()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    model.head.end_step(taken=False)
    del output
    return sum(kept.values())


def time_quietly(steps: Mapping[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of steps that are epochs of one batch, without their progress bars."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        return time_in_turns(steps, rounds)


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if found is None else [found.type, "cpu"]
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}; default: all")
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="samples in a batch")
    features = parser.add_argument_group("on features")
    of_each = {"type": int, "nargs": len(MODALITIES), "metavar": ("TEXT", "AUDIO", "VISION")}
    features.add_argument("--study", help="the variants of this study, in place of METHOD")
    features.add_argument("--widths", **of_each, default=[768, 74, 35], help="widths of the features")
    features.add_argument("--steps", **of_each, default=[50, 50, 50], help="steps of each modality")
    online = parser.add_argument_group("on raw inputs")
    online.add_argument("--text-encoder", help="read raw inputs, with a text encoder of this shape")
    online.add_argument("--tokens", type=int, default=50)
    online.add_argument("--mel-steps", type=int, default=400)
    online.add_argument("--frames", type=int, default=8, help="face crops, 96 x 96")
    options = parser.parse_args(argv)
    offered = [name for name in METHODS if name not in WITHIN] if options.text_encoder else METHODS
    options.methods = options.methods or offered
    for name in options.methods:
        if name not in offered:
            parser.error(f"unknown method {name!r}: one of {', '.join(offered)}")
    counts = {"batch": options.batch, "rounds": options.rounds, "tokens": options.tokens}
    counts |= {"mel-steps": options.mel_steps, "frames": options.frames}
    counts |= {"widths": min(options.widths), "steps": min(options.steps)}
    for name, count in counts.items():
        if count < 1:
            parser.error(f"--{name} must be at least 1")
    compare = compare_with_parts if options.text_encoder else compare_on_features
    return run_command(lambda: compare(options, Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
