# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Time the optimizer step of training and torch's other AdamW steps, alternating in one process.

    python scripts/benchmark_optimizer.py
    python scripts/benchmark_optimizer.py --text-encoder microsoft/deberta-v3-base

The model is late fusion with a text encoder of the given shape. Weights and gradients are random, nothing is
downloaded. The results are medians over the rounds.
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch
from rich.console import Console
from timing import CONFIGS, Clock, Step, name_of_machine, table_of_medians, time_in_turns
from torch.optim import AdamW

from msa_online import MSAConfig, MSAModel
from msa_online.encoders import load_encoder_config
from msa_online.training.config_reader import read_arguments
from msa_online.training.optimizer import make_optimizer
from msa_online.user_errors import run_command

KERNELS = {
    "one loop over tensors": {"fused": False, "foreach": False},
    "lists of tensors (foreach)": {"fused": False, "foreach": True},
}
OURS = "as in training"


def compare(options: argparse.Namespace, console: Console) -> None:
    """Time a step of one model with each kernel, and print a table."""
    device = torch.device(options.device)
    settings = read_arguments(CONFIGS / "late_fusion.yaml").model
    text_config = load_encoder_config("text", options.text_encoder)
    settings = {**settings, "text_encoder": options.text_encoder, "text_config": text_config}
    model = MSAModel(MSAConfig(**settings)).to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    steps = {OURS: optimizer_step(new_optimizer(model), device)}
    for name, kernel in KERNELS.items():
        optimizer = new_optimizer(model)
        for group in optimizer.param_groups:
            group.update(kernel)
        steps[name] = optimizer_step(optimizer, device)
    medians = time_in_turns(steps, options.rounds)
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{name_of_machine(device)}; late fusion on {options.text_encoder}, {count:,} parameters in fp32; "
        f"medians of {options.rounds} rounds, ms"
    )
    console.print(table_of_medians(medians, against=OURS))


def new_optimizer(model: MSAModel) -> AdamW:
    """The optimizer of a run, with a learning rate that hardly changes the weights."""
    return make_optimizer(model, learning_rate=1e-8, learning_rates={"text": 1e-8}, weight_decay=0.01)


def optimizer_step(optimizer: AdamW, device: torch.device) -> Step:
    """One step with the existing gradients; its mark is the end of the work on the device."""

    def step() -> dict[str, float]:
        clock = Clock(device)
        optimizer.step()
        return {"step": clock.read()}

    return step


def main(argv: list[str]) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default=str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    )
    parser.add_argument("--text-encoder", default="bert-base-uncased", help="shape of the text encoder")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return run_command(lambda: compare(options, Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
