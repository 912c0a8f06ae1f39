# SPDX-License-Identifier: Apache-2.0
"""OGM-GE on the gradients of a real model, against a naive computation of docs/methods/ogm.md."""

import math

import pytest
import torch

from msa_online import MSAConfig, MSAModel
from msa_online.methods import ModulationContext, OGMModulator
from msa_online.modalities import MODALITIES
from tests.equations import assert_equation

SEED = 5


def without_dropout(config: MSAConfig) -> MSAConfig:
    config = MSAConfig(**config.to_dict())
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0
    config.head_kwargs["dropout"] = 0.0
    return config


class Step:
    """A model after the backward pass of one batch, and what a modulator saw of it."""

    def __init__(self, config: MSAConfig, batch: dict, modulator: OGMModulator, epoch: int = 0) -> None:
        torch.manual_seed(0)
        self.model = MSAModel(config)
        for predictor in self.model.head.unimodal.values():  # new ones hardly tell the classes apart
            torch.nn.init.normal_(predictor.weight)
        self.output = self.model(**batch)
        self.output.loss.backward()
        owned = self.model.modality_parameters()
        seen = modulator.observe(self.output, batch["labels"]) | modulator.measure(owned)
        statistics = {name: value.item() for name, value in seen.items()}
        self.before = self.gradients()
        self.modulation = modulator.modulate(
            ModulationContext(owned, statistics, stage="train", epoch=epoch, step=3, seed=SEED)
        )

    def gradients(self) -> dict[str, torch.Tensor]:
        return {
            name: value.grad.clone()
            for name, value in self.model.named_parameters()
            if value.grad is not None
        }

    def owners(self) -> dict[str, str]:
        names = {id(value): name for name, value in self.model.named_parameters()}
        owned = self.model.modality_parameters()
        return {names[id(value)]: modality for modality, values in owned.items() for value in values}


@pytest.fixture
def uneven_batch(make_batch):
    batch = make_batch(6)
    batch["modality_present"][[0, 3], 1] = False
    batch["modality_present"][2, 2] = False
    return batch


def scores_by_hand(output, labels: torch.Tensor) -> dict[str, float]:
    """Mean probability of the true class, or inverse error, sample by sample."""
    scores = {}
    for name in MODALITIES:
        values = []
        for row in range(len(labels)):
            if not output.present[name][row]:
                continue
            logits = output.modality_logits[name][row].tolist()
            if len(logits) == 1:
                values.append(abs(logits[0] - float(labels[row])))
            else:
                powers = [math.exp(value) for value in logits]
                values.append(powers[int(labels[row])] / sum(powers))
        mean = sum(values) / len(values)
        scores[name] = 1 / mean if output.logits.shape[1] == 1 else mean
    return scores


@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_each_modality_is_damped_as_the_equation_says(task, strength, tiny_config, uneven_batch):
    config = without_dropout(tiny_config)
    if task == "classification":
        names = dict(enumerate(["low", "even", "high"]))
        plain = {key: value for key, value in config.to_dict().items() if key != "label_range"}
        config = MSAConfig(**plain | {"id2label": names, "label2id": {v: k for k, v in names.items()}})
        uneven_batch["labels"] = torch.arange(6) % 3
    step = Step(config, uneven_batch, OGMModulator(strength=strength, noise=0))
    scores = scores_by_hand(step.output, uneven_batch["labels"])
    expected = {}
    for name, score in scores.items():
        others = [value for other, value in scores.items() if other != name]
        mean = sum(others) / 2
        expected[name] = 1 - math.tanh(strength * score / mean) if score > mean else 1.0
    assert sorted(expected.values())[-1] == 1.0 and min(expected.values()) < 0.8
    log = step.modulation.log
    found = {name: log[f"score/{name}"] for name in MODALITIES}
    assert_equation("5.4", "scores", found, scores, rtol=1e-5, atol=1e-12)
    found = {name: log[f"coefficient/{name}"] for name in MODALITIES}
    assert_equation("5.5", "coefficients", found, expected, rtol=1e-5, atol=1e-12)
    spread = (max(scores.values()) - min(scores.values())) / (max(scores.values()) + min(scores.values()))
    assert log["imbalance/degree"] == pytest.approx(spread, rel=1e-3)
    owners = step.owners()
    for name, gradient in step.gradients().items():
        factor = expected.get(owners.get(name), 1.0)
        quantity, before = f"gradient of {name}", factor * step.before[name]
        assert_equation("5.6", quantity, gradient, before, rtol=1e-5, atol=1e-12)


def test_noise_falls_on_the_matrices_and_kernels_of_every_modality(tiny_config, uneven_batch):
    plain = Step(without_dropout(tiny_config), uneven_batch, OGMModulator(noise=0))
    noisy = Step(without_dropout(tiny_config), uneven_batch, OGMModulator())
    owners, reached = plain.owners(), set()
    without, gradients = plain.gradients(), noisy.gradients()
    for name, gradient in gradients.items():
        changed = not torch.equal(gradient, without[name])
        spread = noisy.before[name].numel() > 1 and noisy.before[name].std() > 0
        assert changed == bool(name in owners and gradient.ndim >= 2 and spread), name
        if changed:
            reached.add((owners[name], gradient.ndim))
    assert {owner for owner, _ in reached} == set(MODALITIES)
    assert max(ndim for _, ndim in reached) == 4  # kernels of the face encoder


def test_only_the_chosen_modalities_are_compared_and_changed(tiny_config, uneven_batch):
    step = Step(without_dropout(tiny_config), uneven_batch, OGMModulator(modalities=["text", "vision"]))
    scores = scores_by_hand(step.output, uneven_batch["labels"])
    better, worse = sorted(("text", "vision"), key=scores.get, reverse=True)
    log = step.modulation.log
    assert log[f"coefficient/{better}"] == pytest.approx(
        1 - math.tanh(scores[better] / scores[worse]), rel=1e-5
    )
    assert log[f"coefficient/{worse}"] == 1.0
    assert not any("audio" in name for name in log)
    owners, after = step.owners(), step.gradients()
    assert all(
        torch.equal(after[name], value)
        for name, value in step.before.items()
        if owners.get(name) not in ("text", "vision")
    )


def test_as_a_factor_on_the_learning_rate_gradients_keep_their_size(tiny_config, uneven_batch):
    config = without_dropout(tiny_config)
    scaled = Step(config, uneven_batch, OGMModulator(noise=0))
    rated = Step(config, uneven_batch, OGMModulator(noise=0, apply="lr"))
    assert rated.modulation.log == scaled.modulation.log
    assert scaled.modulation.rates == {}
    assert rated.modulation.rates == {
        name: scaled.modulation.log[f"coefficient/{name}"] for name in MODALITIES
    }
    assert all(torch.equal(value, rated.before[name]) for name, value in rated.gradients().items())


def test_outside_its_epochs_scores_are_still_recorded_and_coefficients_are_one(tiny_config, uneven_batch):
    config = without_dropout(tiny_config)
    inside = Step(config, uneven_batch, OGMModulator(epochs=[1, 2]), epoch=2)
    outside = Step(config, uneven_batch, OGMModulator(epochs=[1, 2]), epoch=3)
    for name in MODALITIES:
        assert outside.modulation.log[f"score/{name}"] == inside.modulation.log[f"score/{name}"]
        assert outside.modulation.log[f"coefficient/{name}"] == 1.0
    assert outside.modulation.rates == {}
    assert all(torch.equal(value, outside.before[name]) for name, value in outside.gradients().items())
