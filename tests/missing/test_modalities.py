# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from msa_online.missing.modalities import FixedCondition, InputMask, ModalityDropout
from msa_online.modalities import CONDITIONS, MODALITIES

SAMPLES = 20_000


def hidden(dropout: ModalityDropout, order: torch.Tensor | None = None) -> torch.Tensor:
    """What is hidden from each sample, `(samples, 3)` bool, in dataset order; batches come in `order`."""
    order = torch.arange(dropout.samples) if order is None else order
    result = torch.zeros(dropout.samples, 3, dtype=torch.bool)
    for index in order.split(64):
        batch = {"index": index, "modality_present": torch.ones(len(index), 3, dtype=torch.bool)}
        result[index] = ~dropout.apply(batch)["modality_present"]
    return result


def test_each_modality_is_hidden_at_its_rate():
    dropout = ModalityDropout({"text": 0.5, "audio": 0.3, "vision": 0.2}, SAMPLES, seed=1)
    dropout.start_epoch(0)
    # 3 % of the samples would lose all three (0.5 x 0.3 x 0.2) and keep all three instead
    for share, expected in zip(
        hidden(dropout).double().mean(dim=0).tolist(), (0.47, 0.27, 0.17), strict=True
    ):
        assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / SAMPLES))


def test_modalities_are_hidden_independently_of_one_another():
    dropout = ModalityDropout({"text": 0.5, "audio": 0.4}, SAMPLES, seed=1)
    dropout.start_epoch(0)
    lost = hidden(dropout)
    both = (lost[:, 0] & lost[:, 1]).double().mean().item()
    assert both == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / SAMPLES))
    assert not lost[:, 2].any()  # vision was not named


def test_no_sample_loses_all_three():
    dropout = ModalityDropout({"text": 0.9, "audio": 0.9, "vision": 0.9}, SAMPLES, seed=1)
    dropout.start_epoch(0)
    assert not hidden(dropout).all(dim=1).any()


def test_a_sample_that_has_one_modality_only_keeps_it():
    dropout = ModalityDropout({"text": 0.9, "audio": 0.5}, 100, seed=1)
    dropout.start_epoch(0)
    text_alone = torch.tensor([True, False, False]).expand(100, 3)
    batch = {"index": torch.arange(100), "modality_present": text_alone}
    assert torch.equal(dropout.apply(batch)["modality_present"], text_alone)


def test_what_a_sample_loses_does_not_depend_on_the_order_of_batches():
    dropout = ModalityDropout({"text": 0.5, "audio": 0.5, "vision": 0.5}, 500, seed=1)
    dropout.start_epoch(3)
    forward = hidden(dropout)
    assert torch.equal(hidden(dropout, torch.arange(499, -1, -1)), forward)
    resumed = ModalityDropout({"text": 0.5, "audio": 0.5, "vision": 0.5}, 500, seed=1)
    resumed.start_epoch(3)  # without the epochs before it
    assert torch.equal(hidden(resumed, torch.randperm(500)), forward)


def test_every_epoch_and_every_seed_hides_something_else():
    draws = []
    for seed, epoch in ((1, 0), (1, 1), (2, 0)):
        dropout = ModalityDropout({"text": 0.5, "audio": 0.5, "vision": 0.5}, 500, seed=seed)
        dropout.start_epoch(epoch)
        draws.append(hidden(dropout))
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_without_rates_a_batch_stays_as_it_is(make_batch):
    dropout = ModalityDropout({}, samples=4, seed=1)
    dropout.start_epoch(0)
    batch = make_batch(present=(True, False, True))
    untouched = {name: value.clone() for name, value in batch.items()}
    result = dropout.apply(batch)
    assert result.keys() == untouched.keys()
    assert all(torch.equal(result[name], value) for name, value in untouched.items())


def test_hiding_never_brings_back_what_was_absent(make_batch):
    dropout = ModalityDropout({"audio": 0.9}, samples=4, seed=1)
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
