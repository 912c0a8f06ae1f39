# SPDX-License-Identifier: Apache-2.0
import importlib
from pathlib import Path

import numpy as np
import pytest

from msa_online.methods import MODULATORS

SETTINGS = ["model.feature_widths={text: 5, audio: 3, vision: 4}"]
SETTINGS += ["model.head_kwargs={hidden_size: 8, dropout: 0}", "training.weight_decay=0"]
SETTINGS += ["training.batch_size=4", "training.epochs=4", "training.clip_norm=1e6"]


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    yield importlib.import_module("measure_modulation")
    MODULATORS.pop("constant", None)


@pytest.fixture
def features(tmp_path) -> str:
    random = np.random.default_rng(0)
    label = random.uniform(-3, 3, 36).astype(np.float32)
    seen = {
        name: label[:, None] * random.normal(size=width) + random.normal(size=(36, width))
        for name, width in (("text", 5), ("audio", 3), ("vision", 4))
    }
    split = np.repeat(["train", "valid", "test"], [24, 8, 4])
    np.savez(tmp_path / "f.npz", id=np.arange(36).astype(str), label=label, split=split, **seen)
    return str(tmp_path / "f.npz")


def figures(shown: str) -> dict[str, list[float]]:
    """Numbers of the table's rows, by their first cell."""
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if "│" in line
    ]
    return {name: [float(cell.split()[0]) for cell in cells] for name, *cells in rows}


def test_adamw_divides_a_constant_coefficient_on_gradients_out_again(script, features, capsys):
    assert script.main([features, *SETTINGS, "--seeds", "1", "--coefficient", "0.2"]) == 0
    paths = {name: cells[0] for name, cells in figures(capsys.readouterr().out).items()}
    assert paths["none"] == 1
    assert paths["gradient"] == pytest.approx(1, abs=0.02)
    assert paths["lr"] == pytest.approx(0.2, rel=0.25)


def test_features_of_other_widths_are_an_error_in_one_line(script, features, capsys):
    assert script.main([features, "model.feature_widths={text: 6, audio: 3, vision: 4}"]) == 1
    assert "text is 5 wide in the data and 6 in the model" in " ".join(capsys.readouterr().err.split())
