# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Time EBMC's training steps and reference computations, alternating in one process.

    python scripts/benchmark_ebmc.py               online: the whole model with EBMC's head or late fusion's
    python scripts/benchmark_ebmc.py --offline     EBMC's head on features, a plain reading of the paper, and
                                                   the bare matrix products of the head's own step

Weights and inputs are random, nothing is downloaded. Steps are those of EBMC's second stage, which uses all
parts. The results are medians over the rounds.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from plain_ebmc import PlainEBMC
from timing import CONFIGS, TYPES, Clock, Step, name_of_machine, random_clips, table_of_medians, time_in_turns

from msa_online import MSAConfig, MSAModel
from msa_online.encoders import load_encoder_config
from msa_online.methods.ebmc import EBMCHead
from msa_online.modalities import MODALITIES, ModalitySequence
from msa_online.training.config_reader import read_arguments
from msa_online.training.optimizer import make_optimizer
from msa_online.user_errors import run_command


def compare_online(options: argparse.Namespace, console: Console) -> None:
    """Time the complete model on raw inputs with different heads."""
    device = torch.device(options.device)
    ours, control = (read_arguments(CONFIGS / name).model for name in ("ebmc.yaml", "late_fusion.yaml"))
    its_head = {key: control.get(key) for key in ("head", "head_kwargs", "loss_weights")}
    models = {"late fusion": {**ours, **its_head}, "EBMC": ours}
    vocabulary = load_encoder_config("text", options.text_encoder).vocab_size
    inputs = random_clips(options, device, vocabulary)
    steps = {name: online_step(model, inputs, options) for name, model in models.items()}
    medians = time_in_turns(steps, options.rounds)
    console.print(
        f"{name_of_machine(device)}; {options.text_encoder}, {options.precision}, batch {options.batch}, "
        f"{options.tokens} tokens, {options.mel_steps} mel steps, {options.frames} face crops; "
        f"medians of {options.rounds} rounds, ms"
    )
    console.print(table_of_medians(medians, against="late fusion"))


def online_step(settings: Mapping, inputs: Mapping[str, Tensor], options: argparse.Namespace) -> Step:
    """A training step of a model, marked after the backward pass and after the optimizer's step."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    text_config = load_encoder_config("text", options.text_encoder)
    settings = {**settings, "text_encoder": options.text_encoder, "text_config": text_config}
    model = MSAModel(MSAConfig(**settings)).to(device)
    teacher = None
    if model.head.teachers:
        with torch.no_grad():
            teacher = model.eval().teach(
                **{name: value for name, value in inputs.items() if name != "labels"}
            )
    model.train().head.start_stage(model.head.stages[-1])
    optimizer = make_optimizer(model, learning_rate=1e-5, learning_rates={"text": 1e-5}, weight_decay=0.01)
    scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")

    def step() -> dict[str, float]:
        clock = Clock(device)
        with _precision(device, options.precision):
            loss = model(**inputs, teacher=teacher).loss
        scaler.scale(loss).backward()
        marks = {"forward + backward": clock.read()}
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return marks | {"with optimizer": clock.read()}

    return step


def compare_offline(options: argparse.Namespace, console: Console) -> None:
    """Time EBMC's head only, on one step of features per modality, in fp32 and in bf16."""
    device = torch.device(options.device)
    settings = read_arguments(CONFIGS / "ebmc_offline.yaml").model
    size = options.batch
    torch.manual_seed(0)
    widths, switches, weights = (settings[key] for key in ("feature_widths", "head_kwargs", "loss_weights"))
    features = {name: torch.randn(size, 1, width, device=device) for name, width in widths.items()}
    labels = torch.rand(size, device=device) * 6 - 3
    teacher = torch.randn(size, len(MODALITIES), 1, device=device)
    head, plain = EBMCHead(widths, 1, **switches).to(device), PlainEBMC(widths, **switches).to(device)
    head.start_stage("balance")

    def loss_of_head() -> Tensor:
        observed = torch.ones(size, 1, dtype=torch.bool, device=device)
        sequences = {name: ModalitySequence.of(values, observed) for name, values in features.items()}
        losses = head(sequences, labels, teacher).losses
        return sum(weights.get(name, 1.0) * loss for name, loss in losses.items())

    def loss_of_plain() -> Tensor:
        losses = plain(features, labels, teacher)
        return sum(weights.get(name, 1.0) * loss for name, loss in losses.items())

    console.print(
        f"{name_of_machine(device)}; batch {size}, one step of features a modality, forward + backward of "
        f"the second stage; medians of {options.rounds} rounds, ms"
    )
    medians: dict[str, dict[str, float]] = {}
    for precision in ("fp32", "bf16"):
        step = offline_step(head, loss_of_head, device, precision)
        products = Products()
        with products:
            step()
        steps = {
            "EBMC head": step,
            "plain reading": offline_step(plain, loss_of_plain, device, precision),
            "matrix products of the head": products.replay(device),
        }
        for name, found in time_in_turns(steps, options.rounds).items():
            medians.setdefault(name, {})[precision] = found["step"]
    console.print(table_of_medians(medians, against="EBMC head"))


def offline_step(module: nn.Module, loss: Callable[[], Tensor], device: torch.device, precision: str) -> Step:
    """Forward and backward of `loss` over the parameters of `module`."""

    def step() -> dict[str, float]:
        clock = Clock(device)
        with _precision(device, precision):
            value = loss()
        value.backward()
        module.zero_grad()
        return {"step": clock.read()}

    return step


class Products(TorchDispatchMode):
    """Records all matrix products that run in its context, forward and backward, to repeat them alone."""

    KINDS = {
        torch.ops.aten.mm.default, torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default,
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Tensor], list[tuple]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.KINDS:
            operands = [(operand.shape, operand.stride(), operand.dtype) for operand in args]
            self.calls.append((function, operands))
        return function(*args, **kwargs or {})

    def replay(self, device: torch.device) -> Step:
        """The same products on tensors of the same shapes, layouts and types."""

        def fill(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty_strided(shape, stride, dtype=dtype, device=device).fill_(0.5)

        prepared = [(function, [fill(*operand) for operand in operands]) for function, operands in self.calls]

        def step() -> dict[str, float]:
            clock = Clock(device)
            for function, operands in prepared:
                function(*operands)
            return {"step": clock.read()}

        return step


def _precision(device: torch.device, name: str) -> torch.autocast:
    return torch.autocast(device.type, TYPES[name], enabled=name != "fp32")


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--offline", action="store_true", help="the head alone, on features")
    parser.add_argument(
        "--device", default=str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, help="samples in a batch [32, offline 64]")
    online = parser.add_argument_group("online")
    online.add_argument("--text-encoder", default="bert-base-uncased", help="shape of the text encoder")
    online.add_argument("--precision", choices=TYPES, default="fp32")
    online.add_argument("--tokens", type=int, default=50)
    online.add_argument("--mel-steps", type=int, default=400)
    online.add_argument("--frames", type=int, default=8, help="face crops, 96 x 96")
    options = parser.parse_args(argv)
    if options.batch is None:
        options.batch = 64 if options.offline else 32
    for name in ("rounds", "batch", "tokens", "mel_steps", "frames"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.precision == "fp16" and options.device.startswith("cpu"):
        parser.error("--precision fp16 needs a GPU: on a CPU say bf16")
    compare = compare_offline if options.offline else compare_online
    return run_command(lambda: compare(options, Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
