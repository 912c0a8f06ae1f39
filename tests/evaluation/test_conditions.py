# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest
import torch

from msa_online import MSAConfig, MSAModel
from msa_online.evaluation.conditions import (
    UndefinedScoreError,
    evaluate_frame_rates,
    predict_conditions,
    selection_score,
    validate,
)
from msa_online.methods import HEADS
from msa_online.methods.late_fusion import LateFusionHead
from msa_online.missing.frames import FrameDrop

INPUTS = {
    "text": ("text_input_ids", "text_mask"),
    "audio": ("audio_values", "audio_mask"),
    "vision": ("vision_values", "vision_blendshapes", "vision_mask"),
}
SEVEN = {  # condition: which of text, audio, vision may be seen
    "text": (True, False, False),
    "audio": (False, True, False),
    "vision": (False, False, True),
    "text+audio": (True, True, False),
    "text+vision": (True, False, True),
    "audio+vision": (False, True, True),
    "text+audio+vision": (True, True, True),
}


def in_batches(batch: dict, rows: list[list[int]]) -> list[dict]:
    return [{name: value[numbers] for name, value in batch.items()} for numbers in rows]


def evaluate_conditions(model, batches, accelerator, conditions=tuple(SEVEN)):
    return predict_conditions(model, batches, accelerator, conditions).metrics(model.config)


def test_all_seven_conditions_are_evaluated(model, make_batch, accelerator):
    results = evaluate_conditions(model, [make_batch()], accelerator)
    assert list(results) == list(SEVEN)
    assert len({metrics["mae"] for metrics in results.values()}) == 7


def test_some_conditions_can_be_asked_for_alone(model, make_batch, accelerator):
    batch = make_batch()
    alone = evaluate_conditions(model, [batch], accelerator, ("audio", "text+audio+vision"))
    everything = evaluate_conditions(model, [batch], accelerator)
    assert alone == {name: everything[name] for name in ("audio", "text+audio+vision")}


def test_encoding_once_gives_what_the_model_itself_gives_under_each_condition(model, make_batch, accelerator):
    batch = make_batch(6)
    predictions = predict_conditions(model, [batch], accelerator, tuple(SEVEN))
    for condition, visible in SEVEN.items():
        with torch.no_grad():
            expected = model(**{**batch, "modality_present": torch.tensor(visible).expand(6, 3)}).logits
        np.testing.assert_allclose(predictions.logits[condition], expected.numpy(), atol=1e-6, rtol=0)


def test_what_a_sample_lacks_stays_absent_under_every_condition(model, make_batch, accelerator):
    lacking = make_batch(present=(True, True, False))
    predictions = predict_conditions(model, [lacking], accelerator, tuple(SEVEN))
    np.testing.assert_array_equal(predictions.logits["text+vision"], predictions.logits["text"])
    np.testing.assert_array_equal(predictions.logits["text+audio+vision"], predictions.logits["text+audio"])


def test_predictions_say_which_modalities_each_sample_shows(model, make_batch, accelerator):
    lacking = make_batch(present=(True, True, False))
    predictions = predict_conditions(model, [lacking], accelerator, ("nothing", "text+vision"))
    assert not predictions.seen["nothing"].any()
    assert (predictions.seen["text+vision"] == [True, False, False]).all()
    assert predictions.metrics(model.config).keys() == {"text+vision"}
    with torch.no_grad():
        baseline = model(**{**lacking, "modality_present": torch.zeros_like(lacking["modality_present"])})
    np.testing.assert_allclose(predictions.logits["nothing"], baseline.logits.numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("condition", SEVEN)
def test_the_content_of_hidden_modalities_cannot_change_a_result(condition, model, make_batch, accelerator):
    batch, other = make_batch(), make_batch(seed=1)
    hidden = [name for name, seen in zip(INPUTS, SEVEN[condition], strict=True) if not seen]
    perturbed = {**batch, **{key: other[key] for name in hidden for key in INPUTS[name]}}
    expected = predict_conditions(model, [batch], accelerator, (condition,)).logits[condition]
    np.testing.assert_array_equal(
        predict_conditions(model, [perturbed], accelerator, (condition,)).logits[condition], expected
    )


def test_the_content_of_visible_modalities_does_change_the_result(model, make_batch, accelerator):
    batch, other = make_batch(), make_batch(seed=1)
    expected = predict_conditions(model, [batch], accelerator, ("text+audio+vision",)).logits[
        "text+audio+vision"
    ]
    for keys in INPUTS.values():
        perturbed = {**batch, **{key: other[key] for key in keys}}
        changed = predict_conditions(model, [perturbed], accelerator, ("text+audio+vision",))
        assert np.abs(changed.logits["text+audio+vision"] - expected).max() > 1e-5


def test_samples_come_back_in_dataset_order_whatever_the_batches(model, make_batch, accelerator):
    batch = make_batch(6)
    whole = predict_conditions(model, [batch], accelerator, ("text", "audio"))
    mixed = predict_conditions(
        model, in_batches(batch, [[4, 1], [5, 0, 3], [2]]), accelerator, ("text", "audio")
    )
    np.testing.assert_array_equal(mixed.labels, batch["labels"].numpy())
    for condition in ("text", "audio"):
        np.testing.assert_allclose(mixed.logits[condition], whole.logits[condition], atol=1e-6, rtol=0)


def test_samples_that_ranks_repeat_to_fill_a_batch_count_once(model, make_batch, accelerator):
    batch = make_batch(5)
    once = predict_conditions(model, in_batches(batch, [[0, 1, 2], [3, 4]]), accelerator, tuple(SEVEN))
    batches = in_batches(batch, [[0, 1, 2], [3, 4, 0], [1, 2, 0]])
    repeated = predict_conditions(model, batches, accelerator, tuple(SEVEN))
    np.testing.assert_array_equal(repeated.labels, once.labels)
    for condition, logits in once.logits.items():
        np.testing.assert_allclose(repeated.logits[condition], logits, atol=1e-6, rtol=0)


def test_evaluation_neither_drops_out_nor_leaves_dropout_off(model, make_batch, accelerator):
    model.train()
    first = predict_conditions(model, [make_batch()], accelerator, ("text",)).logits["text"]
    second = predict_conditions(model, [make_batch()], accelerator, ("text",)).logits["text"]
    np.testing.assert_array_equal(first, second)
    assert model.training
    model.eval()
    predict_conditions(model, [make_batch()], accelerator, ("text",))
    assert not model.training


def test_classes_are_scored_by_the_most_probable_one(tiny_config, make_batch, accelerator):
    config = MSAConfig(**{**tiny_config.to_dict(), "label_range": None, "id2label": {0: "sad", 1: "happy"}})
    model = MSAModel(config)
    torch.nn.init.zeros_(model.head.classifier.weight)
    with torch.no_grad():
        model.head.classifier.bias.copy_(torch.tensor([0.0, 1.0]))  # always "happy"
    batch = {**make_batch(), "labels": torch.tensor([1, 1, 0, 1])}
    metrics = evaluate_conditions(model, [batch], accelerator, ("text",))["text"]
    assert metrics["accuracy"] == pytest.approx(3 / 4)
    assert metrics["f1_weighted"] == pytest.approx(
        3 / 4 * 6 / 7
    )  # "happy": precision 3/4, recall 1; "sad": 0


def test_regression_is_scored_in_the_units_of_the_labels(model, make_batch, accelerator):
    torch.nn.init.zeros_(model.head.classifier.weight)
    torch.nn.init.constant_(model.head.classifier.bias, 2.0)  # always 2
    batch = {**make_batch(), "labels": torch.tensor([1.0, 2.0, 2.5, 0.0])}
    assert evaluate_conditions(model, [batch], accelerator, ("text",))["text"]["mae"] == pytest.approx(
        3.5 / 4
    )


def test_seven_point_accuracy_is_not_claimed_on_another_scale(tiny_config, make_batch, accelerator):
    assert (
        "acc7" in evaluate_conditions(MSAModel(tiny_config), [make_batch()], accelerator, ("text",))["text"]
    )
    config = MSAConfig(**{**tiny_config.to_dict(), "label_range": [-1, 1]})
    metrics = evaluate_conditions(MSAModel(config), [make_batch()], accelerator, ("text",))["text"]
    assert "acc7" not in metrics and "acc5_sims" in metrics


def test_the_best_epoch_has_the_smallest_error_or_the_highest_f1():
    assert selection_score({"mae": 0.7, "corr": 0.1}, True) > selection_score({"mae": 0.9, "corr": 0.9}, True)
    better, worse = {"f1_weighted": 0.6, "accuracy": 0.5}, {"f1_weighted": 0.5, "accuracy": 0.9}
    assert selection_score(better, False) > selection_score(worse, False)


@pytest.fixture
def drop(tiny_processor) -> FrameDrop:
    stand_ins = {"text": torch.tensor(tiny_processor.tokenizer.unk_token_id), "audio": torch.tensor(-11.0)}
    return FrameDrop([f"clip_{number}" for number in range(6)], stand_ins, split="test")


@pytest.mark.parametrize("level", ["input", "feature"])
def test_a_sweep_goes_from_everything_to_a_tenth_and_ends_with_the_mean_of_ten(
    level, model, make_batch, accelerator, drop
):
    batches = in_batches(make_batch(6), [[0, 1, 2, 3], [4, 5]])
    sweep = evaluate_frame_rates(model, batches, accelerator, drop, level=level)
    assert list(sweep) == [*(f"0.{tenths}" for tenths in range(10)), "mean"]
    complete = evaluate_conditions(model, batches, accelerator, ("text+audio+vision",))
    assert sweep["0.0"] == pytest.approx(complete["text+audio+vision"], abs=1e-6)
    errors = [sweep[f"0.{tenths}"]["mae"] for tenths in range(10)]
    assert len(set(errors)) == 10
    assert sweep["mean"]["mae"] == pytest.approx(np.mean(errors))


@pytest.mark.parametrize("level", ["input", "feature"])
def test_a_sweep_gives_the_same_whatever_the_batches(level, model, make_batch, accelerator, drop):
    batch = make_batch(6)
    whole = evaluate_frame_rates(model, [batch], accelerator, drop, level=level, rates=(0.3, 0.7))
    mixed = in_batches(batch, [[4, 1], [5, 0, 3], [2, 4]])
    parts = evaluate_frame_rates(model, mixed, accelerator, drop, level=level, rates=(0.3, 0.7))
    assert all(parts[rate] == pytest.approx(whole[rate], abs=1e-6) for rate in ("0.3", "0.7", "mean"))


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ({"level": "inputs"}, "level is 'inputs': it must be one of input, feature"),
        ({"rates": (0.5, 1.0)}, "rate 1.0"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_naming_the_value(
    choice, named, model, make_batch, accelerator, drop
):
    with pytest.raises(ValueError, match=named):
        evaluate_frame_rates(model, [make_batch(6)], accelerator, drop, **choice)


class TwoStageHead(LateFusionHead):
    """A head that does not train its fused prediction in its first stage."""

    stages = ("alone", "fused")
    stage = "fused"

    def forward(self, sequences, labels=None, teacher=None):
        return replace(super().forward(sequences, labels, teacher), fused_valid=self.stage == "fused")

    def start_stage(self, name):
        self.stage = name


@pytest.fixture
def staged(tiny_config, monkeypatch) -> MSAModel:
    """A model whose head has two stages, in the last of them."""
    monkeypatch.setitem(HEADS, "two_stages", TwoStageHead)
    torch.manual_seed(0)
    head = {"head": "two_stages", "head_kwargs": {"hidden_size": 8}}
    return MSAModel(MSAConfig(**{**tiny_config.to_dict(), **head})).eval()


@pytest.mark.parametrize("condition", SEVEN)
def test_epochs_are_judged_by_what_the_run_is_for(condition, staged, make_batch, accelerator):
    batches = in_batches(make_batch(6), [[0, 1, 2, 3], [4, 5]])
    wanted = evaluate_conditions(staged, batches, accelerator, (condition,))[condition]
    found = validate(staged, batches, accelerator, (condition,))
    assert found.pop("loss") >= found["mae"] ** 2  # the mean square is at least the square of the mean
    assert found == wanted
    complete = evaluate_conditions(staged, batches, accelerator)["text+audio+vision"]
    assert {name: validate(staged, batches, accelerator)[name] for name in complete} == complete


def test_epochs_may_be_judged_by_the_mean_of_several_conditions(staged, make_batch, accelerator):
    batches = in_batches(make_batch(6), [[0, 1, 2, 3], [4, 5]])
    each = evaluate_conditions(staged, batches, accelerator, ("text", "audio+vision"))
    found = validate(staged, batches, accelerator, ("text", "audio+vision"))
    for name in each["text"]:
        mean = (each["text"][name] + each["audio+vision"][name]) / 2
        assert found[name] == pytest.approx(mean), name
    staged.head.start_stage("alone")  # the modalities' own predictions depend on no condition
    alone = validate(staged, batches, accelerator)
    assert validate(staged, batches, accelerator, ("text+audio+vision", "text")) == alone


def test_a_stage_without_a_fused_prediction_is_judged_by_each_modality_alone(staged, make_batch, accelerator):
    staged.head.start_stage("alone")
    batch = make_batch(6)
    batch["modality_present"][1:3, 0] = False  # samples without text are no part of what text is judged by
    found = validate(staged, in_batches(batch, [[0, 1, 2, 3], [4, 5]]), accelerator)
    with torch.no_grad():
        output = staged(**batch)
    errors = []
    for column, name in enumerate(INPUTS):
        seen = batch["modality_present"][:, column]
        scores = output.modality_logits[name][seen, 0].clamp(-3, 3)
        errors.append((scores - batch["labels"][seen]).abs().mean().item())
    assert found["mae"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_a_modality_that_no_sample_of_a_split_has_is_not_judged(staged, make_batch, accelerator):
    staged.head.start_stage("alone")
    batch = make_batch(4, present=(True, False, False))
    with torch.no_grad():
        scores = staged(**batch).modality_logits["text"][:, 0].clamp(-3, 3)
    expected = (scores - batch["labels"]).abs().mean().item()
    assert validate(staged, [batch], accelerator)["mae"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", ["alone", "fused"])
def test_a_score_is_never_computed_from_a_part_of_the_split(stage, staged, make_batch, accelerator):
    """Predictions that are not numbers were left out, and the rest chose the best epoch."""
    staged.head.start_stage(stage)
    batch = make_batch(6)
    batch["audio_values"][[1, 4]] = float("nan")
    with pytest.raises(UndefinedScoreError, match="2 of 6 samples.*not finite.*lower training.learning_rate"):
        validate(staged, in_batches(batch, [[0, 1, 2, 3], [4, 5]]), accelerator)


def test_a_checkpoint_whose_predictions_are_not_numbers_gets_no_score(staged, make_batch, accelerator):
    with torch.no_grad():
        next(staged.encoders["text"].parameters()).fill_(float("inf"))
    with pytest.raises(UndefinedScoreError, match="4 of 4 samples"):
        evaluate_conditions(staged, [make_batch(4)], accelerator)


def test_a_split_that_shows_nothing_at_all_cannot_judge_single_modalities(staged, make_batch, accelerator):
    staged.head.start_stage("alone")
    with pytest.raises(UndefinedScoreError, match="no validation sample has text, sound or a face"):
        validate(staged, [make_batch(4, present=(False, False, False))], accelerator)
