# SPDX-License-Identifier: Apache-2.0
import importlib
from pathlib import Path

import pytest


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    """The script, imported."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("benchmark_states")


def test_three_runs_are_timed_side_by_side(
    script, tiny_corpus, tiny_text_encoder, cache_dir, fresh_accelerate, capsys
):
    words = ["--text-encoder", str(tiny_text_encoder), "--audio-encoder", "null", "--vision-encoder", "null"]
    assert script.main([str(tiny_corpus), *words]) == 0
    printed = capsys.readouterr().out
    assert "16 training clips; frozen: text; states, once:" in printed
    assert all(name in printed for name in ("in every epoch", "computed once", "features"))
