# SPDX-License-Identifier: Apache-2.0
import json
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from msa_online.evaluation.json_text import json_text
from msa_online.evaluation.metrics import (
    METRIC_TITLES,
    class_metrics,
    classification_metrics,
    emotion_binary_metrics,
    regression_metrics,
    undefined_metrics,
)

REGRESSION_KEYS = ["mae", "corr", "acc2_has0", "f1_has0", "acc2_non0", "f1_non0", "acc7", "acc5", "acc3"]


def test_all_regression_metrics_of_a_case_computed_by_hand():
    predictions = [2.0, -1.0, 0.4, -0.4, 1.0]
    labels = [3.0, -2.0, 0.0, 1.0, 1.0]
    metrics = regression_metrics(predictions, labels)
    assert list(metrics) == REGRESSION_KEYS
    assert metrics["mae"] == pytest.approx((1 + 1 + 0.4 + 1.4 + 0) / 5)
    # means 0.4 and 0.6: covariance sum 7.4, squared deviations 5.52 and 13.2
    assert metrics["corr"] == pytest.approx(7.4 / math.sqrt(5.52 * 13.2))
    assert metrics["acc2_has0"] == pytest.approx(4 / 5)
    # one negative: precision 1/2, recall 1 -> 2/3; four non-negative: precision 1, recall 3/4 -> 6/7
    assert metrics["f1_has0"] == pytest.approx((2 / 3 + 4 * 6 / 7) / 5)
    assert metrics["acc2_non0"] == pytest.approx(3 / 4)
    assert metrics["f1_non0"] == pytest.approx((2 / 3 + 3 * 4 / 5) / 4)
    assert metrics["acc7"] == pytest.approx(2 / 5)  # 2/3 -1/-2 0/0 0/1 1/1
    assert metrics["acc5"] == pytest.approx(3 / 5)  # 2/2 -1/-2 0/0 0/1 1/1
    assert metrics["acc3"] == pytest.approx(4 / 5)  # 1/1 -1/-1 0/0 0/1 1/1


def test_f1_is_weighted_by_the_true_counts_not_the_predicted_ones():
    labels = [1.0] * 8 + [-1.0] * 2
    predictions = [1.0] * 3 + [-1.0] * 7
    # positive: precision 1, recall 3/8 -> 6/11; negative: precision 2/7, recall 1 -> 4/9
    right = 0.8 * 6 / 11 + 0.2 * 4 / 9
    swapped = 0.3 * 6 / 11 + 0.7 * 4 / 9
    metrics = regression_metrics(predictions, labels)
    assert metrics["f1_has0"] == metrics["f1_non0"] == pytest.approx(right)
    assert abs(right - swapped) > 0.04


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (9.0, 3)]
)
def test_half_way_scores_round_to_the_even_class(value, rounded):
    assert regression_metrics([value, -3.0], [rounded, -3.0])["acc7"] == 1.0


def test_labels_are_rounded_and_clipped_like_predictions():
    metrics = regression_metrics([2.0, 3.0], [2.5, 2.6])
    assert (metrics["acc7"], metrics["acc5"], metrics["acc3"]) == (1.0, 1.0, 1.0)
    assert regression_metrics([2.0, 3.0, 0.0], [2.0, 2.0, 0.0])["acc7"] == pytest.approx(2 / 3)
    assert regression_metrics([2.0, 3.0, -9.0], [2.0, 2.0, -2.0])["acc5"] == 1.0


def test_zero_labels_are_dropped_from_non0_and_kept_in_has0():
    metrics = regression_metrics([-1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 2.0, 1.0])
    assert metrics["acc2_non0"] == metrics["f1_non0"] == 1.0
    assert metrics["acc2_has0"] == 0.5


def test_a_prediction_of_zero_is_negative_in_non0_and_non_negative_in_has0():
    metrics = regression_metrics([0.0, 0.0, -1.0], [-1.0, -2.0, -1.0])
    assert (metrics["acc2_non0"], metrics["acc2_has0"]) == (1.0, pytest.approx(1 / 3))


@pytest.mark.parametrize("constant", [0.1, 0.0, -2.0])
def test_a_model_that_always_says_the_same_has_no_correlation(constant):
    with pytest.warns(UserWarning, match="all predictions are"):
        metrics = regression_metrics([constant] * 7, [1, -2, 3, 0, 1, 2, -1])
    assert metrics["corr"] == 0.0


def test_labels_that_are_all_zero_leave_non0_undefined_but_the_rest_defined():
    with pytest.warns(UserWarning) as caught:
        metrics = regression_metrics([0.2, -0.2], [0.0, 0.0])
    assert {str(warning.message)[:12] for warning in caught} == {"no label dif", "all labels a"}
    assert math.isnan(metrics["acc2_non0"]) and math.isnan(metrics["f1_non0"])
    assert metrics["mae"] == pytest.approx(0.2) and metrics["acc2_has0"] == 0.5


@pytest.mark.parametrize(
    ("labels", "undefined"),
    [
        ([0.0, 0.0], {"acc2_non0", "f1_non0", "corr"}),
        ([1.5, 1.5], {"corr"}),
        ([0.0, 1.0], set()),
        ([-2.0], {"corr"}),
    ],
)
def test_what_is_undefined_whatever_is_predicted_has_a_reason(labels, undefined):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = regression_metrics(np.linspace(0, 1, len(labels)), labels)
    reasons = undefined_metrics(labels)
    assert {name for name, value in metrics.items() if math.isnan(value)} == set(reasons) == undefined
    assert all(
        reason.startswith(("no label differs from 0", "all labels are")) for reason in reasons.values()
    )


def test_results_with_undefined_metrics_are_valid_json():
    results = {
        "text": {"corr": math.nan, "mae": np.float64(0.5)},
        "more": [math.inf, -math.inf, 1, "nan", None],
    }
    text = json_text(results)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "text": {"corr": None, "mae": 0.5},
        "more": [None, None, 1, "nan", None],
    }


def test_nonzero_style_scores_everything_without_zero_labels():
    predictions, labels = [1.0, 3.0, -1.0, 2.0], [2.0, 0.0, -1.0, 3.0]
    kept = regression_metrics([1.0, -1.0, 2.0], [2.0, -1.0, 3.0])
    metrics = regression_metrics(predictions, labels, style="nonzero")
    assert metrics == {key: value for key, value in kept.items() if "has0" not in key}
    with pytest.warns(UserWarning, match="no label differs"):
        assert math.isnan(regression_metrics([1.0], [0.0], style="nonzero")["mae"])


def test_accuracies_of_several_classes_are_those_of_the_label_range():
    plain = REGRESSION_KEYS[:6]
    ours = {
        (-3, 3): REGRESSION_KEYS,
        (-1, 1): [*plain, "acc2_sims", "f1_sims", "acc3_sims", "acc5_sims"],
        (0, 5): plain,
    }
    for label_range, keys in ours.items():
        assert list(regression_metrics([0.2, -0.4], [0.4, -1.0], label_range=list(label_range))) == keys


def test_the_scores_of_ch_sims_of_a_case_computed_by_hand():
    labels = [-1.0, -0.6, -0.2, 0.0, 0.0, 0.4, 0.8, 1.0]
    predictions = [-0.8, -0.9, -0.05, -0.1, 0.05, 0.9, 0.6, 1.4]
    metrics = regression_metrics(predictions, labels, label_range=(-1, 1))
    # classes 0..4 of labels 0 1 1 2 2 3 4 4, of predictions 0 0 2 1 2 4 3 4
    assert metrics["acc5_sims"] == pytest.approx(3 / 8)
    assert metrics["acc3_sims"] == pytest.approx(6 / 8)  # the third and the fourth differ
    assert metrics["acc2_sims"] == pytest.approx(7 / 8)  # the fifth: 0 is not positive, 0.05 is
    # not positive: precision 1, recall 4/5 -> 8/9; positive: precision 3/4, recall 1 -> 6/7
    assert metrics["f1_sims"] == pytest.approx((5 * 8 / 9 + 3 * 6 / 7) / 8)


@pytest.mark.parametrize("stored", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("end", "below", "above"), [(-0.7, -0.9, -0.5), (-0.1, -0.5, 0), (0.1, 0, 0.5), (0.7, 0.5, 0.9)]
)
def test_the_end_of_a_class_of_ch_sims_belongs_to_the_class_below(end, below, above, stored):
    score = [
        regression_metrics(np.array([end, 1.0], stored), [near, 1.0], label_range=(-1, 1))["acc5_sims"]
        for near in (below, above)
    ]
    assert score == [1.0, 0.5]


def test_float32_model_outputs_score_like_float64_ones():
    rng = np.random.default_rng(3)
    labels = rng.integers(-15, 16, 500) / 5
    single = (labels + rng.normal(size=500)).astype(np.float32)
    assert regression_metrics(single, labels) == regression_metrics(single.astype(np.float64), labels)
    assert regression_metrics(single[:, None], labels[:, None]) == regression_metrics(single, labels)
    large = np.full(10**5, 16_777_217.0)
    large[0] = 0.0
    assert regression_metrics(large, large + 1)["mae"] == 1.0  # a float32 mean would not resolve this


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_non_finite_prediction_is_refused_by_row_instead_of_counted_as_negative(broken):
    with pytest.raises(ValueError, match="predictions row 1 is"):
        regression_metrics([1.0, broken], [1.0, -1.0])
    with pytest.raises(ValueError, match="labels row 0 is"):
        regression_metrics([1.0, 1.0], [broken, -1.0])
    with pytest.raises(ValueError, match="predictions row 1 is"):
        classification_metrics([[0.1, 0.9], [broken, 0.0]], [1, 1], num_classes=2)


def test_empty_mismatched_and_misshapen_arrays_are_refused():
    with pytest.raises(ValueError, match="predictions are empty"):
        regression_metrics([], [])
    with pytest.raises(ValueError, match="3 predictions for 2 labels"):
        regression_metrics([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match=r"predictions have shape \(2, 3\)"):
        regression_metrics(np.zeros((2, 3)), [1, 2])
    with pytest.raises(ValueError, match="style is 'all'"):
        regression_metrics([1], [1], style="all")


def test_classification_metrics_of_a_case_computed_by_hand():
    labels = [0, 0, 0, 0, 1, 1, 2]
    predicted = [0, 0, 0, 1, 1, 2, 2]
    metrics = classification_metrics(predicted, labels, num_classes=4)
    assert metrics["accuracy"] == pytest.approx(5 / 7)
    f1 = [6 / 7, 1 / 2, 2 / 3]
    assert metrics["f1_weighted"] == pytest.approx((4 * f1[0] + 2 * f1[1] + f1[2]) / 7)
    assert metrics["f1_macro"] == pytest.approx(sum(f1) / 3)
    assert metrics["recall_macro"] == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert classification_metrics(np.eye(4)[predicted], labels, num_classes=4) == metrics


def test_a_class_that_is_only_predicted_lowers_macro_f1_but_is_no_class_to_recall():
    metrics = classification_metrics([0, 0, 2], [0, 0, 0], num_classes=3)
    assert metrics["f1_macro"] == pytest.approx(0.8 / 2)
    assert metrics["recall_macro"] == pytest.approx(2 / 3)


def test_class_indices_outside_the_task_are_refused_by_row():
    with pytest.raises(ValueError, match="labels row 1 is 3: classes run from 0 to 2"):
        classification_metrics([0, 1], [0, 3], num_classes=3)
    with pytest.raises(ValueError, match="predictions row 0 is 0.5"):
        classification_metrics([0.5, 1], [0, 1], num_classes=3)
    with pytest.raises(ValueError, match="2 columns for num_classes=3"):
        classification_metrics([[0.2, 0.8]], [0], num_classes=3)


def test_emotions_are_four_independent_weighted_f1_scores():
    labels = np.array([[1, 0, 0, 1], [0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]])
    answers = labels.copy()
    answers[:, 0] = 0  # happy missed: "no" has precision 3/4 and recall 1, "yes" has F1 0
    logits = np.stack([1.0 - answers, answers], axis=2)
    metrics = emotion_binary_metrics(logits, labels)
    assert metrics["f1_happy"] == pytest.approx(0.75 * 6 / 7)
    assert metrics["f1_sad"] == metrics["f1_angry"] == metrics["f1_neutral"] == 1.0
    assert metrics["f1_mean"] == pytest.approx((3 + 0.75 * 6 / 7) / 4)


def test_emotion_arrays_of_another_protocol_are_refused():
    with pytest.raises(ValueError, match=r"expected \(samples, 4, 2\)"):
        emotion_binary_metrics(np.zeros((3, 4)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="labels row 1"):
        emotion_binary_metrics(np.zeros((2, 4, 2)), [[0, 1, 0, 0], [0, 2, 0, 0]])


def test_every_metric_has_a_title_and_both_kinds_of_acc2_are_named_in_full():
    produced = {
        *regression_metrics([1, -1], [1, -1]),
        *regression_metrics([1, -1], [1, -1], label_range=(-1, 1)),
        *classification_metrics([0, 1], [0, 1], 2),
        *emotion_binary_metrics(np.zeros((1, 4, 2)), np.zeros((1, 4))),
    }
    assert produced == set(METRIC_TITLES)
    assert METRIC_TITLES["acc2_has0"] == "Acc-2 negative vs non-negative (Has0)"
    assert METRIC_TITLES["acc2_non0"] == "Acc-2 negative vs positive (Non0)"


EVALUATE_SCRIPT = """
import evaluate
import numpy as np
from msa_online.evaluation import metrics
from msa_online.evaluation.msa_metrics import METRICS_PATH

rng = np.random.default_rng(0)
labels, predictions = rng.normal(size=60), rng.normal(size=60)
metric = evaluate.load(str(METRICS_PATH))
for part in np.array_split(np.arange(60), 7):
    metric.add_batch(predictions=predictions[part], references=labels[part])
assert metric.compute() == metrics.regression_metrics(predictions, labels)
values = evaluate.load(str(METRICS_PATH)).compute(predictions=predictions, references=labels, style="nonzero")
assert values == metrics.regression_metrics(predictions, labels, style="nonzero")

classes, answers = rng.integers(0, 6, 60), rng.integers(0, 6, 60)
values = evaluate.load(str(METRICS_PATH), "classification").compute(
    predictions=answers, references=classes, num_classes=6
)
assert values == metrics.classification_metrics(answers, classes, 6)

logits, emotions = rng.normal(size=(60, 4, 2)), rng.integers(0, 2, (60, 4))
values = evaluate.load(str(METRICS_PATH), "emotions").compute(predictions=logits, references=emotions)
assert values == metrics.emotion_binary_metrics(logits, emotions)
"""


def test_evaluate_module_loads_offline_and_gives_the_very_same_numbers(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE_SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_each_class_has_its_f1_and_the_one_against_the_rest_by_hand():
    true, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]
    found = class_metrics(predicted, true, ["angry", "calm", "sad"])
    assert [each["samples"] for each in found.values()] == [3, 2, 1]
    assert found["angry"]["f1"] == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))  # precision 1, recall 2/3
    of_rest = 2 * 0.75 * 1 / 1.75  # the rest: 3 of 4 predicted are right, 3 of 3 found
    assert found["angry"]["f1_binary"] == pytest.approx((3 * found["angry"]["f1"] + 3 * of_rest) / 6)
    assert class_metrics([0, 0], [0, 1], ["a", "b"])["b"]["f1"] == 0
