# SPDX-License-Identifier: Apache-2.0
"""Runs with a frozen encoder: its states are computed once, and nothing else about the run changes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from feature_extractors import FeatureCache
from msa_online.encoders.text import TextEncoder
from msa_online.precomputed.states import StateStore

pytestmark = pytest.mark.slow

RANK = """
import sys
from msa_online.precomputed import states
from msa_online.training.config_reader import read_arguments
from msa_online.training.run import train

compute = states.FrozenEncoder.compute
def counting(self, keys, *others):
    print("computes", len(keys))
    compute(self, keys, *others)
states.FrozenEncoder.compute = counting

if __name__ == "__main__":
    train(read_arguments(sys.argv[1]), "a test")
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """An empty cache of features that all runs of this file share; it has the pretrained files."""
    from feature_extractors.assets import cache_root

    folder = tmp_path_factory.mktemp("cache")
    (folder / "models").symlink_to(cache_root() / "models")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MSA_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def describe(cache, tiny_corpus, tiny_text_encoder, tmp_path_factory):
    """A function that describes a run with a frozen text encoder in a folder of that name."""
    folder = tmp_path_factory.mktemp("runs")

    def describe_run(name: str, **training) -> dict:
        return {
            "model": {
                "text_encoder": str(tiny_text_encoder),
                "audio_channels": [16, 16],
                "audio_width": 16,
                "face_channels": 8,
                "face_width": 16,
                "head_kwargs": {"hidden_size": 16},
            },
            "data": {"path": str(tiny_corpus), "num_frames": 4, "face_size": 32},
            "training": {
                **{"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "log_with": None},
                **{"freeze": ["text"], "mixed_precision": "no", "output_dir": str(folder / name)},
                **{"modality_dropout": {"text": 0.3, "audio": 0.2}},
                **training,
            },
        }

    return describe_run


@pytest.fixture(scope="module")
def plain_run(describe, train) -> Path:
    """A run that computes the states in every epoch."""
    return train(describe("plain", cache_states="off"))


@pytest.fixture(scope="module")
def cached_run(describe, train, plain_run) -> Path:
    """The same run with states that are computed once."""
    return train(describe("cached"))


def losses(run: Path) -> torch.Tensor:
    history = json.loads((run / "history.json").read_text())
    return torch.tensor([[epoch["losses"]["loss"], epoch["valid"]["mae"]] for epoch in history])


def results(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())["trained_on"]["results"]


def test_losses_weights_and_scores_are_those_of_a_run_without_the_cache(plain_run, cached_run):
    torch.testing.assert_close(losses(cached_run), losses(plain_run), atol=1e-5, rtol=0)
    plain, cached = (load_file(run / "model.safetensors") for run in (plain_run, cached_run))
    assert plain.keys() == cached.keys()  # the frozen encoder is in the checkpoint all the same
    assert all((value - cached[name]).abs().max() < 1e-4 for name, value in plain.items())
    for split, conditions in results(plain_run).items():
        assert len(conditions) == 7
        for condition, metrics in conditions.items():
            assert results(cached_run)[split][condition] == pytest.approx(metrics, abs=1e-4), condition


def test_a_later_run_computes_nothing_and_says_so(describe, train, cached_run, monkeypatch, capsys):
    monkeypatch.setattr(TextEncoder, "states", None)  # it must not be called
    train(describe("later", epochs=1))
    assert "states of text: cached (30 clips)" in capsys.readouterr().out


def test_a_run_resumes_without_the_cache_onto_the_same_weights(describe, train, cached_run, monkeypatch):
    from msa_online.training.loop import TrainingLoop

    whole = TrainingLoop.train_epoch

    def interrupted(self, *arguments, epoch, **kwargs):
        if epoch == 2:
            raise KeyboardInterrupt
        return whole(self, *arguments, epoch=epoch, **kwargs)

    monkeypatch.setattr(TrainingLoop, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(describe("resumed"))
    monkeypatch.undo()
    run = train(describe("resumed", resume=True, cache_states="off"))
    torch.testing.assert_close(losses(run), losses(cached_run), atol=1e-5, rtol=0)


def test_frame_dropout_and_an_encoder_that_trains_store_nothing(describe, train, cache, capsys):
    before = list((FeatureCache().folder / "states").glob("*/*"))
    train(describe("dropped", epochs=1, frame_dropout=True, modality_dropout={}))
    train(describe("trained", epochs=1, freeze=[]))
    assert list((FeatureCache().folder / "states").glob("*/*")) == before
    assert "states of" not in capsys.readouterr().out


def test_two_processes_share_the_work_and_the_states(describe, plain_run, on_two_processes, tmp_path):
    import shutil

    shutil.rmtree(FeatureCache().folder / "states", ignore_errors=True)
    document = describe("two", batch_size=4)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    statuses, printed = on_two_processes(RANK, tmp_path, tmp_path / "run.yaml")
    assert statuses == [0, 0], "".join(printed)
    counts = [
        [int(line.split()[1]) for line in output.splitlines() if line.startswith("computes")]
        for output in printed
    ]
    assert all(first > 0 and rest == 0 for first, rest in counts), counts
    (folder,) = (FeatureCache().folder / "states").iterdir()
    store = StateStore(FeatureCache(), folder.name)
    assert len(store._places) == sum(first for first, _ in counts)
    assert "states of text: computed once (30 clips" in printed[0]
    assert "states of" not in printed[1]
