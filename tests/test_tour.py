# SPDX-License-Identifier: Apache-2.0
"""The notebook docs/tour.ipynb: its code runs, and its outputs are those of one run from top to bottom."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"
CELLS = [
    cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
]
SMALLER = {"clips=48": "clips=15", '"epochs": 8': '"epochs": 1'}


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate", "cache_dir")
def test_the_code_of_the_notebook_runs(tiny_text_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    changes = {**SMALLER, "sentence-transformers/all-MiniLM-L6-v2": str(tiny_text_encoder)}
    source = "\n".join("".join(cell["source"]) for cell in CELLS)
    for there, here in changes.items():
        assert there in source
        source = source.replace(there, here)
    names: dict = {}
    exec(compile(source, str(NOTEBOOK), "exec"), names)
    assert set(names["errors"]) >= {"text", "audio", "vision", "text+audio+vision"}
    assert list(names["without_text"].missing) == ["text"]


def test_the_notebook_has_the_outputs_of_one_run_without_errors_and_is_small():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    kinds = [output["output_type"] for cell in CELLS for output in cell["outputs"]]
    assert "display_data" in kinds and "error" not in kinds
    assert NOTEBOOK.stat().st_size < 100_000
