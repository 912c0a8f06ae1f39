# SPDX-License-Identifier: Apache-2.0
import importlib
import re
from pathlib import Path

import pytest


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("benchmark_optimizer")


def test_one_run_shows_each_step_and_its_ratio_to_that_of_training(
    script, tiny_text_encoder, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["--device", "cpu", "--rounds", "1", "--text-encoder", str(tiny_text_encoder)]
    assert script.main(arguments) == 0
    table = capsys.readouterr().out
    for name in (script.OURS, *script.KERNELS):
        assert re.search(rf"{re.escape(name)}\s*│\s*[\d.]+\s*│\s*[\d.]+", table), name


def test_no_rounds_are_refused(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--rounds", "0"])
    assert "--rounds must be at least 1" in capsys.readouterr().err
