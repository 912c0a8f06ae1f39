# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor

from msa_online import MSAConfig, MSAModel
from msa_online.confidence import Confidence
from msa_online.evaluation.attribution import attribute, modality_shares, predict
from msa_online.methods import HEADS
from msa_online.modalities import MODALITIES


@pytest.fixture
def classifier(tiny_config) -> MSAModel:
    torch.manual_seed(2)
    settings = {**tiny_config.to_dict(), "label_range": None, "id2label": {0: "calm", 1: "angry", 2: "happy"}}
    settings.pop("num_labels", None)
    model = MSAModel(MSAConfig(**settings)).eval()
    torch.nn.init.normal_(model.head.missing.tokens)
    return model


def seen(batch: dict, visible: set[str]) -> dict:
    """The batch as a data set would bring it in which only some modalities were recorded."""
    column = torch.tensor([name in visible for name in MODALITIES])
    return {**batch, "modality_present": batch["modality_present"] & column}


def mean_over_all_orders(predict, batch: dict) -> Tensor:
    """What each modality adds to the prediction, averaged over the six orders in which they may arrive."""
    shares = torch.zeros(len(batch["labels"]), len(MODALITIES))
    for order in permutations(MODALITIES):
        for place, name in enumerate(order):
            before = set(order[:place])
            step = predict(seen(batch, before | {name})) - predict(seen(batch, before))
            shares[:, MODALITIES.index(name)] += step / 6
    return shares


@torch.no_grad()
def test_contributions_are_what_hiding_modalities_from_the_model_itself_shows(model, make_batch):
    batch = make_batch(5)
    found = attribute(model, batch).contributions
    expected = mean_over_all_orders(lambda inputs: model(**inputs).logits[:, 0], batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.abs().min() > 1e-6  # every modality does something in this model


@torch.no_grad()
def test_contributions_to_a_class_are_contributions_to_its_probability(classifier, make_batch):
    batch = {**make_batch(5), "labels": torch.tensor([0, 1, 2, 0, 1])}
    predicted = classifier(**batch).logits.argmax(dim=-1)

    def probability(inputs: dict) -> Tensor:
        return classifier(**inputs).logits.softmax(dim=-1)[torch.arange(5), predicted]

    found = attribute(classifier, batch).contributions
    torch.testing.assert_close(found, mean_over_all_orders(probability, batch), rtol=1e-4, atol=1e-5)
    before, after = (probability(seen(batch, names)) for names in (set(), set(MODALITIES)))
    torch.testing.assert_close(found.sum(dim=-1), after - before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_calibrated_probabilities_are_those_of_what_each_sample_shows(classifier, make_batch):
    present = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    batch = {**make_batch(3), "labels": torch.tensor([0, 1, 2]), "modality_present": present}
    temperatures = {"text+audio+vision": 0.5, "text+audio": 4.0, "vision": 0.1, "nothing": 2.0}
    classifier.config.confidence = Confidence("valid", {}, temperatures=temperatures).to_dict()
    found = attribute(classifier, batch)
    logits = classifier(**batch).logits
    expected = (logits / torch.tensor([[0.5], [4.0], [2.0]])).softmax(dim=-1)
    torch.testing.assert_close(found.outputs, expected)
    torch.testing.assert_close(predict(classifier, batch).outputs, expected)
    nothing = (classifier(**seen(batch, set())).logits / 2).softmax(dim=-1)
    baseline = nothing.gather(-1, found.predicted.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(found.baseline, baseline)
    chosen = expected.max(dim=-1).values
    torch.testing.assert_close(found.contributions.sum(dim=-1), chosen - baseline, rtol=0, atol=1e-5)
    assert torch.equal(found.contributions != 0, present)


@pytest.fixture(params=HEADS)
def precise_model(request, tiny_config) -> MSAModel:
    """A model of each head in float64, with weights that make every hidden modality count."""
    torch.manual_seed(3)
    model = MSAModel(MSAConfig(**{**tiny_config.to_dict(), "head": request.param})).double().eval()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture
def patchy_batch(make_batch) -> dict:
    """Five samples in float64: one complete, one without each modality, one with nothing."""
    present = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    batch = {**make_batch(5), "modality_present": present}
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


@torch.no_grad()
def test_contributions_of_every_head_add_up_to_the_prediction_less_its_baseline(precise_model, patchy_batch):
    found = attribute(precise_model, patchy_batch)
    predicted = precise_model(**patchy_batch).logits[:, 0]
    baseline = precise_model(**seen(patchy_batch, set())).logits[:, 0]
    torch.testing.assert_close(found.outputs[:, 0], predicted, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.baseline, baseline, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.contributions.sum(dim=-1), predicted - baseline, rtol=0, atol=1e-9)


def contributing(model: MSAModel, batch: dict) -> Tensor:
    """Modalities that a sample has and that the head fuses, `(batch, 3)` bool."""
    return batch["modality_present"] & torch.tensor([name in model.head.fuses for name in MODALITIES])


@torch.no_grad()
def test_what_a_sample_lacks_adds_exactly_nothing_whoever_is_beside_it(precise_model, patchy_batch):
    found = attribute(precise_model, patchy_batch).contributions
    assert torch.equal(found != 0, contributing(precise_model, patchy_batch))


@torch.no_grad()
def test_a_head_that_rounds_by_its_batch_gives_nothing_to_what_a_sample_lacks(precise_model, patchy_batch):
    def round_by_the_batch(head, inputs, output):
        return replace(output, logits=output.logits + 1e-12 * inputs[0]["audio"].present.sum())

    precise_model.head.register_forward_hook(round_by_the_batch)
    found = attribute(precise_model, patchy_batch).contributions
    assert not found[~patchy_batch["modality_present"]].any()
    assert found[contributing(precise_model, patchy_batch)].all()


@torch.no_grad()
def test_a_sample_has_the_same_contributions_alone_as_in_a_batch(precise_model, patchy_batch):
    together = attribute(precise_model, patchy_batch)
    for row in range(5):
        one = {name: value[row : row + 1] for name, value in patchy_batch.items()}
        alone = attribute(precise_model, one).of_sample(0)
        for name, value in vars(together.of_sample(row)).items():
            torch.testing.assert_close(getattr(alone, name), value, rtol=0, atol=1e-9)


@torch.no_grad()
def test_contributions_of_a_model_in_half_precision_are_shared_out_in_fp32(model, make_batch):
    batch = make_batch(3)
    with torch.autocast("cpu", torch.bfloat16):
        found = attribute(model, batch)
    rest = found.outputs[:, 0] - found.baseline - found.contributions.sum(dim=-1)
    assert found.contributions.dtype == torch.float32 and rest.abs().max() < 1e-5


def test_shares_are_mean_sizes_of_contributions_and_means_keep_their_sign(model, make_batch, accelerator):
    batches = [make_batch(4), {**make_batch(3, seed=5), "index": torch.arange(4, 7)}]
    found = modality_shares(model, batches, accelerator)
    with torch.no_grad():
        parts = torch.cat([attribute(model, batch).contributions for batch in batches])
    sizes = parts.abs().mean(dim=0)
    for column, name in enumerate(MODALITIES):
        assert found[name] == pytest.approx((sizes[column] / sizes.sum()).item(), rel=1e-4)
        assert found[f"mean/{name}"] == pytest.approx(parts[:, column].mean().item(), rel=1e-4, abs=1e-6)
    assert sum(found[name] for name in MODALITIES) == pytest.approx(1)


def test_a_modality_that_was_never_recorded_has_no_share(model, make_batch, accelerator):
    shares = modality_shares(model, [make_batch(present=(True, False, True))], accelerator)
    assert shares["audio"] == 0 and shares["mean/audio"] == 0
    assert shares["text"] > 0 and shares["vision"] > 0


def test_a_modality_the_fusion_does_not_read_has_no_share(model, make_batch, accelerator):
    width = model.head.fusion[0].in_features // 3
    torch.nn.init.zeros_(model.head.fusion[0].weight[:, 2 * width :])  # vision comes last
    shares = modality_shares(model, [make_batch()], accelerator)
    assert shares["vision"] == pytest.approx(0, abs=1e-6) and shares["text"] + shares[
        "audio"
    ] == pytest.approx(1)


def test_a_model_that_always_says_the_same_shares_out_nothing(model, make_batch, accelerator):
    torch.nn.init.zeros_(model.head.classifier.weight)
    shares = modality_shares(model, [make_batch()], accelerator)
    assert set(shares.values()) == {0.0}
