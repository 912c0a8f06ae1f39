# SPDX-License-Identifier: Apache-2.0
"""Fixtures of tests that train: small training loops, and whole runs on one process or on two.

The folders of such tests import them in their `conftest.py`.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

from msa_online import MSAConfig, MSAModel
from msa_online.batching import BucketBatchSampler
from msa_online.methods import GradientModulator, Modulation, ModulationContext
from msa_online.missing.modalities import ModalityDropout
from msa_online.training.config import TrainingArguments
from msa_online.training.config_reader import parse_arguments
from msa_online.training.loop import TrainingLoop
from msa_online.training.model import limit_training
from msa_online.training.optimizer import make_optimizer, make_scheduler
from msa_online.training.run import train as train_run

REPOSITORY = Path(__file__).parents[1]
SAMPLES = 24
WIDTHS = {"text": 6, "audio": 4, "vision": 5}

STOPPED_AND_RESUMED = """
import sys
from msa_online.methods import MODULATORS
from msa_online.training.config_reader import read_arguments
from msa_online.training.accelerator import start_accelerator
from msa_online.training.run import carry_out

settings, folder, modulator = sys.argv[1:]

class Stopping(MODULATORS[modulator]):
    stops = False
    epochs_seen = 0

    def on_validation(self, score):
        self.epochs_seen += 1
        if self.stops and self.epochs_seen == 2:
            raise KeyboardInterrupt

def run_all():
    MODULATORS["stopping"] = Stopping
    accelerator = None
    for name, stops, resume in (("whole", False, False), ("stopped", True, False), ("stopped", False, True)):
        changes = [f"training.output_dir={folder}/{name}", f"training.resume={resume}"]
        arguments = read_arguments(settings, changes)
        accelerator = accelerator or start_accelerator(arguments.training)
        Stopping.stops = stops
        try:
            carry_out(arguments, "a test", accelerator)
            assert not stops
        except KeyboardInterrupt:
            assert stops
        accelerator.free_memory()
    accelerator.end_training()

if __name__ == "__main__":  # processes that extract features import this file
    run_all()
"""
"""A program for `on_two_processes`: a whole run, and one that is stopped in epoch 2 and resumed.

Arguments: the configuration, whose modulator is "stopping"; the folder of the runs "whole" and "stopped"; and
the modulator that "stopping" extends.
"""


class Recording(GradientModulator):
    """A modulator, and what it was shown and did in every step."""

    def __init__(self, modulator: GradientModulator) -> None:
        self.modulator = modulator
        self.modalities, self.epochs = modulator.modalities, modulator.epochs
        self.observe, self.extra_losses = modulator.observe, modulator.extra_losses
        self.measure, self.attach = modulator.measure, modulator.attach
        self.state_dict, self.load_state_dict = modulator.state_dict, modulator.load_state_dict
        self.steps: list[int] = []
        self.logs: list[dict[str, float]] = []

    def modulate(self, context: ModulationContext) -> Modulation | None:
        modulation = self.modulator.modulate(context)
        self.steps.append(context.step)
        self.logs.append(dict(modulation.log) if modulation else {})
        return modulation


class Trial:
    """A training loop around a fresh model, and what came of it."""

    def __init__(
        self,
        config,
        rows,
        modulator,
        *,
        batch_size=8,
        accumulation=1,
        scaler=None,
        clip_norm=1.0,
        freeze=(),
    ) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # one precision to a process, says Accelerate
        accelerator = Accelerator(
            gradient_accumulation_steps=accumulation, mixed_precision="fp16" if scaler else "no", cpu=True
        )
        if scaler is not None:  # fp16 on a CPU would silently compute in fp32: force it, as on a GPU
            accelerator.native_amp, accelerator.scaler = True, scaler
        torch.manual_seed(0)
        model = MSAModel(config)
        with torch.no_grad():
            shown = model.eval()(**{name: value.unsqueeze(0) for name, value in rows[0].items()})
        limit_training(model.encoders, TrainingArguments(freeze=list(freeze)))
        widths = {name: state.shape[-1] for name, state in shown.features.items()}
        modulator.attach(model, widths, shown.fused.shape[-1])
        optimizer = make_optimizer(
            model, learning_rate=1e-3, learning_rates={"text": 1e-3}, weight_decay=0.01
        )
        scheduler = make_scheduler(optimizer, steps=100, warmup=0.0)
        model, optimizer = accelerator.prepare(model, optimizer)
        self.sampler = BucketBatchSampler([1] * len(rows), batch_size, accumulation, seed=3)
        self.loader = accelerator.prepare(DataLoader(rows, batch_sampler=self.sampler))
        self.modulator = Recording(modulator)
        mask = ModalityDropout({}, torch.ones(len(rows), 3, dtype=torch.bool), seed=3)
        self.loop = TrainingLoop(accelerator, model, optimizer, scheduler, self.modulator, mask, clip_norm, 3)

    def train(self, epochs: int = 2, stage: str = "train") -> dict[str, torch.Tensor]:
        for epoch in range(epochs):
            self.sampler.start_epoch(epoch)
            self.losses = self.loop.train_epoch(self.loader, stage=stage, epoch=epoch, title="")
        return {name: value.clone() for name, value in self.loop.bare_model.state_dict().items()}

    def logged(self, name: str) -> list[float]:
        """A number of every step."""
        return [log[name] for log in self.modulator.logs]

    def owners(self) -> dict[str, str]:
        model = self.loop.bare_model
        names = {id(value): name for name, value in model.named_parameters()}
        return {
            names[id(value)]: modality
            for modality, values in model.modality_parameters().items()
            for value in values
        }


def as_rows(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: value[number] for name, value in batch.items()} for number in range(len(batch["labels"]))]


@pytest.fixture
def make_trial():
    """A function that makes a `Trial`."""
    return Trial


@pytest.fixture
def rows(make_batch):
    """Samples of which a third lacks audio and some lack vision, unevenly over the halves of a batch."""
    batch = make_batch(SAMPLES)
    batch["modality_present"][::3, 1] = False
    batch["modality_present"][[1, 2, 4, 5, 7, 13], 2] = False
    return as_rows(batch)


@pytest.fixture
def still_config(tiny_config):
    """The tiny model without dropout, under the task loss alone, which is linear in the batch."""
    config = MSAConfig(**tiny_config.to_dict())
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0
    config.head_kwargs["dropout"] = 0.0
    config.loss_weights = {"unimodal": 0.0}
    return config


@pytest.fixture
def features_config():
    """A function that configures a head on precomputed features."""

    def configure(head: str, **settings) -> MSAConfig:
        return MSAConfig(
            feature_widths=WIDTHS, head=head, head_kwargs={"hidden_size": 8, **settings}, label_range=[-3, 3]
        )

    return configure


@pytest.fixture
def feature_rows():
    generator = torch.Generator().manual_seed(0)
    batch = {
        "modality_present": torch.rand(SAMPLES, 3, generator=generator) > 0.2,
        "labels": torch.rand(SAMPLES, generator=generator) * 6 - 3,
        "index": torch.arange(SAMPLES),
    }
    for name, width in WIDTHS.items():
        batch[f"{name}_values"] = torch.randn(SAMPLES, 4, width, generator=generator)
        lengths = torch.randint(1, 5, (SAMPLES, 1), generator=generator)
        batch[f"{name}_mask"] = torch.arange(4) < lengths
    return as_rows(batch)


@pytest.fixture(scope="module")
def train(repository):
    """A function that carries out a configuration as train.py does, in this process."""

    def carry_out(document: dict) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()  # an interrupted run leaves its loaders there
        train_run(parse_arguments(document), "a test")
        return Path(document["training"]["output_dir"])

    return carry_out


multiprocessing.set_forkserver_preload(["tests.training_fixtures"])  # ranks start with torch imported


def run_rank(script: Path, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
    """Run a program as its own process would, with what it prints in a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture(scope="session")
def on_two_processes():
    """A function that runs a program as two ranks of one launch; returns exit status and output of both.

    The ranks fork from a process that has imported this module and nothing else.
    """
    context = multiprocessing.get_context("forkserver")

    def run(program: str, folder: Path, *arguments: str | Path) -> tuple[list[int], list[str]]:
        script = folder / "rank.py"
        script.write_text(program)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        launch = os.environ | {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", **address}
        outputs = [folder / f"printed by rank {rank}" for rank in range(2)]
        processes = []
        for rank, output in enumerate(outputs):
            environment = launch | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(REPOSITORY)}
            call = (script, [*map(str, arguments)], environment, output)
            processes.append(context.Process(target=run_rank, args=call))
            processes[-1].start()
        for process in processes:
            process.join(timeout=240)
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
        printed = [output.read_text() for output in outputs]
        assert not hanging, "".join(printed)
        return [process.exitcode for process in processes], printed

    return run
