# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from torch.nn.utils import get_total_norm

import msa_online_cli
from msa_online import MSAConfig, MSAModel
from msa_online.methods import GradientModulator
from msa_online.training.config_reader import parse_arguments
from msa_online.training.diagnostics import probe_modalities
from msa_online.training.yaml_reader import ConfigurationError

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
WIDTHS = {"text": 4, "audio": 3, "vision": 2}
COUNT = 60


def batch_of(labels: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Samples whose text is the label; audio and vision are noise, and every third sample has no audio."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"labels": labels, "index": torch.arange(len(labels))}
    for name, width in WIDTHS.items():
        batch[f"{name}_values"] = torch.randn(len(labels), 1, width, generator=generator)
        batch[f"{name}_mask"] = torch.ones(len(labels), 1, dtype=torch.bool)
    batch["text_values"][:, 0, 0] = labels.float()
    batch["modality_present"] = torch.ones(len(labels), 3, dtype=torch.bool)
    batch["modality_present"][::3, 1] = False
    return batch


def test_a_probe_reads_what_a_modality_shows_and_no_more():
    torch.manual_seed(0)
    config = MSAConfig(feature_widths=WIDTHS, head_kwargs={"hidden_size": 16}, label_range=[-3, 3])
    splits = [batch_of(torch.linspace(-3, 3, COUNT), seed) for seed in (0, 1)]
    scores = probe_modalities(MSAModel(config), [splits[0]], [splits[1]], Accelerator(cpu=True))
    assert scores["probe/text"] < 0.6
    assert scores["probe/audio"] > 1.2 and scores["probe/vision"] > 1.2  # a constant has 1.5


def test_the_probe_of_a_classifier_is_an_f1_and_a_modality_that_never_occurs_has_none():
    torch.manual_seed(0)
    config = MSAConfig(feature_widths=WIDTHS, head_kwargs={"hidden_size": 16}, id2label={0: "a", 1: "b"})
    splits = [batch_of(torch.arange(COUNT) % 2, seed) for seed in (0, 1)]
    for split in splits:
        split["text_values"][:, 0, 0] = 8 * (split["labels"] - 0.5)
    splits[1]["modality_present"][:, 2] = False
    scores = probe_modalities(MSAModel(config), [splits[0]], [splits[1]], Accelerator(cpu=True))
    assert scores["probe/text"] > 0.9 > 0.75 > scores["probe/audio"]
    assert "probe/vision" not in scores


def test_the_gradient_of_a_modality_is_that_of_its_own_parameters(features_config, feature_rows, make_trial):
    trial = make_trial(features_config("late_fusion", dropout=0.0), feature_rows, GradientModulator())
    trial.loop.measure_modalities = True
    model = trial.loop.bare_model
    trial.sampler.start_epoch(0)
    batch = next(iter(trial.loader))
    model(**batch).loss.backward()
    expected = {
        f"modality_gradient/{name}": get_total_norm(
            [each.grad for each in parameters if each.grad is not None]
        ).item()
        for name, parameters in model.modality_parameters().items()
    }
    model.zero_grad()
    records = []
    trial.loop._log = records.append
    trial.train(1)
    assert {name: records[0][name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def run(tmp_path: Path):
    """A function that trains on a few features and returns the run's folder."""
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "features.npz",
        id=np.array([f"s{number}" for number in range(COUNT)]),
        label=np.linspace(-3, 3, COUNT).astype(np.float32),
        split=np.array(["train", "valid", "test"] * (COUNT // 3)),
        **{name: random.normal(size=(COUNT, width)) for name, width in WIDTHS.items()},
    )

    def run(name: str, **training) -> Path:
        document = {
            "model": {"feature_widths": WIDTHS, "head_kwargs": {"hidden_size": 8}},
            "data": {"path": str(tmp_path / "features.npz")},
            "training": {"epochs": 2, "log_with": None, "output_dir": str(tmp_path / name), **training},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document))
        assert msa_online_cli.main(["train", str(tmp_path / f"{name}.yaml")]) == 0
        return tmp_path / name

    return run


def test_diagnostics_are_in_the_history_of_every_epoch_and_change_nothing(run):
    dropout = {"modality_dropout": {"text": 0.3}}
    plain, measured = (
        run("plain", **dropout),
        run("measured", diagnostics=["shares", "probes", "gradients"], **dropout),
    )
    weights = [(folder / "model.safetensors").read_bytes() for folder in (plain, measured)]
    assert weights[0] == weights[1]
    for entry in json.loads((measured / "history.json").read_text()):
        values = entry["losses"]
        for kind in ("share", "probe", "modality_gradient"):
            assert all(values[f"{kind}/{name}"] > 0 for name in WIDTHS)
        assert sum(values[f"share/{name}"] for name in WIDTHS) == pytest.approx(1)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"diagnostics": ["share"]}, "names 'share': any of shares, probes, gradients"),
        ({"diagnostics": ["shares"], "condition": "text"}, "names shares, but a model of training.condition"),
    ],
)
def test_diagnostics_that_cannot_be_measured_are_refused(training, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_arguments({"model": {"feature_widths": WIDTHS}, "training": training})
