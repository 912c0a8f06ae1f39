# SPDX-License-Identifier: Apache-2.0
import json
import warnings
from pathlib import Path

import pytest

from msa_online.studies.convergence import RunEnd, draw_diagnostics, draw_learning_curves, warnings_of
from msa_online.studies.study import StudyRun
from msa_online.training.config import RunArguments, StageArguments, TrainingArguments
from msa_online.training.yaml_reader import ConfigurationError


@pytest.fixture
def finished(tmp_path: Path):
    """A function that writes the files of a finished run, with an epoch for each name of a stage."""

    def finished(names: list[str], best: int, variant: str = "plain", seed: int = 1, **training) -> StudyRun:
        folder = tmp_path / variant / str(seed)
        folder.mkdir(parents=True)
        history = [
            {
                "epoch": number,
                "stage": stage,
                "losses": {"unimodal" if stage == "alone" else "task": 1 / number},
                "valid": {"mae": 1.0, "loss": 2 / number},
            }
            for number, stage in enumerate(names, start=1)
        ]
        (folder / "history.json").write_text(json.dumps(history))
        record = {
            "epoch": best,
            "results": {},
            "effort": {"steps": 1230, "hours": 0.05},
            "parameters": {"all": 4567},
        }
        (folder / "config.json").write_text(json.dumps({"trained_on": record}))
        return StudyRun(variant, seed, folder, [], RunArguments(training=TrainingArguments(**training)))

    return finished


def test_a_run_that_still_improves_at_its_limit_has_not_converged_and_is_named(finished):
    late = RunEnd.of(finished(["fit"] * 20, best=19, epochs=20, variant="late"))
    assert (late.reason, late.converged) == ("limit", False)
    settled = RunEnd.of(finished(["fit"] * 20, best=18, epochs=20, variant="settled"))
    assert (settled.reason, settled.converged) == ("limit", True)
    patient = RunEnd.of(finished(["fit"] * 12, best=11, epochs=20, patience=1, variant="patient"))
    assert (patient.reason, patient.converged) == ("patience", True)
    (line,) = warnings_of([late, settled, patient])
    assert "late (seed 1) ended at its limit of 20 epochs, best epoch 19" in line


def test_only_the_last_stage_decides_and_its_epochs_are_counted_alone(finished):
    stages = {"stages": [StageArguments("alone", 10), StageArguments("fit", 10)]}
    early = RunEnd.of(finished(["alone"] * 10 + ["fit"] * 10, best=15, **stages))
    assert early.converged and (early.epochs, early.offered) == (20, 20)
    late = RunEnd.of(finished(["alone"] * 3 + ["fit"] * 10, best=13, variant="other", **stages))
    assert not late.converged and (late.epochs, late.offered) == (13, 20)


def test_a_row_shows_epochs_steps_time_and_parameters(finished):
    row = RunEnd.of(finished(["fit"] * 4, best=4, epochs=4)).cells
    assert row == ["plain", "1", "4 of 4", "4", "limit, not converged", "1,230", "3.0", "4,567"]


def test_learning_curves_have_a_panel_for_each_variant(finished, tmp_path):
    ends = [
        RunEnd.of(finished(["alone", "fit", "fit"], best=2, variant=variant, seed=seed, epochs=9))
        for variant in ("a", "b")
        for seed in (1, 2)
    ]
    draw_learning_curves(ends, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_damaged_history_is_one_line_with_the_remedy(finished):
    run = finished(["fit"], best=1)
    (run.folder / "history.json").write_text("[")
    with pytest.raises(ConfigurationError, match="history.json cannot be read.*delete"):
        RunEnd.of(run)


def test_diagnostics_are_drawn_where_they_were_measured_beside_models_of_one_modality(finished, tmp_path):
    plain = RunEnd.of(finished(["fit"] * 3, best=2, epochs=9))
    assert not draw_diagnostics([plain], tmp_path / "diagnostics.png")
    joint = finished(["fit"] * 3, best=2, epochs=9, variant="joint")
    history = json.loads((joint.folder / "history.json").read_text())
    for entry in history:
        entry["losses"] |= {f"{kind}/text": 0.5 for kind in ("share", "probe", "modality_gradient")}
    (joint.folder / "history.json").write_text(json.dumps(history))
    alone = finished(["fit"] * 3, best=2, epochs=9, variant="alone", condition="text")
    assert draw_diagnostics([RunEnd.of(joint), RunEnd.of(alone), plain], tmp_path / "diagnostics.png")
    assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")


def test_variants_may_measure_different_diagnostics(finished, tmp_path):
    ends = []
    for kind in ("share", "probe"):
        run = finished(["fit"] * 3, best=2, epochs=9, variant=kind)
        history = json.loads((run.folder / "history.json").read_text())
        for entry in history:
            entry["losses"][f"{kind}/text"] = 0.5
        (run.folder / "history.json").write_text(json.dumps(history))
        ends.append(RunEnd.of(run))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an empty panel has no legend
        assert draw_diagnostics(ends, tmp_path / "diagnostics.png")
