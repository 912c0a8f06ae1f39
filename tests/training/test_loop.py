# SPDX-License-Identifier: Apache-2.0
"""One step in its legal order: trajectories under accumulation, precision, bad gradients, a modulator."""

import inspect
from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from msa_online import MSAConfig, MSAModel
from msa_online.batching import BucketBatchSampler
from msa_online.methods import HEADS, GradientModulator, Modulation
from msa_online.missing.modalities import ModalityDropout
from msa_online.training.loop import TrainingLoop
from msa_online.training.optimizer import make_optimizer, make_scheduler
from msa_online.training.teacher import Teacher

SAMPLES = 24
MOVED_BY_MICRO_BATCHES = {"cpsl", "ithp"}  # a state follows each micro-batch, or noise is drawn in it


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
        optimizer = make_optimizer(
            model, learning_rate=1e-3, learning_rates={"text": 1e-3}, weight_decay=0.01
        )
        scheduler = make_scheduler(optimizer, steps=100, warmup=0.0)
        model, optimizer = accelerator.prepare(model, optimizer)
        self.sampler = BucketBatchSampler([1] * len(rows), batch_size, accumulation, seed=3)
        self.loader = accelerator.prepare(DataLoader(rows, batch_sampler=self.sampler))
        mask = ModalityDropout({}, torch.ones(len(rows), 3, dtype=torch.bool), seed=3)
        self.loop = TrainingLoop(
            accelerator, model, optimizer, scheduler, modulator or GradientModulator(), mask, 1.0, 3
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


def assert_as_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """To 1e-5; but keys' biases change no attention: their gradient is rounding, which Adam makes large."""
    biases = {name for name in one if name.endswith(("query_key.bias", "key_value.bias"))}
    assert_close({name: one[name] for name in one.keys() - biases}, other, 1e-5)
    assert_close({name: one[name] for name in biases}, other, 1e-4)


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


@pytest.mark.parametrize("head", [name for name in HEADS if name not in MOVED_BY_MICRO_BATCHES])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (3, 3), (1, 8)])
def test_accumulation_changes_nothing_where_samples_do_not_divide_evenly(
    head, batch_size, accumulation, still_config, rows
):
    """Steps of 7 samples: micro-batches of 4 and 3, of 3, 2 and 2, and of one each, the last of none."""
    weights = {name: 0.0 for name in HEADS[head].loss_names if name != "task"}
    kwargs = {"hidden_size": 8, "dropout": 0.0}
    if "depth" in inspect.signature(HEADS[head]).parameters:
        kwargs["depth"] = 1
    settings = {"head": head, "head_kwargs": kwargs, "loss_weights": weights}
    config = MSAConfig(**{**still_config.to_dict(), **settings})
    rows = rows[:21]
    whole = Trial(config, rows, batch_size=8 if batch_size * accumulation == 8 else 9)
    end = whole.train()
    parts = Trial(config, rows, batch_size=batch_size, accumulation=accumulation)
    found = parts.train()
    assert_as_close(end, found)
    assert whole.loop.progress.step == parts.loop.progress.step == 6
    assert parts.losses["task"] == pytest.approx(whole.losses["task"], rel=1e-4)
    assert parts.losses["loss"] == pytest.approx(whole.losses["loss"], rel=1e-4)


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


@pytest.mark.parametrize("scaled", [False, True])
def test_a_skipped_step_changes_no_weight_and_no_moment(scaled, still_config, rows):
    """The fused step skips inside its kernel: it must not count the step or follow the gradients either."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    trial = Trial(still_config, rows, scaler=scaler)
    trial.train(1)
    before = {name: value.clone() for name, value in trial.loop.bare_model.state_dict().items()}
    optimizer_before = deepcopy(trial.loop.optimizer.state_dict()["state"])
    for row in rows:
        row["labels"] = torch.tensor(float("nan"))
    after = trial.train(1)
    assert trial.loop.progress.skipped == 3
    assert trial.losses == {}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    optimizer_after = trial.loop.optimizer.state_dict()["state"]
    for number, state in optimizer_before.items():
        assert all(torch.equal(value, optimizer_after[number][name]) for name, value in state.items())


class OverflowingModulator(GradientModulator):
    """Adds finite gradients with a norm that is not finite."""

    def extra_losses(self, output, labels):
        return {"huge": 1e25 * self.parameter.sum()}


def test_a_norm_that_overflows_skips_the_step_although_no_gradient_is_infinite(still_config, rows):
    modulator = OverflowingModulator()
    trial = Trial(
        still_config, rows, modulator=modulator, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0)
    )
    modulator.parameter = trial.loop.bare_model.head.classifier.weight
    before = {name: value.clone() for name, value in trial.loop.bare_model.state_dict().items()}
    after = trial.train(1)
    assert trial.loop.progress.skipped == 3
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
        return Modulation(log={"coefficient/audio": 0.0})


def test_what_the_modulator_scales_is_what_the_optimizer_takes(still_config, rows):
    trial = Trial(still_config, rows, modulator=MutingModulator())
    before = {name: value.clone() for name, value in trial.loop.bare_model.state_dict().items()}
    after = trial.train(1)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(
        name.startswith("encoders.audio") and name.endswith("bias") for name in moved
    )  # not decayed either
    assert any(name.startswith("encoders.vision") for name in moved)


@pytest.fixture
def ebmc_config(still_config):
    """A function that configures the tiny model with EBMC, without dropout, under weights of its losses."""

    def configure(**weights: float) -> MSAConfig:
        head = {"hidden_size": 8, "depth": 1, "dropout": 0.0}
        return MSAConfig(
            **{**still_config.to_dict(), "head": "ebmc", "head_kwargs": head, "loss_weights": weights}
        )

    return configure


def taught(config, rows, **settings) -> Trial:
    trial = Trial(config, rows, **settings)
    answers = torch.randn(SAMPLES, 3, 2, generator=torch.Generator().manual_seed(0))
    trial.loop.teacher = Teacher(answers)
    return trial


@pytest.mark.needs("ebmc")
@pytest.mark.parametrize("stage", ["enhance", "balance"])
def test_accumulated_halves_are_one_batch_for_what_is_linear_in_the_batch(stage, ebmc_config, rows):
    """The energy gap and the contrastive loss compare the samples of a batch (docs/methods/numerics.md)."""
    ends = {}
    for name, config in (("linear", ebmc_config(emc=0.0, msd=0.0)), ("all", ebmc_config())):
        for batch_size, accumulation in ((8, 1), (4, 2)):
            trial = taught(config, rows, batch_size=batch_size, accumulation=accumulation)
            trial.loop.bare_model.head.start_stage(stage)
            ends[name, accumulation] = trial.train(1)
    assert_as_close(ends["linear", 1], ends["linear", 2])
    with pytest.raises(AssertionError):
        assert_as_close(ends["all", 1], ends["all", 2])


@pytest.mark.needs("ebmc")
def test_every_sample_gets_its_own_teacher_target(ebmc_config, rows):
    """The loader shuffles, the teacher's answers do not: a student that copies them has nothing to distil."""
    trial = taught(ebmc_config(), rows)
    model = trial.loop.bare_model.eval()
    said = torch.stack([model(**_as_batch(row)).logits[0] for row in rows]).detach()
    answers = torch.cat([said, torch.zeros(SAMPLES, 1)], dim=-1).unsqueeze(1).expand(SAMPLES, 3, 2)
    for batch in trial.loader:
        right = model(**Teacher(answers).join(batch)).losses["imtd"]
        wrong = model(**Teacher(answers.flip(0)).join(batch)).losses["imtd"]
        assert right.item() == pytest.approx(0.0, abs=1e-9) and wrong > 1e-6


def _as_batch(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.unsqueeze(0) for name, value in row.items()}


@pytest.mark.needs("ebmc")
def test_the_gradient_of_each_loss_is_measured_by_itself_once_an_epoch(ebmc_config, rows):
    trial = taught(ebmc_config(), rows)
    trial.loop.measure_gradients = True
    trial.train(1)
    measured = {name.removeprefix("gradient/") for name in trial.losses if name.startswith("gradient/")}
    assert measured == {"task", "unimodal", "msd", "cce", "emc", "imtd"}
    plain = taught(ebmc_config(), rows)
    plain.train(1)
    assert {name: trial.losses[name] for name in plain.losses} == plain.losses
    assert_close(trial.loop.bare_model.state_dict(), plain.loop.bare_model.state_dict(), 0.0)


@pytest.mark.needs("pase")
def test_a_loss_that_moves_nothing_has_a_gradient_of_zero(still_config, rows):
    """The alignment of PaSE with constant prototypes."""
    head = {"hidden_size": 8, "depth": 1, "dropout": 0.0, "cal_gradient": "none"}
    config = MSAConfig(**{**still_config.to_dict(), "head": "pase", "head_kwargs": head})
    trial = Trial(config, rows)
    trial.loop.measure_gradients = True
    trial.train(1)
    assert trial.losses["gradient/cal"] == 0.0 and trial.losses["gradient/pcl"] > 0.0


@pytest.mark.needs("ebmc")
def test_measured_norms_are_those_of_the_unweighted_losses(ebmc_config, rows):
    norms = []
    for weights in ({}, {"task": 0.5, "emc": 0.0}):
        trial = taught(ebmc_config(**weights), rows)
        trial.loop.measure_gradients = True
        batch = next(iter(trial.loader))
        output = trial.loop.model(**trial.loop.teacher.join(batch))
        model = trial.loop.bare_model
        for name in ("task", "emc"):
            model.zero_grad()
            output.losses[name].backward(retain_graph=True)
            grads = [value.grad for value in model.parameters() if value.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
        model.zero_grad()
        trial.train(1)
        norms += [trial.losses["gradient/task"], trial.losses["gradient/emc"]]
    assert norms == pytest.approx(norms[:2] * 4, rel=1e-4)
