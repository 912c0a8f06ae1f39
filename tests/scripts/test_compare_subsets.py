# SPDX-License-Identifier: Apache-2.0
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from msa_online.modalities import CONDITIONS
from msa_online.studies.study import read_study
from msa_online.training.checkpoint import PREDICTIONS


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("compare_subsets")


@pytest.fixture
def write_study(tmp_path: Path):
    """A function that writes a study, and finished runs with the given error under each condition."""

    def write_study(settings: dict, errors: dict[str, float]) -> str:
        path = tmp_path / "study.yaml"
        document = {
            "config": "late_fusion_plain_offline",
            "output_dir": str(tmp_path / "runs"),
            "seeds": [1, 2],
        }
        path.write_text(yaml.safe_dump({**document, "variants": {"plain": {}}, "settings": settings}))
        noise = np.random.default_rng(0)
        labels = noise.normal(size=50)
        for run in read_study(path).runs():
            seen = [run.arguments.training.condition] if settings else list(errors)
            logits = {name: labels + noise.normal(errors[name], 0.01, labels.shape) for name in seen}
            run.folder.mkdir(parents=True)
            (run.folder / "config.json").write_text(json.dumps({"trained_on": {"results": {}}}))
            arrays = {f"test/{name}": each[:, None] for name, each in logits.items()}
            np.savez(run.folder / PREDICTIONS, **arrays, **{"test/labels": labels})
        return str(path)

    return write_study


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.split("|")[1:-1]]


def test_a_modality_that_makes_trained_models_worse_is_marked(script, write_study, capsys):
    errors = {"text": 0.5, "vision": 0.7, "text+vision": 0.6}
    path = write_study({name: {"training.condition": name} for name in errors}, errors)
    assert script.main([path]) == 0
    *rows, _, summary = capsys.readouterr().out.splitlines()[2:]
    assert [cells(row)[:4] for row in rows] == [
        ["plain", "trained", "text", "text+vision"],
        ["plain", "trained", "vision", "text+vision"],
    ]
    differences = [cells(row)[-2].partition("\\*") for row in rows]
    assert [float(number) for number, *_ in differences] == pytest.approx([0.1, -0.1], abs=0.01)
    assert [mark for _, mark, _ in differences] == ["\\*", ""]
    assert summary == "larger error beyond the interval: 1 of 2"


def test_one_model_is_compared_under_all_nine_pairs(script, write_study, capsys):
    path = write_study({}, {name: 0.9 - 0.2 * len(visible) for name, visible in CONDITIONS.items()})
    assert script.main([path]) == 0
    *rows, _, summary = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 9 and {cells(row)[1] for row in rows} == {"tested"}
    assert [float(cells(row)[-2]) for row in rows] == pytest.approx([-0.2] * 9, abs=0.01)
    assert summary.endswith("0 of 9")


def test_a_study_without_finished_runs_is_one_line(script, tmp_path, capsys):
    assert script.main(["subsets", f"output_dir={tmp_path}"]) == 1
    assert "no finished runs under two subsets" in capsys.readouterr().err
