# SPDX-License-Identifier: Apache-2.0
import copy
import importlib
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from msa_online import MSAConfig, MSAModel
from msa_online.methods import MODULATORS, GradientModulator, ModulationContext

SMALL = ["--device", "cpu", "--rounds", "1", "--batch", "2", "--tokens", "5"]


@pytest.fixture
def benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch):
    """The script; Accelerate keeps one precision to a process, so it starts from none and leaves none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    yield importlib.import_module("benchmark_modulators")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def features_model() -> MSAModel:
    torch.manual_seed(0)
    widths = {"text": 6, "audio": 4, "vision": 5}
    return MSAModel(MSAConfig(feature_widths=widths, head_kwargs={"hidden_size": 8, "dropout": 0.0}))


@pytest.fixture
def step_of(benchmark, features_model):
    """A function that takes one measured step under a modulator, always from the same start.

    Returns the weights after it by name, and the loop.
    """
    accelerator = Accelerator(cpu=True)

    def take(modulator: GradientModulator):
        model = copy.deepcopy(features_model)
        torch.manual_seed(0)
        widths = model.config.feature_widths
        batch = benchmark.random_features(widths, 4, dict.fromkeys(widths, 3), torch.device("cpu"))
        loop = benchmark.make_loops(model, {"it": modulator}, accelerator)["it"]
        assert benchmark.training_step(loop, batch)()["step"] > 0
        return dict(model.state_dict()), loop

    return take


class Slowing(GradientModulator):
    """Scales every gradient of audio and vision, unevenly, so that Adam does not divide the factor out."""

    modalities = ("audio", "vision")

    def modulate(self, context: ModulationContext) -> None:
        for name in self.modalities:
            for number, parameter in enumerate(context.modality_parameters[name]):
                parameter.grad[number % len(parameter.grad)] = 0


def test_what_is_timed_is_a_whole_step_in_which_the_modulator_acts(step_of):
    plain, loop = step_of(GradientModulator())
    assert loop.progress.step == 1 and loop.progress.skipped == 0
    again, _ = step_of(GradientModulator())
    changed, loop = step_of(Slowing())
    assert loop.progress.step == 1
    assert all(torch.equal(value, again[name]) for name, value in plain.items())
    moved = {name for name, value in plain.items() if not torch.equal(value, changed[name])}
    assert any(name.startswith("head.projections.audio") for name in moved)
    assert any(name.startswith("head.projections.vision") for name in moved)


def test_all_modulators_of_a_table_share_one_model(benchmark, features_model):
    modulators = {"one": GradientModulator(), "two": Slowing()}
    one, two = benchmark.make_loops(features_model, modulators, Accelerator(cpu=True)).values()
    assert one.bare_model is two.bare_model is features_model and one.optimizer is two.optimizer
    assert one.progress is not two.progress


def test_modulators_with_probes_are_left_out_and_the_others_act_on_what_the_model_owns(
    benchmark, features_model, monkeypatch
):
    class Probing(GradientModulator):
        def attach(self, model, features, fused):
            model.probes["text"] = torch.nn.Linear(1, 1)

    class Noisy(GradientModulator):
        def __init__(self, modalities=("text", "audio"), noise=1.0):
            self.modalities, self.noise = modalities, noise

    for name, kind in {"probing": Probing, "noisy": Noisy, "slowing": Slowing}.items():
        monkeypatch.setitem(MODULATORS, name, kind)
    owned = {"text": [], "audio": ["a"], "vision": ["v"]}
    monkeypatch.setattr(features_model, "modality_parameters", lambda: owned)
    found = benchmark.make_modulators(features_model)
    assert "probing" not in found and not features_model.probes
    assert found["noisy"].modalities == ["audio", "vision"] and found["noisy without noise"].noise == 0.0
    assert found["slowing"].modalities == ("audio", "vision")


def test_both_kinds_of_input_run_from_the_command_line(benchmark, tmp_path, capsys):
    features = tmp_path / "features.yaml"
    features.write_text("model: {feature_widths: {text: 6, audio: 4, vision: 5}}\ndata: {path: x}\n")
    assert benchmark.main(["--config", str(features), *SMALL]) == 0
    shown = capsys.readouterr().out
    rows = list(benchmark.make_modulators(MSAModel(benchmark.model_config(features, ""))))
    assert "identity" in rows and all(f"│ {name}" in shown for name in rows) and "skipped" not in shown
    AcceleratorState._reset_state(reset_partial_state=True)
    online = ["--text-encoder", "sentence-transformers/all-MiniLM-L6-v2", "--mel-steps", "40"]
    assert benchmark.main([*SMALL, *online, "--frames", "2", "--precision", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert all(f"│ {name}" in shown for name in rows) and "skipped" not in shown


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
