# SPDX-License-Identifier: Apache-2.0
import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch import nn

from msa_online.methods import HEADS
from msa_online.training.config import RunArguments
from msa_online.training.config_reader import read_arguments

SMALL = ["--device", "cpu", "--rounds", "1", "--batch", "3"]


@pytest.fixture
def benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch):
    """The script; Accelerate keeps one precision to a process, so it starts from none and leaves none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    monkeypatch.setenv("COLUMNS", "140")
    yield importlib.import_module("benchmark_heads")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_method_has_a_row_with_its_time_size_and_memory(benchmark, capsys):
    heads = {read_arguments(benchmark.CONFIGS / f"{name}.yaml").model["head"] for name in benchmark.METHODS}
    assert {*HEADS} <= heads
    assert benchmark.main([*SMALL, "--steps", "3", "4", "5", "--widths", "6", "5", "4"]) == 0
    shown = capsys.readouterr().out
    for name in benchmark.METHODS:
        assert re.search(rf"│ {name} +│ [\d.]+ +│ [\d.]+ +│ [\d,]+ +│ [\d.]+", shown), name


def test_the_variants_of_a_study_are_timed_with_their_own_settings(benchmark, tmp_path, capsys):
    variants = {"narrow": {"model.head_kwargs": {"hidden_size": 4}}, "wide": {}}
    study = {"config": "late_fusion_plain_offline", "output_dir": "x", "seeds": [1, 2], "variants": variants}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    options = [*SMALL, "--study", str(tmp_path / "study.yaml"), "--steps", "1", "1", "1"]
    assert benchmark.main([*options, "--widths", "6", "5", "4"]) == 0
    shown = capsys.readouterr().out
    narrow, wide = (
        int(re.search(rf"│ {name} +│ [\d.]+ +│ [\d.]+ +│ ([\d,]+) ", shown)[1].replace(",", ""))
        for name in variants
    )
    assert narrow < wide


def test_a_method_without_head_settings_acts_on_features(benchmark):
    arguments = RunArguments(model={"head": "mag"})
    assert benchmark.on_features(arguments) == {"head": "mag", "head_kwargs": {"layer": None}}


def test_a_model_with_a_text_encoder_is_compared_with_the_sum_of_its_parts(
    benchmark, tiny_text_encoder, capsys
):
    arguments = [*SMALL, "late_fusion", "--text-encoder", str(tiny_text_encoder), "--tokens", "5"]
    assert benchmark.main([*arguments, "--mel-steps", "40", "--frames", "2"]) == 0
    shown = capsys.readouterr().out
    row = r" +│ (\d+) +│ *([\d.]*) +│ (\d+) +│ *([\d.]*)"
    alone, without, whole = (
        re.search(f"│ {name}{row}", shown).groups()
        for name in (benchmark.PLAIN, benchmark.rest("late_fusion"), "late_fusion")
    )
    for at in (0, 2):  # of rounded milliseconds
        total = float(alone[at]) + float(without[at])
        assert float(whole[at + 1]) == pytest.approx(float(whole[at]) / total, rel=0.3, abs=0.1)


def test_what_is_kept_for_backward_is_counted_once_and_without_weights(benchmark):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8, bias=False)
            self.head = type("Head", (), {"end_step": lambda self, taken: None})()

        def forward(self, values, output_internals):
            hidden = self.linear(values).exp()  # exp keeps its result, and the product its factors
            return hidden * hidden

    values = torch.randn(4, 8)
    assert benchmark.kept_for_backward(Model(), {"values": values}) == 4 * 8 * 4


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["nosuch"], "unknown method 'nosuch': one of late_fusion, "),
        pytest.param(
            ["mag", "--text-encoder", "bert-base-uncased"],
            "unknown method 'mag': one of late_fusion, ",
            marks=pytest.mark.needs("mag"),
        ),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--steps", "1", "0", "1"], "--steps must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(wrong, told, benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(wrong)
    assert told in capsys.readouterr().err
