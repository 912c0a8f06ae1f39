# SPDX-License-Identifier: Apache-2.0
import pytest

from msa_online.studies.comparison import RunScore, compare
from msa_online.studies.sensitivity import draw_sensitivity, sweeps
from msa_online.studies.study import Study

VARIANTS = {
    "published": {},
    "gamma 1": {"model.loss_weights.emc": 1},
    "without EMC": {"model.loss_weights.emc": 0},
    "one zeta": {"model.loss_weights.msd": 0.3},
    "a choice": {"model.head_kwargs.enhanced": "replace"},
    "a switch": {"model.head_kwargs.missing_tokens": False},
    "two settings": {"model.loss_weights.emc": 5, "model.loss_weights.cce": 5},
}


@pytest.fixture
def make_study(tmp_path):
    """A function that makes a study of EBMC with the given settings."""

    def make_study(**settings) -> Study:
        return Study("ebmc_offline", str(tmp_path), [1, 2], VARIANTS, **settings)

    return make_study


def test_variants_that_change_one_number_are_points_of_its_sweep_beside_the_unchanged_one(make_study):
    study = make_study()
    expected = {"model.loss_weights.emc": {0: "without EMC", 0.1: "published", 1: "gamma 1"}}
    assert sweeps(study, study.runs()) == expected
    assert list(sweeps(study, study.runs())["model.loss_weights.emc"]) == [0, 0.1, 1]


def test_numbers_that_yaml_reads_as_text_are_points_too(tmp_path):
    changed = {"slow": {"training.learning_rate": "1e-4"}, "fast": {"training.learning_rate": "1e-2"}}
    study = Study("ebmc_offline", str(tmp_path), [1], changed)
    assert sweeps(study, study.runs()) == {"training.learning_rate": {1e-4: "slow", 1e-2: "fast"}}
    changed = {"low": {"model.loss_weights.emc": "1e-3"}, "high": {"model.loss_weights.emc": 1}}
    study = Study("ebmc_offline", str(tmp_path), [1], changed)
    assert sweeps(study, study.runs()) == {"model.loss_weights.emc": {1e-3: "low", 1: "high"}}


def test_a_sweep_has_finished_variants_only(make_study):
    study = make_study()
    runs = [run for run in study.runs() if run.variant != "without EMC"]
    assert sweeps(study, runs) == {}
    runs = [run for run in study.runs() if run.variant != "published"]
    assert sweeps(study, runs) == {"model.loss_weights.emc": {0: "without EMC", 1: "gamma 1"}}


def test_a_study_over_settings_has_no_sweeps(make_study):
    study = make_study(settings={"rate .3": {"data.missing.rates": 0.3}})
    assert sweeps(study, study.runs()) == {}


@pytest.mark.parametrize("metrics", [{"mae": 0.8}, {"accuracy": 0.7, "f1_weighted": 0.7}])
def test_sweeps_become_a_picture(metrics, make_study, tmp_path):
    study = make_study()
    conditions = {"text+audio+vision": metrics, "text": metrics}
    compared = compare([RunScore(run.variant, run.seed, conditions) for run in study.runs()])
    draw_sensitivity(compared, sweeps(study, study.runs()), "test", tmp_path / "sensitivity.png")
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
