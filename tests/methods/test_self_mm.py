# SPDX-License-Identifier: Apache-2.0
"""Self-MM against its equations, computed sample by sample in NumPy (docs/methods/self_mm.md)."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from msa_online import MSAModel
from msa_online.hub import load_checkpoint
from msa_online.methods import MODULATORS, GradientModulator, SelfMMHead
from msa_online.methods.self_mm import OwnLabels, pseudo_loss
from msa_online.modalities import MODALITIES
from msa_online.training.callback import RunningStateCallback
from msa_online.training.yaml_reader import ConfigurationError
from tests.equations import assert_equation

PRESENT = [[True, True, True], [True, False, True], [False, False, True], [False, False, False]]
WIDTHS = {"text": 6, "audio": 5, "vision": 4}
LABELS = [2.0, -1.0, 0.5, -2.5, 0.0, 1.5, -0.5]
WIDTH = 3


def linear(weights: dict, name: str, values: np.ndarray) -> np.ndarray:
    return weights[f"{name}.weight"] @ values + weights[f"{name}.bias"]


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_predictions_are_those_of_the_equations_whatever_is_absent(outputs, make_head, make_gappy):
    head, sequences = make_head("self_mm", outputs), make_gappy(4, PRESENT)
    weights = {name: value.numpy() for name, value in head.state_dict().items()}
    output = head(sequences)
    for sample, present in enumerate(PRESENT):
        states = []
        for name, is_there in zip(MODALITIES, present, strict=True):
            state = np.zeros(8)
            if is_there:
                mean = sequences[name].values[sample][sequences[name].mask[sample]].mean(dim=0)
                normal = torch.nn.functional.layer_norm(mean, mean.shape).numpy()  # starts as the identity
                state = torch.nn.functional.gelu(
                    torch.from_numpy(linear(weights, f"projections.{name}.1", normal))
                ).numpy()
            assert_equation("9.1", f"state of {name}", output.features[name][sample], state)
            alone = np.maximum(linear(weights, f"specific.{name}.0", state), 0)
            found = output.modality_logits[name][sample]
            assert_equation(
                "9.3", f"prediction of {name}", found, linear(weights, f"predictors.{name}", alone)
            )
            states.append(state)
        fused = np.maximum(linear(weights, "fusion.0", np.concatenate(states)), 0)
        assert_equation("9.2", "fused state", output.fused[sample], fused)
        assert_equation("9.2", "prediction", output.logits[sample], linear(weights, "classifier", fused))


def test_the_loss_weighs_each_own_label_by_its_distance_from_the_label():
    generator = torch.Generator().manual_seed(0)
    own, scores = (torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor(LABELS, dtype=torch.float64)
    present = dict(zip(MODALITIES, torch.rand(3, 7, generator=generator) < 0.6, strict=True))
    expected = 0.0
    for row, name in enumerate(MODALITIES):
        terms = [
            np.tanh(abs(own[row, at] - labels[at])) * abs(scores[row, at] - own[row, at])
            for at in range(7)
            if present[name][at]
        ]
        expected += np.mean(terms)
    logits = {name: scores[row].unsqueeze(-1) for row, name in enumerate(MODALITIES)}
    assert_equation("9.8", "loss pseudo", pseudo_loss(logits, own, labels, present), expected)


class NaiveLabels:
    """Own labels one sample at a time; the fused state is the fourth."""

    def __init__(self) -> None:
        self.own = [[label] * 3 for label in LABELS]
        self.states = [[None] * 4 for _ in LABELS]
        self.visits = [[0] * 4 for _ in LABELS]

    def centre(self, of: int, sign: int) -> np.ndarray:
        known = [sample for sample in range(len(LABELS)) if self.states[sample][of] is not None]
        label = [LABELS[sample] if of == 3 else self.own[sample][of] for sample in known]
        return np.mean(
            [self.states[s][of] for s, y in zip(known, label, strict=True) if sign * y > 0], axis=0
        )

    def position(self, of: int, state: np.ndarray) -> float:
        far, near = (((state - self.centre(of, sign)) ** 2).sum() / np.sqrt(WIDTH) for sign in (-1, 1))
        return (far - near) / (near + 1e-6)

    def step(self, index: list[int], states: np.ndarray, seen: np.ndarray) -> None:
        own = [list(labels) for labels in self.own]
        for row, sample in enumerate(index):
            for of in range(3):
                if not seen[of, row] or not self.visits[sample][of]:
                    continue
                alone, fused = self.position(of, states[of, row]), self.position(3, states[3, row])
                y = LABELS[sample]
                new = y + (alone - fused) / 2 * (y + fused) / fused
                new = min(max(new, min(LABELS)), max(LABELS))
                visit = self.visits[sample][of] + 1
                own[sample][of] = (visit - 1) / (visit + 1) * own[sample][of] + 2 / (visit + 1) * new
        self.own = own
        for row, sample in enumerate(index):
            for of in range(4):
                if seen[of, row]:
                    self.states[sample][of] = states[of, row]
                    self.visits[sample][of] += 1


def steps_of(epochs: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Index, states and what is seen of two steps an epoch; in the first epoch all is seen."""
    generator = torch.Generator().manual_seed(0)
    steps = []
    for epoch in range(epochs):
        for index in torch.randperm(len(LABELS), generator=generator).split(4):
            states = torch.randn(4, len(index), WIDTH, generator=generator, dtype=torch.float64)
            there = (torch.rand(3, len(index), generator=generator) < 0.6) | (epoch == 0)
            steps.append((index, states, torch.cat([there, there.any(dim=0, keepdim=True)])))
    return steps


def make_store() -> OwnLabels:
    return OwnLabels(torch.tensor(LABELS, dtype=torch.float64), WIDTH)


def after(steps, cut: int = 4) -> OwnLabels:
    """A store after these steps, each cut into micro-batches of `cut` samples."""
    store = make_store()
    for index, states, seen in steps:
        for part in torch.arange(len(index)).split(cut):
            store.collect(index[part], states[:, part], seen[:, part])
        store.end_step(taken=True)
    return store


def assert_same(one: OwnLabels, other: OwnLabels) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-12, atol=1e-12)


def test_own_labels_are_the_running_means_of_labels_generated_from_distances():
    store, naive = make_store(), NaiveLabels()
    assert store.of(torch.tensor([3, 0])).tolist() == [[-2.5, 2.0]] * 3
    for number, (index, states, seen) in enumerate(steps_of(4)):
        store.collect(index, states, seen)
        store.end_step(taken=True)
        naive.step(index.tolist(), states.numpy(), seen.numpy())
        found = store.of(torch.arange(len(LABELS))).T
        assert_equation("9.7", f"own labels after step {number}", found, naive.own)
    moved = (store.generated - store.labels).abs() > 0.1
    inside = (store.generated > min(LABELS)) & (store.generated < max(LABELS))
    assert (moved & inside).sum() > 10  # most labels are not only the bounds of their range


def test_a_position_of_zero_gives_a_finite_label():
    """A fused state as far from one centre as from the other divides by 0."""
    store = make_store()
    index, states = torch.arange(7), torch.zeros(4, 7, WIDTH, dtype=torch.float64)
    for _ in range(2):
        store.collect(index, states, torch.ones(4, 7, dtype=torch.bool))
        store.end_step(taken=True)
    assert store.generated.isfinite().all()


def test_without_samples_of_both_signs_labels_stay():
    store = OwnLabels(torch.tensor([1.0, 2.0, 0.5]), WIDTH)
    for _ in range(2):
        store.collect(torch.arange(3), torch.randn(4, 3, WIDTH), torch.ones(4, 3, dtype=torch.bool))
        store.end_step(taken=True)
    assert torch.equal(store.generated, store.labels.expand(3, -1))


@pytest.mark.parametrize("cut", [1, 3])
def test_how_a_step_is_cut_changes_nothing(cut):
    assert_same(after(steps_of(3), cut), after(steps_of(3)))


def test_a_skipped_step_and_a_placeholder_leave_no_trace():
    steps = steps_of(3)
    store = after(steps[:-1])
    index, states, seen = steps[-1]
    store.collect(index, torch.full_like(states, torch.nan), seen)
    store.end_step(taken=False)
    store.collect(index, states, seen)
    store.collect(index[:1], states[:, -1:], torch.zeros_like(seen[:, :1]))  # a sample of the same step
    store.end_step(taken=True)
    store.end_step(taken=True)  # nothing was collected
    assert_same(store, after(steps))


def test_a_store_continues_where_it_was_saved():
    steps = steps_of(3)
    store = make_store()
    saved = {name: value.clone() for name, value in after(steps[:3]).state_dict().items()}
    store.load_state_dict(saved)
    for index, states, seen in steps[3:]:
        store.collect(index, states, seen)
        store.end_step(taken=True)
    assert_same(store, after(steps))


def test_only_training_reads_and_moves_own_labels(make_head, make_sequences):
    head, labels, index = make_head("self_mm", dropout=0.0), torch.tensor(LABELS).double(), torch.arange(7)
    head.start_training(labels)
    sequences = make_sequences(7)
    head.train()
    for _ in range(2):
        head(sequences, labels, index=index)
        head.end_step(taken=True)
    trained = head(sequences, labels, index=index)
    own = head.samples.of(index)
    assert trained.losses["pseudo"] == pseudo_loss(
        trained.modality_logits, own, labels, {name: sequences[name].present for name in MODALITIES}
    )
    assert trained.losses["pseudo"] > 0
    head.end_step(taken=False)
    before = head.samples.states.clone()
    head.eval()
    evaluated = head(sequences, labels, index=index)
    head.end_step(taken=True)
    assert evaluated.losses["pseudo"] == 0 and torch.equal(head.samples.states, before)
    assert not any(name.startswith("samples") for name in head.state_dict())


def test_a_trainer_of_transformers_keeps_a_store_that_was_started(features_config, feature_rows, tmp_path):
    model = MSAModel(features_config("self_mm"))
    model.head.start_training(torch.stack([row["labels"] for row in feature_rows]))
    settings = TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True, num_train_epochs=3)
    callbacks = [RunningStateCallback()]
    Trainer(model, settings, train_dataset=feature_rows, callbacks=callbacks).train()
    store, present = model.head.samples, torch.stack([row["modality_present"] for row in feature_rows])
    assert torch.equal(store.visits[:3], 3 * present.T)
    assert ((store.generated != store.labels) <= present.T).all() and store.generated.ne(store.labels).any()


def test_a_run_with_classes_has_to_do_without_generated_labels(train, tmp_path):
    np.savez(
        tmp_path / "features.npz",
        id=np.arange(12).astype(str),
        label=np.array(["calm", "angry"] * 6),
        split=np.array((["train"] * 2 + ["valid", "test"]) * 3),
        **{name: np.random.default_rng(0).normal(size=(12, 2, width)) for name, width in WIDTHS.items()},
    )
    document = {
        "model": {"feature_widths": WIDTHS, "head": "self_mm", "head_kwargs": {"hidden_size": 8}},
        "data": {"path": str(tmp_path / "features.npz"), "task": "classification"},
        "training": {"output_dir": str(tmp_path / "run"), "epochs": 1, "log_with": None},
    }
    with pytest.raises(ConfigurationError, match="of the data are classes: set model.loss_weights.pseudo=0"):
        train(document)
    assert not (tmp_path / "run").exists()


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="regression_loss='huber' must be one of mse, l1"):
        SelfMMHead(WIDTHS, 1, regression_loss="huber")


RANKS = """
import os, sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.methods.test_self_mm import make_store, steps_of

dist.init_process_group("gloo")
rank, store = dist.get_rank(), make_store()
for index, states, seen in steps_of(3):
    mine = torch.arange(3) if rank == 0 else torch.arange(3, len(index))  # three samples, and one or none
    store.collect(index[mine], states[:, mine], seen[:, mine])
    store.end_step(taken=True)
save_file(store.state_dict(), f"{sys.argv[1]}/{rank}.safetensors")
dist.destroy_process_group()
"""


def test_two_ranks_keep_the_store_of_one_process(on_two_processes, tmp_path):
    statuses, printed = on_two_processes(RANKS, tmp_path, tmp_path)
    assert statuses == [0, 0], "".join(printed)
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, value in after(steps_of(3)).state_dict().items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], value, rtol=1e-12, atol=1e-12)


class Stopping(GradientModulator):
    """Interrupts a run in its third epoch."""

    epochs_seen = 0

    def on_validation(self, score):
        self.epochs_seen += 1
        if self.epochs_seen == 3:
            raise KeyboardInterrupt


def test_a_resumed_run_continues_with_the_stored_labels_and_publishes_none(train, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    labels = random.uniform(-3, 3, size=35).round(3)
    np.savez(
        tmp_path / "features.npz",
        id=np.array([f"s{number}" for number in range(35)]),
        label=labels,
        split=np.array((["train"] * 3 + ["valid", "test"]) * 7),
        **{name: random.normal(size=(35, 3, w)) + labels[:, None, None] for name, w in WIDTHS.items()},
    )

    def run(name: str, **training) -> dict:
        return {
            "model": {
                "feature_widths": WIDTHS,
                "head": "self_mm",
                "head_kwargs": {"hidden_size": 8},
                "loss_weights": {"unimodal": 0},
            },
            "data": {"path": str(tmp_path / "features.npz")},
            "training": {
                "output_dir": str(tmp_path / name),
                "epochs": 4,
                "batch_size": 4,
                "learning_rate": 0.01,
                "modulator": "stopping",
                "modality_dropout": {"text": 0.3, "audio": 0.2},
                "mixed_precision": "no",
                "log_with": None,
                **training,
            },
        }

    monkeypatch.setitem(MODULATORS, "stopping", Stopping)
    with pytest.raises(KeyboardInterrupt):
        train(run("stopped"))
    monkeypatch.setitem(MODULATORS, "stopping", GradientModulator)
    resumed, whole = train(run("stopped", resume=True)), train(run("whole"))
    shifts = [
        epoch["losses"]["label_shift/audio"] for epoch in json.loads((whole / "history.json").read_text())
    ]
    assert shifts[0] == 0 < shifts[2]
    assert (resumed / "history.json").read_text() == (whole / "history.json").read_text()
    ends = [load_file(folder / "model.safetensors") for folder in (resumed, whole)]
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
    opened, _ = load_checkpoint(whole)
    assert opened.state_dict().keys() == ends[1].keys() and opened.head.samples is None
