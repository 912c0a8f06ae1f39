# SPDX-License-Identifier: Apache-2.0
"""The probe of precomputed features finds what is in them, and its errors without refitting are exact."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from msa_online.evaluation.metrics import regression_metrics


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("probe_features")


def test_columns_that_show_the_label_are_told_from_noise(script, tmp_path, capsys):
    random = np.random.default_rng(0)
    labels = random.uniform(-3, 3, 90)
    shown = np.tanh(labels[:, None] + [-1, 0, 1]) + 0.05 * random.standard_normal((90, 3))
    features = np.hstack([random.standard_normal((90, 3)), shown]).astype(np.float32)
    lengths = np.arange(90) % 3  # steps of a sample; every third one lacks the modality
    vision = np.where(np.arange(2) < lengths[:, None], 1, np.nan)[..., None] * features[:, None]
    path = tmp_path / "features.npz"
    np.savez(
        path,
        id=[f"sample {number}" for number in range(90)],
        label=labels,
        split=np.repeat(["train", "valid", "test"], 30),
        text=features,
        audio=features,
        vision=np.nan_to_num(vision),
        vision_lengths=lengths,
    )
    assert script.main([str(path), "--columns", "0:3", "3:6"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("40 samples to fit, 20 to test")
    noise, label = ([float(cell.split()[0]) for cell in line.split("|")[2:-1]] for line in printed[3:])
    scores = label[1::2]  # accuracy, correlation, error; differences from the noise stand between
    assert scores[0] > 0.9 and scores[1] > 0.95 and scores[2] < 0.5
    for value, first, difference in zip(scores, noise[1::2], label[2::2], strict=True):
        assert difference == pytest.approx(value - first, abs=0.002) and abs(difference) > 0.3
    assert noise[2::2] == [0, 0, 0]


def test_scores_are_those_of_a_run(script):
    random = np.random.default_rng(0)
    labels = random.integers(-3, 4, 50).astype(float)
    predicted = labels + random.standard_normal(50)
    metrics = regression_metrics(predicted, labels)
    expected = [metrics["acc2_non0"], metrics["corr"], metrics["mae"]]
    np.testing.assert_allclose(script.score(predicted, labels), expected)


def test_leave_one_out_errors_are_those_of_fits_without_the_sample(script, monkeypatch):
    random = np.random.default_rng(0)
    features, labels = random.standard_normal((12, 2)), random.standard_normal(12)
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    labels -= labels.mean()  # the mean is that of all samples, and stays
    monkeypatch.setattr(script, "GAMMAS", (0.5,))
    monkeypatch.setattr(script, "PENALTIES", (0.7,))
    _, error = script.kernel_ridge(features, labels, features)
    kernel = np.exp(-0.5 * ((features[:, None] - features) ** 2).mean(axis=2))
    errors = []
    for left in range(12):
        others = np.arange(12) != left
        weights = np.linalg.solve(kernel[np.ix_(others, others)] + 0.7 * np.eye(11), labels[others])
        errors.append(abs(kernel[left, others] @ weights - labels[left]))
    assert error == pytest.approx(np.mean(errors))
