# SPDX-License-Identifier: Apache-2.0
"""Shared code of the benchmarks: timing of alternating steps, random batches, a table of medians.

`scripts/` is not a package: benchmarks find this file because Python puts a script's folder on the path.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from msa_online.batching import BucketBatchSampler
from msa_online.modalities import MODALITIES
from msa_online.training.loop import TrainingLoop

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WARM_UP = 2  # steps before the first that is timed

Step = Callable[[], dict[str, float]]
"""Runs one step and returns the seconds from its start to each of its marks."""


def time_in_turns(steps: Mapping[str, Step], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds to each mark of each step; odd rounds are reversed to balance the order."""
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
    """Seconds since its creation, after all work on the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._now()
        self.cpu_start = time.process_time()

    def read(self) -> float:
        """Seconds since the start."""
        return self._now() - self.start

    def read_cpu(self) -> float:
        """Seconds since the start that the threads of this process computed; other processes do not count."""
        return time.process_time() - self.cpu_start

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def training_step(loop: TrainingLoop, batch: Mapping[str, Tensor]) -> Step:
    """An epoch of one batch; its marks are the end of the work on the device, and its CPU time."""
    size = len(batch["labels"])
    sampler = BucketBatchSampler([1] * size, size, seed=0)
    loader = DataLoader(range(size), batch_sampler=sampler, collate_fn=lambda _: dict(batch))

    def step() -> dict[str, float]:
        clock = Clock(loop.accelerator.device)
        loop.train_epoch(loader, stage="train", epoch=0, title="")
        return {"step": clock.read(), "CPU": clock.read_cpu()}

    return step


def random_features(
    widths: Mapping[str, int], size: int, steps: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    """A batch of features `(size, steps, width)` of each modality, none shorter than another, with labels."""
    inputs = {"modality_present": torch.ones(size, len(MODALITIES), dtype=torch.bool)}
    inputs |= {"labels": torch.rand(size) * 6 - 3, "index": torch.arange(size)}
    for name, width in widths.items():
        inputs[f"{name}_values"] = torch.randn(size, steps[name], width)
        inputs[f"{name}_mask"] = torch.ones(size, steps[name], dtype=torch.bool)
    return {name: values.to(device) for name, values in inputs.items()}


def random_clips(options: argparse.Namespace, device: torch.device, vocabulary: int) -> dict[str, Tensor]:
    """A batch of model inputs for clips of equal length, with labels; tokens are below `vocabulary`."""
    size = options.batch
    whole = {"text": options.tokens, "audio": options.mel_steps, "vision": options.frames}
    inputs = {
        "text_input_ids": torch.randint(vocabulary, (size, options.tokens)),
        "audio_values": torch.randn(size, options.mel_steps, 80),
        "vision_values": torch.randint(0, 256, (size, options.frames, 96, 96, 3), dtype=torch.uint8),
        "vision_blendshapes": torch.rand(size, options.frames, 52),
        **{f"{name}_mask": torch.ones(size, steps, dtype=torch.bool) for name, steps in whole.items()},
        "modality_present": torch.ones(size, len(MODALITIES), dtype=torch.bool),
        "labels": torch.rand(size) * 6 - 3,
        "index": torch.arange(size),
    }
    return {name: values.to(device) for name, values in inputs.items()}


def name_of_machine(device: torch.device) -> str:
    """The GPU, or the CPU with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def table_of_medians(medians: Mapping[str, Mapping[str, float]], against: str) -> Table:
    """Milliseconds, and their ratio to the row `against`."""
    table = Table("")
    marks = list(medians[against])
    for mark in marks:
        table.add_column(mark, justify="right")
        table.add_column("ratio", justify="right")
    for name, found in medians.items():
        ratios = ((found[mark], found[mark] / medians[against][mark]) for mark in marks)
        table.add_row(name, *(cell for value, ratio in ratios for cell in (f"{value:.2f}", f"{ratio:.2f}")))
    return table
