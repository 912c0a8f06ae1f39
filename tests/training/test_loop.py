# SPDX-License-Identifier: Apache-2.0
"""One step in its legal order: trajectories under accumulation, precision, bad gradients, a modulator."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from msa_online import MSAConfig, MSAModel
from msa_online.balancing import GradientModulator
from msa_online.data.collate import BucketBatchSampler
from msa_online.data.missing import ModalityDropout
from msa_online.training.loop import TrainingLoop
from msa_online.training.optimizer import make_optimizer, make_scheduler

SAMPLES = 24


@pytest.fixture
def rows(make_batch):
    batch = make_batch(SAMPLES)
    return [{name: value[number] for name, value in batch.items()} for number in range(SAMPLES)]


@pytest.fixture
def still_config(tiny_config):
    """The tiny model without dropout, so that trajectories can be compared."""
    config = MSAConfig(**tiny_config.to_dict())
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0
    config.head_kwargs["dropout"] = 0.0
    return config


class Trial:
    """A training loop around a fresh model, and what came of it."""

    def __init__(
        self, config, rows, *, batch_size=8, accumulation=1, precision="no", modulator=None, scaler=None
    ):
        AcceleratorState._reset_state(reset_partial_state=True)  # one precision to a process, says Accelerate
        precision = "fp16" if scaler else precision
        accelerator = Accelerator(
            gradient_accumulation_steps=accumulation, mixed_precision=precision, cpu=True
        )
        if scaler is not None:  # fp16 on a CPU would silently compute in fp32: force it, as on a GPU
            accelerator.native_amp, accelerator.scaler = True, scaler
        torch.manual_seed(0)
        model = MSAModel(config)
        optimizer = make_optimizer(model, learning_rate=1e-3, text_learning_rate=1e-3, weight_decay=0.01)
        scheduler = make_scheduler(optimizer, steps=100, warmup=0.0)
        model, optimizer = accelerator.prepare(model, optimizer)
        self.sampler = BucketBatchSampler([1] * len(rows), batch_size, accumulation, seed=3)
        self.loader = accelerator.prepare(DataLoader(rows, batch_sampler=self.sampler))
        hiding = ModalityDropout({}, len(rows), seed=3)
        self.loop = TrainingLoop(
            accelerator, model, optimizer, scheduler, modulator or GradientModulator(), hiding, 1.0, 3
        )

    def train(self, epochs: int = 2) -> dict[str, torch.Tensor]:
        for epoch in range(epochs):
            self.sampler.start_epoch(epoch)
            self.losses = self.loop.train_epoch(self.loader, stage="train", epoch=epoch, title="")
        return {name: value.clone() for name, value in self.loop.bare_model.state_dict().items()}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_losses_fall_and_are_named(still_config, rows):
    trial = Trial(still_config, rows)
    trial.train(1)
    first = trial.losses
    trial.train(5)
    assert set(first) == {"loss", "task", "unimodal"}
    assert trial.losses["loss"] < first["loss"]
    assert trial.loop.progress.step == 18


def test_two_accumulated_halves_are_one_batch(still_config, rows):
    whole = Trial(still_config, rows, batch_size=8).train()
    halves = Trial(still_config, rows, batch_size=4, accumulation=2).train()
    assert_close(whole, halves, 1e-5)


def test_bf16_follows_fp32(still_config, rows):
    exact, rough = Trial(still_config, rows), Trial(still_config, rows, precision="bf16")
    assert_close(exact.train(), rough.train(), 5e-3)
    assert rough.losses["loss"] == pytest.approx(exact.losses["loss"], rel=0.05)


def test_fp16_with_loss_scaling_follows_fp32(still_config, rows):
    exact = Trial(still_config, rows).train()
    scaled = Trial(still_config, rows, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)).train()
    assert_close(exact, scaled, 5e-3)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_non_finite_gradient_skips_the_whole_step_and_is_counted(scaled, still_config, rows):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    counting = CountingModulator()
    trial = Trial(still_config, rows, scaler=scaler, modulator=counting)
    rows[5]["labels"] = torch.tensor(float("inf"))
    state = trial.train(1)
    assert trial.loop.progress.skipped == 1
    assert trial.loop.progress.step == counting.calls == 2
    assert trial.loop.scheduler.last_epoch == 2
    assert all(torch.isfinite(value).all() for value in state.values())
    assert torch.isfinite(torch.tensor(list(trial.losses.values()))).all()
    if scaled:
        assert scaler.get_scale() == 512.0


def test_a_skipped_step_changes_no_weight(still_config, rows):
    for row in rows:
        row["labels"] = torch.tensor(float("nan"))
    trial = Trial(still_config, rows)
    before = {name: value.clone() for name, value in trial.loop.bare_model.state_dict().items()}
    after = trial.train(1)
    assert trial.loop.progress.skipped == 3
    assert trial.losses == {}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class CountingModulator(GradientModulator):
    """Counts its calls and remembers the norm of the gradients it was shown."""

    def __init__(self) -> None:
        self.calls = 0
        self.norms: list[float] = []

    def modulate(self, context):
        self.calls += 1
        owned = [value.grad for value in context.modality_parameters["text"] if value.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(owned).item())
        return {}


def test_the_modulator_sees_whole_unscaled_gradients_once_a_step(still_config, rows):
    plain, scaled, accumulated = CountingModulator(), CountingModulator(), CountingModulator()
    Trial(still_config, rows, modulator=plain).train()
    Trial(still_config, rows, modulator=scaled, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)).train()
    Trial(still_config, rows, modulator=accumulated, batch_size=4, accumulation=2).train()
    assert plain.calls == scaled.calls == accumulated.calls == 6
    assert scaled.norms == pytest.approx(plain.norms, rel=0.05)
    assert accumulated.norms == pytest.approx(plain.norms, rel=1e-4)


class MutingModulator(GradientModulator):
    """Silences one modality."""

    def modulate(self, context):
        for parameter in context.modality_parameters["audio"]:
            if parameter.grad is not None:
                parameter.grad.zero_()
        return {"audio": torch.tensor(0.0)}


def test_what_the_modulator_scales_is_what_the_optimizer_takes(still_config, rows):
    trial = Trial(still_config, rows, modulator=MutingModulator())
    before = {name: value.clone() for name, value in trial.loop.bare_model.state_dict().items()}
    after = trial.train(1)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(
        name.startswith("encoders.audio") and name.endswith("bias") for name in moved
    )  # not decayed either
    assert any(name.startswith("encoders.vision") for name in moved)
