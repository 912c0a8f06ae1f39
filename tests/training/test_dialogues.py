# SPDX-License-Identifier: Apache-2.0
"""Training on dialogues: what one turn says about the next is learned, on one process and on two."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from msa_online import MSAModel
from msa_online.batching import make_dataset, make_loader, make_sampler
from msa_online.context import CONTEXTS
from msa_online.corpora.corpus import CorpusError
from msa_online.evaluation.conditions import predict_conditions
from msa_online.hub import load_checkpoint
from msa_online.modalities import COMPLETE
from msa_online.precomputed.reading import read_features
from msa_online.training.config_reader import parse_arguments
from msa_online.training.data import changed_data, fingerprint
from msa_online.training.yaml_reader import ConfigurationError
from msa_online_cli import main
from tests.training_fixtures import STOPPED_AND_RESUMED

WIDTHS = {"text": 6, "audio": 4, "vision": 5}
TURNS = 6
OF_EBMC = pytest.param("ebmc", marks=pytest.mark.needs("ebmc"))
heads = pytest.mark.parametrize("head", ["late_fusion", OF_EBMC])


def write_dialogues(path: Path, dialogues: int = 40, **changes: np.ndarray) -> Path:
    """Dialogues of six turns: the label of a turn is what the turn before it says, and of the first one 0."""
    random = np.random.default_rng(0)
    count = dialogues * TURNS
    said = random.uniform(-2, 2, size=(dialogues, TURNS))
    labels = np.concatenate([np.zeros((dialogues, 1)), said[:, :-1]], axis=1)
    values = {name: 0.3 * random.normal(size=(count, 3, width)) for name, width in WIDTHS.items()}
    angles = 0.7 * said.reshape(-1, 1)  # a LayerNorm loses the size of a state, not its direction
    values["text"][..., :2] += 3 * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    splits = np.array(["train", "train", "train", "valid", "test"])
    columns = {
        "id": np.array([f"s{number}" for number in range(count)]),
        "label": labels.ravel().round(3),
        "split": np.repeat(splits[np.arange(dialogues) % 5], TURNS),
        "dialogue": np.repeat([f"d{number}" for number in range(dialogues)], TURNS),
        "turn": np.tile(np.arange(TURNS), dialogues),
        **values,
        **changes,
    }
    order = random.permutation(count)  # the order of rows means nothing
    np.savez(path, **{name: column[order] for name, column in columns.items()})
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return write_dialogues(tmp_path_factory.mktemp("dialogues") / "features.npz")


@pytest.fixture
def describe(archive, tmp_path):
    """A function that describes a run on the dialogues; the loss is linear in the batch, without dropout."""

    def configure(name: str = "run", kind: str = "gru", head: str = "late_fusion", **training) -> dict:
        kwargs = {"hidden_size": 16, "dropout": 0.0} | ({"depth": 1} if head == "ebmc" else {})
        model = {"feature_widths": WIDTHS, "head": head, "head_kwargs": kwargs, "context": kind}
        if kind != "none":
            model["context_kwargs"] = {"hidden_size": 16, "dropout": 0.0}
        settings = {"epochs": 2, "batch_size": 6, "learning_rate": 1e-2, "mixed_precision": "no"}
        return {
            "model": model | {"loss_weights": {"unimodal": 0.0}},
            "data": {"path": str(archive)},
            "training": {"output_dir": str(tmp_path / name), "log_with": None, **settings, **training},
        }

    return configure


def error_after(steps, corpus, arguments):
    """MAE on the test split of a model trained on the whole training split, `steps` times."""
    torch.manual_seed(0)
    model = MSAModel(arguments.model_config(()))
    whole = {}
    for split in ("train", "test"):
        dataset = make_dataset(corpus, split, None, model.config)
        (whole[split],) = make_loader(dataset, make_sampler(dataset, len(dataset)))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**whole["train"]).loss.backward()
        optimizer.step()
    with torch.no_grad():
        predicted = model.eval()(**whole["test"]).logits.squeeze(-1)
    return (predicted - whole["test"]["labels"]).abs().mean().item()


@heads
def test_a_label_that_the_turn_before_decides_is_learned_with_context_and_not_without(head, describe):
    errors = {}
    for kind in CONTEXTS:
        document = describe(kind=kind, head=head)
        arguments = parse_arguments(document)
        corpus = read_features(arguments.data.path, label_range=(-3, 3))
        errors[kind] = error_after(50, corpus, arguments)
    assert errors.pop("none") > 0.8 and max(errors.values()) < 0.6, errors


def test_a_label_that_the_other_speaker_decides_is_learned_by_a_graph(describe, tmp_path):
    """The label of a turn is the mean of what the other speaker says in the dialogue."""
    said = np.random.default_rng(0).uniform(-2, 2, size=(40, TURNS))  # as in `write_dialogues`
    speakers = np.random.default_rng(1).integers(0, 2, size=said.shape)
    others = speakers[:, :, None] != speakers[:, None]
    labels = (others * said[:, None]).sum(axis=-1) / others.sum(axis=-1).clip(min=1)
    archive = write_dialogues(
        tmp_path / "speakers.npz",
        label=labels.ravel(),
        speaker=np.where(speakers.ravel() == 0, "Ann", "Bob"),
    )
    corpus, errors = read_features(archive, label_range=(-3, 3)), {}
    for kind in ("gru", "graph"):
        errors[kind] = error_after(60, corpus, parse_arguments(describe(kind=kind)))
    assert errors["graph"] < 0.6 * errors["gru"], errors


def test_a_graph_needs_the_speaker_of_each_turn_in_training_and_evaluation(
    describe, train, archive, tmp_path, capsys
):
    document = describe(kind="graph", epochs=1)
    with pytest.raises(
        CorpusError, match=r"without a speaker \(240 such samples in 40 dialogues\)"
    ) as caught:
        train(document)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "state").exists()
    names = np.array(["Ann", "Bob", "Cy"] * 80)
    document["data"]["path"] = str(write_dialogues(tmp_path / "speakers.npz", speaker=names))
    run = train(document)
    capsys.readouterr()
    options = ["--split", "test", "--mixed-precision", "no"]
    assert main(["evaluate", str(run), str(archive), *options]) == 1
    assert "without a speaker (48 such samples in 8 dialogues)" in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", str(run), document["data"]["path"], *options]) == 0


def test_other_speakers_are_other_data_where_they_are_read(tmp_path):
    names = np.array(["Ann", "Bob", "Cy"] * 80)
    corpora = [
        read_features(write_dialogues(tmp_path / "features.npz", speaker=each), label_range=(-3, 3))
        for each in (names, np.roll(names, 1))
    ]
    for speakers in (True, False):
        before, now = (fingerprint(corpus, turns=True, speakers=speakers) for corpus in corpora)
        found = changed_data(before, now)
        assert (found or "").startswith("240 of 240 turns differ (for example 's0': 'd0 0 Ann'") == speakers


@heads
def test_a_run_reports_its_dialogues_and_its_checkpoint_scores_the_same(
    head, describe, train, archive, capsys
):
    document = describe(head=head, batch_size=4)
    if head == "ebmc":
        document["training"]["stages"] = [{"name": name, "epochs": 1} for name in ("enhance", "balance")]
    document["model"]["context_turns"] = 4
    run = train(document)
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "warning: 40 of 40 dialogues have more than the 4 turns that the model reads together (most: 'd"
        in printed
        and "they are cut into 80 windows" in printed
    )
    assert "train: 144 samples in 48 dialogues, which batches count; steps: 12 per epoch" in printed
    model, _ = load_checkpoint(run)
    recorded = model.config.trained_on["results"]["test"]
    assert "| context | gru over up to 4 turns |" in (run / "README.md").read_text(encoding="utf-8")
    dataset = make_dataset(read_features(archive, label_range=(-3, 3)), "test", None, model.config)
    for batch_size in (1, 100):  # how windows are put into batches changes nothing
        loader = make_loader(dataset, make_sampler(dataset, batch_size))
        found = predict_conditions(model, loader, Accelerator(cpu=True), (COMPLETE, "text"))
        for condition, scores in found.metrics(model.config).items():
            assert scores["mae"] == pytest.approx(recorded[condition]["mae"], rel=1e-5)


def test_dialogues_that_are_cut_are_refused_if_the_data_must_be_clean(describe, train):
    document = describe()
    document["model"]["context_turns"] = 5
    document["data"]["strict"] = True
    with pytest.raises(CorpusError, match=r"(?s)--strict .*40 of 40 dialogues have more than the 5 turns"):
        train(document)


@pytest.mark.parametrize(
    ("column", "cells", "message"),
    [
        ("dialogue", [""] * 240, "no sample has a dialogue, which a model with context reads"),
        ("turn", ["", *range(239)], r"has a sample without a turn \(1 such sample in 1 dialogue\)"),
        (
            "turn",
            [1] * 240,
            r"turn 1 of dialogue 'd\d+' is also that of .* \(200 such samples in 40 dialogues\)",
        ),
    ],
    ids=["no dialogue", "no turn", "one turn"],
)
def test_turns_without_an_order_stop_a_run_before_it_trains(
    column, cells, message, describe, train, tmp_path
):
    document = describe()
    document["data"]["path"] = str(
        write_dialogues(tmp_path / "broken.npz", **{column: np.array(list(map(str, cells)))})
    )
    with pytest.raises(CorpusError, match=message) as caught:
        train(document)
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "state").exists()
    document["model"] |= {"context": "none", "context_kwargs": {}}
    train(document)  # other models do not read the columns


def test_fewer_dialogues_than_micro_batches_are_named(describe, train):
    with pytest.raises(ConfigurationError, match=r"24 dialogues, but one optimizer step takes 30 batches"):
        train(describe(accumulation=30))


@pytest.mark.slow
def test_two_processes_train_and_resume_as_one_process_trains(describe, train, on_two_processes, tmp_path):
    """Dialogues of unequal lengths: the sizes of micro-batches differ, and a step has all of them."""
    lengths = np.random.default_rng(1).integers(1, 9, size=240)
    cells = np.repeat([f"d{number}" for number in range(240)], lengths)[:240]
    archive = write_dialogues(
        tmp_path / "uneven.npz",
        dialogue=cells,
        turn=np.arange(240),
        split=np.where(np.char.endswith(cells, "5"), "valid", "train"),
    )
    one, two = describe("one", batch_size=8, epochs=3), describe("two", batch_size=2, epochs=3)
    for document in (one, two):
        document["data"]["path"] = str(archive)
    one = train(one)
    two["training"] |= {"accumulation": 2, "modulator": "stopping"}
    settings = tmp_path / "two.yaml"
    settings.write_text(yaml.safe_dump(two))
    statuses, printed = on_two_processes(STOPPED_AND_RESUMED, tmp_path, settings, tmp_path, "identity")
    assert statuses == [0, 0], "".join(printed)
    ends = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped", one.name)]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), f"{name} after resuming"
        torch.testing.assert_close(value, ends[2][name], atol=1e-4, rtol=1e-3)
