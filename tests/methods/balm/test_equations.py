# SPDX-License-Identifier: Apache-2.0
"""BALM equation by equation (docs/methods/balm.md): calibration of features, progress and coefficients."""

import copy
import itertools
import math

import pytest
import torch

from msa_online import MSAConfig, MSAModel
from msa_online.describe import count_parameters
from msa_online.methods import CALIBRATORS, MODULATORS, ModulationContext
from msa_online.methods.balm import kl_from_fused, rebalance, squared_distance
from msa_online.modalities import MODALITIES, ModalitySequence
from msa_online.modeling_msa import MSAOutput
from msa_online.training.config_reader import parse_arguments
from msa_online.training.yaml_reader import ConfigurationError
from tests.equations import assert_equation

WIDTHS = {"text": 6, "audio": 5, "vision": 4}  # those of the encoded batches
MIXED = [[True, True, True], [True, False, True], [False, True, False], [False, False, False]]


def make_calibrator(trained: bool = True, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    calibrator = CALIBRATORS["fcm"](WIDTHS, **settings).double()
    if trained:
        with torch.no_grad():
            for parameter in calibrator.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return calibrator


def assert_same(found: dict, expected: dict, tolerance: float = 1e-12) -> None:
    for name, sequence in expected.items():
        torch.testing.assert_close(found[name].values, sequence.values, atol=tolerance, rtol=0)
        assert torch.equal(found[name].mask, sequence.mask)
        assert torch.equal(found[name].present, sequence.present)


def test_calibration_starts_by_leaving_every_feature_as_it_is_bit_for_bit(make_gappy):
    sequences = make_gappy(present=MIXED)
    assert_same(make_calibrator(trained=False)(sequences), sequences, tolerance=0)


def test_gates_are_those_of_the_equations_one_sample_and_step_at_a_time(make_gappy):
    """(3.1) to (3.3)."""
    calibrator, sequences = make_calibrator(), make_gappy(present=MIXED)
    weights = dict(calibrator.named_parameters())
    calibrated = calibrator(sequences)
    for row in range(4):
        pooled = []
        for name, width in WIDTHS.items():
            steps = [
                value
                for value, there in zip(sequences[name].values[row], sequences[name].mask[row], strict=True)
                if there
            ]
            pooled.append(sum(steps) / len(steps) if steps else torch.zeros(width, dtype=torch.float64))
        described = weights["describe.weight"] @ torch.cat(pooled) + weights["describe.bias"]
        descriptor = torch.stack([max(value, torch.zeros(())) for value in described])
        for name in MODALITIES:
            raw = weights[f"gates.{name}.weight"] @ descriptor + weights[f"gates.{name}.bias"]
            gate = 2 / (1 + torch.exp(-raw))
            for step, there in enumerate(sequences[name].mask[row]):
                expected = gate * sequences[name].values[row, step] if there else torch.zeros_like(gate)
                quantity = f"calibrated {name}, sample {row}, step {step}"
                assert_equation("3.3", quantity, calibrated[name].values[row, step], expected, rtol=1e-7)


def test_gates_lie_between_zero_and_two(make_sequences):
    calibrator, sequences = make_calibrator(), make_sequences(8)
    for name, sequence in calibrator(sequences).items():
        ratio = (sequence.values / sequences[name].values)[sequences[name].mask]
        assert ((ratio > 0) & (ratio < 2)).all() and ratio.max() > 1.1 and ratio.min() < 0.9


def test_an_absent_modality_stays_absent_and_says_nothing_of_what_was_hidden(make_sequences):
    calibrator = make_calibrator()
    for column, name in enumerate(MODALITIES):
        present = [number != column for number in range(3)]
        one, other = (make_sequences(present=present, seed=seed) for seed in (0, 1))
        mixed = calibrator(one | {name: other[name]})
        assert_same(mixed, calibrator(one))
        assert not mixed[name].values.any() and not mixed[name].mask.any()


def test_the_order_of_steps_and_padding_do_not_count(make_gappy):
    calibrator, sequences = make_calibrator(), make_gappy()
    plain = calibrator(sequences)
    order = torch.tensor([5, 2, 8, 0, 1, 7, 3, 6, 4])
    audio = sequences["audio"]
    turned = calibrator(
        sequences | {"audio": ModalitySequence(audio.values[:, order], audio.mask[:, order], audio.present)}
    )
    moved = ModalitySequence(plain["audio"].values[:, order], audio.mask[:, order], audio.present)
    assert_same(turned, plain | {"audio": moved})
    padded = {
        name: ModalitySequence(
            torch.nn.functional.pad(each.values, (0, 0, 0, 3)),
            torch.nn.functional.pad(each.mask, (0, 3)),
            each.present,
        )
        for name, each in sequences.items()
    }
    found = calibrator(padded)
    for name, sequence in plain.items():
        torch.testing.assert_close(found[name].values[:, :-3], sequence.values)
        assert not found[name].values[:, -3:].any()


@pytest.mark.parametrize(("read", "scaled"), itertools.permutations(MODALITIES, 2))
def test_every_modality_has_a_say_in_how_the_others_are_scaled(read, scaled, make_sequences):
    sequences = make_sequences(8)
    values = sequences[read].values.requires_grad_()
    (gradient,) = torch.autograd.grad(make_calibrator()(sequences)[scaled].values.sum(), values)
    assert gradient.any()


def test_after_a_step_of_training_the_gates_have_left_the_start(make_sequences):
    calibrator, sequences = make_calibrator(trained=False), make_sequences()
    optimizer = torch.optim.SGD(calibrator.parameters(), lr=0.1)
    for _ in range(2):  # in the first the gates alone move, as they read nothing yet
        optimizer.zero_grad()
        sum(each.values.square().sum() for each in calibrator(sequences).values()).backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in calibrator.parameters())
    assert not torch.allclose(calibrator(sequences)["text"].values, sequences["text"].values, atol=1e-3)


@pytest.mark.parametrize(
    ("widths", "size", "published"),
    [
        ({"text": 1024, "audio": 1582, "vision": 342}, 737, 4_349_037),  # IEMOCAP
        ({"text": 1024, "audio": 1024, "vision": 512}, 640, 3_280_000),  # MOSEI
    ],
)
def test_calibration_has_as_many_parameters_as_published(widths, size, published):
    total = sum(widths.values())
    with torch.device("meta"):
        default, given = CALIBRATORS["fcm"](widths), CALIBRATORS["fcm"](widths, descriptor_size=100)
    assert default.describe.out_features == size == total / 4
    for calibrator, z in ((default, size), (given, 100)):
        found = sum(parameter.numel() for parameter in calibrator.parameters())
        assert found == (total + 1) * z + (z + 1) * total
    assert sum(parameter.numel() for parameter in default.parameters()) == published


@pytest.mark.parametrize("size", [0, -3])
def test_a_descriptor_without_width_is_refused_naming_key_and_value(size):
    with pytest.raises(ValueError, match=f"descriptor_size={size} must be at least 1"):
        make_calibrator(descriptor_size=size)
    document = {
        "model": {
            "feature_widths": WIDTHS, "calibrator": "fcm", "calibrator_kwargs": {"descriptor_size": size}
        },
        "data": {"path": "features.npz"},
    }  # fmt: skip
    with pytest.raises(ConfigurationError, match=rf"run\.yaml: model.calibrator_kwargs.*_size={size} must"):
        parse_arguments(document, origin="run.yaml")


def test_a_trained_calibration_is_saved_and_loaded(tmp_path, make_sequences):
    torch.manual_seed(0)
    config = MSAConfig(feature_widths=WIDTHS, calibrator="fcm", head_kwargs={"hidden_size": 8})
    model = MSAModel(config).eval()
    with torch.no_grad():
        for parameter in model.calibrator.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    model.save_pretrained(tmp_path)
    loaded = MSAModel.from_pretrained(tmp_path)
    sequences = make_sequences(dtype=torch.float32)
    assert not torch.allclose(
        model.decide(sequences).logits, model.head(sequences).logits
    )  # it does something
    assert torch.equal(loaded.decide(sequences).logits, model.decide(sequences).logits)


def test_a_checkpoint_without_calibration_gets_one_that_changes_nothing(tmp_path, make_sequences):
    """It is built without weights, on the meta device: its gates must find their start there too."""
    torch.manual_seed(0)
    plain = MSAModel(MSAConfig(feature_widths=WIDTHS, head_kwargs={"hidden_size": 8})).eval()
    plain.save_pretrained(tmp_path)
    config = MSAConfig.from_pretrained(tmp_path)
    config.calibrator = "fcm"
    loaded, _ = MSAModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not any(value.any() for value in loaded.calibrator.gates.parameters())
    assert loaded.calibrator.describe.weight.isfinite().all() and loaded.calibrator.describe.weight.any()
    sequences = make_sequences(dtype=torch.float32)
    assert torch.equal(loaded.decide(sequences).logits, plain.decide(sequences).logits)


# progress and coefficients


def divergences(seed: int, count: int = 3, steps: int = 30) -> list[dict[str, float]]:
    """Divergences that fall, with the noise of batches."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, count, generator=generator).mul(0.3).exp()
    pace = torch.rand(count, generator=generator) * 0.1
    table = noise * torch.exp(-pace * torch.arange(steps).unsqueeze(-1))
    return [dict(zip(MODALITIES, row.tolist(), strict=False)) for row in table]


def follow(found: list[dict[str, float]], guard: str) -> list[dict[str, float]]:
    names = set().union(*found)
    kappa, before, coefficients = dict.fromkeys(names, 1 - 1 / len(names)), {}, []
    for each in found:
        kappa, before = rebalance(each, before, kappa, guard)
        coefficients.append(kappa)
    return coefficients


@pytest.mark.parametrize("guard", ["smooth", "none"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_coefficients_add_up_to_one_less_than_the_modalities(seed, count, guard):
    for kappa in follow(divergences(seed, count), guard):
        assert sum(kappa.values()) == pytest.approx(count - 1, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_smoothed_coefficients_never_turn_a_gradient_round(seed):
    found = follow(divergences(seed), "smooth")
    assert all(1 / 3 <= value <= 5 / 6 for kappa in found for value in kappa.values())  # half way to 2/3
    printed = follow(divergences(seed), "none")
    assert any(value < 0 for kappa in printed for value in kappa.values())  # which is why they are smoothed


@pytest.mark.parametrize("guard", ["smooth", "none"])
def test_equal_progress_gives_equal_coefficients(guard):
    found = [dict.fromkeys(MODALITIES, value) for value in (3.0, 2.0, 1.5, 1.4)]
    for kappa in follow(found, guard):
        assert list(kappa.values()) == pytest.approx([2 / 3] * 3)


def test_no_progress_at_all_gives_equal_coefficients():
    found = [{"text": 0.5, "audio": 1.0, "vision": 2.0}] * 4
    for kappa in follow(found, "smooth"):
        assert list(kappa.values()) == pytest.approx([2 / 3] * 3)
    assert list(follow(found, "none")[-1].values()) == [0.0] * 3  # as printed: 0 / 1e-8
    lost = [{name: value * (1 + step) for name, value in found[0].items()} for step in range(3)]
    assert list(follow(lost, "smooth")[-1].values()) == pytest.approx([2 / 3] * 3)


@pytest.mark.parametrize("guard", ["smooth", "none"])
@pytest.mark.parametrize("factor", [0.1, 50.0])
def test_the_scale_of_the_divergences_does_not_count(factor, guard):
    found = divergences(1)
    scaled = [{name: factor * value for name, value in each.items()} for each in found]
    for kappa, other in zip(follow(found, guard), follow(scaled, guard), strict=True):
        assert list(other.values()) == pytest.approx(list(kappa.values()), rel=1e-3)


@pytest.mark.parametrize("guard", ["smooth", "none"])
def test_who_learns_more_is_slowed_more(guard):
    found = [dict.fromkeys(MODALITIES, 4.0), {"text": 1.0, "audio": 3.0, "vision": 2.0}]
    kappa = follow(found, guard)[-1]
    assert kappa["text"] < kappa["vision"] < kappa["audio"]


def test_printed_coefficients_are_those_of_the_equation():
    """(3.8): the first progress is D_0 itself, and a negative sum makes coefficients large and negative."""
    start, second = {"text": 2.0, "audio": 1.0, "vision": 1.0}, {"text": 2.3, "audio": 0.6, "vision": 1.2}
    first, then = follow([start, second], "none")
    halves = {"text": 0.5, "audio": 0.75, "vision": 0.75}
    assert_equation("3.8", "coefficients of the first step", first, halves, rtol=1e-6, atol=1e-12)
    deltas = {"text": -0.3, "audio": 0.4, "vision": -0.2}  # together -0.1
    expected = {name: (-0.1 - delta) / (-0.1 + 1e-8) for name, delta in deltas.items()}
    assert_equation("3.8", "coefficients of the second step", then, expected, rtol=1e-6, atol=1e-12)
    assert then == pytest.approx({"text": -2.0, "audio": 5.0, "vision": -1.0}, rel=1e-5)


def test_smoothed_coefficients_are_those_of_the_rule():
    """The guarded form of choice B5, step by step on plain numbers."""
    found = divergences(2)
    running, expected = None, []
    for each in found:
        values = [each[name] for name in MODALITIES]
        before = values if running is None else running
        running = [0.9 * old + 0.1 * new for old, new in zip(before, values, strict=True)]
        floor = 1e-3 * (running[0] + running[1] + running[2]) / 3 + 1e-12
        gains = [max(old - new, 0) + floor for old, new in zip(before, running, strict=True)]
        shares = [gain / (gains[0] + gains[1] + gains[2]) for gain in gains]
        expected.append([0.5 * (1 - share) + 0.5 * 2 / 3 for share in shares])
    for kappa, numbers in zip(follow(found, "smooth"), expected, strict=True):
        found_here = [kappa[name] for name in MODALITIES]
        assert_equation("3.8", "smoothed coefficients", found_here, numbers, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("guard", ["smooth", "none"])
def test_a_modality_absent_from_a_step_keeps_its_coefficient_and_the_others_share_the_rest(guard):
    """The sum, and with it the mean learning rate, must not jump with what a batch happens to lack."""
    found = divergences(3)
    lacking = (4, 5, 11)
    for step in lacking:
        del found[step]["audio"]
    kappas = follow(found, guard)
    assert all(sum(kappa.values()) == pytest.approx(2, rel=1e-3) for kappa in kappas)
    assert all(kappas[step]["audio"] == kappas[step - 1]["audio"] for step in lacking)
    assert len({kappa["audio"] for kappa in kappas}) > 15
    assert any(kappas[step]["text"] != kappas[step - 1]["text"] for step in lacking)
    if guard == "smooth":
        assert all(0 <= value <= 1 for kappa in kappas for value in kappa.values())


def test_a_modality_first_seen_late_starts_from_an_equal_share():
    found = divergences(4)
    for step in range(5):
        del found[step]["vision"]
    kappas = follow(found, "smooth")
    assert {kappa["vision"] for kappa in kappas[:5]} == {1 - 1 / 3}
    assert len({kappa["text"] for kappa in kappas[:5]}) == 5
    assert all(sum(kappa.values()) == pytest.approx(2) for kappa in kappas)
    assert len({kappa["vision"] for kappa in kappas[5:]}) > 20


@pytest.mark.parametrize("guard", ["smooth", "none"])
def test_a_step_with_one_modality_alone_changes_no_coefficient(guard):
    found = divergences(5)[:6]
    found[3] = {"text": found[3]["text"]}
    kappas = follow(found, guard)
    assert kappas[3] == pytest.approx(kappas[2], rel=1e-4)
    assert kappas[4] != pytest.approx(kappas[3], rel=1e-2)


def test_divergence_is_zero_of_equal_predictions_and_positive_of_others():
    generator = torch.Generator().manual_seed(0)
    for outputs, divergence in itertools.product((1, 4), (kl_from_fused, squared_distance)):
        fused, alone = torch.randn(2, 9, outputs, generator=generator, dtype=torch.float64) * 3
        assert torch.equal(divergence(fused, fused), torch.zeros(9, dtype=torch.float64))
        assert (divergence(fused, alone) > 0).all()
        assert divergence(fused * 400, -alone * 400).isfinite().all()


@pytest.mark.parametrize("outputs", [1, 4])
def test_divergences_are_those_of_the_equations(outputs):
    """(3.6) and BALM-M; a score s stands for the pair (sigmoid(-s), sigmoid(s)), which its sign flips."""
    generator = torch.Generator().manual_seed(0)
    fused, alone = torch.randn(2, 5, outputs, generator=generator, dtype=torch.float64)
    for row in range(5):
        distributions = []
        for logits in (fused[row].tolist(), alone[row].tolist()):
            exponents = [0.0, logits[0]] if outputs == 1 else logits
            powers = [math.exp(value) for value in exponents]
            distributions.append([power / sum(powers) for power in powers])
        p, q = distributions
        kl = sum(one * math.log(one / other) for one, other in zip(p, q, strict=True))
        mse = sum((one - other) ** 2 for one, other in zip(p, q, strict=True)) / len(p)
        assert_equation("3.6", "divergence", kl_from_fused(fused, alone)[row], kl, rtol=1e-6, atol=1e-12)
        assert_equation(
            "3.6", "squared distance", squared_distance(fused, alone)[row], mse, rtol=1e-6, atol=1e-12
        )
    if outputs == 1:
        torch.testing.assert_close(kl_from_fused(-fused, -alone), kl_from_fused(fused, alone))


# the modulator around them


def make_output(batch: int = 6, **changes) -> MSAOutput:
    generator = torch.Generator().manual_seed(0)
    present = torch.tensor([[True] * 3, [False, True, True], [True, False, False]] * 2)
    settings = {
        "logits": torch.randn(batch, 1, generator=generator),
        "probe_logits": {name: torch.randn(batch, 1, generator=generator) for name in MODALITIES},
        "present": {name: present[:, column] for column, name in enumerate(MODALITIES)},
        "fused_valid": True,
    }
    return MSAOutput(**settings | changes)


def modulate(modulator, output: MSAOutput, step: int = 0):
    owned = {name: [torch.nn.Parameter(torch.zeros(2))] for name in MODALITIES}
    for values in owned.values():
        values[0].grad = torch.ones(2)
    labels = torch.zeros(len(output.logits))
    statistics = {name: value.item() for name, value in modulator.observe(output, labels).items()}
    context = ModulationContext(owned, statistics, stage="train", epoch=0, step=step, seed=1)
    modulation = modulator.modulate(context)
    return modulation, {name: values[0].grad[0].item() for name, values in owned.items()}


@pytest.mark.parametrize("progress", ["kl", "mse"])
def test_a_modality_is_judged_on_the_samples_that_have_it(progress):
    output = make_output()
    divergence = {"kl": kl_from_fused, "mse": squared_distance}[progress]
    modulation, _ = modulate(MODULATORS["rebalance"](progress=progress), output)
    for name in MODALITIES:
        rows = [row for row in range(6) if output.present[name][row]]
        expected = divergence(output.logits[rows], output.probe_logits[name][rows]).mean().item()
        assert modulation.log[f"divergence/{name}"] == pytest.approx(expected)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_share_of_errors_is_that_of_the_samples_that_have_the_modality(outputs):
    """CGGM's progress; a sample without the modality is neither right nor wrong."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.tensor([0.0, 2.0, -1.0, 0.4, 3.0]) if outputs == 1 else torch.tensor([0, 2, 1, 1, 0])
    present = torch.tensor([[True, False, True]] * 2 + [[True, True, True]] * 3)
    output = MSAOutput(
        logits=torch.randn(5, outputs, generator=generator),
        probe_logits={name: torch.randn(5, outputs, generator=generator) for name in MODALITIES},
        present={name: present[:, column] for column, name in enumerate(MODALITIES)},
        fused_valid=True,
    )
    seen = MODULATORS["rebalance"](progress="errors", strength=1.3, spatial_weight=0.2).observe(
        output, labels
    )
    for name in MODALITIES:
        errors = []
        for row in range(5):
            values, label = output.probe_logits[name][row].tolist(), labels[row].item()
            right = (values[0] > 0) == (label > 0) if outputs == 1 else values.index(max(values)) == label
            errors += [0.0 if right else 1.0] * bool(output.present[name][row])
        found = seen[f"divergence/{name}"] / seen[f"observed/{name}"]
        assert_equation("3.14", f"errors of {name}", found.double(), sum(errors) / len(errors), rtol=1e-6)


def test_squared_distance_takes_the_place_of_the_divergence_and_of_nothing_else():
    outputs = [make_output(logits=torch.full((6, 1), value)) for value in (1.0, 0.8, 0.1)]
    for settings in ({}, {"guard": "none"}):
        modulator = MODULATORS["rebalance"](progress="mse", **settings)
        logs = [modulate(modulator, output)[0].log for output in outputs]
        found = [{name: log[f"divergence/{name}"] for name in MODALITIES} for log in logs]
        for log, kappa in zip(logs, follow(found, settings.get("guard", "smooth")), strict=True):
            for name in MODALITIES:
                assert log[f"coefficient/{name}"] == pytest.approx(1.4 * kappa[name])


def test_gradients_are_scaled_by_rho_times_the_share_of_the_others():
    modulator = MODULATORS["rebalance"](strength=1.2)
    modulate(modulator, make_output())
    moved = make_output(logits=torch.full((6, 1), 0.3))
    modulation, gradients = modulate(modulator, moved, step=1)
    for name in MODALITIES:
        assert gradients[name] == pytest.approx(modulation.log[f"coefficient/{name}"])
        assert gradients[name] == pytest.approx(1.2 * modulator.kappa[name])
    assert sum(gradients.values()) == pytest.approx(1.2 * 2)
    assert len(set(gradients.values())) == 3
    assert modulation.rates == {}


@pytest.mark.parametrize("apply", ["lr", "off"])
def test_coefficients_may_go_to_the_learning_rates_or_nowhere(apply):
    modulator = MODULATORS["rebalance"](apply=apply)
    modulate(modulator, make_output())
    modulation, gradients = modulate(modulator, make_output(logits=torch.full((6, 1), 0.3)), step=1)
    assert set(gradients.values()) == {1.0}
    scaled = {name: 1.4 * value for name, value in modulator.kappa.items()}
    assert modulation.rates == ({} if apply == "off" else scaled)
    logged = {name: modulation.log[f"coefficient/{name}"] for name in MODALITIES}
    assert logged == (dict.fromkeys(MODALITIES, 1.0) if apply == "off" else scaled)


def test_without_a_fused_prediction_nothing_is_judged_and_nothing_scaled():
    modulator = MODULATORS["rebalance"]()
    output = make_output(fused_valid=False)
    assert not any(value.any() for value in modulator.observe(output, torch.zeros(6)).values())
    modulation, gradients = modulate(modulator, output)
    assert modulator.kappa is None and modulator.state_dict() == {"divergences": None, "kappa": None}
    assert set(gradients.values()) == {1.0}
    assert modulation.log == {f"coefficient/{name}": 1.0 for name in MODALITIES}


@pytest.mark.parametrize("absent", MODALITIES)
def test_a_step_whose_samples_all_lack_a_modality_rebalances_the_others(absent):
    modulator = MODULATORS["rebalance"]()
    modulate(modulator, make_output())
    modulate(modulator, make_output(logits=torch.full((6, 1), 0.3)), step=1)
    before = copy.deepcopy(modulator.state_dict())
    lacking = make_output(logits=torch.full((6, 1), 0.1))
    lacking.present[absent] = torch.zeros(6, dtype=torch.bool)
    modulation, gradients = modulate(modulator, lacking, step=2)
    after = modulator.state_dict()
    for part in ("divergences", "kappa"):
        assert [name for name in MODALITIES if after[part][name] == before[part][name]] == [absent]
    assert f"divergence/{absent}" not in modulation.log
    assert gradients == pytest.approx({name: 1.4 * value for name, value in modulator.kappa.items()})
    assert sum(gradients.values()) == pytest.approx(1.4 * 2)


@pytest.mark.parametrize("guard", ["smooth", "none"])
def test_a_corpus_without_a_modality_is_rebalanced_over_the_two_it_has(guard, tiny_model):
    """All coefficients used to stay at 1 for the whole run, without a message (choice B15)."""
    modulator = MODULATORS["rebalance"](guard=guard)
    modulator.attach(tiny_model, dict.fromkeys(MODALITIES, 16), 16)
    modulator.leave_out(["text"])
    assert modulator.modalities == tuple(tiny_model.probes) == ("audio", "vision")
    found = []
    for step, value in enumerate((1.0, 0.8, 0.1)):
        output = make_output(logits=torch.full((6, 1), value))
        output.present["text"] = torch.zeros(6, dtype=torch.bool)
        modulation, gradients = modulate(modulator, output, step)
        found.append({name: modulation.log[f"divergence/{name}"] for name in ("audio", "vision")})
        assert "coefficient/text" not in modulation.log and gradients["text"] == 1.0
        assert gradients["audio"] + gradients["vision"] == pytest.approx(1.4)
    expected = follow(found, guard)[-1]
    assert expected["audio"] != pytest.approx(0.5, abs=1e-3)
    assert modulator.kappa == pytest.approx(expected)


def test_probes_are_two_layers_as_wide_as_what_the_prediction_reads_and_no_part_of_the_model(tiny_model):
    """(3.5), and what is counted as the model's size."""
    before = count_parameters(tiny_model)
    modulator = MODULATORS["rebalance"](modalities=["text", "vision"])
    modulator.attach(tiny_model, {"text": 16, "audio": 16, "vision": 16}, 16)
    assert set(tiny_model.probes) == {"text", "vision"}
    hidden, _, output = tiny_model.probes["vision"]
    assert (hidden.in_features, hidden.out_features) == (16, 16)
    assert output.weight.shape == tiny_model.head.classifier.weight.shape  # "of equal shape"
    assert count_parameters(tiny_model) == before
