# SPDX-License-Identifier: Apache-2.0
"""Confidence of a checkpoint: fitted when a run ends or by `evaluate --calibrate`, and shown."""

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState

from msa_online.hub import load_checkpoint
from msa_online.modalities import VISIBLE_SETS
from msa_online.training.config_reader import parse_arguments
from msa_online.training.run import train as train_run
from msa_online_cli import main

WIDTHS = {"text": 4, "audio": 3, "vision": 2}
WITHOUT_VISION = slice(0, None, 3)
IN_FP32 = ("--mixed-precision", "no")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Features of 96 samples in equal splits; a third of each split has no vision."""
    random = np.random.default_rng(0)
    labels = random.uniform(-3, 3, size=96)
    arrays = {name: labels[:, None] + random.normal(size=(96, width)) for name, width in WIDTHS.items()}
    arrays["vision"][WITHOUT_VISION] = 0
    path = tmp_path_factory.mktemp("features") / "features.npz"
    np.savez(
        path,
        id=np.array([f"s{number}" for number in range(96)]),
        label=labels.round(3),
        mood=np.where(labels < -1, "low", np.where(labels > 1, "high", "even")),
        split=np.repeat(["train", "valid", "test"], 32),
        **arrays,
    )
    return path


@pytest.fixture
def train(archive, tmp_path):
    """A function that trains for an epoch with more keys in `data:`, and returns the run's folder."""

    def train(**data) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        document = {
            "model": {"feature_widths": WIDTHS, "head_kwargs": {"hidden_size": 8}},
            "data": {"path": str(archive), **data},
            "training": {
                "output_dir": str(tmp_path / "run"),
                "epochs": 1,
                "log_with": None,
                "mixed_precision": "no",
            },
        }
        train_run(parse_arguments(document), "none")
        return tmp_path / "run"

    return train


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_a_run_fits_intervals_on_validation_and_measures_them_on_test(train, capsys, archive):
    folder = train()
    printed = capsys.readouterr().out
    config = config_of(folder)
    fitted, record = config["confidence"], config["trained_on"]["confidence"]
    assert fitted["split"] == "valid" and fitted["level"] == 0.9 and fitted["temperatures"] == {}
    assert fitted["half_widths"].keys() == VISIBLE_SETS.keys()
    assert {fitted["samples"][name] for name in ("nothing", "text", "text+audio")} == {32}
    assert {fitted["samples"][name] for name in ("vision", "text+audio+vision")} == {21}
    assert record.keys() == {"test"} and record["test"].keys() == VISIBLE_SETS.keys()
    assert all(measured["samples"] == 32 for measured in record["test"].values())
    card = (folder / "README.md").read_text()
    row = f"| text+audio+vision | 21 | {fitted['half_widths']['text+audio+vision']:.3f} | 32 |"
    assert row in card and "90 % of the intervals contain the label" in card
    assert "test: intervals at 90%, fitted on valid" in printed and "coverage %" in printed
    assert main(["describe", str(folder)]) == 0
    assert "test: intervals at 90%, fitted on valid" in capsys.readouterr().out
    assert main(["evaluate", str(folder), str(archive), *IN_FP32, "--json", "-"]) == 0
    measured = json.loads(capsys.readouterr().out)["confidence"]["measured"]
    for name, values in record["test"].items():
        assert measured[name] == pytest.approx(values, rel=1e-5)


def test_a_run_on_classes_fits_temperatures(train, capsys):
    config = config_of(train(task="classification", label_column="mood"))
    assert config["confidence"]["half_widths"] == {}
    assert config["confidence"]["temperatures"].keys() == VISIBLE_SETS.keys()
    assert config["trained_on"]["confidence"]["test"]["text"].keys() >= {"ece", "ece_before", "confidence"}
    assert "calibrated probabilities, fitted on valid" in capsys.readouterr().out


def test_a_checkpoint_without_confidence_gets_it_by_evaluate_and_fine_tuning_drops_it(
    train, archive, tmp_path, capsys
):
    folder = train()
    config = config_of(folder)
    wanted = config.pop("confidence")
    (folder / "config.json").write_text(json.dumps(config))
    words = ["evaluate", str(folder), str(archive), *IN_FP32]
    capsys.readouterr()
    assert main(words) == 0 and "interval" not in capsys.readouterr().out
    assert main([*words, "--split", "valid", "--calibrate"]) == 0
    assert f"intervals at 90%, fitted on valid: stored in {folder}" in capsys.readouterr().out
    stored = config_of(folder)
    assert stored["confidence"]["half_widths"] == pytest.approx(wanted["half_widths"], rel=1e-5)
    assert "confidence" not in stored["trained_on"]  # measured with the old fit
    assert {**stored, "confidence": 0, "trained_on": 0} == {**config, "confidence": 0, "trained_on": 0}
    model, _ = load_checkpoint(folder)
    document = {
        "data": {"path": str(archive)},
        "training": {"init_from": str(folder), "output_dir": str(tmp_path / "second")},
    }
    from msa_online.training.model import _inherit

    assert model.config.confidence is not None
    assert _inherit(parse_arguments(document), []).confidence is None


def test_a_fit_that_cannot_be_stored_or_trusted_is_refused_before_data_are_read(capsys, tmp_path):
    def refused(*words: str) -> str:
        with pytest.raises(SystemExit):
            main(["evaluate", *words, "--calibrate"])
        return capsys.readouterr().err

    assert "needs --split valid" in refused(str(tmp_path), "data")
    assert "needs --split valid" in refused(
        str(tmp_path), "data", "--split", "valid", "--frame-rates", "input"
    )
    assert "config.json, which does not exist" in refused("me/model", "data", "--split", "valid")


RANK = """
import sys

from msa_online_cli import main

sys.exit(main(["evaluate", *sys.argv[1:], "--split", "valid", "--batch-size", "5", "--calibrate"]))
"""


@pytest.mark.slow
def test_two_processes_fit_the_same_numbers_as_one(train, archive, on_two_processes, tmp_path):
    folder = train()
    alone = config_of(folder)["confidence"]
    statuses, printed = on_two_processes(RANK, tmp_path, folder, archive, *IN_FP32)
    assert statuses == [0, 0], "".join(printed)
    assert sum("stored in" in output for output in printed) == 1
    together = config_of(folder)["confidence"]
    assert together["samples"] == alone["samples"]
    assert together["half_widths"] == pytest.approx(alone["half_widths"], rel=1e-5)
