# SPDX-License-Identifier: Apache-2.0
"""Shapley modulation, (2.7) to (2.10): coefficients, utilities, measurements and the plateau."""

import copy
import json
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from msa_online import MSAConfig, MSAModel
from msa_online.layers.shapley import SUBSETS, shapley_values
from msa_online.methods import HEADS, ModulationContext
from msa_online.methods.pase.head import TRANSPORTS
from msa_online.methods.pase.modulator import LOSSES, ShapleyModulator, equilibrium, prototype_utility
from msa_online.modalities import MODALITIES
from tests.equations import assert_equation

WIDTHS = {"text": 6, "audio": 4, "vision": 5}
PUBLISHED = {
    **dict(zip((f"spread/{name}" for name in MODALITIES), (0.4, 0.9, 1.1), strict=True)),
    **dict(zip(TRANSPORTS, (0.5, 0.6, 0.8), strict=True)),
}


def test_the_published_utility_gives_the_reference_values():
    worth = {subset: torch.tensor(prototype_utility(subset, PUBLISHED)) for subset in SUBSETS}
    contributions = {name: share.item() for name, share in shapley_values(worth).items()}
    expected, scale = [0.1658, 0.0941, 0.0646], [0.5431, 0.7310, 1.0]
    found = list(contributions.values())
    assert_equation("2.7", "contributions under the published utility", found, expected, rtol=0, atol=5e-5)
    found = list(equilibrium(contributions).values())
    assert_equation("2.8", "coefficients under the published utility", found, scale, rtol=0, atol=5e-5)


def test_a_pair_counts_for_the_two_modalities_it_joins():
    assert TRANSPORTS == ("transport/text+audio", "transport/text+vision", "transport/audio+vision")
    assert prototype_utility(frozenset(), PUBLISHED) == 0
    one = prototype_utility(frozenset({"audio"}), PUBLISHED)
    assert_equation("2.10", "utility of audio", one, 0.6 + 0.4 / 1.9, rtol=1e-6, atol=1e-12)
    two = prototype_utility(frozenset({"vision", "text"}), PUBLISHED)
    assert_equation("2.10", "utility of a pair", two, 0.6 / 1.6 + 0.4 / 2.5, rtol=1e-6, atol=1e-12)


def test_the_least_contributing_modality_learns_at_full_rate_and_others_slower_the_more_they_give():
    draw = random.Random(0)
    for _ in range(200):
        contributions = {name: draw.uniform(1e-3, 5.0) for name in MODALITIES}
        found = equilibrium(contributions)
        assert all(1 / math.e < value <= 1 for value in found.values())
        ranked = sorted(MODALITIES, key=contributions.get)
        assert found[ranked[0]] == 1.0
        assert found[ranked[0]] > found[ranked[1]] > found[ranked[2]]
        least = contributions[ranked[0]]
        expected = {name: math.exp(least / value - 1) for name, value in contributions.items()}
        assert_equation("2.8", "coefficients", found, expected, rtol=1e-5, atol=1e-12)
        scaled = equilibrium({name: 7e4 * value for name, value in contributions.items()})
        assert scaled == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("values", [(0.3, 0.3, 0.3), (0, 0, 0), (-1, -2, -0.5), (-1, 0, -1)])
def test_where_all_give_alike_or_nobody_gives_anything_nothing_is_slowed(values):
    assert equilibrium(dict(zip(MODALITIES, values, strict=True))) == dict.fromkeys(MODALITIES, 1.0)


@pytest.mark.parametrize("harm", [0.0, -0.4])
def test_beside_a_modality_that_gives_nothing_all_others_are_slowed_by_e(harm):
    found = equilibrium({"text": 0.5, "audio": harm, "vision": 0.1})
    assert found["audio"] == 1.0
    assert found["text"] == pytest.approx(1 / math.e, rel=1e-6) == pytest.approx(found["vision"], rel=1e-6)
    assert all(math.isfinite(value) for value in found.values())


def make_model(head: str = "pase", **settings) -> MSAModel:
    torch.manual_seed(0)
    kwargs = {"hidden_size": 8, **settings}
    return MSAModel(MSAConfig(feature_widths=WIDTHS, head=head, head_kwargs=kwargs, label_range=[-3, 3]))


def make_inputs(batch: int = 8, present=None, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(batch, 3, generator=generator) > 0.2 if present is None else present
    inputs = {"modality_present": there, "labels": torch.rand(batch, generator=generator) * 6 - 3}
    for name, width in WIDTHS.items():
        inputs[f"{name}_values"] = torch.randn(batch, 4, width, generator=generator)
        inputs[f"{name}_mask"] = torch.arange(4) < torch.randint(1, 5, (batch, 1), generator=generator)
    return inputs


def attached(model: MSAModel, **settings) -> ShapleyModulator:
    modulator = ShapleyModulator(**settings)
    modulator.attach(model, dict.fromkeys(MODALITIES, 8), 24)
    return modulator


def observe(modulator: ShapleyModulator, model: MSAModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return modulator.observe(model(**inputs, output_internals=True), inputs["labels"])


def test_contributions_are_measured_without_dropout_in_any_part_that_decides():
    config = {**make_model(dropout=0.5).config.to_dict(), "context": "gru"}
    model, inputs = (
        MSAModel(MSAConfig(**{**config, "context_kwargs": {"dropout": 0.5}})).train(),
        make_inputs(),
    )
    with torch.no_grad():
        for parameter in model.context.parameters():
            parameter.copy_(torch.randn_like(parameter))
    inputs |= {"dialogue": torch.zeros(8, dtype=torch.int64), "turn": torch.arange(8)}
    output = model(**inputs, output_internals=True)
    once, again = (attached(model).observe(output, inputs["labels"]) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in LOSSES) and model.context.training


def context(model: MSAModel, statistics, epoch: int = 0, step: int = 0) -> ModulationContext:
    numbers = {name: float(value) for name, value in statistics.items()}
    return ModulationContext(model.modality_parameters(), numbers, "train", epoch=epoch, step=step, seed=0)


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_under_a_subset_is_that_of_a_prediction_from_it(head):
    model, inputs = make_model(head).train(), make_inputs()
    found = observe(attached(model), model, inputs)
    assert tuple(found) == LOSSES
    model.eval()
    for subset, name in zip(SUBSETS, LOSSES, strict=True):
        seen = inputs["modality_present"] & torch.tensor([other in subset for other in MODALITIES])
        answer = model(**{**inputs, "modality_present": seen, "labels": None}).logits.squeeze(-1)
        expected = (answer - inputs["labels"]).square().mean()
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)


def contributions_of(modulator: ShapleyModulator, model: MSAModel, inputs) -> dict[str, float]:
    """What a first epoch of one step says in the second."""
    seen = observe(modulator, model, inputs)
    modulator.modulate(context(model, seen))
    log = modulator.modulate(context(model, {}, epoch=1, step=1)).log
    assert {name: log[f"contribution/{name}"] for name in MODALITIES} == modulator.contributions
    return modulator.contributions | {"measured": (seen[LOSSES[0]] - seen[LOSSES[-1]]).item()}


@pytest.mark.parametrize("head", HEADS)
def test_contributions_add_up_to_the_loss_that_is_saved(head):
    model = make_model(head).train()
    found = contributions_of(attached(model), model, make_inputs())
    assert any(found[name] for name in MODALITIES)
    assert sum(found[name] for name in MODALITIES) == pytest.approx(found["measured"], rel=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_a_modality_without_samples_contributes_exactly_zero(head):
    model = make_model(head).train()
    present = torch.tensor([True, True, False]).expand(8, 3)
    found = contributions_of(attached(model), model, make_inputs(present=present))
    assert found["vision"] == 0.0
    assert [name for name in ("text", "audio") if found[name]] == [
        name for name in ("text", "audio") if name in model.head.fuses
    ]


@pytest.mark.parametrize("utility", ["task", "prototype"])
def test_on_a_corpus_without_a_modality_the_other_two_are_compared_with_each_other(utility):
    """Beside one that never occurs, and contributes nothing, both used to be slowed by e in all steps."""
    model = make_model().train()
    modulator = attached(model, utility=utility, interval=1, latest=0)
    modulator.leave_out(["vision"])
    present = torch.tensor([True, True, False]).expand(8, 3)
    seen = observe(modulator, model, make_inputs(present=present)) if utility == "task" else PUBLISHED
    modulator.modulate(context(model, seen))
    log = modulator.modulate(context(model, {} if utility == "task" else PUBLISHED, epoch=1, step=1)).log
    coefficients = {name: log[f"coefficient/{name}"] for name in ("text", "audio")}
    assert max(coefficients.values()) == 1.0 > min(coefficients.values())
    assert coefficients == equilibrium(modulator.contributions)
    assert not any("vision" in name for name in log)
    if utility == "task":
        assert set(seen) == {"loss/none", "loss/text", "loss/audio", "loss/audio+text"}
        saved = seen["loss/none"] - seen["loss/audio+text"]
        assert sum(modulator.contributions.values()) == pytest.approx(saved.item(), rel=1e-5)


def test_a_measurement_runs_the_encoders_no_second_time_and_leaves_everything_as_it_was(
    tiny_config, make_batch
):
    config = MSAConfig(**{**tiny_config.to_dict(), "head": "pase", "head_kwargs": {"hidden_size": 16}})
    torch.manual_seed(0)
    model, batch = MSAModel(config).train(), make_batch(6)
    calls: list[int] = []
    hooks = [each.register_forward_hook(lambda *_: calls.append(1)) for each in model.encoders.values()]
    modulator = attached(model)
    output = model(**batch, output_internals=True)
    output.loss.backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {
        name: None if value.grad is None else value.grad.clone() for name, value in model.named_parameters()
    }
    generator, seen = torch.get_rng_state(), model.head.prototypes._sums.clone()
    assert len(calls) == 3
    found = modulator.observe(output, batch["labels"])
    assert len(found) == 8 and len(calls) == 3
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.head.prototypes._sums, seen)
    for name, value in model.named_parameters():
        kept = gradients[name]
        assert (value.grad is None) == (kept is None) and (kept is None or torch.equal(value.grad, kept))
    assert all(value.shape == () and not value.requires_grad for value in found.values())
    for hook in hooks:
        hook.remove()
    model.eval()
    modulator.observe(model(**batch, output_internals=True), batch["labels"])
    assert not any(module.training for module in model.modules())


def test_the_sequences_a_model_hands_back_hold_no_graph():
    """A modulator may keep them beyond the step."""
    sequences = make_model().train()(**make_inputs(), output_internals=True).sequences
    assert tuple(sequences) == MODALITIES
    assert not any(sequence.values.requires_grad for sequence in sequences.values())


@pytest.mark.parametrize(("interval", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (4, [0, 4])])
def test_the_utility_is_measured_at_the_interval_and_averaged_over_the_epoch(interval, expected):
    model = make_model().train()
    modulator = attached(model, interval=interval)
    measured, worths = [], []
    for step in range(6):
        found = observe(modulator, model, make_inputs(seed=step))
        if found:
            measured.append(step)
            saved = [(found[LOSSES[0]] - found[name]).double() for name in LOSSES]
            worths.append(dict(zip(SUBSETS, saved, strict=True)))
        log = modulator.modulate(context(model, found, step=step)).log
        assert not any(name.startswith("contribution/") for name in log)  # an epoch is not over yet
    assert measured == expected
    modulator.modulate(context(model, {}, epoch=1, step=6))
    mean = {subset: torch.stack([worth[subset] for worth in worths]).mean() for subset in SUBSETS}
    shares = {name: share.item() for name, share in shapley_values(mean).items()}
    assert modulator.contributions == pytest.approx(shares, rel=1e-5, abs=1e-9)
    assert modulator.coefficients == pytest.approx(equilibrium(shares), rel=1e-4)


def test_the_prototypes_utility_costs_no_forward_pass():
    model = make_model().train()
    modulator = attached(model, utility="prototype", interval=1)
    assert observe(modulator, model, make_inputs()) == {}
    modulator.modulate(context(model, PUBLISHED))
    modulator.modulate(context(model, PUBLISHED, epoch=1))
    assert list(modulator.coefficients.values()) == pytest.approx([0.5431, 0.7310, 1.0], abs=5e-5)


def validate(modulator: ShapleyModulator, scores) -> list[bool]:
    phases = []
    for score in scores:
        modulator.on_validation(score)
        phases.append(modulator.balancing)
    return phases


def test_a_plateau_starts_the_second_phase_once_and_for_good():
    modulator = ShapleyModulator(warmup=2, patience=3, latest=100)
    assert not modulator.balancing
    falls = [-1.0, -0.8, -0.7, -0.75, -0.72, -0.71]
    assert validate(modulator, falls) == [False] * 5 + [True]
    assert validate(modulator, [-0.3, -0.2, -0.9, -0.9, -0.9, -0.9]) == [True] * 6


@pytest.mark.parametrize("warmup", [0, 4, 9])
def test_no_plateau_is_looked_for_before_the_warm_up_is_over(warmup):
    phases = validate(ShapleyModulator(warmup=warmup, patience=2, latest=100), [-1.0] * 12)
    assert phases.index(True) == max(warmup, 2) and all(phases[max(warmup, 2) :])


@pytest.mark.parametrize(("gain", "plateau"), [(0.0005, True), (0.002, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_counts_as_an_improvement_is_relative_to_the_best_score(gain, plateau, sign):
    """Scores are errors below zero or F1 above."""
    scores = [10.0 * sign]
    for _ in range(10):
        scores.append(scores[-1] + gain * abs(scores[-1]))
    modulator = ShapleyModulator(warmup=0, patience=1, latest=100, min_delta=1e-3)
    assert any(validate(modulator, scores)) == plateau


def test_the_second_phase_starts_at_the_latest_epoch_in_any_case():
    rising = [float(number) for number in range(1, 11)]
    assert validate(ShapleyModulator(latest=4), rising) == [False] * 3 + [True] * 7
    assert validate(ShapleyModulator(latest=100), rising) == [False] * 10
    fixed = ShapleyModulator(switch="fixed", latest=8, warmup=0, patience=1)
    assert validate(fixed, [-1.0] * 10) == [False] * 7 + [True] * 3
    assert ShapleyModulator(latest=0).balancing


@pytest.mark.parametrize("score", [math.nan, -math.inf])
def test_a_score_that_is_no_number_is_no_improvement(score):
    phases = validate(ShapleyModulator(warmup=0, patience=2, latest=100), [-1.0, score, score])
    assert phases == [False, False, True]


@pytest.mark.parametrize("first", [math.nan, -math.inf])
def test_a_first_score_that_is_no_number_can_be_improved_on(first):
    rising = [first, -1.0, -0.8, -0.6, -0.4]
    assert validate(ShapleyModulator(warmup=0, patience=3, latest=100), rising) == [False] * 5


def test_every_stage_of_the_head_starts_in_the_first_phase():
    """What one stage is judged by is no measure of the next."""
    model = make_model()
    modulator = attached(model, warmup=0, patience=2, latest=100)
    modulator.modulate(replace(context(model, {}), stage="enhance"))
    assert validate(modulator, [-0.5] * 4)[-1]
    modulator.modulate(replace(context(model, {}), stage="balance"))
    assert validate(modulator, [-0.9, -0.8, -0.7, -0.7, -0.7]) == [False] * 4 + [True]


def test_the_second_phase_is_announced_once_and_starts_rather_than_the_run_ends():
    modulator = ShapleyModulator(latest=2)
    assert [modulator.on_validation(-1.0) for _ in range(4)] == [False, True, False, False]
    impatient = ShapleyModulator(switch="fixed", latest=100)
    assert not impatient.on_validation(-1.0)
    assert impatient.on_patience_end() and impatient.balancing
    assert not impatient.on_patience_end()


def test_measuring_contributions_starts_no_phase_of_training():
    modulator = ShapleyModulator(latest=1, apply="off")
    assert not modulator.on_validation(-1.0) and not modulator.on_patience_end()


def with_gradients(model: MSAModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    for value in model.parameters():
        value.grad = torch.randn(value.shape, generator=generator)
    return {name: value.grad.clone() for name, value in model.named_parameters()}


def second_phase(model: MSAModel, **settings) -> ShapleyModulator:
    """It knows what an epoch has measured and is about to scale the next."""
    modulator = attached(model, utility="prototype", interval=1, latest=1, **settings)
    modulator.modulate(context(model, PUBLISHED))
    modulator.on_validation(-1.0)
    return modulator


@pytest.mark.parametrize("apply", ["gradient", "lr", "off"])
def test_gradients_of_a_modality_are_scaled_by_its_coefficient_and_shared_ones_are_not(apply):
    model = make_model()
    modulator = second_phase(model, apply=apply)
    before = with_gradients(model)
    modulation = modulator.modulate(context(model, PUBLISHED, epoch=1))
    phi = dict(zip(MODALITIES, (0.5431, 0.7310, 1.0), strict=True))
    assert modulation.log["phase/balancing"] == 1.0
    logged = {name: modulation.log[f"coefficient/{name}"] for name in MODALITIES}
    assert logged == pytest.approx(phi if apply != "off" else dict.fromkeys(MODALITIES, 1.0), abs=5e-5)
    assert dict(modulation.rates) == (pytest.approx(phi, abs=5e-5) if apply == "lr" else {})
    owners = {id(value): name for name, values in model.modality_parameters().items() for value in values}
    touched = set()
    for name, value in model.named_parameters():
        owner = owners.get(id(value))
        if apply == "gradient" and owner is not None:
            torch.testing.assert_close(value.grad, modulator.coefficients[owner] * before[name])
            touched.add(owner)
        else:
            assert torch.equal(value.grad, before[name]), name
    assert touched == (set(MODALITIES) if apply == "gradient" else set())
    assert {name.split(".")[1] for name, value in model.named_parameters() if id(value) not in owners} == {
        "fusion", "classifier", "unimodal",
    }  # fmt: skip


def test_the_first_phase_leaves_every_gradient_as_it_is_and_records_contributions():
    model = make_model()
    modulator = attached(model, utility="prototype", interval=1, latest=100)
    for epoch in range(3):
        before = with_gradients(model)
        modulation = modulator.modulate(context(model, PUBLISHED, epoch=epoch))
        assert all(torch.equal(value.grad, before[name]) for name, value in model.named_parameters())
        assert not modulation.rates and modulation.log["phase/balancing"] == 0.0
    assert modulation.log["contribution/text"] == pytest.approx(0.1658, abs=5e-5)


def test_what_it_keeps_is_plain_data_and_takes_it_over_the_switch():
    model = make_model().train()
    whole, stopped = (attached(model, warmup=1, patience=2, latest=100, interval=2) for _ in range(2))
    inputs = [make_inputs(seed=seed) for seed in range(12)]

    def epoch(modulator: ShapleyModulator, number: int) -> list:
        logs = []
        for step in range(3 * number, 3 * number + 3):
            with_gradients(model)
            seen = observe(modulator, model.eval(), inputs[step])
            logs.append(modulator.modulate(context(model, seen, epoch=number, step=step)))
        modulator.on_validation(-1.0)
        return logs

    for number in range(2):
        epoch(whole, number)
        epoch(stopped, number)
    state = stopped.state_dict()
    assert json.loads(json.dumps(state)) == state
    resumed = attached(model, warmup=1, patience=2, latest=100, interval=2)
    resumed.load_state_dict(copy.deepcopy(state))
    assert not resumed.balancing
    for number in (2, 3):
        assert epoch(resumed, number) == epoch(whole, number)
    assert resumed.balancing and resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"utility": "loss"}, "utility='loss'"),
        ({"apply": "both"}, "apply='both'"),
        ({"switch": "entropy"}, "switch='entropy'"),
        ({"warmup": -1}, "warmup=-1"),
        ({"patience": 0}, "patience=0"),
        ({"min_delta": -0.1}, "min_delta=-0.1"),
        ({"min_delta": math.nan}, "min_delta=nan"),
        ({"latest": -1}, "latest=-1"),
        ({"interval": 0}, "interval=0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_naming_it(settings, named):
    with pytest.raises(ValueError, match=named):
        ShapleyModulator(**settings)
