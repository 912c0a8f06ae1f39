# SPDX-License-Identifier: Apache-2.0
import re

import numpy as np
import pytest
import torch

from msa_online.missing.modalities import FixedCondition, InputMask, ModalityDropout, dropout_problem
from msa_online.modalities import CONDITIONS, MODALITIES

SAMPLES = 20_000


def complete(samples: int) -> torch.Tensor:
    return torch.ones(samples, 3, dtype=torch.bool)


def hidden(dropout: ModalityDropout, order: torch.Tensor | None = None) -> torch.Tensor:
    """What is hidden from each sample, `(samples, 3)` bool, in dataset order; batches come in `order`."""
    order = torch.arange(len(dropout.present)) if order is None else order
    result = torch.zeros(len(dropout.present), 3, dtype=torch.bool)
    for index in order.split(64):
        batch = {"index": index, "modality_present": torch.ones(len(index), 3, dtype=torch.bool)}
        result[index] = ~dropout.apply(batch)["modality_present"]
    return result


@pytest.mark.parametrize("rates", [(0.5, 0.3, 0.2), (0.3, 0.1, 0.2), (0.5, 0.7, 0.7), (0.6, 0.65, 0.7)])
def test_each_modality_is_hidden_at_its_rate_and_no_sample_loses_all(rates):
    dropout = ModalityDropout(dict(zip(MODALITIES, rates, strict=True)), complete(SAMPLES), seed=1)
    assert list(dropout.realised.values()) == pytest.approx(rates, abs=1e-6)
    dropout.start_epoch(0)
    lost = hidden(dropout)
    for share, expected in zip(lost.double().mean(dim=0).tolist(), rates, strict=True):
        assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / SAMPLES))
    assert not lost.all(dim=1).any()


def test_samples_with_two_modalities_lose_them_at_the_same_rates():
    having = torch.tensor([[False, True, True]]).expand(SAMPLES, 3)
    dropout = ModalityDropout({"text": 0.3, "audio": 0.5, "vision": 0.4}, having, seed=1)
    assert dropout.realised["audio"] == pytest.approx(0.5) and np.isnan(dropout.realised["text"])
    assert "text never occurs, audio 50.0, vision 40.0" in dropout.line
    dropout.start_epoch(0)
    batch = {"index": torch.arange(SAMPLES), "modality_present": having}
    shown = dropout.apply(batch)["modality_present"]
    assert shown.any(dim=1).all() and not shown[:, 0].any()
    assert shown[:, 1].double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert shown[:, 2].double().mean().item() == pytest.approx(0.6, abs=0.02)


def test_what_incomplete_samples_cannot_lose_is_printed_beside_what_was_asked_for():
    having = complete(4).clone()
    having[0] = torch.tensor([True, False, False])
    dropout = ModalityDropout({"text": 0.5, "audio": 0.25}, having, seed=1)
    assert dropout.realised["text"] == pytest.approx(0.375)
    assert dropout.line.endswith("text 37.5 (asked for: 50.0), audio 25.0")


@pytest.mark.parametrize(
    ("rates", "having", "message"),
    [
        ((0.5, 0.7, 0.9), (1, 1, 1), "sum to 2.1, .* below 2"),
        ((0.9, 0.5, 0.5), (0, 1, 1), "the rates of audio, vision sum to 1, .* below 1"),
        ((0.9, 0.9, 0.0), (1, 1, 1), None),
        ((0.5, 0.7, 0.7), (1, 1, 1), None),
        ((0.9, 0.9, 0.9), (1, 0, 0), None),  # nothing can be hidden, and the line says so
    ],
)
def test_rates_that_no_sample_could_lose_are_refused(rates, having, message):
    by_name = dict(zip(MODALITIES, rates, strict=True))
    problem = dropout_problem(by_name, torch.tensor([having], dtype=torch.bool))
    assert problem is None if message is None else re.search(message, problem)


def test_modalities_are_hidden_independently_of_one_another():
    dropout = ModalityDropout({"text": 0.5, "audio": 0.4}, complete(SAMPLES), seed=1)
    dropout.start_epoch(0)
    lost = hidden(dropout)
    both = (lost[:, 0] & lost[:, 1]).double().mean().item()
    assert both == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / SAMPLES))
    assert not lost[:, 2].any()  # vision was not named


def test_a_sample_that_has_one_modality_only_keeps_it():
    dropout = ModalityDropout({"text": 0.9, "audio": 0.5}, complete(100), seed=1)
    dropout.start_epoch(0)
    text_alone = torch.tensor([True, False, False]).expand(100, 3)
    batch = {"index": torch.arange(100), "modality_present": text_alone}
    assert torch.equal(dropout.apply(batch)["modality_present"], text_alone)


def test_what_a_sample_loses_does_not_depend_on_the_order_of_batches():
    dropout = ModalityDropout({"text": 0.5, "audio": 0.5, "vision": 0.5}, complete(500), seed=1)
    dropout.start_epoch(3)
    forward = hidden(dropout)
    assert torch.equal(hidden(dropout, torch.arange(499, -1, -1)), forward)
    resumed = ModalityDropout({"text": 0.5, "audio": 0.5, "vision": 0.5}, complete(500), seed=1)
    resumed.start_epoch(3)  # without the epochs before it
    assert torch.equal(hidden(resumed, torch.randperm(500)), forward)


def test_every_epoch_and_every_seed_hides_something_else():
    draws = []
    for seed, epoch in ((1, 0), (1, 1), (2, 0)):
        dropout = ModalityDropout({"text": 0.5, "audio": 0.5, "vision": 0.5}, complete(500), seed=seed)
        dropout.start_epoch(epoch)
        draws.append(hidden(dropout))
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_without_rates_a_batch_stays_as_it_is(make_batch):
    dropout = ModalityDropout({}, complete(4), seed=1)
    dropout.start_epoch(0)
    batch = make_batch(present=(True, False, True))
    untouched = {name: value.clone() for name, value in batch.items()}
    result = dropout.apply(batch)
    assert result.keys() == untouched.keys()
    assert all(torch.equal(result[name], value) for name, value in untouched.items())


def test_hiding_never_brings_back_what_was_absent(make_batch):
    dropout = ModalityDropout({"audio": 0.9}, complete(4), seed=1)
    dropout.start_epoch(0)
    batch = make_batch(present=(True, False, True))
    assert torch.equal(dropout.apply(batch)["modality_present"], batch["modality_present"])
    assert (
        batch["modality_present"].tolist() == [[True, False, True]] * 4
    )  # the batch handed in is not changed


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_fixed_condition_shows_the_same_modalities_of_every_sample_in_every_epoch(condition, make_batch):
    fixed = FixedCondition(CONDITIONS[condition])
    wanted = [[name in condition.split("+") for name in MODALITIES]] * 4
    for epoch in range(2):
        fixed.start_epoch(epoch)
        assert fixed.apply(make_batch())["modality_present"].tolist() == wanted


def test_a_fixed_condition_never_brings_back_what_was_absent(make_batch):
    batch = make_batch(present=(False, True, True))
    seen = FixedCondition(("text", "audio")).apply(batch)
    assert seen["modality_present"].tolist() == [[False, True, False]] * 4
    nothing = FixedCondition(("text",)).apply(batch)  # legal: the sample then has nothing
    assert nothing["modality_present"].tolist() == [[False, False, False]] * 4
    assert batch["modality_present"].tolist() == [[False, True, True]] * 4
    assert all(torch.equal(seen[name], batch[name]) for name in batch if name != "modality_present")


def test_hiding_nothing_hands_on_the_batch(make_batch):
    batch = make_batch()
    mask = InputMask()
    mask.start_epoch(3)
    assert mask.apply(batch) == batch
