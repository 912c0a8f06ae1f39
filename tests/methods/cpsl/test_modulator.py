# SPDX-License-Identifier: Apache-2.0
"""The conflict-aware penalty: when it applies, and how much ((4.8) to (4.10), docs/methods/cpsl.md)."""

import itertools
import math
import random

import pytest
import torch
from torch.nn import Parameter

from msa_online import MSAConfig, MSAModel
from msa_online.methods import MODULATORS, ConflictModulator, ModulationContext
from msa_online.methods.cpsl import find_conflicts
from msa_online.modalities import MODALITIES
from tests.equations import assert_equation

PAIR = ("audio", "vision")


def make_context(
    errors: dict[str, float], norms: dict[str, float], *, epoch: int = 0, count: float = 8.0
) -> ModulationContext:
    """A step in which modalities had these mean absolute errors and average gradient norms."""
    generator = torch.Generator().manual_seed(0)
    owned = {name: [Parameter(torch.zeros(4, 3)), Parameter(torch.zeros(3))] for name in MODALITIES}
    for parameter in itertools.chain(*owned.values()):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    statistics = {}
    for name, error in errors.items():
        statistics |= {f"error/{name}": count * error, f"observed/{name}": count}
        statistics[f"encoder_gradient/{name}"] = norms[name]
    return ModulationContext(owned, statistics, stage="train", epoch=epoch, step=3, seed=1)


def coefficients_of(modulator, context: ModulationContext) -> dict[str, float]:
    log = modulator.modulate(context).log
    return {name: log[f"coefficient/{name}"] for name in modulator.modalities}


@pytest.mark.parametrize("penalty", [0.5, 0.3, 1.0])
@pytest.mark.parametrize(("better", "larger"), itertools.product(PAIR, PAIR), ids=lambda name: name)
def test_only_the_better_modality_with_the_larger_gradient_is_penalised(better, larger, penalty):
    errors = {name: 0.5 if name == better else 0.7 for name in PAIR}
    norms = {name: 2.0 if name == larger else 1.9 for name in PAIR}
    (worse,) = set(PAIR) - {better}
    damped = 1 - math.tanh(0.7 / 0.5)
    modulator = ConflictModulator(penalty=penalty, noise=0)
    context = make_context(errors, norms)
    before = {name: [value.grad.clone() for value in context.modality_parameters[name]] for name in PAIR}
    modulation = modulator.modulate(context)
    expected = {better: damped * (penalty if better == larger else 1.0), worse: 1.0}
    for name in PAIR:
        found = modulation.log[f"coefficient/{name}"]
        assert_equation("4.9", f"coefficient of {name}", found, expected[name], rtol=1e-6, atol=1e-12)
        assert modulation.log[f"conflict/{name}"] == float(name == better == larger)
        for parameter, gradient in zip(context.modality_parameters[name], before[name], strict=True):
            scaled = expected[name] * gradient
            assert_equation("4.10", f"gradient of {name}", parameter.grad, scaled, rtol=1e-6, atol=0)


def test_the_penalty_is_exact():
    context = {"errors": {"audio": 0.4, "vision": 0.9}, "norms": {"audio": 3.0, "vision": 1.0}}
    plain = coefficients_of(ConflictModulator(penalty=1.0, noise=0), make_context(**context))
    for penalty in (0.5, 0.37, 1e-3):
        penalised = coefficients_of(ConflictModulator(penalty=penalty, noise=0), make_context(**context))
        assert penalised == {"audio": penalty * plain["audio"], "vision": 1.0}


def test_just_above_equality_the_published_setting_gives_what_the_specification_says():
    context = make_context({"audio": 0.5, "vision": 0.5 * (1 + 1e-9)}, {"audio": 2.0, "vision": 1.0})
    assert coefficients_of(ConflictModulator(), context)["audio"] == pytest.approx(0.1192, abs=5e-5)


@pytest.mark.parametrize(
    ("errors", "norms"),
    [((0.5, 0.5), (2.0, 1.0)), ((0.5, 0.6), (1.0, 1.0)), ((0.5, 0.6), (0.0, 0.0)), ((0.5, 0.5), (1.0, 1.0))],
)
def test_a_tie_in_either_is_no_conflict(errors, norms):
    context = make_context(dict(zip(PAIR, errors, strict=True)), dict(zip(PAIR, norms, strict=True)))
    log = ConflictModulator(noise=0).modulate(context).log
    assert log["conflict/audio"] == log["conflict/vision"] == 0.0
    if errors[0] == errors[1]:
        assert log["coefficient/audio"] == log["coefficient/vision"] == 1.0


def test_the_penalty_never_raises_a_coefficient_and_at_most_one_of_a_pair_conflicts():
    draw = random.Random(0)
    conflicts = 0
    for _ in range(300):
        errors = {name: 10 ** draw.uniform(-2, 1) for name in PAIR}
        norms = {name: 10 ** draw.uniform(-4, 2) for name in PAIR}
        setting = {"strength": draw.uniform(0.1, 2), "shift": draw.choice([0, 1]), "noise": 0}
        penalty = draw.uniform(0.01, 1)
        modulator = ConflictModulator(penalty=penalty, **setting)
        penalised = coefficients_of(modulator, make_context(errors, norms))
        plain = coefficients_of(ConflictModulator(penalty=1.0, **setting), make_context(errors, norms))
        found = find_conflicts({name: 1 / error for name, error in errors.items()}, norms)
        assert sum(found.values()) <= 1
        conflicts += sum(found.values())
        for name in PAIR:
            assert 0 <= penalised[name] <= plain[name] <= 1
            assert penalised[name] == (penalty if found[name] else 1.0) * plain[name]
    assert 100 < conflicts < 200  # both halves of the truth table were drawn


def test_swapping_the_modalities_swaps_what_is_done():
    one = make_context({"audio": 0.4, "vision": 0.9}, {"audio": 3.0, "vision": 1.0})
    other = make_context({"audio": 0.9, "vision": 0.4}, {"audio": 1.0, "vision": 3.0})
    modulator = ConflictModulator(noise=0)
    found, swapped = coefficients_of(modulator, one), coefficients_of(modulator, other)
    assert swapped == {"audio": found["vision"], "vision": found["audio"]}


def test_a_third_modality_is_compared_with_the_means_of_the_others():
    errors = {"text": 0.25, "audio": 0.4, "vision": 2.0}  # scores 4, 2.5, 0.5
    norms = {"text": 1.0, "audio": 3.0, "vision": 1.5}
    modulator = ConflictModulator(modalities=MODALITIES, noise=0)
    found = coefficients_of(modulator, make_context(errors, norms))
    assert found["text"] == pytest.approx(1 - math.tanh(4 / 1.5), rel=1e-6)  # better, gradients smaller
    assert found["audio"] == pytest.approx(0.5 * (1 - math.tanh(2.5 / 2.25)), rel=1e-6)  # both
    assert found["vision"] == 1.0


def test_a_modality_that_no_sample_of_the_step_had_leaves_both_alone():
    context = make_context({"audio": 0.5, "vision": 0.7}, {"audio": 2.0, "vision": 0.0})
    context.statistics.update({"error/vision": 0.0, "observed/vision": 0.0})
    modulation = ConflictModulator(noise=0).modulate(context)
    assert modulation.log["coefficient/audio"] == modulation.log["coefficient/vision"] == 1.0
    assert modulation.log["conflict/audio"] == modulation.log["conflict/vision"] == 0.0
    assert "score/vision" not in modulation.log
    assert all(math.isfinite(value) for value in modulation.log.values())


def test_a_modality_that_no_sample_has_does_not_lower_the_norm_the_others_are_compared_with():
    """Its gradient is zero: half of that of the rival would be exceeded by both, and be a conflict."""
    errors, norms = {"text": 0.0, "audio": 0.5, "vision": 0.7}, {"text": 0.0, "audio": 1.0, "vision": 1.5}
    context = make_context(errors, norms)
    context.statistics.update({"observed/text": 0.0})
    of_three = ConflictModulator(modalities=MODALITIES, noise=0).modulate(context).log
    of_two = ConflictModulator(noise=0).modulate(context).log
    assert of_three["conflict/audio"] == of_two["conflict/audio"] == 0.0
    for name in PAIR:
        assert of_three[f"coefficient/{name}"] == of_two[f"coefficient/{name}"]
    assert of_three["coefficient/text"] == 1.0


def test_the_norms_that_decide_are_those_taken_before_anything_was_modulated():
    """What lies on the parameters by then may be anything."""
    found = []
    for scale in (1.0, 1e-3):
        context = make_context({"audio": 0.5, "vision": 0.7}, {"audio": 2.0, "vision": 1.0})
        for parameter in context.modality_parameters["audio"]:
            parameter.grad *= scale
        found.append(ConflictModulator(noise=0).modulate(context).log)
    assert found[0] == found[1] and found[0]["conflict/audio"] == 1.0


@pytest.mark.parametrize("norm", ["mean", "rms"])
def test_the_norms_are_those_of_each_modalitys_encoder(norm, tiny_config, make_batch):
    torch.manual_seed(0)
    model = MSAModel(tiny_config)
    model(**make_batch(4)).loss.backward()
    measured = ConflictModulator(norm=norm).measure(model.modality_parameters())
    for name in PAIR:
        prefixes = (f"encoders.{name}.", f"head.projections.{name}.")
        gradients = [
            value.grad
            for key, value in model.named_parameters()
            if key.startswith(prefixes) and value.grad is not None
        ]
        squares = [math.fsum(value**2 for value in gradient.flatten().tolist()) for gradient in gradients]
        mean = sum(map(math.sqrt, squares)) / len(squares)
        rms = math.sqrt(sum(squares) / sum(gradient.numel() for gradient in gradients))
        assert measured[f"encoder_gradient/{name}"].item() == pytest.approx(
            mean if norm == "mean" else rms, rel=1e-5
        )


def test_the_text_is_left_alone():
    assert set(ConflictModulator().modalities) == {"audio", "vision"}


@pytest.mark.needs("ogm")
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("epoch", [0, 30])
def test_without_penalty_it_is_plain_gradient_modulation(noise, epoch):
    context = {"errors": {"audio": 0.4, "vision": 0.9}, "norms": {"audio": 3.0, "vision": 1.0}}
    here, there = make_context(**context, epoch=epoch), make_context(**context, epoch=epoch)
    settings = {"noise": noise, "epochs": [0, 25]}
    one = ConflictModulator(penalty=1.0, **settings).modulate(here)
    other = MODULATORS["ogm"](modalities=PAIR, **settings).modulate(there)
    assert {name: one.log[name] for name in other.log} == other.log
    for name in MODALITIES:
        pairs = zip(here.modality_parameters[name], there.modality_parameters[name], strict=True)
        assert all(torch.equal(left.grad, right.grad) for left, right in pairs)


def test_on_features_the_encoders_are_those_of_the_head():
    config = MSAConfig(
        feature_widths={"text": 6, "audio": 4, "vision": 5}, head="cpsl", head_kwargs={"hidden_size": 8}
    )
    torch.manual_seed(0)
    model = MSAModel(config)
    batch = {"modality_present": torch.ones(4, 3, dtype=torch.bool), "labels": torch.randn(4)}
    for name, width in config.widths.items():
        batch[f"{name}_values"] = torch.randn(4, 3, width)
        batch[f"{name}_mask"] = torch.ones(4, 3, dtype=torch.bool)
    model(**batch).loss.backward()
    measured = ConflictModulator().measure(model.modality_parameters())
    for name in PAIR:
        norms = [value.grad.norm() for value in model.head.encoders[name].parameters()]
        assert measured[f"encoder_gradient/{name}"].item() == pytest.approx(
            torch.stack(norms).mean().item(), rel=1e-5
        )
