# SPDX-License-Identifier: Apache-2.0
"""Metrics of sentiment and emotion models, as defined by the public MMSA toolkit.

In the literature two accuracies are called Acc-2, and they differ by several points. Here the convention is
part of the name: *Has0* is negative against non-negative on all samples (`y >= 0`); *Non0* is negative
against positive without zero labels (`y > 0`). Papers print "Has0/Non0". A third convention is not
implemented: the toolkit's classification mode on MOSI counts neutral as *negative*, so its results are not
comparable. docs/methods/protocols.md has the definitions.

Everything is computed in float64 on whole arrays: gather all ranks first (`accelerator.gather_for_metrics`
drops samples that were repeated as padding), then call once. Accuracies and F1 are fractions in [0, 1].
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

SEVEN_POINT = (-3.0, 3.0)
"""The label range on which Acc-7, Acc-5 and Acc-3 are defined."""

CH_SIMS = (-1.0, 1.0)
"""The label range on which the scores of CH-SIMS are defined."""

EMOTIONS = ("happy", "sad", "angry", "neutral")
"""Order of the four decisions in the RAVEN/MulT protocol of IEMOCAP."""

ROUNDED_ACCURACIES = {"acc7": 3, "acc5": 2, "acc3": 1}  # both arrays are clipped to +-limit, then rounded

SIMS_CLASSES = {"acc3_sims": (-0.1, 0.1), "acc5_sims": (-0.7, -0.1, 0.1, 0.7)}
"""Upper ends of the classes of CH-SIMS; the last class is open."""

METRIC_TITLES: Mapping[str, str] = {
    "mae": "Mean absolute error",
    "corr": "Pearson correlation",
    "acc2_has0": "Acc-2 negative vs non-negative (Has0)",
    "f1_has0": "F1 negative vs non-negative (Has0), weighted",
    "acc2_non0": "Acc-2 negative vs positive (Non0)",
    "f1_non0": "F1 negative vs positive (Non0), weighted",
    "acc7": "Acc-7",
    "acc5": "Acc-5",
    "acc3": "Acc-3",
    "acc2_sims": "Acc-2 not positive vs positive (CH-SIMS)",
    "f1_sims": "F1 not positive vs positive (CH-SIMS), weighted",
    "acc3_sims": "Acc-3 (CH-SIMS)",
    "acc5_sims": "Acc-5 (CH-SIMS)",
    "accuracy": "Accuracy",
    "f1_weighted": "F1, weighted by class size",
    "f1_macro": "F1, mean over classes",
    "recall_macro": "Recall, mean over classes (UA)",
    **{f"f1_{emotion}": f"F1 {emotion} vs rest, weighted" for emotion in EMOTIONS},
    "f1_mean": "F1, mean of the four emotions (RAVEN/MulT protocol)",
}
"""Full names of all metrics, in the order of the tables; `tables.HEADLINES` has the column titles."""


def regression_metrics(
    predictions: ArrayLike,
    labels: ArrayLike,
    *,
    style: Literal["mmsa", "nonzero"] = "mmsa",
    label_range: tuple[float, float] = SEVEN_POINT,
) -> dict[str, float]:
    """Score sentiment predictions as in papers on CMU-MOSI, CMU-MOSEI and CH-SIMS.

    Predictions are not clipped, except for the rounded accuracies; so predictions beyond the label range
    increase the MAE.

    Accuracies of several classes depend on `label_range`. On [-3, 3], Acc-7, Acc-5 and Acc-3 clip both arrays
    to +-3, +-2, +-1, round halves to even and compare. On [-1, 1], the scores of CH-SIMS are added: classes
    end at 0.1 and 0.7 on both sides, and zero counts as not positive. An end belongs to the class below it.

    Args:
        predictions: Predicted scores, `(samples,)` or `(samples, 1)`, in the unit of the labels.
        labels: True scores, `(samples,)` or `(samples, 1)`.
        style: "mmsa" scores all samples. "nonzero" first drops every sample whose label is exactly 0 and
            reports no Has0 metrics, like the public scripts of some papers.
        label_range: Declared lowest and highest label: [-3, 3], [-1, 1], or another one without such scores.

    Returns:
        Values under the keys of `METRIC_TITLES`, from "mae" to "acc5_sims". The correlation is 0, with a
        warning, if all predictions are equal, and NaN if all labels are. Non0 metrics (in "nonzero" style
        all) are NaN, with a warning, if every label is 0.

    Raises:
        ValueError: Arrays are empty, not finite, of different lengths or of a wrong shape; or the style is
            unknown.
    """
    if style not in ("mmsa", "nonzero"):
        raise ValueError(
            f"style is {style!r}: choose 'mmsa' (all samples) or 'nonzero' (zero labels dropped)"
        )
    predicted, true = _score_columns(predictions, labels)
    nonzero = true != 0
    if not nonzero.any():
        warnings.warn("no label differs from 0: metrics on non-zero labels are NaN", stacklevel=2)
    if style == "nonzero":
        predicted, true = predicted[nonzero], true[nonzero]
        nonzero = nonzero[nonzero]
    metrics = {"mae": _mean(np.abs(predicted - true)), "corr": _pearson(predicted, true)}
    if style == "mmsa":
        metrics |= _binary_metrics(predicted >= 0, true >= 0, "has0")
    metrics |= _binary_metrics(predicted[nonzero] > 0, true[nonzero] > 0, "non0")
    if tuple(label_range) == SEVEN_POINT:
        metrics |= {name: _rounded_accuracy(predicted, true, top) for name, top in ROUNDED_ACCURACIES.items()}
    if tuple(label_range) == CH_SIMS:
        metrics |= _binary_metrics(predicted > 0, true > 0, "sims")
        metrics |= {name: _same_class(predicted, true, ends) for name, ends in SIMS_CLASSES.items()}
    return metrics


def undefined_metrics(labels: ArrayLike) -> dict[str, str]:
    """Metrics of a regression that are undefined on these labels, whatever is predicted, with the reason.

    Args:
        labels: True scores, `(samples,)`.
    """
    true = np.asarray(labels, dtype=np.float64).ravel()
    reasons = {}
    if not true.any():
        reasons |= dict.fromkeys(("acc2_non0", "f1_non0"), "no label differs from 0")
    if true.max() == true.min():
        reasons["corr"] = f"all labels are {true[0]:g}"
    return reasons


def classification_metrics(predictions: ArrayLike, labels: ArrayLike, num_classes: int) -> dict[str, float]:
    """Score a classifier with one class per sample, as in four-class (GCNet) or six-class (BALM) IEMOCAP.

    Args:
        predictions: Probabilities or logits, `(samples, classes)`, of which the largest counts (the first of
            equals); or class indices, `(samples,)`.
        labels: True class indices, `(samples,)`, from 0 to `num_classes - 1`.
        num_classes: Number of classes of the task.

    Returns:
        "accuracy"; "f1_weighted", weighted by the true class sizes; "f1_macro", the mean over classes that
        occur in labels or predictions; "recall_macro", the mean over classes that occur in labels (UA).

    Raises:
        ValueError: Arrays are empty, not finite, of different lengths or of a wrong shape; or an index is not
            a class of the task.
    """
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    predicted, true = _checked_classes(predictions, labels, num_classes)
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "f1_weighted": float(f1_score(true, predicted, average="weighted", zero_division=0)),
        "f1_macro": float(f1_score(true, predicted, average="macro", zero_division=0)),
        "recall_macro": float(recall_score(true, predicted, labels=np.unique(true), average="macro")),
    }


def class_metrics(
    predictions: ArrayLike, labels: ArrayLike, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """F1 of each class of a classifier with one class per sample.

    Args:
        predictions: As for `classification_metrics`.
        labels: True class indices, `(samples,)`.
        names: Name of each class.

    Returns:
        By name of the class: "samples", those that have it; "f1", the F1 of this class; "f1_binary", the F1
        of class against rest, averaged over the two by their true counts. The last is how RAVEN and MulT
        score the four emotions of IEMOCAP, though their models decide on each emotion by itself
        (`emotion_binary_metrics`).

    Raises:
        ValueError: As in `classification_metrics`.
    """
    from sklearn.metrics import f1_score

    predicted, true = _checked_classes(predictions, labels, len(names))
    found = {}
    for number, name in enumerate(names):
        yes, truly = predicted == number, true == number
        found[name] = {
            "samples": int(truly.sum()),
            "f1": float(f1_score(truly, yes, zero_division=0)),
            "f1_binary": _weighted_f1(yes, truly),
        }
    return found


def emotion_binary_metrics(logits: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Score IEMOCAP as RAVEN and MulT do: four independent binary decisions; several can apply to a sample.

    The results are not comparable with four-class accuracy or F1 (`classification_metrics`): name the
    protocol in every table.

    Args:
        logits: Scores of "no" and "yes" for each of `EMOTIONS`, `(samples, 4, 2)`.
        labels: 1 where the emotion applies and 0 where not, `(samples, 4)`.

    Returns:
        "f1_happy", "f1_sad", "f1_angry", "f1_neutral", each the mean F1 of yes and no weighted by their true
        counts; and their mean as "f1_mean".

    Raises:
        ValueError: Arrays are empty, not finite or of a wrong shape; or a label is neither 0 nor 1.
    """
    scores = _finite(np.asarray(logits), "logits")
    true = np.asarray(labels)
    if scores.shape[1:] != (len(EMOTIONS), 2) or true.shape != scores.shape[:2]:
        raise ValueError(
            f"logits have shape {scores.shape} and labels {true.shape}: "
            "expected (samples, 4, 2) and (samples, 4)"
        )
    if not np.isin(true, (0, 1)).all():
        row = int(np.flatnonzero(~np.isin(true, (0, 1)).all(axis=1))[0])
        raise ValueError(f"labels row {row} is {true[row].tolist()}: every emotion is either 0 or 1")
    yes = scores.argmax(axis=2)
    metrics = {f"f1_{name}": _weighted_f1(yes[:, i], true[:, i]) for i, name in enumerate(EMOTIONS)}
    return metrics | {"f1_mean": _mean(np.array(list(metrics.values())))}


def _binary_metrics(predicted: np.ndarray, true: np.ndarray, name: str) -> dict[str, float]:
    return {f"acc2_{name}": _mean(predicted == true), f"f1_{name}": _weighted_f1(predicted, true)}


def _weighted_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """F1 averaged over the two classes, weighted by their *true* counts; the arguments are not symmetric."""
    from sklearn.metrics import f1_score

    if not len(true):
        return float("nan")
    return float(f1_score(true.astype(int), predicted.astype(int), average="weighted", zero_division=0))


def _rounded_accuracy(predicted: np.ndarray, true: np.ndarray, limit: int) -> float:
    return _mean(np.rint(predicted.clip(-limit, limit)) == np.rint(true.clip(-limit, limit)))


def _same_class(predicted: np.ndarray, true: np.ndarray, ends: Sequence[float]) -> float:
    """Share of samples in the same of the classes that end at `ends`.

    Compared in fp32: a label of 0.1 is on the end of its class, also if it was stored in fp32.
    """
    bounds = np.array(ends, np.float32)
    classes = [np.searchsorted(bounds, values.astype(np.float32)) for values in (predicted, true)]
    return _mean(classes[0] == classes[1])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    """Pearson correlation. max == min detects constants, whose computed deviation is rarely exactly 0."""
    if not len(true):
        return float("nan")
    if true.max() == true.min():
        warnings.warn(f"all labels are {true[0]}: correlation is undefined", stacklevel=3)
        return float("nan")
    if predicted.max() == predicted.min():
        warnings.warn(
            f"all predictions are {predicted[0]:.6g}: correlation is undefined, reported as 0", stacklevel=3
        )
        return 0.0
    return float(np.corrcoef(predicted, true)[0, 1])


def _score_columns(predictions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays as finite float64 `(samples,)` of equal length."""
    columns = []
    for name, values in (("predictions", predictions), ("labels", labels)):
        array = np.asarray(values)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != 1:
            raise ValueError(f"{name} have shape {array.shape}: expected (samples,) or (samples, 1)")
        columns.append(_finite(array, name))
    _require_same_length(*columns)
    return columns[0], columns[1]


def _finite(array: np.ndarray, name: str) -> np.ndarray:
    """Convert an array to float64; raises `ValueError` if it is empty or has a value that is not finite."""
    if array.size == 0:
        raise ValueError(f"{name} are empty: there is nothing to score")
    array = array.astype(np.float64)
    broken = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if broken.any():
        row = int(np.flatnonzero(broken)[0])
        raise ValueError(
            f"{name} row {row} is {array[row].tolist()} ({int(broken.sum())} such rows): a NaN or infinite "
            "value has no score and must not count as a wrong answer"
        )
    return array


def _checked_classes(
    predictions: ArrayLike, labels: ArrayLike, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true classes, `(samples,)` int64 of equal length."""
    scores = np.asarray(predictions)
    if scores.ndim == 2:
        if scores.shape[1] != num_classes:
            raise ValueError(f"predictions have {scores.shape[1]} columns for num_classes={num_classes}")
        scores = _finite(scores, "predictions").argmax(axis=1)
    predicted = _class_indices(scores, "predictions", num_classes)
    true = _class_indices(np.asarray(labels), "labels", num_classes)
    _require_same_length(predicted, true)
    return predicted, true


def _class_indices(array: np.ndarray, name: str, num_classes: int) -> np.ndarray:
    if array.ndim != 1:
        raise ValueError(f"{name} have shape {array.shape}: expected one class index per sample")
    array = _finite(array, name)
    broken = (array != np.rint(array)) | (array < 0) | (array >= num_classes)
    if broken.any():
        row = int(np.flatnonzero(broken)[0])
        raise ValueError(f"{name} row {row} is {array[row]:g}: classes run from 0 to {num_classes - 1}")
    return array.astype(np.int64)


def _require_same_length(predicted: np.ndarray, true: np.ndarray) -> None:
    if len(predicted) != len(true):
        raise ValueError(f"{len(predicted)} predictions for {len(true)} labels")
