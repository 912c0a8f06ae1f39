# SPDX-License-Identifier: Apache-2.0
"""Training on precomputed features, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from msa_online import MSAConfig, MSAModel
from msa_online.batching import BucketBatchSampler, FeatureDataset, make_loader
from msa_online.evaluation.conditions import evaluate_frame_rates
from msa_online.hub import load_checkpoint
from msa_online.methods import MODULATORS, GradientModulator
from msa_online.missing.frames import FrameDrop, stand_ins_of
from msa_online.missing.rates import SplitMask
from msa_online.modalities import CONDITIONS
from msa_online.precomputed.reading import read_features
from msa_online.training.config_reader import parse_arguments
from msa_online.training.run import train as train_run
from msa_online.training.yaml_reader import ConfigurationError
from msa_online.user_errors import INPUT_ERRORS

WIDTHS = {"text": 6, "audio": 4, "vision": 8}
LIMIT = 240  # seconds a launch may take on a busy machine


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Forty samples whose vision says what the label is, in units far from 1."""
    random = np.random.default_rng(0)
    labels = random.uniform(-3, 3, size=40)
    pattern = np.array([1, -1, 1, 1, -1, -1, 1, -1])
    vision = 1000 + 100 * (labels[:, None] * pattern + random.normal(size=(40, 8)))
    text = random.normal(5, 2, size=(40, 5, 6))
    text[np.arange(40) % 7 == 0] = 0  # no words
    path = tmp_path_factory.mktemp("features") / "features.npz"
    np.savez(
        path,
        id=np.array([f"s{number}" for number in range(40)]),
        label=labels.round(3),
        mood=np.where(labels < -1, "low", np.where(labels > 1, "high", "even")),
        split=np.array((["train"] * 3 + ["valid", "test"]) * 8),
        text=text,
        audio=random.normal(size=(40, 9, 4)),
        vision=vision,
    )
    return path


@pytest.fixture
def document(archive, tmp_path) -> dict:
    """A configuration that trains on the archive."""
    return {
        "model": {"feature_widths": WIDTHS, "head_kwargs": {"hidden_size": 16}},
        "data": {"path": str(archive)},
        "training": {"output_dir": str(tmp_path / "run"), "epochs": 1, "batch_size": 4, "log_with": None},
    }


@pytest.fixture
def train(repository):
    """A function that carries out a configuration as train.py does, in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return lambda document: train_run(parse_arguments(document), "none")


@pytest.mark.slow
def test_a_run_on_features_learns_and_is_a_checkpoint_that_scales_as_it_did(
    repository, document, archive, tmp_path
):
    changes = {"epochs": 20, "learning_rate": 0.01, "modality_dropout": {"text": 0.5, "audio": 0.5}}
    document["training"] |= changes
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    done = subprocess.run(
        [*launcher, "train.py", str(tmp_path / "run.yaml")],
        cwd=repository,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 samples (24 train, 8 valid, 8 test)" in done.stdout and "6 (15.0%)" in done.stdout
    weights = load_file(tmp_path / "run" / "model.safetensors")
    with np.load(archive) as arrays:
        training = arrays["vision"][arrays["split"] == "train"]
    np.testing.assert_allclose(weights["encoders.vision.mean"], training.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(weights["encoders.vision.deviation"], training.std(axis=0), rtol=1e-4)
    model, processor = load_checkpoint(tmp_path / "run")
    assert processor is None and not (tmp_path / "run" / "tokenizer.json").exists()
    assert model.config.trained_on["results"]["test"]["vision"]["corr"] > 0.8


def test_classes_are_named_by_the_data_and_fine_tuning_keeps_the_scaling(document, train, tmp_path, capsys):
    document["data"] |= {"task": "classification", "label_column": "mood", "standardize": False}
    train(document)
    model, _ = load_checkpoint(tmp_path / "run")
    assert set(model.config.label2id) == {"low", "even", "high"}
    assert torch.equal(model.encoders["vision"].mean, torch.zeros(8))  # as said
    document["data"]["standardize"] = True
    second = {"init_from": str(tmp_path / "run"), "output_dir": str(tmp_path / "second")}
    document["training"] |= second
    capsys.readouterr()
    train(document)
    printed = capsys.readouterr().out
    assert (
        f"fine-tuning from {tmp_path / 'run'}" in printed
        and "  vision encoder: 2 tensors loaded\n" in printed
    )
    model, _ = load_checkpoint(tmp_path / "second")
    assert torch.equal(model.encoders["vision"].mean, torch.zeros(8))  # what the weights are used to


MISSING = {"rates": {"audio": 0.5, "text": 0.3, "vision": 0.4}, "seed": 3}


@pytest.mark.parametrize("lacking", [None, "text"])
def test_the_best_epoch_may_be_chosen_by_the_mean_of_all_conditions_the_data_allow(
    document, archive, train, tmp_path, capsys, lacking
):
    if lacking:
        with np.load(archive) as arrays:
            kept = {name: arrays[name] for name in arrays if name != lacking}
        np.savez(tmp_path / "features.npz", **kept)
        document["data"]["path"] = str(tmp_path / "features.npz")
    document["training"]["selection"] = "conditions"
    train(document)
    (epoch,) = json.loads((tmp_path / "run" / "history.json").read_text())
    record = load_checkpoint(tmp_path / "run")[0].config.trained_on
    counted = [name for name in CONDITIONS if not lacking or lacking not in CONDITIONS[name]]
    assert len(counted) == (3 if lacking else 7)
    scores = [record["results"]["valid"][name]["mae"] for name in counted]
    assert epoch["valid"]["mae"] == pytest.approx(np.mean(scores))
    assert record["selection"] == f"validation MAE, mean of {len(counted)} conditions"
    assert (
        f"validation MAE, mean of {len(counted)} conditions" in (tmp_path / "run" / "README.md").read_text()
    )


def test_a_run_at_missing_rates_is_judged_and_scored_on_incomplete_splits(document, train, tmp_path, capsys):
    document["data"]["missing"] = MISSING
    document["training"]["epochs"] = 3
    train(document)
    record = load_checkpoint(tmp_path / "run")[0].config.trained_on
    drawn = record["missing"]["splits"]
    assert [sum(drawn[split]["patterns"].values()) for split in ("train", "valid", "test")] == [24, 8, 8]
    realised = drawn["train"]["realised"]
    assert record["protocol"].startswith("imr") and f"text 0.3 ({realised['text']:.3f})" in record["protocol"]
    printed = capsys.readouterr().out
    assert all(f"{100 * rate:.1f}" in printed for rate in (0.4, *realised.values()))
    assert set(record["results"]["test"]) == {*CONDITIONS, "imr"}
    assert "calibrated probabilities: valid has 8 samples for them; at least 20 are needed" in printed
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    chosen = min(history, key=lambda epoch: epoch["valid"]["mae"])
    assert chosen["epoch"] == record["epoch"]
    assert chosen["valid"]["mae"] == pytest.approx(record["results"]["valid"]["imr"]["mae"], rel=1e-5)


@pytest.mark.parametrize("head", ["late_fusion", pytest.param("ebmc", marks=pytest.mark.needs("ebmc"))])
def test_what_a_mask_hides_reaches_neither_training_nor_a_teacher_nor_the_scaling(
    head, document, train, archive, tmp_path
):
    document["data"]["missing"] = MISSING
    if head == "ebmc":
        document["model"] |= {"head": "ebmc", "head_kwargs": {"hidden_size": 8, "depth": 1}}
        stages = [{"name": "enhance", "epochs": 1}, {"name": "balance", "epochs": 1}]
        document["training"] |= {"stages": stages}
    train(document)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    with np.load(archive) as arrays:
        arrays = dict(arrays)
    mask = SplitMask(
        [str(name) for name in arrays["id"][arrays["split"] == "train"]],
        torch.ones(24, 3, dtype=torch.bool),
        **MISSING,
        split="train",
    )
    hidden = np.flatnonzero(arrays["split"] == "train")[~mask.kept[:, 2].numpy()]
    hidden = hidden[hidden % 7 != 0]  # one without words may keep its face although the mask says otherwise
    arrays["vision"][hidden] = 1e6  # another corpus, that differs in what was hidden from training
    np.savez(tmp_path / "other.npz", **arrays)
    document["data"]["path"] = str(tmp_path / "other.npz")
    document["training"]["output_dir"] = str(tmp_path / "other")
    train(document)
    others = load_file(tmp_path / "other" / "model.safetensors")
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_training_with_dropped_frames_is_repeatable_and_judged_with_half_of_them_missing(
    document, train, archive, tmp_path
):
    document["training"] |= {"frame_dropout": True, "epochs": 2}
    runs = []
    for name in ("run", "again"):
        document["training"]["output_dir"] = str(tmp_path / name)
        train(document)
        runs.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    model, _ = load_checkpoint(tmp_path / "run")
    assert "frames dropped" in model.config.trained_on["protocol"]
    corpus = read_features(archive, label_range=(-3, 3))
    dataset = FeatureDataset(corpus, corpus.split("valid"), WIDTHS, None)
    loader = make_loader(dataset, BucketBatchSampler(dataset.lengths, 4))
    ids = [sample.id for sample in dataset.samples]
    drop = FrameDrop(ids, stand_ins_of(model, None), split="valid", seed=1111)
    scores = evaluate_frame_rates(model, loader, Accelerator(cpu=True), drop, rates=(0.5,))
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    judged = min(epoch["valid"]["mae"] for epoch in history)
    assert judged == pytest.approx(scores["0.5"]["mae"], rel=1e-5)


def test_a_split_too_small_for_its_rates_is_refused_before_anything_is_written(document, train, tmp_path):
    document["data"]["missing"] = {"rates": {"audio": 0.01}}
    with pytest.raises(INPUT_ERRORS, match="the train split has 24 samples, too few"):
        train(document)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"feature_widths": {**WIDTHS, "audio": 74}}, "audio is 4 wide in the data and 74 in the model"),
        ({"path": "{clips}"}, "holds raw clips, but the model reads precomputed features.*extract-features"),
        (
            {"feature_widths": None, "text_encoder": "{encoder}"},
            "holds precomputed features, but the model",
        ),
        ({"label_range": [-1, 1]}, r"is outside \[-1, 1\]"),
        ({"split_column": "mood"}, "split 'low' is unknown"),
        ({"path": "{clips}/features.pkl"}, "msa-online convert-features"),
        ({"path": "{clips}", "split_column": "fold"}, "data.split_column=fold applies to precomputed feat"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused_before_anything_is_written(
    document, train, tiny_corpus, tiny_text_encoder, tmp_path, changes, expected
):
    places = {"{clips}": str(tiny_corpus), "{encoder}": str(tiny_text_encoder)}
    document["model"] = {"feature_widths": WIDTHS}
    for key, value in changes.items():
        for place, path in places.items():
            value = value.replace(place, path) if isinstance(value, str) else value
        document["model" if key in ("feature_widths", "text_encoder") else "data"][key] = value
    with pytest.raises(INPUT_ERRORS, match=expected):
        train(document)
    assert not (tmp_path / "run").exists()


def test_fine_tuning_keeps_to_the_widths_of_its_checkpoint(document, train, tmp_path):
    MSAModel(MSAConfig(feature_widths=WIDTHS)).save_pretrained(tmp_path / "first")
    document["model"]["feature_widths"] = {**WIDTHS, "text": 768}
    document["training"]["init_from"] = str(tmp_path / "first")
    with pytest.raises(ConfigurationError, match="has feature_widths .* but model.feature_widths is"):
        train(document)


class Stopping(GradientModulator):
    """Interrupts a run in its second epoch, unless told to let it pass."""

    stops = False

    def modulate(self, context):
        if self.stops and context.epoch == 1:
            raise KeyboardInterrupt


def test_processes_that_load_change_neither_a_run_nor_a_resumed_one(document, train, tmp_path, monkeypatch):
    monkeypatch.setitem(MODULATORS, "stopping", Stopping)
    document["model"]["head_kwargs"]["dropout"] = 0.5
    document["training"] |= {"epochs": 3, "modulator": "stopping"}
    runs = {}
    for name, workers, stops in (("none", 0, False), ("one", 1, False), ("resumed", 1, True)):
        document["data"]["loader_workers"] = workers
        document["training"] |= {"output_dir": str(tmp_path / name), "resume": False}
        if stops:
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(Stopping, "stops", True)
                train(document)
            GradientState._reset_state()  # an interrupted run leaves its loaders there
            document["training"]["resume"] = True
        train(document)
        runs[name] = (
            load_file(tmp_path / name / "model.safetensors"),
            (tmp_path / name / "history.json").read_text(),
        )
    for weights, history in (runs["one"], runs["resumed"]):
        assert all(torch.equal(value, weights[name]) for name, value in runs["none"][0].items())
        assert history == runs["none"][1]


def test_a_diverged_run_stops_and_publishes_nothing(train, document, tmp_path):
    document["training"] |= {"learning_rate": 1e4, "warmup": 0.0, "clip_norm": 1e6, "epochs": 5}
    with pytest.raises(INPUT_ERRORS, match="training has diverged.*lower training.learning_rate"):
        train(document)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "README.md").exists()


def test_a_model_that_has_learned_nothing_is_compared_with_the_mean_label(train, document, tmp_path, capsys):
    document["training"] |= {"learning_rate": 1e-9}
    document["model"]["head_kwargs"]["dropout"] = 0.0
    train(document)
    output = " ".join(capsys.readouterr().out.split())
    assert "always predicting the mean training label" in output
    trained_on = MSAConfig.from_pretrained(tmp_path / "run").trained_on
    found, floor = trained_on["results"]["test"]["text+audio+vision"], trained_on["constant"]["test"]
    assert ("warning: test:" in output) == (found["mae"] > floor["mae"])
    assert all(
        f"- {line}" in (tmp_path / "run" / "README.md").read_text() for line in trained_on["comparison"]
    )


def saved_with(archive: Path, folder: Path, **changes) -> str:
    """A copy of the archive with other arrays."""
    with np.load(archive) as arrays:
        np.savez(folder / "changed.npz", **{**arrays, **changes})
    return str(folder / "changed.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("labels", r"of 40 labels differ"),
        ("splits", r"16 of 40 splits differ \(for example 's\d+': '\w+', now '\w+'\)"),
        ("features", r"40 of 40 files differ"),
        ("samples", r"1 sample is gone \(for example 's39'\)"),
    ],
)
def test_a_run_is_not_resumed_on_other_data(change, message, archive, document, train, tmp_path, monkeypatch):
    monkeypatch.setitem(MODULATORS, "stopping", Stopping)
    document["training"] |= {"epochs": 3, "modulator": "stopping"}
    document["data"]["path"] = saved_with(archive, tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Stopping, "stops", True)
        train(document)
    with np.load(archive) as arrays:
        changes = {
            "labels": {"label": -arrays["label"][::-1]},
            "splits": {"split": np.array((["train"] * 3 + ["test", "valid"]) * 8)},
            "features": {"vision": arrays["vision"] + 1},
            "samples": {name: arrays[name][:39] for name in arrays},
        }[change]
    saved_with(archive, tmp_path, **changes)
    GradientState._reset_state()
    document["training"]["resume"] = True
    with pytest.raises(
        ConfigurationError, match=f"the data have changed since the run was started: .*({message})"
    ):
        train(document)
    saved_with(archive, tmp_path)
    GradientState._reset_state()
    train(document)  # on the data of the start it goes on
    assert len(json.loads((tmp_path / "run" / "history.json").read_text())) == 3


def test_undefined_metrics_are_null_with_the_reason_wherever_they_are_stored(
    archive, document, train, tmp_path, capsys
):
    from msa_online_cli import main

    with np.load(archive) as arrays:
        split = arrays["split"]
        label = np.where(split == "train", arrays["label"], np.where(split == "test", 0.0, 1.5))
    document["data"]["path"] = saved_with(archive, tmp_path, label=label)
    with pytest.warns(UserWarning, match="no label differs from 0|all labels are"):
        train(document)
    run = tmp_path / "run"
    record = json.loads((run / "config.json").read_text(), parse_constant=pytest.fail)["trained_on"]
    for scores in (*record["results"]["test"].values(), record["constant"]["test"]):
        assert scores["corr"] is scores["acc2_non0"] is scores["f1_non0"] is None and scores["mae"] >= 0
    assert record["undefined"] == {
        "valid": {"corr": "all labels are 1.5"},
        "test": {
            "acc2_non0": "no label differs from 0",
            "f1_non0": "no label differs from 0",
            "corr": "all labels are 0",
        },
    }
    (epoch,) = json.loads((run / "history.json").read_text(), parse_constant=pytest.fail)
    assert epoch["valid"]["corr"] is None and epoch["undefined"] == {"corr": "all labels are 1.5"}
    assert "undefined: Pearson correlation (all labels are 1.5)" in capsys.readouterr().out
    assert "Undefined: Acc-2 Non0 (no label differs from 0); " in (run / "README.md").read_text()
    capsys.readouterr()
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.warns(UserWarning, match="no label differs from 0|all labels are"):
        assert main(["evaluate", str(run), document["data"]["path"], "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["undefined"] == record["undefined"]["test"]
    assert all(scores["corr"] is None for scores in report["conditions"].values())
    assert main(["describe", str(run)]) == 0 and main(["describe", str(run), "--json"]) == 0


def test_strict_refuses_odd_data_before_training(archive, document, train, tmp_path, capsys):
    with np.load(archive) as arrays:
        changes = {"label": np.abs(arrays["label"]), "speaker": np.array(["ann", "bob"] * 20)}
        vision, text, audio = (arrays[name].copy() for name in ("vision", "text", "audio"))
    for values in (vision, text, audio):
        values[3] = values[0]  # a sample of validation is one of training
    document["data"]["path"] = saved_with(archive, tmp_path, **changes, vision=vision, text=text, audio=audio)
    train(document)
    printed = capsys.readouterr().out
    for expected in (
        "warning: 2 of 2 speakers are in more than one split",
        "warning: none of 40 labels is negative",
        "warning: 2 samples have the same bytes as samples of another split, under other names (for example "
        "'s0' of train and 's3' of valid)",
        "warning: train has only 24 samples",
    ):
        assert expected in printed
    document["data"]["strict"] = True
    document["training"]["output_dir"] = str(tmp_path / "strict")
    with pytest.raises(INPUT_ERRORS, match=r"5 warnings, which --strict \(data.strict=true\) refuses"):
        train(document)
    assert not (tmp_path / "strict").exists()
