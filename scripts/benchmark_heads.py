# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the path has to know the repository before its modules are imported
"""Time EBMC's training steps beside what they are to be measured by, in one process, in turns.

    python scripts/benchmark_heads.py              online: the whole model with EBMC's head or late fusion's
    python scripts/benchmark_heads.py --offline    EBMC's head on features, a plain reading of the paper, and
                                                   the bare matrix products of the head's own step

Weights and inputs are random, nothing is downloaded. Steps are those of EBMC's second stage, where everything
is in use. Figures are medians over the rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from plain_ebmc import PlainEBMC

from msa_online import MSAConfig, MSAModel
from msa_online.encoders.text import load_text_config
from msa_online.errors import run_command
from msa_online.methods.ebmc import EBMCHead
from msa_online.modalities import MODALITIES, ModalitySequence
from msa_online.training.arguments import read_arguments
from msa_online.training.optimizer import make_optimizer

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIGS = REPOSITORY / "configs"
WARM_UP = 2  # steps before the first that counts

Step = Callable[[], dict[str, float]]
"""Does one step and returns the seconds from its start to each of its marks."""


def time_in_turns(steps: Mapping[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds to every mark of every step; odd rounds go backwards, so that none always leads."""
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for number in range(-WARM_UP, rounds):
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            taken = steps[name]()
            if number >= 0:
                laps[name].append(taken)
    return {
        name: {mark: 1000 * statistics.median(lap[mark] for lap in of_one) for mark in of_one[0]}
        for name, of_one in laps.items()
    }


class Clock:
    """Seconds since it was made, with everything that was asked of the device done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._now()

    def read(self) -> float:
        """Seconds since the start."""
        return self._now() - self.start

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def compare_online(options: argparse.Namespace, console: Console) -> None:
    """The whole model from raw inputs, the head exchanged and nothing else."""
    device = torch.device(options.device)
    ours, control = (read_arguments(CONFIGS / name).model for name in ("ebmc.yaml", "late_fusion.yaml"))
    its_head = {key: control.get(key) for key in ("head", "head_kwargs", "loss_weights")}
    models = {"late fusion": {**ours, **its_head}, "EBMC": ours}
    inputs = random_clips(options, device)
    steps = {name: online_step(model, inputs, options) for name, model in models.items()}
    medians = time_in_turns(steps, options.rounds)
    console.print(
        f"{_machine(device)}; {options.text_encoder}, {options.precision}, batch {options.batch}, "
        f"{options.tokens} tokens, {options.mel_steps} mel steps, {options.frames} face crops; "
        f"medians of {options.rounds} rounds, ms"
    )
    console.print(_table(medians, against="late fusion"))


def random_clips(options: argparse.Namespace, device: torch.device) -> dict[str, Tensor]:
    """A batch of clips as the model takes it, none shorter than another, with labels."""
    size, vocabulary = options.batch, load_text_config(options.text_encoder).vocab_size
    whole = {"text": options.tokens, "audio": options.mel_steps, "vision": options.frames}
    inputs = {
        "text_input_ids": torch.randint(vocabulary, (size, options.tokens)),
        "audio_values": torch.randn(size, options.mel_steps, 80),
        "vision_values": torch.randint(0, 256, (size, options.frames, 96, 96, 3), dtype=torch.uint8),
        "vision_blendshapes": torch.rand(size, options.frames, 52),
        **{f"{name}_mask": torch.ones(size, steps, dtype=torch.bool) for name, steps in whole.items()},
        "modality_present": torch.ones(size, len(MODALITIES), dtype=torch.bool),
        "labels": torch.rand(size) * 6 - 3,
    }
    return {name: values.to(device) for name, values in inputs.items()}


def online_step(settings: Mapping, inputs: Mapping[str, Tensor], options: argparse.Namespace) -> Step:
    """A training step of a model, marked after the backward pass and after the optimizer's step."""
    torch.manual_seed(0)
    device = torch.device(options.device)
    text_config = load_text_config(options.text_encoder)
    settings = {**settings, "text_encoder": options.text_encoder, "text_config": text_config}
    model = MSAModel(MSAConfig(**settings)).to(device)
    teacher = None
    if model.head.teachers:
        with torch.no_grad():
            teacher = model.eval().teach(
                **{name: value for name, value in inputs.items() if name != "labels"}
            )
    model.train().head.start_stage(model.head.stages[-1])
    optimizer = make_optimizer(model, learning_rate=1e-5, text_learning_rate=1e-5, weight_decay=0.01)
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
    """EBMC's head alone on one step of features a modality, in fp32 and in bf16."""
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
        f"{_machine(device)}; batch {size}, one step of features a modality, forward + backward of the "
        f"second stage; medians of {options.rounds} rounds, ms"
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
    console.print(_table(medians, against="EBMC head"))


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
    """Takes down every matrix product of what runs under it, forward and backward, to do them again alone."""

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


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _table(medians: Mapping[str, Mapping[str, float]], against: str) -> Table:
    """Milliseconds, and beside each how many times that of the row `against` it is."""
    table = Table("")
    marks = list(medians[against])
    for mark in marks:
        table.add_column(mark, justify="right")
        table.add_column("ratio", justify="right")
    for name, found in medians.items():
        ratios = ((found[mark], found[mark] / medians[against][mark]) for mark in marks)
        table.add_row(name, *(cell for value, ratio in ratios for cell in (f"{value:.2f}", f"{ratio:.2f}")))
    return table


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
    online.add_argument(
        "--text-encoder", default="bert-base-uncased", help="whose shape the text encoder has"
    )
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
