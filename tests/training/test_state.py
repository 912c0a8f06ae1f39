# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import math
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from msa_online.training.loop import Progress
from msa_online.training.state import MANIFEST, RunState, require_settings, seal, verify
from msa_online.training.yaml_reader import ConfigurationError
from tests.training_fixtures import STOPPED_AND_RESUMED

CPU = torch.device("cpu")
FILES = (
    "manifest.json",
    "model.safetensors",
    "run.json",
    "run.safetensors",
    "rank_0.json",
    "rank_0.safetensors",
)


class Part:
    """Something with a state of a given content."""

    def __init__(self, state: dict) -> None:
        self.state = state

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def state_of(part: Part, model: torch.nn.Module | None = None, name: str = "part") -> RunState:
    return RunState(model or torch.nn.Linear(2, 1), {name: part}, CPU, rank=0, processes=1)


@pytest.fixture
def settings(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("training: {seed: 1}\n")
    return path


@pytest.fixture
def folder(settings, tmp_path) -> Path:
    """A state as a run leaves it."""
    path = tmp_path / "state"
    path.mkdir()
    state_of(Part({"step": 3})).write(path)
    seal(path, 1, settings)
    return path


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def accept(folder: Path, name: str) -> None:
    """Write into the manifest what a file holds now, as somebody does who forges a state."""
    manifest = json.loads((folder / MANIFEST).read_text())
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_any_file_is_refused_and_never_run(name, forged, folder, settings, tmp_path):
    mark = tmp_path / "executed"
    (folder / name).write_bytes(pickle.dumps(Malicious(mark)))
    if forged and name != MANIFEST:
        accept(folder, name)
    with pytest.raises(ConfigurationError, match=f"{name.split('.')[0]}.*cannot be resumed.*overwrite=true"):
        require_settings(verify(folder), settings)
        state_of(Part({"step": 0})).read(folder)
    assert not mark.exists()
    pickle.loads((folder / name).read_bytes())
    assert mark.exists()  # it would have been


def test_pickles_beside_a_state_are_not_looked_at(folder, tmp_path):
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    part = Part({"step": 0})
    state_of(part).read(folder)
    assert part.state == {"step": 3}
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("harm", ["missing", "empty", "cut short", "one byte changed"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_with_the_remedy(name, harm, folder):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"empty": b"", "cut short": content[:-7], "one byte changed": bytes(content)}
    (folder / name).unlink() if harm == "missing" else (folder / name).write_bytes(damaged[harm])
    with pytest.raises(ConfigurationError) as caught:
        verify(folder)
    message = str(caught.value)
    assert "\n" not in message and "training.overwrite=true" in message
    # a changed byte in the manifest may make another file look damaged
    assert name in message or (name, harm) == (MANIFEST, "one byte changed")


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"format": 1}', '{"format": 2}', "[" * 100_000, "\0"])
def test_a_manifest_of_anything_else_is_refused(content, folder):
    (folder / MANIFEST).write_text(content)
    with pytest.raises(ConfigurationError, match="manifest.json: the run cannot be resumed"):
        verify(folder)


def test_a_state_of_another_run_is_refused(folder, settings):
    require_settings(verify(folder), settings)
    settings.write_text("training: {seed: 2}\n")
    with pytest.raises(ConfigurationError, match="run.yaml.*not the configuration that the state was"):
        require_settings(verify(folder), settings)
    with pytest.raises(ConfigurationError, match=r"model\.safetensors.*size mismatch"):
        state_of(Part({"step": 0}), torch.nn.Linear(3, 1)).read(folder)
    with pytest.raises(ConfigurationError, match="run.json.*it contains part, not optimizer"):
        state_of(Part({"step": 0}), name="optimizer").read(folder)
    with pytest.raises(ConfigurationError, match="run.json.*the part of another run"):
        state_of(Part({"kappa": None})).read(folder)
    two = RunState(torch.nn.Linear(2, 1), {"part": Part({"step": 0})}, CPU, rank=1, processes=2)
    with pytest.raises(ConfigurationError, match="by 1 processes, not 2"):
        two.read(folder)


def test_everything_a_part_may_keep_comes_back_as_it_was(settings, tmp_path):
    matrix = torch.randn(3, 4)
    kept = {
        "numbers": [1, -2.5e-300, math.inf, -math.inf, 2**70, True, None, "text"],
        "tuple": (0.9, (1, "a"), []),
        "by number": {0: {"exp_avg": torch.randn(2, 2)}, 7: {}},
        "rows of one matrix": [matrix[0], matrix[1], matrix.t()],
        "types": [torch.tensor(3), torch.ones(2, dtype=torch.bfloat16), torch.zeros(0, dtype=torch.bool)],
        "$tensor": {"$tuple": {"$items": 1}},
        "empty": {},
    }
    part = Part(kept)
    state_of(part).write(tmp_path)
    seal(tmp_path, 1, settings)
    other = Part(dict.fromkeys(kept))
    state_of(other).read(tmp_path)
    assert_same(other.state, kept)


def assert_same(found, expected) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def test_what_is_no_plain_data_is_named_where_it_lies(tmp_path):
    with pytest.raises(TypeError, match=r"run\.part\.seen is a set"):
        state_of(Part({"seen": {1, 2}})).write(tmp_path)


def draw() -> list[float]:
    return [random.random(), float(np.random.normal()), torch.rand(()).item(), random.gauss(0, 1)]


def test_every_generator_continues_where_it_was(settings, tmp_path):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    draw()  # of the two numbers that a normal deviate is drawn with, one waits for the next
    state_of(Part({})).write(tmp_path)
    seal(tmp_path, 1, settings)
    expected = draw()
    draw()
    state_of(Part({})).read(tmp_path)
    assert draw() == expected


def test_the_optimizer_of_a_real_model_and_its_schedule_come_back(tiny_model, make_batch, settings, tmp_path):
    from msa_online.training.optimizer import make_optimizer, make_scheduler

    def equipment(model):
        optimizer = make_optimizer(model, learning_rate=1e-3, layer_decay=0.5, weight_decay=0.1)
        scheduler = make_scheduler(optimizer, steps=10, warmup=0.2)
        return {"optimizer": optimizer, "scheduler": scheduler, "progress": Progress()}

    def step(model, parts):
        model(**make_batch(4)).loss.backward()
        parts["optimizer"].step()
        parts["optimizer"].zero_grad()
        parts["scheduler"].step()
        parts["progress"].step += 1

    parts = equipment(tiny_model)
    step(tiny_model, parts)
    RunState(tiny_model, parts, CPU, 0, 1).write(tmp_path)
    seal(tmp_path, 1, settings)
    step(tiny_model, parts)
    other = type(tiny_model)(tiny_model.config).eval()
    resumed = equipment(other)
    RunState(other, resumed, CPU, 0, 1).read(tmp_path)
    assert resumed["progress"].step == 1
    step(other, resumed)
    assert_same(dict(other.state_dict()), dict(tiny_model.state_dict()))
    assert_same(resumed["optimizer"].state_dict(), parts["optimizer"].state_dict())
    assert_same(resumed["scheduler"].state_dict(), parts["scheduler"].state_dict())


# --- two processes, each with dropout of its own ---


@pytest.mark.slow
def test_two_processes_resume_onto_the_same_weights(on_two_processes, tmp_path):
    random_ = np.random.default_rng(0)
    labels = random_.uniform(-3, 3, size=40)
    widths = {"text": 6, "audio": 4, "vision": 5}
    np.savez(
        tmp_path / "features.npz",
        id=np.array([f"s{number}" for number in range(40)]),
        label=labels.round(3),
        split=np.array((["train"] * 3 + ["valid", "test"]) * 8),
        **{name: random_.normal(size=(40, 5, width)) for name, width in widths.items()},
    )
    document = {
        "model": {"feature_widths": widths, "head_kwargs": {"hidden_size": 8, "dropout": 0.5}},
        "data": {"path": str(tmp_path / "features.npz")},
        "training": {"epochs": 3, "batch_size": 4, "modulator": "stopping", "log_with": None},
    }
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(document))
    statuses, printed = on_two_processes(STOPPED_AND_RESUMED, tmp_path, settings, tmp_path, "identity")
    assert statuses == [0, 0], "".join(printed)
    assert "2 processes on cpu" in printed[0] and "resuming after epoch 1" in printed[0]
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped")]
    assert_same(ends[1], ends[0])
