# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from torch.amp import GradScaler

from msa_online import MSAConfig
from msa_online.training.divergence import ConstantModel, DivergedError, check_epoch, constant_line, is_worse

CLASSES = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
CONSTANT = {"mae": 1.2}
RANGE = (-3.0, 3.0)


@pytest.fixture
def regression() -> MSAConfig:
    return MSAConfig(label_range=[-3, 3])


def test_a_constant_model_is_scored_as_any_other(regression):
    constant = ConstantModel.fit([1.0, 2.0, -3.0, 2.0], regression)
    metrics = constant.metrics([0.5, 1.5])
    assert metrics["mae"] == pytest.approx(0.5) and metrics["corr"] == 0.0
    assert constant.title == "the mean training label (0.500)"


def test_the_constant_of_a_classification_is_the_most_frequent_class():
    constant = ConstantModel.fit([1, 0, 1], MSAConfig(**CLASSES))
    assert constant.title == "the most frequent training class (b)"
    assert constant.metrics([1, 1, 0, 1])["accuracy"] == pytest.approx(0.75)


@pytest.mark.parametrize("mae", [4e13, 60.1])
def test_an_absurd_error_stops_the_run_with_the_remedy(mae):
    message = r"epoch 3/9: validation MAE .* for labels from -3 to 3;.*lower training.learning_rate"
    with pytest.raises(DivergedError, match=message):
        check_epoch("epoch 3/9", {"loss": 1.0}, {"mae": mae}, RANGE, None)


def test_a_poor_first_epoch_is_no_divergence():
    check_epoch("epoch 1/9", {"loss": 9.0}, {"mae": 20.0}, RANGE, None)
    check_epoch("epoch 1/9", {"loss": 9.0}, {"f1_weighted": 0.0}, RANGE, None)


def test_an_epoch_without_a_finite_gradient_stops_the_run():
    with pytest.raises(DivergedError, match="epoch 2/9: every step was skipped.*learning_rate"):
        check_epoch("epoch 2/9", {}, {"mae": 1.0}, RANGE, None)


def test_fp16_may_skip_the_first_steps_while_it_searches_for_its_scale():
    searching, at_its_end = (GradScaler("cpu", init_scale=scale) for scale in (1024.0, 0.5))
    for scaler in (searching, at_its_end):
        scaler._lazy_init_scale_growth_tracker("cpu")
    check_epoch("epoch 1/9", {}, {"mae": 1.0}, RANGE, searching)
    with pytest.raises(DivergedError):
        check_epoch("epoch 1/9", {}, {"mae": 1.0}, RANGE, at_its_end)


def test_a_model_worse_than_a_constant_is_named():
    assert is_worse({"mae": 1.3}, CONSTANT, True) and not is_worse({"mae": 1.1}, CONSTANT, True)
    line = constant_line("test", {"mae": 1.3}, CONSTANT, "the mean training label (0.1)")
    assert line.startswith(
        "warning: test: MAE 1.300; always predicting the mean training label (0.1) gives 1.200"
    )
    better = constant_line(
        "test", {"f1_weighted": 0.7}, {"f1_weighted": 0.4}, "the most frequent training class (b)"
    )
    assert (
        better
        == "test: F1 weighted 0.700; always predicting the most frequent training class (b) gives 0.400"
    )
    assert not np.isnan(ConstantModel.fit([0.0], MSAConfig(label_range=[-1, 1])).logits).any()
