# SPDX-License-Identifier: Apache-2.0
"""EBMC through train.py: two stages, a teacher between them, interruptions at every point, two processes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from msa_online import MSAConfig, MSAModel
from msa_online.methods import MODULATORS, GradientModulator
from msa_online.training.config_reader import parse_arguments
from msa_online.training.yaml_reader import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:all predictions are")

STEPS = 2  # optimizer steps of an epoch: 16 samples, batches of 4, accumulated twice
TWO_STAGES = [{"name": "enhance", "epochs": 2}, {"name": "balance", "epochs": 2}]


class Watching(GradientModulator):
    """Sees every step of a run, and can stop it there."""

    stop_before: int | None = None
    stages: list[str] = []

    def modulate(self, context):
        if context.step == self.stop_before:
            raise KeyboardInterrupt
        self.stages.append(context.stage)


class Runs:
    """Runs of train.py in this process, on the tiny corpus."""

    def __init__(self, folder: Path, corpus: Path, text_encoder: Path) -> None:
        self.folder, self.corpus, self.text_encoder = folder, corpus, text_encoder

    def start(self, name: str, *, stop_before: int | None = None, **training) -> Path:
        """Train into a folder; `stop_before` an optimizer step, counted from the start of the run."""
        from msa_online.training.run import train

        Watching.stop_before, Watching.stages = stop_before, []
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()  # an interrupted run leaves its loaders there
        arguments = parse_arguments(self.document(name, **training))
        if stop_before is None:
            train(arguments, "a test")
        else:
            with pytest.raises(KeyboardInterrupt):
                train(arguments, "a test")
        return self.folder / name

    def document(self, name: str, **training) -> dict:
        """The configuration of a run, with keys of its `training:` section."""
        return {
            "model": {
                "text_encoder": str(self.text_encoder),
                "audio_channels": [16, 16],
                "audio_width": 16,
                "face_channels": 8,
                "face_width": 16,
                "head": "ebmc",
                "head_kwargs": {
                    "hidden_size": 8,
                    "depth": 1,
                    "dropout": 0.2,
                    "readings": ["msd_annealed"],
                },
            },
            "data": {"path": str(self.corpus), "num_frames": 4, "face_size": 32},
            "training": {
                "output_dir": str(self.folder / name),
                "stages": TWO_STAGES,
                "batch_size": 4,
                "accumulation": 2,
                "modality_dropout": {"text": 0.3, "audio": 0.2},
                "modulator": "watching",
                "log_with": None,
                **training,
            },
        }


@pytest.fixture(scope="module")
def module_runs(tiny_corpus, tiny_text_encoder, tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), tiny_corpus, tiny_text_encoder)


@pytest.fixture
def runs(module_runs, repository, monkeypatch) -> Runs:
    monkeypatch.syspath_prepend(str(repository))
    monkeypatch.setitem(MODULATORS, "watching", Watching)
    return module_runs


@pytest.fixture
def whole_run(runs) -> Path:
    """A run that nothing interrupted, with every source of randomness switched on; trained once."""
    path = runs.folder / "whole"
    return path if path.exists() else runs.start("whole")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def history(run: Path) -> list[dict]:
    return json.loads((run / "history.json").read_text())


@pytest.mark.parametrize(
    ("stopped", "step", "lost"),
    [
        ("in the first stage", STEPS + 1, None),
        ("at the switch, before the teacher had answered", 2 * STEPS, "balance_teacher.safetensors"),
        ("at the switch, after the teacher had answered", 2 * STEPS, None),
        ("in the second stage", 3 * STEPS + 1, None),
        ("in the second stage, its answers lost", 3 * STEPS + 1, "balance_teacher.safetensors"),
    ],
)
def test_a_stopped_run_lands_where_an_uninterrupted_one_does(stopped, step, lost, runs, whole_run):
    path = runs.start(stopped, stop_before=step)
    if lost:
        (path / "stages" / lost).unlink()
    runs.start(stopped, resume=True)
    assert same(weights(path / "model.safetensors"), weights(whole_run / "model.safetensors"))
    assert history(path) == history(whole_run)


@pytest.mark.parametrize(
    ("harm", "file"),
    [
        ("gone", "enhance.safetensors"),
        ("cut short", "enhance.safetensors"),
        ("cut short", "balance_teacher.safetensors"),
    ],
)
def test_an_unreadable_teacher_is_named_and_other_files_stay(harm, file, runs):
    path = runs.folder / "stopped"
    if not path.exists():
        runs.start("stopped", stop_before=2 * STEPS)
    harmed = path / "stages" / file
    answers = path / "stages" / "balance_teacher.safetensors"
    kept = {item: item.read_bytes() for item in path.rglob("*") if item.is_file()}
    if file == "enhance.safetensors":
        answers.unlink()  # else nobody would have to be asked
    harmed.unlink() if harm == "gone" else harmed.write_bytes(harmed.read_bytes()[:100])
    left = {item: item.read_bytes() for item in path.rglob("*") if item.is_file()}
    with pytest.raises(ConfigurationError, match=f"{file}: the teacher.*put the file back.*overwrite=true"):
        runs.start("stopped", resume=True)
    assert {item: item.read_bytes() for item in path.rglob("*") if item.is_file()} == left
    for item, content in kept.items():
        item.write_bytes(content)


def test_the_teacher_is_the_first_stages_best_epoch_and_not_its_last(runs, monkeypatch):
    constant = {"decay": "constant", "warmup": 0.0}
    scores = iter([-0.1, -0.9])
    with monkeypatch.context() as scored:
        scored.setattr("msa_online.training.run.selection_score", lambda *_: next(scores))
        two = runs.start("best first", stop_before=2 * STEPS, **constant)
    one_epoch = [{"name": "enhance", "epochs": 1}, {"name": "balance", "epochs": 1}]
    one = runs.start("one epoch", stop_before=STEPS, stages=one_epoch, **constant)
    teacher = weights(two / "stages" / "enhance.safetensors")
    assert same(teacher, weights(one / "state" / "model.safetensors"))
    assert not same(teacher, weights(two / "state" / "model.safetensors"))
    answers = [weights(run / "stages" / "balance_teacher.safetensors")["answers"] for run in (one, two)]
    assert torch.equal(answers[0], answers[1])


def test_a_finished_run_publishes_the_student_alone(whole_run):
    assert not (whole_run / "stages").exists() and not (whole_run / "state").exists()
    model = MSAModel.from_pretrained(whole_run)
    assert model.head.balancing
    assert same(weights(whole_run / "model.safetensors"), dict(model.state_dict()))
    stages = [epoch["stage"] for epoch in history(whole_run)]
    assert stages == ["enhance", "enhance", "balance", "balance"]
    assert all(("imtd" in epoch["losses"]) == (epoch["stage"] == "balance") for epoch in history(whole_run))


def test_a_run_tells_the_head_how_far_the_stage_is(whole_run):
    """The weight of MSD falls with the epochs of the second stage."""
    shares = []
    for epoch in history(whole_run):
        losses = epoch["losses"]
        whole = losses["msd/inv"] + 0.1 * losses["msd/dis"] + 0.1 * losses["msd/uni"]
        shares.append(losses["msd"] / whole)
    assert shares == pytest.approx([1, 1, 1, 0.5], rel=1e-5)


def test_the_optimizer_keeps_its_state_in_the_second_stage(runs):
    taken = []

    def count(optimizer, *_):
        taken.append({int(state["step"]) for state in optimizer.state.values()})

    hook = register_optimizer_step_pre_hook(count)
    try:
        runs.start("counted", stages=[{"name": "enhance", "epochs": 1}, {"name": "balance", "epochs": 1}])
    finally:
        hook.remove()
    # steps known of a parameter: those of the fusion are first known in the second stage
    assert taken == [set(), {1}, {2}, {3, 1}]


def test_the_second_stage_may_run_alone_and_without_a_teacher(runs):
    path = runs.start("balance only", stages=[{"name": "balance", "epochs": 1}])
    (epoch,) = history(path)
    assert "imtd" not in epoch["losses"] and "emc" in epoch["losses"]
    assert not (path / "stages").exists()


def test_the_stages_may_run_in_the_other_order(runs):
    path = runs.start("reversed", stages=[{"name": "balance", "epochs": 1}, {"name": "enhance", "epochs": 1}])
    assert [epoch["stage"] for epoch in history(path)] == ["balance", "enhance"]
    assert not any("imtd" in epoch["losses"] for epoch in history(path))
    assert MSAModel.from_pretrained(path).head.balancing  # whatever was trained last, it predicts


def test_a_run_for_one_condition_trains_and_is_judged_under_it_alone(runs):
    stages = [{"name": "enhance", "epochs": 1}, {"name": "balance", "epochs": 1}]
    path = runs.start("text and audio", stages=stages, condition="text+audio", modality_dropout={})
    enhanced, balanced = history(path)
    assert balanced["losses"]["energy/vision"] == 0 == balanced["losses"]["trust/vision"]
    assert balanced["losses"]["energy/text"] > 0 and balanced["losses"]["energy/audio"] > 0
    record = MSAConfig.from_pretrained(path).trained_on
    assert record["protocol"] == "per_condition (text+audio)"
    assert {split: list(scores) for split, scores in record["results"].items()} == {
        "valid": ["text+audio"],
        "test": ["text+audio"],
    }
    best = record["results"]["valid"]["text+audio"]
    assert balanced["valid"]["mae"] == pytest.approx(best["mae"])


def test_the_gradient_of_every_loss_is_measured_on_request_and_changes_nothing(runs, whole_run):
    path = runs.start("measured", measure_gradients=True)
    for measured, plain in zip(history(path), history(whole_run), strict=True):
        norms = {
            name: measured["losses"].pop(name) for name in list(measured["losses"]) if "gradient/" in name
        }
        losses = {name for name in plain["losses"] if "/" not in name} - {"loss"}
        assert {name.removeprefix("gradient/") for name in norms} == losses
        assert all(norm > 0 for norm in norms.values())
        assert measured == plain
    assert same(weights(path / "model.safetensors"), weights(whole_run / "model.safetensors"))


RANK = """
import os, sys
import msa_online_cli
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_post_hook

seen = {}

def keep(optimizer, *_):
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    seen.update({str(number): value.detach().clone() for number, value in enumerate(parameters)})
    seen["steps"] = seen.get("steps", parameters[0].new_zeros(1)) + 1

register_optimizer_step_post_hook(keep)
status = msa_online_cli.main(["train", *sys.argv[2:]])
save_file(seen, f"{sys.argv[1]}/rank{os.environ['RANK']}.safetensors")
sys.exit(status)
"""


@pytest.mark.slow
def test_two_processes_pass_the_switch_together_and_hold_the_same_weights(runs, on_two_processes, tmp_path):
    settings = tmp_path / "two.yaml"
    document = runs.document(
        "two",
        stages=[{"name": "enhance", "epochs": 1}, {"name": "balance", "epochs": 2}],
        accumulation=1,
        modulator="identity",
        measure_gradients=True,
    )
    settings.write_text(yaml.safe_dump(document))
    statuses, printed = on_two_processes(RANK, tmp_path, tmp_path, settings)
    assert statuses == [0, 0], "".join(printed)
    assert "2 processes on cpu" in printed[0]
    ranks = [weights(tmp_path / f"rank{number}.safetensors") for number in range(2)]
    assert ranks[0]["steps"] == 6  # two an epoch
    assert same(*ranks)
    enhanced, *balanced = history(runs.folder / "two")
    assert all("imtd" in epoch["losses"] for epoch in balanced) and "imtd" not in enhanced["losses"]
