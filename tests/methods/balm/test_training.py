# SPDX-License-Identifier: Apache-2.0
"""BALM in the loop: what its probes and its calibration leave alone, under accumulation and precision."""

import copy
import math

import pytest
import torch

from msa_online import MSAConfig
from msa_online.methods import GradientModulator, RebalancingModulator

QUIET = {"spatial": "off", "apply": "off"}  # probes alone


@pytest.fixture
def complete_rows(rows):
    return [{**row, "modality_present": torch.ones(3, dtype=torch.bool)} for row in rows]


def backbone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith(("probes.", "calibrator."))}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_the_first_step_of_a_neutral_balm_is_that_of_the_bare_model(still_config, complete_rows, make_trial):
    """Fresh calibration, no spatial term, rho 1.5: the first divergences show no progress of anybody."""
    bare = make_trial(still_config, complete_rows[:8], GradientModulator(), clip_norm=math.inf)
    start = {name: value.clone() for name, value in bare.loop.bare_model.state_dict().items()}
    config = MSAConfig(**{**still_config.to_dict(), "calibrator": "fcm"})
    modulator = RebalancingModulator(strength=1.5, spatial_weight=0.0)
    balm = make_trial(config, complete_rows[:8], modulator, clip_norm=math.inf)
    lacking = balm.loop.bare_model.load_state_dict(start, strict=False)
    assert not lacking.unexpected_keys
    assert all(name.startswith(("probes.", "calibrator.")) for name in lacking.missing_keys)
    ends = [trial.train(1) for trial in (bare, balm)]
    assert balm.loop.progress.step == 1 and len(set(balm.logged("divergence/text"))) == 1
    assert_equal(backbone(ends[1]), backbone(ends[0]))
    assert any(not torch.equal(value, start[name]) for name, value in ends[0].items())
    gates = [value for name, value in ends[1].items() if name.startswith("calibrator.gates.")]
    assert len(gates) == 6 and any(value.any() for value in gates)  # calibration has begun


@pytest.mark.parametrize("clip_norm", [1e-2, 1.0])
def test_probes_change_neither_the_model_nor_how_its_gradients_are_clipped(
    clip_norm, still_config, rows, make_trial
):
    plain = make_trial(still_config, rows, GradientModulator(), clip_norm=clip_norm)
    probed = make_trial(still_config, rows, RebalancingModulator(**QUIET), clip_norm=clip_norm)
    before = {name: value.clone() for name, value in probed.loop.bare_model.state_dict().items()}
    ends = [trial.train() for trial in (plain, probed)]
    assert_equal(backbone(ends[1]), ends[0])
    moved = [name for name in before if not torch.equal(before[name], ends[1][name])]
    assert len([name for name in moved if name.startswith("probes.")]) == 12
    assert probed.losses["balm"] == 0.0 and probed.losses["probe"] > 0


def test_probes_learn(features_config, feature_rows, make_trial):
    trial = make_trial(features_config("late_fusion"), feature_rows, RebalancingModulator(**QUIET))
    trial.loop.scheduler.base_lrs = [0.01 for _ in trial.loop.scheduler.base_lrs]
    trial.train(1)
    first = trial.losses["probe"]
    trial.train(40)
    trial.train(1)  # in the batches of the first epoch
    assert trial.losses["probe"] < 0.9 * first


def test_a_whole_balm_changes_what_is_learned(still_config, rows, make_trial):
    ends = {}
    for name, settings in (
        ("probes", QUIET),
        ("BALM", {}),
        ("BALM-D", {"spatial": "off"}),
        ("BALM-S", {"apply": "off"}),
        ("BALM-M", {"progress": "mse"}),
        ("CGGM", {"progress": "errors", "strength": 1.3, "spatial_weight": 0.2}),
        ("as printed", {"guard": "none"}),
        ("abs", {"mod_form": "abs"}),
        ("rates", {"apply": "lr"}),
    ):
        trial = make_trial(still_config, rows, RebalancingModulator(**settings), clip_norm=math.inf)
        ends[name] = trial.train(3)["encoders.audio.convolutions.0.weight"]
        assert torch.isfinite(ends[name]).all()
        assert (trial.losses["balm"] == 0) == (settings.get("spatial") == "off")
        scaled = {trial.logged(f"coefficient/{modality}")[-1] for modality in ("text", "audio", "vision")}
        assert (scaled == {1.0}) == (settings.get("apply") == "off")
    assert len({tuple(value.flatten().tolist()) for value in ends.values()}) == len(ends)


@pytest.mark.parametrize("settings", [{}, {"spatial": "off"}, {"progress": "mse"}], ids=str)
@pytest.mark.parametrize(("samples", "batch_size"), [(24, 4), (21, 4), (21, 1)])
def test_accumulated_parts_are_rebalanced_as_one_batch(
    samples, batch_size, settings, still_config, complete_rows, make_trial
):
    """Of complete samples: a probe's loss is a mean over those that have its modality.

    Not so under `mod_form: abs`: the absolute value of a mean is not linear in the batch.
    """
    rows = complete_rows[:samples]
    whole = make_trial(still_config, rows, RebalancingModulator(**settings), batch_size=8)
    whole.train()
    parts = {"batch_size": batch_size, "accumulation": 8 // batch_size}
    halves = make_trial(still_config, rows, RebalancingModulator(**settings), **parts)
    halves.train()
    assert whole.modulator.steps == halves.modulator.steps == list(range(6))
    for name in ("text", "audio", "vision"):
        coefficients, divergences = (f"{number}/{name}" for number in ("coefficient", "divergence"))
        assert halves.logged(coefficients) == pytest.approx(whole.logged(coefficients), abs=3e-4)
        assert halves.logged(divergences) == pytest.approx(whole.logged(divergences), rel=1e-3)
        assert len(set(whole.logged(coefficients))) > 3


# The gradient of a cosine is the steeper, the shorter what it compares: CP/SL needs a smaller scale than
# without the spatial term. That of EBMC differentiates a LayerNorm twice, which overflows in half precision;
# under autocast a CPU computes it so, a GPU in fp32.
IN_HALF_PRECISION = [
    ("late_fusion", "latent", 1024.0),
    pytest.param("cpsl", "latent", 64.0, marks=pytest.mark.needs("cpsl")),
    pytest.param("ebmc", "off", 64.0, marks=pytest.mark.needs("ebmc")),
]


@pytest.mark.parametrize(("head", "spatial", "scale"), IN_HALF_PRECISION)
def test_fp16_with_loss_scaling_is_rebalanced_as_fp32_is(
    head, spatial, scale, features_config, feature_rows, make_trial
):
    modalities = ["audio", "vision"] if head == "cpsl" else ["text", "audio", "vision"]
    still = {"dropout": 0.0} | ({"classifier_dropout": 0.0, "ame": False} if head == "cpsl" else {})
    config = features_config(head, **still)
    trials = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=scale)):
        modulator = RebalancingModulator(modalities=modalities, spatial=spatial)
        trials.append(make_trial(config, feature_rows, modulator, scaler=scaler))
        state = trials[-1].train()
        assert all(torch.isfinite(value).all() for value in state.values())
        assert all(math.isfinite(value) for value in trials[-1].losses.values())
        assert trials[-1].loop.progress.skipped == 0
    exact, scaled = trials
    for name in modalities:
        coefficients, divergences = (f"{number}/{name}" for number in ("coefficient", "divergence"))
        assert scaled.logged(coefficients) == pytest.approx(exact.logged(coefficients), rel=0.05)
        assert scaled.logged(divergences) == pytest.approx(exact.logged(divergences), rel=0.05)
    assert scaled.losses["balm"] == pytest.approx(exact.losses["balm"], rel=0.05)
    assert (exact.losses["balm"] > 0) == (spatial == "latent")


@pytest.mark.parametrize("scaled", [False, True])
def test_a_probe_alone_whose_gradient_is_not_finite_skips_the_step_and_keeps_the_coefficients(
    scaled, still_config, rows, make_trial
):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    trial = make_trial(still_config, rows, RebalancingModulator(), scaler=scaler)
    trial.train(1)
    before = copy.deepcopy(trial.modulator.state_dict())
    weight = trial.loop.bare_model.probes["audio"][0].weight
    hook = weight.register_hook(lambda gradient: gradient * math.inf)
    state = trial.train(1)
    assert trial.loop.progress.skipped == 3 and trial.modulator.steps == [0, 1, 2]
    assert trial.modulator.state_dict() == before
    assert all(torch.isfinite(value).all() for value in state.values())
    hook.remove()
    trial.train(1)
    assert trial.loop.progress.skipped == 3 and trial.modulator.steps == list(range(6))


@pytest.mark.needs("ebmc")
def test_before_ebmc_fuses_only_probes_are_trained_and_then_coefficients_begin(
    features_config, feature_rows, make_trial
):
    modulator = RebalancingModulator()
    trial = make_trial(features_config("ebmc"), feature_rows, modulator)
    head = trial.loop.bare_model.head
    head.start_stage("enhance")
    before = {name: value.clone() for name, value in trial.loop.bare_model.probes.state_dict().items()}
    trial.train(1, "enhance")
    assert modulator.kappa is None and trial.losses["balm"] == 0.0
    for name in ("text", "audio", "vision"):
        assert trial.logged(f"coefficient/{name}") == [1.0] * 3
    assert not any("divergence/" in name for name in trial.losses)
    after = trial.loop.bare_model.probes.state_dict()
    assert all(not torch.equal(value, after[name]) for name, value in before.items())
    head.start_stage("balance")
    trial.train(1, "balance")
    assert modulator.kappa is not None and trial.losses["balm"] > 0.0  # from its second step on
    for name in ("text", "audio", "vision"):
        assert trial.logged(f"coefficient/{name}")[3] == pytest.approx(1.4 * 2 / 3)
    assert len(set(trial.logged("coefficient/audio")[3:])) == 3


def test_a_step_uses_the_coefficients_of_the_one_before_in_the_spatial_term(
    still_config, complete_rows, make_trial
):
    modulator = RebalancingModulator(spatial_weight=0.5)
    trial = make_trial(still_config, complete_rows[:8], modulator)
    trial.train(1)
    assert trial.losses["balm"] == 0.0  # (3.10): L_mod is 0 at first
    for _ in range(3):
        kappa = dict(modulator.kappa)
        trial.train(1)
        assert modulator.kappa != kappa
        assert 0 <= trial.losses["balm"] <= 0.5 * 2 * sum(kappa.values()) / 3
