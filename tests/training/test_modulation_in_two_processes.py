# SPDX-License-Identifier: Apache-2.0
"""Whole runs of train.py under modulation, on features: on two processes, and over an interruption."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from msa_online import MSAModel
from msa_online.methods import HEADS, MODULATORS, GradientModulator, Modulation, ModulationContext
from msa_online.modalities import COMPLETE

WIDTHS = {"text": 6, "audio": 4, "vision": 5}
STEPS = 20  # 61 samples in four steps of at most 16, five epochs
LINEAR = {"recon": 0.0, "unimodal": 0.0, "div": 0.0, "stat": 0.0}


def write_archive(path: Path, complete: bool, without: str | None = None) -> Path:
    """Features of 77 samples; either all of one length, or of several and some modalities missing.

    `without` is a modality that no sample has.
    """
    random = np.random.default_rng(0)
    labels = random.uniform(-3, 3, size=77)
    arrays = {}
    for number, (name, width) in enumerate(WIDTHS.items()):
        values = random.normal(size=(77, 5, width)) + 0.3 * labels[:, None, None]
        if not complete:
            for row in range(77):
                values[row, random.integers(1, 6) :] = 0
            values[number::5] = 0
        if name != without:
            arrays[name] = values
    split = np.array(["train"] * 61 + ["valid"] * 8 + ["test"] * 8)
    names = np.array([f"s{number}" for number in range(77)])
    np.savez(path, id=names, label=labels.round(3), split=split, **arrays)
    return path


def configure(folder: Path, archive: Path, *, head=None, weights=None, **training) -> dict:
    """A run into a folder; keys of its `training:` section may be added."""
    return {
        "model": {
            "feature_widths": WIDTHS,
            "head": "cpsl",
            "head_kwargs": {"hidden_size": 8, "fusion_size": 8, **(head or {})},
            "loss_weights": weights or {},
        },
        "data": {"path": str(archive)},
        "training": {
            "output_dir": str(folder),
            "epochs": 5,
            "modulator": "conflict",
            "modulator_kwargs": {"epochs": [0, 3], "noise": 1.0},
            "log_with": None,
            "mixed_precision": "no",
            **training,
        },
    }


def history(run: Path) -> list[dict]:
    return json.loads((run / "history.json").read_text())


def lowest_coefficients(run: Path) -> list[float]:
    """The smaller coefficient of audio and vision, averaged over the steps of each epoch."""
    losses = [epoch["losses"] for epoch in history(run)]
    return [min(each["coefficient/audio"], each["coefficient/vision"]) for each in losses]


RANK = """
import os, sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from msa_online.methods import HEADS
from msa_online.training.config_reader import read_arguments
from msa_online.training.accelerator import start_accelerator
from msa_online.training.run import carry_out

seen = {}

def keep(optimizer, *_):
    assert dist.get_world_size() == 2 and dist.get_backend() == "gloo"
    assert dist.get_rank() == int(os.environ["RANK"])
    for number, group in enumerate(optimizer.param_groups):
        for place, value in enumerate(group["params"]):
            seen[f"{number}.{place}"] = value.detach().clone()
    seen["steps"] = seen.get("steps", torch.zeros(1)) + 1

register_optimizer_step_post_hook(keep)

def keep_running_state(kind):
    end_step = kind.end_step

    def end_and_keep(head, taken):
        end_step(head, taken)
        seen.update({f"running state: {name}": value.clone() for name, value in head.named_buffers()})

    kind.end_step = end_and_keep

for kind in HEADS.values():
    if "end_step" in vars(kind):
        keep_running_state(kind)
accelerator = None
for path in sys.argv[1:]:
    arguments = read_arguments(path)
    accelerator = accelerator or start_accelerator(arguments.training)
    accelerator.gradient_accumulation_steps = arguments.training.accumulation
    carry_out(arguments, "a test", accelerator)
    accelerator.free_memory()
    save_file(seen, f"{arguments.training.output_dir}.rank{os.environ['RANK']}")
    seen.clear()
accelerator.end_training()
"""


REBALANCED = {
    "modulator": "rebalance",
    "modulator_kwargs": {"modalities": ["audio", "vision"], "epochs": [0, 3]},
}
WITHOUT_TEXT = {"modulator": "rebalance", "modulator_kwargs": {"epochs": [0, 3]}}
EQUILIBRIUM = {"modulator": "shapley", "modulator_kwargs": {"latest": 1, "interval": 2}}
PROTOTYPES_STILL = {"unimodal": 0.0, "pcl": 0.0, "cal": 0.0}
KINDS = {
    "all losses on complete samples": (True, {}, {}),
    "modalities missing, the task loss": (False, LINEAR, {}),
    "rebalanced, the task loss": (True, LINEAR, REBALANCED),
    "rebalanced without any text": (True, {"unimodal": 0.0}, WITHOUT_TEXT),
    "prototypes and Shapley values, the task loss": (False, PROTOTYPES_STILL, EQUILIBRIUM),
    "prototypes and Shapley values, all losses": (False, {"pcl": 0.1, "cal": 0.1}, EQUILIBRIUM),
}
if not {"cpsl", "conflict"} <= {*HEADS, *MODULATORS}:  # the head and the modulator of the first four
    KINDS = {kind: case for kind, case in KINDS.items() if case[2] in (WITHOUT_TEXT, EQUILIBRIUM)}
KINDS = {kind: case for kind, case in KINDS.items() if case[2].get("modulator", "identity") in MODULATORS}
OF_PASE = [kind for kind, (_, _, training) in KINDS.items() if training == EQUILIBRIUM]
AS_ONE = [kind for kind, (_, weights, _) in KINDS.items() if "pcl" not in weights or not weights["pcl"]]


@pytest.fixture(scope="module")
def pairs(train, on_two_processes, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """The same runs on one process and on two; a pair of folders for each kind."""
    folder = tmp_path_factory.mktemp("pairs")
    still = {"dropout": 0.0, "classifier_dropout": 0.0, "ame": False}
    runs, launched = {}, []
    for number, (kind, (complete, weights, training)) in enumerate(KINDS.items()):
        lacking = "text" if training == WITHOUT_TEXT else None
        archive = write_archive(folder / f"features{number}.npz", complete, lacking)
        settings = {"head": still, "weights": weights, **training}
        one = configure(folder / f"one{number}", archive, **settings, batch_size=16)
        launched.append(configure(folder / f"two{number}", archive, **settings, batch_size=8))
        if kind in OF_PASE:  # of 16 micro-batches one is empty in steps of 15 samples
            launched[-1]["training"] |= {"batch_size": 1, "accumulation": 8}
            for document in (one, launched[-1]):
                document["model"] |= {"head": "pase", "head_kwargs": {"hidden_size": 8, "dropout": 0.0}}
        if training == WITHOUT_TEXT:
            for document in (one, launched[-1]):
                kwargs = {"hidden_size": 8, "dropout": 0.0}
                document["model"] |= {"head": "late_fusion", "head_kwargs": kwargs}
        one = train(one)
        runs[kind] = one, folder / f"two{number}"
    settings = []
    for document in launched:
        settings.append(f"{document['training']['output_dir']}.yaml")
        Path(settings[-1]).write_text(yaml.safe_dump(document))
    statuses, printed = on_two_processes(RANK, folder, *settings)
    assert statuses == [0, 0], "".join(printed)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_hold_the_same_weights_bit_for_bit(kind, pairs):
    _, two = pairs[kind]
    ranks = [load_file(f"{two}.rank{number}") for number in range(2)]
    assert ranks[0]["steps"] == ranks[1]["steps"] == STEPS
    assert ranks[0].keys() == ranks[1].keys()
    assert all(torch.equal(value, ranks[1][name]) for name, value in ranks[0].items())
    assert any(name.startswith("running state: prototypes") for name in ranks[0]) == (kind in OF_PASE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", AS_ONE)
def test_two_processes_modulate_as_one_does(kind, pairs):
    """A loss that is a mean over what not all samples have is no mean of its halves: those weigh nothing."""
    one, two = pairs[kind]
    lowest = lowest_coefficients(one)
    if kind in OF_PASE:
        assert lowest[0] == 1.0 and min(lowest[1:]) < 1.0  # the second phase
    else:
        assert max(lowest[:4]) < 1.0 and lowest[4] == 1.0  # the window is over
    parts = ("variance/", "cal/", "pcl/", "transport/", "spread/", "weight/")  # no means over samples
    for alone, together in zip(history(one), history(two), strict=True):
        for name, value in alone["losses"].items():
            if "/" in name and not name.startswith(parts):
                assert together["losses"][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    ends = [load_file(run / "model.safetensors") for run in (one, two)]
    for name, value in ends[0].items():
        # keys' biases change no attention: their gradient is rounding, which Adam makes large
        tolerance = 1e-4 if name.endswith("query_key.bias") else 1e-5
        torch.testing.assert_close(
            ends[1][name], value, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def stopping(kind: type[GradientModulator]) -> type[GradientModulator]:
    """A modulator in a run that is interrupted before a step."""

    class Stopping(kind):
        stop_before: int | None = None

        def modulate(self, context: ModulationContext) -> Modulation:
            if context.step == self.stop_before:
                raise KeyboardInterrupt
            return super().modulate(context)

    return Stopping


OF_TWO = {"modalities": ["audio", "vision"]}
STOPPED = {
    "conflict": ({}, "identity"),
    "rebalance": (OF_TWO, "fcm"),
    "rebalance without any text": ({}, "fcm"),
    "rebalance as printed": (OF_TWO | {"guard": "none", "mod_form": "abs"}, "identity"),
}


@pytest.mark.needs("cpsl")
@pytest.mark.parametrize("kind", [kind for kind in STOPPED if kind.split()[0] in MODULATORS])
def test_a_stopped_run_continues_with_the_same_noise_and_coefficients(kind, train, tmp_path, monkeypatch):
    kwargs, calibrator = STOPPED[kind]
    interrupted = stopping(MODULATORS[kind.split()[0]])
    monkeypatch.setitem(MODULATORS, "stopping", interrupted)
    without_text = kind.endswith("without any text")
    archive = write_archive(
        tmp_path / "features.npz", complete=False, without="text" if without_text else None
    )
    settings = {
        "epochs": 3,
        "accumulation": 2,
        "batch_size": 8,
        "modality_dropout": {"audio": 0.3},
        "modulator": "stopping",
        "modulator_kwargs": {"epochs": [0, 1], **kwargs},
    }

    def described(folder: str, **more) -> dict:
        document = configure(tmp_path / folder, archive, **settings, **more)
        document["model"]["calibrator"] = calibrator
        if without_text:
            document["model"] |= {"head": "late_fusion", "head_kwargs": {"hidden_size": 8}}
        return document

    whole = train(described("whole"))
    monkeypatch.setattr(interrupted, "stop_before", 6)  # in the third of four steps of the second epoch
    with pytest.raises(KeyboardInterrupt):
        train(described("stopped"))
    kept = load_file(tmp_path / "stopped" / "state" / "model.safetensors")
    assert any(name.startswith("probes.") for name in kept) == (kind != "conflict")
    monkeypatch.setattr(interrupted, "stop_before", None)
    stopped = train(described("stopped", resume=True))
    ends = [load_file(run / "model.safetensors") for run in (whole, stopped)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert history(whole) == history(stopped)
    lowest = lowest_coefficients(whole)
    assert max(lowest[:2]) < 1.0 and lowest[2] == 1.0  # the window is over


@pytest.mark.needs("cpsl", "rebalance")
def test_a_rebalanced_run_publishes_no_probes_and_what_it_publishes_scores_the_same(train, tmp_path):
    archive = write_archive(tmp_path / "features.npz", complete=True)
    document = configure(tmp_path / "run", archive, **REBALANCED, epochs=5, batch_size=16, learning_rate=5e-3)
    document["model"]["calibrator"] = "fcm"
    run = train(document)
    weights = load_file(run / "model.safetensors")
    assert not any(name.startswith("probes.") for name in weights)
    assert any(value.any() for name, value in weights.items() if name.startswith("calibrator.gates."))
    model, notes = MSAModel.from_pretrained(run, output_loading_info=True)
    assert not (notes["missing_keys"] or notes["unexpected_keys"] or notes["mismatched_keys"])
    assert not model.probes
    split = np.load(archive)
    rows = split["split"] == "test"
    inputs = {f"{name}_values": torch.tensor(split[name][rows], dtype=torch.float32) for name in WIDTHS}
    masks = {f"{name}_mask": torch.ones(8, 5, dtype=torch.bool) for name in WIDTHS}
    with torch.no_grad():
        logits = model.eval()(torch.ones(8, 3, dtype=torch.bool), **inputs, **masks).logits.squeeze(-1)
    error = (logits - torch.tensor(split["label"][rows])).abs().mean().item()
    assert error == pytest.approx(model.config.trained_on["results"]["test"][COMPLETE]["mae"], rel=1e-5)
