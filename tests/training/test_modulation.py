# SPDX-License-Identifier: Apache-2.0
"""Modulators where they act: in the loop, under accumulation and precision, with every head."""

import itertools
import math
from statistics import fmean

import pytest
import torch
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from msa_online import MSAConfig
from msa_online.methods import HEADS, MODULATORS, GradientModulator, Modulation, ModulationContext
from msa_online.methods.gradients import apply_coefficients


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


conflict, ogm = pytest.mark.needs("conflict"), pytest.mark.needs("ogm")
modulating = pytest.mark.parametrize(
    "name", [pytest.param("conflict", marks=conflict), pytest.param("ogm", marks=ogm)]
)


@modulating
@pytest.mark.parametrize(("samples", "batch_size"), [(24, 4), (21, 4), (21, 1)])
def test_accumulated_parts_are_modulated_as_one_batch(
    samples, batch_size, name, still_config, rows, make_trial
):
    """Errors are averaged over the samples that were there, not over parts; noise is added once a step."""
    rows = rows[:samples]
    whole = make_trial(still_config, rows, MODULATORS[name](epochs=None), batch_size=8)
    end = whole.train()
    accumulation = 8 // batch_size
    halves = make_trial(
        still_config, rows, MODULATORS[name](epochs=None), batch_size=batch_size, accumulation=accumulation
    )
    assert_close(end, halves.train(), 1e-5)
    assert whole.modulator.steps == halves.modulator.steps == list(range(6))
    for modality in whole.modulator.modalities:
        for number in (f"score/{modality}", f"coefficient/{modality}"):
            assert halves.logged(number) == pytest.approx(whole.logged(number), rel=1e-4), number
    assert min(whole.logged("coefficient/audio") + whole.logged("coefficient/vision")) < 0.3


@conflict
def test_the_score_of_a_window_is_that_of_all_its_samples(still_config, rows, make_trial):
    trial = make_trial(still_config, rows, MODULATORS["conflict"](noise=0), batch_size=4, accumulation=2)
    model = trial.loop.bare_model
    trial.sampler.start_epoch(0)
    halves = list(trial.sampler)[:2]
    for number in halves[0] + halves[1]:
        rows[number]["modality_present"][1:] = number not in halves[0][1:]
    errors: dict[str, list[list[float]]] = {"audio": [], "vision": []}
    for half in halves:
        for found in errors.values():
            found.append([])
        for number in half:
            sample = {name: value.unsqueeze(0) for name, value in rows[number].items()}
            output = model(**sample)
            for name, found in errors.items():
                if output.present[name]:
                    found[-1].append(abs(output.modality_logits[name].item() - sample["labels"].item()))
    trial.train(1)
    for name, (first, second) in errors.items():
        assert len(first) != len(second)
        assert trial.logged(f"score/{name}")[0] == pytest.approx(1 / fmean(first + second), rel=1e-5)
        assert 1 / fmean([fmean(first), fmean(second)]) != pytest.approx(1 / fmean(first + second), rel=1e-4)


@conflict
@pytest.mark.parametrize("norm", ["mean", "rms"])
def test_the_norms_compared_are_those_of_the_whole_step_before_it_is_modulated(
    norm, still_config, rows, make_trial
):
    untouched = make_trial(still_config, rows, GradientModulator(), batch_size=8)
    gradients: list[dict[str, torch.Tensor]] = []
    model = untouched.loop.bare_model

    def keep(*_):
        found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        gradients.append({name: gradient.double().clone() for name, gradient in found.items()})

    untouched.loop.clip_norm = math.inf
    hook = register_optimizer_step_pre_hook(keep)
    untouched.train(1)
    hook.remove()
    trial = make_trial(still_config, rows, MODULATORS["conflict"](norm=norm), batch_size=4, accumulation=2)
    trial.train(1)
    for name in ("audio", "vision"):
        mine = [value for key, value in gradients[0].items() if trial.owners().get(key) == name]
        squares = [value.square().sum().item() for value in mine]
        expected = fmean(map(math.sqrt, squares))
        if norm == "rms":
            expected = math.sqrt(sum(squares) / sum(value.numel() for value in mine))
        assert trial.logged(f"encoder_gradient/{name}")[0] == pytest.approx(expected, rel=1e-4)


@modulating
def test_fp16_with_loss_scaling_is_modulated_as_fp32_is(name, still_config, rows, make_trial):
    exact = make_trial(still_config, rows, MODULATORS[name](epochs=None))
    end = exact.train()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = make_trial(still_config, rows, MODULATORS[name](epochs=None), scaler=scaler)
    assert_close(end, scaled.train(), 5e-3)
    assert scaled.loop.progress.skipped == 0
    for modality in exact.modulator.modalities:
        for number in ("coefficient", "conflict", "encoder_gradient"):
            if f"{number}/{modality}" in exact.modulator.logs[0]:
                assert scaled.logged(f"{number}/{modality}") == pytest.approx(
                    exact.logged(f"{number}/{modality}"), rel=0.05
                )


@pytest.mark.parametrize("name", MODULATORS)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_with_a_non_finite_gradient_never_reaches_the_modulator(
    name, scaled, still_config, rows, make_trial
):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    trial = make_trial(still_config, rows, MODULATORS[name](), scaler=scaler)
    rows[5]["labels"] = torch.tensor(float("inf"))
    state = trial.train(1)
    assert trial.loop.progress.skipped == 1 and trial.modulator.steps == [0, 1]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert all(math.isfinite(value) for value in trial.losses.values())


@modulating
def test_coefficients_appear_in_the_record_of_an_epoch(name, still_config, rows, make_trial):
    trial = make_trial(still_config, rows, MODULATORS[name](epochs=None))
    trial.train(1)
    expected = {"imbalance/degree"}
    for modality in trial.modulator.modalities:
        expected |= {f"score/{modality}", f"coefficient/{modality}"}
        if name == "conflict":
            expected |= {f"conflict/{modality}", f"encoder_gradient/{modality}"}
    assert {name for name in trial.losses if "/" in name} == expected
    for number in expected:
        assert trial.losses[number] == pytest.approx(fmean(trial.logged(number)))
    assert not any(number.startswith(("error/", "observed/", "truth/")) for number in trial.losses)


@ogm
def test_gradients_are_clipped_after_noise_and_penalty(still_config, rows, make_trial):
    norms = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: norms.append(
            get_total_norm(
                [value.grad for group in optimizer.param_groups for value in group["params"]
                 if value.grad is not None]
            ).item()
        )
    )  # fmt: skip
    make_trial(still_config, rows, MODULATORS["ogm"](noise=20.0), clip_norm=0.1).train(1)
    hook.remove()
    assert norms == pytest.approx([0.1] * 3, rel=1e-4)


class Constant(GradientModulator):
    """The same coefficient on a modality in every step."""

    modalities = ("audio",)

    def __init__(self, coefficient: float, apply: str) -> None:
        self.coefficient, self.apply = coefficient, apply

    def modulate(self, context: ModulationContext) -> Modulation:
        coefficients = {"audio": self.coefficient}
        return Modulation(apply_coefficients(coefficients, context, apply=self.apply, noise=0.0))


def travelled(make_trial, config, rows, coefficient: float, apply: str) -> list[float]:
    """How far the audio encoder moves in every step."""
    trial = make_trial(config, rows, Constant(coefficient, apply), clip_norm=math.inf)
    audio = trial.loop.bare_model.modality_parameters()["audio"]
    places = [[value.detach().clone() for value in audio]]
    hook = register_optimizer_step_post_hook(
        lambda *_: places.append([value.detach().clone() for value in audio])
    )
    trial.train(4)
    hook.remove()
    return [
        get_total_norm([after - before for before, after in zip(*pair, strict=True)]).item()
        for pair in itertools.pairwise(places)
    ]


def test_under_adam_a_constant_coefficient_slows_only_as_a_learning_rate(
    features_config, feature_rows, make_trial
):
    """Adam divides a gradient by its own running size (docs/methods/numerics.md)."""
    still = features_config("late_fusion", dropout=0.0)
    plain = travelled(make_trial, still, feature_rows, 1.0, "gradient")
    scaled = travelled(make_trial, still, feature_rows, 0.2, "gradient")
    slowed = travelled(make_trial, still, feature_rows, 0.2, "lr")
    assert scaled == pytest.approx(plain, rel=0.05)
    assert slowed[0] == pytest.approx(0.2 * plain[0], rel=1e-3)  # later their gradients differ
    assert sum(slowed) == pytest.approx(0.2 * sum(plain), rel=0.2)


@conflict
def test_after_a_step_at_scaled_rates_the_schedule_continues_as_without(still_config, rows, make_trial):
    plain = make_trial(still_config, rows, GradientModulator())
    plain.train(1)
    rated = make_trial(still_config, rows, MODULATORS["conflict"](apply="lr", noise=0))
    seen = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append(
            {group["modality"]: group["lr"] for group in optimizer.param_groups}
        )
    )
    rated.train(1)
    hook.remove()
    rates = [[group["lr"] for group in trial.loop.optimizer.param_groups] for trial in (plain, rated)]
    assert rates[0] == rates[1] == rated.loop.scheduler.get_last_lr()
    for step, log in enumerate(rated.modulator.logs):
        whole = 1e-3 * (1 - step / 100)
        factors = {"text": 1.0, None: 1.0} | {
            name: log[f"coefficient/{name}"] for name in ("audio", "vision")
        }
        assert min(factors.values()) < 0.3
        assert seen[step] == pytest.approx({name: whole * factor for name, factor in factors.items()})


PAIRS = [
    (head, name)
    for head in HEADS
    for name in MODULATORS
    if {*MODULATORS[name]().modalities} <= {*HEADS[head].fuses}
]


@pytest.mark.parametrize("kind", ["clips", "features"])
@pytest.mark.parametrize(("head", "name"), PAIRS)
def test_every_head_trains_with_every_modulator(
    head, name, kind, tiny_config, features_config, rows, feature_rows, make_trial
):
    clips = MSAConfig(**{**tiny_config.to_dict(), "head": head, "head_kwargs": {"hidden_size": 8}})
    config = clips if kind == "clips" else features_config(head)
    settings = {}
    if kind == "features" and head == "cpsl" and name in ("ogm", "rebalance"):
        settings = {"modalities": ["audio", "vision"]}  # the text has no parameters of its own there
    for stage in HEADS[head].stages:
        modulator = MODULATORS[name](**settings)
        trial = make_trial(config, rows if kind == "clips" else feature_rows, modulator)
        trial.loop.bare_model.head.start_stage(stage)
        before = {key: value.detach().clone() for key, value in trial.loop.bare_model.named_parameters()}
        after = trial.train(1, stage)
        assert trial.modulator.steps == [0, 1, 2] and trial.loop.progress.skipped == 0
        assert all(math.isfinite(value) for value in trial.losses.values())
        assert "loss" in trial.losses
        of_modulator = {"probe", "balm"} if name == "rebalance" else set()
        reported = {key for key in trial.losses if "/" not in key} - {"loss"}
        assert of_modulator <= reported <= of_modulator | set(HEADS[head].loss_names)
        owners = trial.owners()
        moved = {owners.get(key) for key, value in before.items() if not torch.equal(value, after[key])}
        assert moved >= {None, *set(modulator.modalities) & set(owners.values())}
        assert all(torch.isfinite(value).all() for value in after.values())
