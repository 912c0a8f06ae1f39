# SPDX-License-Identifier: Apache-2.0
"""PaSE in training: prototypes and Shapley modulation in the loop, and in whole runs of train.py."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from msa_online import MSAConfig, MSAModel
from msa_online.methods import MODULATORS, GradientModulator, ModulationContext, ShapleyModulator
from msa_online.modalities import MODALITIES
from msa_online.training.config_reader import parse_arguments
from msa_online.training.yaml_reader import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:all predictions are", "ignore:all labels are")

WIDTHS = {"text": 6, "audio": 4, "vision": 5}
TASK_ALONE = {"unimodal": 0.0, "pcl": 0.0, "cal": 0.0}  # the others are no means over samples


@pytest.fixture
def pase_config(still_config):
    """PaSE on clips, without dropout, under the task loss alone."""
    settings = {"head": "pase", "head_kwargs": {"hidden_size": 16, "depth": 1, "dropout": 0.0}}
    return MSAConfig(**{**still_config.to_dict(), **settings, "loss_weights": TASK_ALONE})


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_two_accumulated_halves_move_prototypes_and_coefficients_as_one_batch(pase_config, rows, make_trial):
    whole = make_trial(pase_config, rows, ShapleyModulator(latest=0, interval=1), batch_size=8)
    end = whole.train(3)
    modulator = ShapleyModulator(latest=0, interval=1)
    halves = make_trial(pase_config, rows, modulator, batch_size=4, accumulation=2)
    found = halves.train(3)
    assert end["head.prototypes.means"].any()
    for name, value in end.items():
        torch.testing.assert_close(
            found[name], value, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert whole.modulator.steps == halves.modulator.steps == list(range(9))
    assert min(min(whole.logged(f"coefficient/{name}")) for name in MODALITIES) < 1.0
    for one, other in zip(whole.modulator.logs, halves.modulator.logs, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-6)


def test_the_coefficients_of_an_epoch_stand_still_in_it(pase_config, rows, make_trial):
    trial = make_trial(pase_config, rows, ShapleyModulator(latest=0, interval=1))
    trial.train(5)
    for name in MODALITIES:
        found = trial.logged(f"coefficient/{name}")
        assert [len(set(found[start : start + 3])) for start in range(0, 15, 3)] == [1] * 5
        assert found[0] == 1.0  # nothing is known yet
    assert len(set(trial.logged("coefficient/text") + trial.logged("coefficient/audio"))) > 2


@pytest.mark.parametrize("settings", [{"latest": 100}, {"latest": 0, "apply": "off"}])
def test_looking_for_contributions_changes_no_training(settings, pase_config, rows, make_trial):
    pase_config.head_kwargs["dropout"] = 0.3
    pase_config.loss_weights = {}
    plain = make_trial(pase_config, rows, GradientModulator()).train()
    watched = make_trial(pase_config, rows, ShapleyModulator(interval=1, **settings))
    assert equal(plain, watched.train())
    assert watched.modulator.logs[-1].keys() >= {f"contribution/{name}" for name in MODALITIES}


def test_a_first_step_in_the_second_phase_is_that_of_gradients_already_scaled(pase_config, rows, make_trial):
    """Once a step, before clipping, whatever the accumulation."""

    class Known(ShapleyModulator):
        def modulate(self, context: ModulationContext):
            self.coefficients = {"text": 0.4, "audio": 0.6, "vision": 1.0}
            owned = context.modality_parameters
            found = {name: [value.grad.clone() for value in values] for name, values in owned.items()}
            modulation = super().modulate(context)
            for name, values in owned.items():
                for value, before in zip(values, found[name], strict=True):
                    torch.testing.assert_close(value.grad, self.coefficients[name] * before)
            self.calls = getattr(self, "calls", 0) + 1
            return modulation

    modulator = Known(latest=0)
    trial = make_trial(pase_config, rows, modulator, batch_size=4, accumulation=2)
    trial.train(1)
    assert modulator.calls == 3


def test_fp16_with_loss_scaling_is_trained_as_fp32_is(pase_config, rows, make_trial):
    pase_config.loss_weights = {"pcl": 0.01, "cal": 0.1}
    exact = make_trial(pase_config, rows, ShapleyModulator(latest=0, interval=1))
    end = exact.train()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = make_trial(pase_config, rows, ShapleyModulator(latest=0, interval=1), scaler=scaler)
    found = scaled.train()
    assert scaled.loop.progress.skipped == 0
    assert found["head.prototypes.means"].dtype == torch.float32
    seen, expected = (run["head.prototypes.means"].any(dim=-1) for run in (found, end))
    assert torch.equal(seen, expected)
    torch.testing.assert_close(
        found["head.prototypes.means"], end["head.prototypes.means"], atol=5e-3, rtol=0
    )
    for name, value in exact.losses.items():
        assert math.isfinite(scaled.losses[name])
        if "/" not in name:
            assert scaled.losses[name] == pytest.approx(value, rel=0.03, abs=1e-3), name


@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_not_finite_gets_into_no_prototype(scaled, pase_config, rows, make_trial):
    rows[5]["audio_values"][:] = math.nan
    rows[5]["modality_present"][1] = True
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    trial = make_trial(
        pase_config, rows, ShapleyModulator(interval=1, latest=0), batch_size=4, accumulation=2, scaler=scaler
    )
    start = trial.loop.bare_model.head.prototypes.means.clone()
    end = trial.train(2)
    assert trial.loop.progress.skipped == 2
    assert all(torch.isfinite(value).all() for value in end.values())
    assert not torch.equal(end["head.prototypes.means"], start)
    assert all(math.isfinite(value) for log in trial.modulator.logs for value in log.values())


def test_prototypes_are_saved_with_the_model(pase_config, rows, make_trial, tmp_path):
    trial = make_trial(pase_config, rows, GradientModulator())
    end = trial.train(1)
    assert end["head.prototypes.means"].any()
    trial.loop.bare_model.save_pretrained(tmp_path)
    loaded, notes = MSAModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not (notes["missing_keys"] or notes["unexpected_keys"] or notes["mismatched_keys"])
    assert equal(dict(loaded.state_dict()), end)


def test_a_checkpoint_without_prototypes_knows_no_class(pase_config, tmp_path):
    """They are empty buffers on the meta device: what stands there would be chance."""
    model = MSAModel(pase_config)
    with torch.no_grad():
        model.head.prototypes.means.fill_(7.0)
    state = {name: value for name, value in model.state_dict().items() if "prototypes" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded, _ = MSAModel.from_pretrained(tmp_path, output_loading_info=True)  # else it is refused
    assert not loaded.head.prototypes.known.any() and not loaded.head.prototypes.means.any()


def write_archive(path: Path, labels: np.ndarray, absent: dict[str, slice]) -> Path:
    """Features of 32 training, 8 validation and 8 test samples; modalities are absent in some."""
    random = np.random.default_rng(0)
    arrays = {name: random.normal(size=(48, 3, width)) for name, width in WIDTHS.items()}
    for name, where in absent.items():
        arrays[name][where] = 0
    split = np.array(["train"] * 32 + ["valid"] * 8 + ["test"] * 8)
    np.savez(path, id=np.array([f"s{n}" for n in range(48)]), label=labels, split=split, **arrays)
    return path


SCORES = np.random.default_rng(1).uniform(-3, 3, size=48).round(3)
MOODS = np.array(["low", "even", "high"])[np.arange(48) % 3]


def described(folder: Path, archive: Path, *, head=None, data=None, **training) -> dict:
    return {
        "model": {
            "feature_widths": WIDTHS,
            "head": "pase",
            "head_kwargs": {"hidden_size": 8, **(head or {})},
        },
        "data": {"path": str(archive), **(data or {})},
        "training": {
            "output_dir": str(folder),
            "epochs": 4,
            "batch_size": 8,
            "modulator": "shapley",
            "modulator_kwargs": {"latest": 2, "interval": 1},
            "log_with": None,
            **training,
        },
    }


def history(run: Path) -> list[dict]:
    return json.loads((run / "history.json").read_text())


class Stopping(ShapleyModulator):
    """In a run that is interrupted before a step."""

    stop_before: int | None = None

    def modulate(self, context: ModulationContext):
        if context.step == self.stop_before:
            raise KeyboardInterrupt
        return super().modulate(context)


@pytest.mark.parametrize("utility", ["task", "prototype"])
@pytest.mark.parametrize("stop", [6, 10], ids=["before the switch", "after the switch"])
def test_a_stopped_run_lands_where_an_uninterrupted_one_does(utility, stop, train, tmp_path, monkeypatch):
    monkeypatch.setitem(MODULATORS, "stopping", Stopping)
    archive = write_archive(tmp_path / "features.npz", SCORES, {"audio": slice(0, None, 4)})
    settings = {
        "modulator": "stopping",
        "modulator_kwargs": {"utility": utility, "latest": 2, "interval": 3, "warmup": 0},
        "modality_dropout": {"text": 0.3},
    }
    whole = train(described(tmp_path / "whole", archive, **settings))
    monkeypatch.setattr(Stopping, "stop_before", stop)
    with pytest.raises(KeyboardInterrupt):
        train(described(tmp_path / "stopped", archive, **settings))
    monkeypatch.setattr(Stopping, "stop_before", None)
    stopped = train(described(tmp_path / "stopped", archive, **settings, resume=True))
    assert history(whole) == history(stopped)
    assert equal(*(load_file(run / "model.safetensors") for run in (whole, stopped)))
    phases = [epoch["losses"]["phase/balancing"] for epoch in history(whole)]
    assert phases == [0.0, 0.0, 1.0, 1.0]
    lowest = [min(epoch["losses"][f"coefficient/{name}"] for name in MODALITIES) for epoch in history(whole)]
    assert lowest[:2] == [1.0, 1.0] and max(lowest[2:]) < 1.0
    assert load_file(whole / "model.safetensors")["head.prototypes.means"].any()


def test_the_second_phase_starts_before_patience_ends_the_run_and_its_best_epoch_is_published(
    train, tmp_path, capsys
):
    archive = write_archive(tmp_path / "features.npz", SCORES, {})
    settings = {"patience": 2, "learning_rate": 3e-3, "epochs": 30}
    modulator = {"modulator_kwargs": {"latest": 100, "patience": 50, "interval": 1}}
    run = train(described(tmp_path / "run", archive, **settings, **modulator))
    phases = [epoch["losses"]["phase/balancing"] for epoch in history(run)]
    switch = phases.index(1.0)
    maes = [epoch["valid"]["mae"] for epoch in history(run)]
    record = MSAConfig.from_pretrained(run).trained_on
    (first,) = record["earlier_phases"]
    assert first["epoch"] == maes.index(min(maes[:switch])) + 1 == switch - 2
    assert record["epoch"] == switch + maes[switch:].index(min(maes[switch:])) + 1 == len(maes) - 2
    for phase in (first, record):
        found = phase["results"]["valid"]["text+audio+vision"]["mae"]
        assert found == pytest.approx(maes[phase["epoch"] - 1], abs=1e-5)
    output = " ".join(capsys.readouterr().out.split())
    assert f"phase 1, best epoch {first['epoch']}: valid MAE" in output and "(published)" in output
    assert f"epoch {record['epoch']}; best epoch {first['epoch']} before" in (run / "README.md").read_text()
    assert not (run / "stages").exists()


TRAINING = np.arange(48) < 32
BAD = {
    "one class in all": (np.full(48, 1.2), {}, {}),
    "one class in training": (np.where(TRAINING, 1.2, SCORES), {}, {}),
    "a class never in training": (np.where(TRAINING & (MOODS == "low"), "even", MOODS), {}, {}),
    "no text in training": (SCORES, {"text": slice(0, 32)}, {}),
    "no vision at all": (SCORES, {"vision": slice(None)}, {}),
    "no vision at all, classes": (MOODS, {"vision": slice(None)}, {}),
    "bins that are empty": (np.clip(SCORES, 0, 3), {}, {"head": {"bins": 7}}),
}


@pytest.mark.parametrize("utility", ["task", "prototype"])
@pytest.mark.parametrize("kind", BAD)
def test_poor_data_are_trained_on_to_the_end_and_everything_stays_finite(kind, utility, train, tmp_path):
    labels, absent, settings = BAD[kind]
    archive = write_archive(tmp_path / "features.npz", labels, absent)
    if labels.dtype.kind == "U":
        settings = settings | {"data": {"task": "classification"}}
    kwargs = {"utility": utility, "latest": 1, "interval": 1}
    run = train(described(tmp_path / "run", archive, modulator_kwargs=kwargs, epochs=3, **settings))
    for epoch in history(run):
        for name, value in epoch["losses"].items():
            assert math.isfinite(value), name
    weights = load_file(run / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    last = history(run)[-1]["losses"]
    for name in MODALITIES:
        if name in absent:
            assert f"coefficient/{name}" not in last and f"contribution/{name}" not in last
        else:
            assert 1 / math.e - 1e-6 <= last[f"coefficient/{name}"] <= 1
    record = MSAConfig.from_pretrained(run).trained_on
    assert record["skipped_steps"] == 0


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("head_kwargs", "bins", 4, "one of 2, 3, 5, 7"),
        ("head_kwargs", "gate", "x", "one of entropy, learned, uniform"),
        ("head_kwargs", "cal_gradient", "batch", "one of straight_through, ema, none"),
        ("head_kwargs", "momentum", 1, "below 1"),
        ("head_kwargs", "temperature", 0, "above 0"),
        ("head_kwargs", "epsilon", -1, "above 0"),
        ("modulator_kwargs", "utility", "loss", "one of task, prototype"),
        ("modulator_kwargs", "switch", "entropy", "one of plateau, fixed"),
        ("modulator_kwargs", "apply", "both", "one of gradient, lr, off"),
        ("modulator_kwargs", "interval", 0, "at least 1"),
        ("modulator_kwargs", "patience", 0, "at least 1"),
        ("modulator_kwargs", "warmup", -1, "at least 0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_the_configuration(section, key, value, said, tmp_path):
    document = described(tmp_path / "run", tmp_path / "features.npz")
    document["model" if section == "head_kwargs" else "training"][section] = {key: value}
    with pytest.raises(ConfigurationError, match=rf"run\.yaml: .*{section}.*{key}='?{value}.*{said}"):
        parse_arguments(document, origin="run.yaml")


def test_prototypes_of_a_head_that_has_none_are_refused_before_anything_is_written(train, tmp_path):
    archive = write_archive(tmp_path / "features.npz", SCORES, {})
    document = described(tmp_path / "run", archive, modulator_kwargs={"utility": "prototype"})
    document["model"]["head"] = "late_fusion"
    expected = (
        "training.modulator=shapley: utility=prototype needs model.head=pase, not late_fusion, .*"
        "set training.modulator_kwargs.utility=task"
    )
    with pytest.raises(ConfigurationError, match=expected):
        train(document)
    assert not (tmp_path / "run").exists()
