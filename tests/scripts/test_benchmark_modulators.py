# SPDX-License-Identifier: Apache-2.0
import importlib
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from msa_online import MSAModel
from msa_online.methods import ConflictModulator, GradientModulator, OGMModulator

SMALL = ["--device", "cpu", "--rounds", "1", "--batch", "2", "--tokens", "5"]


@pytest.fixture
def benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch):
    """The script; Accelerate keeps one precision to a process, so it starts from none and leaves none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    yield importlib.import_module("benchmark_modulators")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def step_of(benchmark):
    """A function that takes one measured step of the offline model under a modulator, from the same start.

    Returns the weights after it by name, and the loop.
    """
    accelerator = Accelerator(cpu=True)
    config = benchmark.offline_config()

    def take(modulator: GradientModulator):
        torch.manual_seed(0)
        model = MSAModel(config)
        batch = benchmark.random_features(config.feature_widths, 4, 3, torch.device("cpu"))
        loop = benchmark.make_loops(model, {"it": modulator}, accelerator)["it"]
        assert benchmark.training_step(loop, batch)()["step"] > 0
        return dict(model.state_dict()), loop

    return take


@pytest.mark.parametrize("modulator", [OGMModulator(modalities=["audio", "vision"]), ConflictModulator()])
def test_what_is_timed_is_a_whole_step_in_which_the_modulator_acts(step_of, modulator):
    plain, loop = step_of(GradientModulator())
    assert loop.progress.step == 1 and loop.progress.skipped == 0
    again, _ = step_of(GradientModulator())
    changed, loop = step_of(modulator)
    assert loop.progress.step == 1
    assert all(torch.equal(value, again[name]) for name, value in plain.items())
    moved = {name for name, value in plain.items() if not torch.equal(value, changed[name])}
    assert any(name.startswith("head.encoders.audio") for name in moved)
    assert any(name.startswith("head.encoders.vision") for name in moved)


def test_all_modulators_of_a_table_share_one_model(benchmark):
    modulators = {"one": GradientModulator(), "two": ConflictModulator()}
    model = MSAModel(benchmark.offline_config())
    one, two = benchmark.make_loops(model, modulators, Accelerator(cpu=True)).values()
    assert one.bare_model is two.bare_model is model and one.optimizer is two.optimizer
    assert one.progress is not two.progress


def test_both_kinds_of_input_run_from_the_command_line(benchmark, capsys):
    assert benchmark.main(["--offline", *SMALL]) == 0
    shown = capsys.readouterr().out
    rows = ("identity", "ogm without noise", "ogm ", "conflict")
    assert all(f"│ {name}" in shown for name in rows) and "skipped" not in shown
    assert "ogm acts on audio, vision, conflict" in " ".join(shown.split())
    AcceleratorState._reset_state(reset_partial_state=True)
    online = ["--text-encoder", "sentence-transformers/all-MiniLM-L6-v2", "--mel-steps", "40"]
    assert benchmark.main([*SMALL, *online, "--frames", "2", "--precision", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert all(f"│ {name}" in shown for name in rows) and "skipped" not in shown
    assert "ogm acts on text, audio, vision, conflict on audio, vision" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(benchmark, capsys, wrong, told):
    with pytest.raises(SystemExit):
        benchmark.main(wrong)
    assert told in capsys.readouterr().err
