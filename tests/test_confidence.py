# SPDX-License-Identifier: Apache-2.0
import json
import math

import numpy as np
import pytest
from scipy.special import softmax

from msa_online import MSAConfig
from msa_online.confidence import (
    Confidence,
    calibration_error,
    conformal_half_width,
    fit_confidence,
    fit_temperature,
    measure_confidence,
    shortfall_line,
    too_few_line,
)
from msa_online.modalities import MODALITIES, VISIBLE_SETS

NOISE = {"text": 0.5, "audio": 2.0, "vision": 1.0}
"""Spread of the error that a modality would remove: a model that sees less errs more."""


def regression(count: int, seed: int, lacks: float = 0.0) -> tuple[dict, dict, np.ndarray]:
    """Scores of a model under each set of modalities, what its samples then show, and labels.

    A share `lacks` of the samples has no modality `vision`.
    """
    random = np.random.default_rng(seed)
    labels = random.uniform(-3, 3, count)
    present = np.ones((count, 3), dtype=bool)
    present[:, 2] = random.uniform(size=count) >= lacks
    seen = {name: present & np.isin(MODALITIES, visible) for name, visible in VISIBLE_SETS.items()}
    scores = {
        name: (labels + (~shown * random.normal(size=(count, 3)) * list(NOISE.values())).sum(axis=1))[:, None]
        + 0.1 * random.normal(size=(count, 1))
        for name, shown in seen.items()
    }
    return scores, seen, labels


def within_binomial_bounds(hits: float, count: int, probability: float) -> bool:
    return abs(hits - count * probability) <= 4 * math.sqrt(count * probability * (1 - probability))


@pytest.mark.parametrize("samples", [20, 29, 100])
def test_an_interval_contains_a_new_label_as_often_as_promised_on_splits_of_any_size(samples):
    """Each trial draws a new validation split, because the promise is an average over splits."""
    random = np.random.default_rng(samples)
    trials = random.standard_t(3, size=(4000, samples + 1))
    inside = sum(abs(new) <= conformal_half_width(old, 0.9) for *old, new in map(list, trials))
    expected = math.ceil(0.9 * (samples + 1) - 1e-9) / (samples + 1)
    assert expected >= 0.9 and within_binomial_bounds(inside, 4000, expected)


def test_too_few_samples_for_a_level_give_no_finite_interval():
    residuals = np.arange(1.0, 20.0)
    assert conformal_half_width(residuals, 0.95) == 19
    assert conformal_half_width(residuals[:18], 0.95) == math.inf


def test_coverage_holds_under_every_condition_and_intervals_widen_where_less_is_seen():
    scores, seen, labels = regression(2000, seed=0)
    confidence = fit_confidence(scores, seen, labels, "valid")
    assert confidence.samples == dict.fromkeys(VISIBLE_SETS, 2000)
    others, seen, labels = regression(4000, seed=1)
    for name in VISIBLE_SETS:
        measured = measure_confidence(confidence, others[name], seen[name], labels, None)
        assert measured["samples"] == 4000
        assert abs(measured["coverage"] - 0.9) < 4 * math.sqrt(0.09 / 4000 + 0.09 / 2000), name
        assert measured["width"] == pytest.approx(2 * confidence.half_widths[name])
    widths = confidence.half_widths
    for name, visible in VISIBLE_SETS.items():
        for other, more in VISIBLE_SETS.items():
            assert widths[other] < widths[name] or not set(visible) < set(more)


def test_a_clip_that_lacks_a_modality_has_the_interval_of_what_it_shows():
    scores, seen, labels = regression(4000, seed=2, lacks=0.5)
    confidence = fit_confidence(scores, seen, labels, "valid")
    complete = fit_confidence(*regression(4000, seed=3), "valid")
    assert 1900 < confidence.samples["text+audio+vision"] < 2100 and confidence.samples["text"] == 4000
    for name, width in complete.half_widths.items():  # samples without vision widen no set with vision
        assert confidence.half_widths[name] == pytest.approx(width, rel=0.15)
    measured = measure_confidence(
        confidence, scores["text+audio+vision"], seen["text+audio+vision"], labels, None
    )
    halves = confidence.half_widths["text+audio+vision"] + confidence.half_widths["text+audio"]
    assert measured["samples"] == 4000 and measured["width"] == pytest.approx(halves, rel=0.1)
    assert confidence.interval(1.0, ("audio", "text"), None).low == 1 - confidence.half_widths["text+audio"]


def test_an_interval_stays_within_the_range_of_the_labels_and_loses_none():
    scores, seen, labels = regression(200, seed=4)
    confidence = fit_confidence(scores, seen, labels, "valid")
    wide = measure_confidence(confidence, scores["nothing"], seen["nothing"], labels, None)
    cut = measure_confidence(confidence, scores["nothing"], seen["nothing"], labels, (-3, 3))
    assert cut["coverage"] == wide["coverage"] and cut["width"] < wide["width"]
    interval = confidence.interval(2.9, (), [-3, 3])
    assert interval.high == 3 and interval.low == 2.9 - confidence.half_widths["nothing"]
    assert interval.level == 0.9


def test_a_test_split_that_is_unlike_validation_gives_a_warning_and_a_like_one_none():
    scores, seen, labels = regression(200, seed=10)
    confidence = fit_confidence(scores, seen, labels, "valid")
    others, seen, labels = regression(600, seed=11)
    measured = {
        name: measure_confidence(confidence, others[name], seen[name], labels, None) for name in VISIBLE_SETS
    }
    assert shortfall_line(confidence, measured, "test") is None
    worse = {**measured, "text": {**measured["text"], "coverage": 0.78}, "imr": measured["text"]}
    line = shortfall_line(confidence, worse, "test")
    assert line.startswith("warning: test: ") and "with text (78.0%): valid and test differ" in line
    empty = {"text": {"samples": 0, "coverage": None, "width": None}}
    assert shortfall_line(confidence, empty, "test") is None


def test_small_splits_promise_nothing_and_say_so_in_one_line():
    scores, seen, labels = regression(19, seed=5)
    confidence = fit_confidence(scores, seen, labels, "valid")
    assert confidence.fitted == {} and confidence.interval(0.0, MODALITIES, None) is None
    assert "valid has 19 samples for them; at least 20 are needed" in too_few_line(confidence)
    scores, seen, labels = regression(30, seed=6, lacks=0.6)
    confidence = fit_confidence(scores, seen, labels, "valid")
    assert set(confidence.fitted) == {"nothing", "text", "audio", "text+audio"}
    assert f"for vision ({confidence.samples['vision']}), text+vision" in too_few_line(confidence)
    measured = measure_confidence(
        confidence, scores["text+audio+vision"], seen["text+audio+vision"], labels, None
    )
    assert measured["samples"] == 30 - confidence.samples["vision"]
    none = measure_confidence(confidence, scores["vision"][:0], seen["vision"][:0], labels[:0], None)
    assert none["samples"] == 0 and math.isnan(none["coverage"])


def drawn(logits: np.ndarray, seed: int) -> np.ndarray:
    """Class numbers drawn with the probabilities of `logits`."""
    random = np.random.default_rng(seed)
    return np.array([random.choice(logits.shape[1], p=row) for row in softmax(logits, axis=1)])


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_a_known_temperature_is_found_and_removes_the_calibration_error(temperature):
    random = np.random.default_rng(7)
    true = 1.5 * random.normal(size=(6000, 4))
    labels = drawn(true, seed=8)
    assert fit_temperature(true[:3000] * temperature, labels[:3000]) == pytest.approx(temperature, rel=0.08)
    seen = np.ones((6000, 3), dtype=bool)
    name = "text+audio+vision"
    half = {name: true[:3000] * temperature}
    confidence = fit_confidence(half, {name: seen[:3000]}, labels[:3000], "valid")
    measured = measure_confidence(confidence, true[3000:] * temperature, seen[3000:], labels[3000:], None)
    assert measured["ece"] < 0.03
    assert measured["confidence"] == pytest.approx(measured["accuracy"], abs=0.03)
    assert (measured["ece_before"] > 0.1) == (temperature != 1)


def test_twenty_samples_without_an_error_do_not_make_a_model_certain():
    labels = np.arange(20) % 2
    logits = 50.0 * np.eye(2)[labels]
    assert softmax(logits / fit_temperature(logits, labels), axis=1).max() == pytest.approx(21 / 22)


def test_classes_the_wrong_way_round_give_the_highest_temperature():
    labels = np.arange(40) % 2
    assert fit_temperature(5.0 * np.eye(2)[1 - labels], labels) == 20


def test_the_calibration_error_is_that_of_the_definition():
    probabilities = np.array([0.95, 0.91, 0.62, 1.0])
    correct = np.array([True, False, True, True])
    upper = abs((0.95 + 0.91 + 1.0) / 3 - 2 / 3)
    assert calibration_error(probabilities, correct) == pytest.approx(0.75 * upper + 0.25 * (1 - 0.62))


def test_a_configuration_keeps_confidence_as_plain_data(tiny_config, tmp_path):
    scores, seen, labels = regression(25, seed=9)
    confidence = fit_confidence(scores, seen, labels, "valid")
    assert "confidence" not in tiny_config.to_dict()
    tiny_config.confidence = confidence.to_dict()
    tiny_config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["confidence"]
    assert Confidence.of(saved) == confidence
    assert Confidence.of(MSAConfig.from_pretrained(tmp_path).confidence) == confidence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "must have the keys"),
        ({"half_widths": {"text+sound": 1.0}}, "names of sets"),
        ({"half_widths": {"text": "wide"}}, "'wide'"),
        ({"temperatures": {"text": 0}}, "at least 0.05"),
        ({"level": 90}, "between 0 and 1"),
    ],
)
def test_damaged_confidence_is_refused_with_the_key(change, message, tiny_config):
    plain = {**Confidence("valid", {"text": 20}, half_widths={"text": 1.0}).to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        MSAConfig(**{**tiny_config.to_dict(), "confidence": plain})
