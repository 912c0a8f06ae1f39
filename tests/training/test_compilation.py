# SPDX-License-Identifier: Apache-2.0
"""Whole runs of train.py under torch.compile, as `accelerate launch --dynamo_backend` switches it on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from msa_online.hub import load_checkpoint
from msa_online.methods import MODULATORS, GradientModulator
from msa_online.modalities import COMPLETE

pytestmark = [pytest.mark.slow, pytest.mark.needs("ebmc", "rebalance")]

WIDTHS = {"text": 6, "audio": 4, "vision": 5}
STAGES = [{"name": "enhance", "epochs": 1}, {"name": "balance", "epochs": 2}]


class Stopping(MODULATORS.get("rebalance", GradientModulator)):
    """Interrupts a run before a step; it brings probes along."""

    stop_before: int | None = None

    def modulate(self, context):
        if context.step == self.stop_before:
            raise KeyboardInterrupt
        return super().modulate(context)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    random = np.random.default_rng(0)
    labels = random.uniform(-3, 3, size=40)
    values = {
        name: random.normal(size=(40, 4, width)) + labels[:, None, None] for name, width in WIDTHS.items()
    }
    path = tmp_path_factory.mktemp("features") / "features.npz"
    split = np.array((["train"] * 3 + ["valid", "test"]) * 8)
    np.savez(
        path, id=np.array([f"s{row}" for row in range(40)]), label=labels.round(3), split=split, **values
    )
    return path


@pytest.fixture(scope="module")
def compiled(archive, train, tmp_path_factory):
    """A function that carries out compiled runs; the cheapest backend wraps the model as all others do."""
    folder = tmp_path_factory.mktemp("runs")

    def carry_out(name: str, **training) -> Path:
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(MODULATORS, "stopping", Stopping)
            patched.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
            return train(describe_run(folder / name, archive, **training))

    return carry_out


@pytest.fixture(scope="module")
def whole_run(compiled) -> Path:
    torch._dynamo.reset()
    counters.clear()
    run = compiled("whole")
    assert counters["stats"]["unique_graphs"] > 0
    return run


def describe_run(folder: Path, archive: Path, **training) -> dict:
    """Two stages with a teacher, dropout, and probes beside the model."""
    return {
        "model": {
            "feature_widths": WIDTHS,
            "head": "ebmc",
            "head_kwargs": {"hidden_size": 8, "depth": 1, "dropout": 0.2},
        },
        "data": {"path": str(archive)},
        "training": {
            "output_dir": str(folder),
            "stages": STAGES,
            "batch_size": 8,
            "learning_rate": 0.01,
            "modulator": "stopping",
            "modulator_kwargs": {"spatial": "off"},
            "mixed_precision": "no",
            "log_with": None,
            **training,
        },
    }


def test_a_compiled_run_publishes_the_model_that_it_trained(whole_run, archive):
    names = set(load_file(whole_run / "model.safetensors"))
    opened, _ = load_checkpoint(whole_run)
    assert names == set(opened.state_dict())  # none that says how it was compiled, and no probes
    split = np.load(archive)
    rows = split["split"] == "test"
    inputs = {f"{name}_values": torch.tensor(split[name][rows], dtype=torch.float32) for name in WIDTHS}
    masks = {f"{name}_mask": torch.ones(8, 4, dtype=torch.bool) for name in WIDTHS}
    with torch.no_grad():
        logits = opened(torch.ones(8, 3, dtype=torch.bool), **inputs, **masks).logits.squeeze(-1)
    error = (logits - torch.tensor(split["label"][rows])).abs().mean().item()
    assert error == pytest.approx(opened.config.trained_on["results"]["test"][COMPLETE]["mae"], rel=1e-5)


def test_compiling_does_not_change_what_is_trained(whole_run, archive, train, tmp_path, monkeypatch):
    monkeypatch.setitem(MODULATORS, "stopping", Stopping)
    plain = train(describe_run(tmp_path / "plain", archive))
    expected = load_file(plain / "model.safetensors")
    for name, value in load_file(whole_run / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)


def test_a_compiled_run_resumes_onto_the_same_weights(whole_run, compiled, monkeypatch):
    monkeypatch.setattr(Stopping, "stop_before", 7)  # in the second stage, which has a teacher
    with pytest.raises(KeyboardInterrupt):
        compiled("stopped")
    monkeypatch.setattr(Stopping, "stop_before", None)
    kept = load_file(whole_run.parent / "stopped" / "state" / "model.safetensors")
    assert any(name.startswith("probes.") for name in kept)
    assert not any("_orig_mod" in name for name in kept)
    stopped = compiled("stopped", resume=True)
    ends = [load_file(run / "model.safetensors") for run in (whole_run, stopped)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    histories = [json.loads((run / "history.json").read_text()) for run in (whole_run, stopped)]
    assert histories[0] == histories[1]
