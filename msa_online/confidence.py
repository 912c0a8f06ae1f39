# SPDX-License-Identifier: Apache-2.0
"""How certain predictions are: intervals around scores, and calibrated probabilities.

Both are fitted on a validation split, separately for each set of visible modalities, because a model is less
certain of what it sees less of. What they promise is in docs/using_a_checkpoint.md, "Confidence".
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from msa_online.modalities import MODALITIES, VISIBLE_SETS

LEVEL = 0.9
"""Share of labels that the intervals of new fits contain."""

MIN_SAMPLES = 20
"""Fewer validation samples give no interval and no temperature."""

TEMPERATURES = (0.05, 20.0)
"""Lowest and highest temperature."""

BINS = 10
"""Bins of equal width of the calibration error."""


@dataclass(frozen=True)
class Interval:
    """A range that contains the label of a regression with a given probability.

    Attributes:
        low: Lower end, in the units of the labels.
        high: Upper end.
        level: The probability, in (0, 1).
    """

    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Confidence:
    """What a checkpoint knows about the certainty of its predictions, by set of visible modalities.

    Sets are named as in `VISIBLE_SETS`. A set with fewer than `MIN_SAMPLES` validation samples has a count
    only.

    Attributes:
        split: Split that it was fitted on.
        samples: Number of samples of that split which have all modalities of the set.
        level: Share of labels that the intervals contain.
        half_widths: Half the width of the intervals of a regression, in the units of the labels.
        temperatures: Divisors of the logits of a classification, which calibrate its probabilities.
    """

    split: str
    samples: dict[str, int]
    level: float = LEVEL
    half_widths: dict[str, float] = field(default_factory=dict)
    temperatures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, plain: Mapping[str, Any] | None) -> "Confidence | None":
        """Read the plain data of a configuration; None if there are none.

        Raises:
            ValueError: The data have other keys or values than those that `to_dict` writes.
        """
        if plain is None:
            return None
        known = {each.name for each in fields(cls)}
        if not isinstance(plain, Mapping) or plain.keys() != known:
            raise ValueError(f"confidence must have the keys {', '.join(sorted(known))}")
        for name in ("samples", "half_widths", "temperatures"):
            values = plain[name]
            if not isinstance(values, Mapping) or not values.keys() <= VISIBLE_SETS.keys():
                raise ValueError(f"confidence.{name} must have names of sets of modalities as keys")
            lowest = TEMPERATURES[0] if name == "temperatures" else 0
            if wrong := [each for each in values.values() if not _is_number(each) or each < lowest]:
                raise ValueError(f"confidence.{name} has {wrong[0]!r}: numbers of at least {lowest}")
        if not _is_number(plain["level"]) or not 0 < plain["level"] < 1:
            raise ValueError(f"confidence.level is {plain['level']!r}: a number between 0 and 1")
        return cls(**plain)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for a configuration."""
        return asdict(self)

    @property
    def fitted(self) -> dict[str, float]:
        """Half-widths or temperatures, whichever the model has."""
        return self.half_widths or self.temperatures

    @property
    def kind(self) -> str:
        """What was fitted and on what, as a title."""
        what = f"intervals at {self.level:.0%}" if self.half_widths else "calibrated probabilities"
        return f"{what}, fitted on {self.split}"

    def interval(
        self, score: float, seen: Iterable[str], label_range: Iterable[float] | None
    ) -> Interval | None:
        """Interval of a score, within the label range; None if none was fitted for these modalities.

        Args:
            score: Prediction of a regression.
            seen: Modalities that it uses.
            label_range: Lowest and highest legal label; None does not cut the interval.
        """
        half_width = self.half_widths.get(set_name(seen))
        if half_width is None:
            return None
        low, high = _ends(np.array(score), np.array(half_width), label_range)
        return Interval(float(low), float(high), self.level)

    def temperature_by_code(self) -> list[float]:
        """Temperature of each set of modalities, 1 if not fitted.

        The index of a set is the sum of 2^i over its modalities, i their place in `MODALITIES`.
        """
        temperatures = [1.0] * 2 ** len(MODALITIES)
        for name, value in self.temperatures.items():
            temperatures[sum(2 ** MODALITIES.index(one) for one in VISIBLE_SETS[name])] = value
        return temperatures


def set_name(seen: Iterable[str]) -> str:
    """Name in `VISIBLE_SETS` of a set of modalities."""
    seen = set(seen)
    return next(name for name, visible in VISIBLE_SETS.items() if set(visible) == seen)


def fit_confidence(
    logits: Mapping[str, np.ndarray],
    seen: Mapping[str, np.ndarray],
    labels: np.ndarray,
    split: str,
) -> Confidence:
    """Fit intervals (one output) or temperatures (several) for each set of visible modalities.

    A sample counts for a set if it has all of its modalities. So what is fitted is for exactly this set,
    and not for a mixture with clips that have less.

    Args:
        logits: Outputs with only the modalities of a set visible, `(samples, outputs)`, by name of the set;
            other names are ignored.
        seen: Which of `MODALITIES` the sample then shows, `(samples, 3)` bool, by name of the set.
        labels: Labels or class numbers, `(samples,)`.
        split: Name of the split, for the record.
    """
    samples, half_widths, temperatures = {}, {}, {}
    for name, visible in VISIBLE_SETS.items():
        if name not in logits:
            continue
        rows = seen[name].sum(axis=1) == len(visible)
        samples[name] = int(rows.sum())
        if samples[name] < MIN_SAMPLES:
            continue
        outputs, truth = logits[name][rows], labels[rows]
        if outputs.shape[1] == 1:
            half_widths[name] = conformal_half_width(outputs[:, 0] - truth, LEVEL)
        else:
            temperatures[name] = fit_temperature(outputs, truth.astype(int))
    return Confidence(split, samples, LEVEL, half_widths, temperatures)


def conformal_half_width(residuals: np.ndarray, level: float) -> float:
    """Half-width of an interval by split conformal prediction.

    It is the k-th smallest absolute residual, k = ceil((n + 1) level). If a new sample and the n samples are
    exchangeable, and the model was not fitted on them, the interval contains the new label with probability
    of at least `level`, and of less than `level` + 1 / (n + 1) if residuals have no ties.

    Args:
        residuals: Prediction minus label, `(samples,)`.
        level: Probability, in (0, 1).

    Returns:
        The half-width; infinity if there are too few samples for the level.
    """
    rank = math.ceil(round((len(residuals) + 1) * level, 9))  # rounded: 0.9 * 30 is above 27
    return float(np.sort(np.abs(residuals))[rank - 1]) if rank <= len(residuals) else math.inf


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Temperature that minimises the negative log-likelihood of softmax(logits / temperature).

    With n samples and K classes the target of the true class is (n + 1) / (n + K), not 1, as in Platt's
    scaling. Otherwise a small split without an error would give the lowest temperature, and certainty.

    Args:
        logits: `(samples, classes)`.
        labels: Class numbers, `(samples,)`.

    Returns:
        The temperature, within `TEMPERATURES`.
    """
    from scipy.optimize import brentq
    from scipy.special import softmax

    count, classes = logits.shape
    targets = np.full((count, classes), 1 / (count + classes))
    targets[np.arange(count), labels] = (count + 1) / (count + classes)

    def slope(inverse: float) -> float:  # of the likelihood; it is convex in the inverse temperature
        return float(((softmax(inverse * logits, axis=1) - targets) * logits).sum(axis=1).mean())

    lowest, highest = TEMPERATURES
    if slope(1 / highest) >= 0:
        return highest
    if slope(1 / lowest) <= 0:
        return lowest
    return float(1 / brentq(slope, 1 / highest, 1 / lowest))


def measure_confidence(
    confidence: Confidence,
    logits: np.ndarray,
    seen: np.ndarray,
    labels: np.ndarray,
    label_range: Iterable[float] | None,
) -> dict[str, float]:
    """Measure on other samples what was fitted; each sample counts with the modalities that it shows.

    Args:
        confidence: The fit.
        logits: Outputs `(samples, outputs)`.
        seen: Which of `MODALITIES` each sample shows, `(samples, 3)` bool.
        labels: Labels or class numbers, `(samples,)`.
        label_range: As in `Confidence.interval`.

    Returns:
        "samples", the number of samples whose set of modalities was fitted; the others are left out. In
        regression "coverage", the share of labels inside their interval, and "width", the mean width. In
        classification "accuracy", "confidence" (the mean probability of the predicted class), "ece" (the
        expected calibration error) and "ece_before", without temperatures. NaN if no sample is left.
    """
    names = [set_name(np.array(MODALITIES)[row]) for row in seen]
    fitted = np.array([confidence.fitted.get(name, np.nan) for name in names])
    known = np.isfinite(fitted)
    logits, fitted, labels = logits[known], fitted[known], labels[known]
    measured = {"samples": int(known.sum())}
    if logits.shape[1] == 1:
        low, high = _ends(logits[:, 0], fitted, label_range)
        inside = (low <= labels) & (labels <= high)
        return {**measured, "coverage": _mean(inside), "width": _mean(high - low)}
    from scipy.special import softmax

    correct = logits.argmax(axis=1) == labels
    calibrated = softmax(logits / fitted[:, None], axis=1).max(axis=1, initial=0)
    return {
        **measured,
        "accuracy": _mean(correct),
        "confidence": _mean(calibrated),
        "ece": calibration_error(calibrated, correct),
        "ece_before": calibration_error(softmax(logits, axis=1).max(axis=1, initial=0), correct),
    }


def calibration_error(probabilities: np.ndarray, correct: np.ndarray) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy, in bins of equal width.

    Few samples give an error above zero even if the probabilities are right.

    Args:
        probabilities: Of the predicted class, `(samples,)`.
        correct: Whether it is the true class, `(samples,)` bool.

    Returns:
        The error in [0, 1]; NaN without samples.
    """
    if not len(probabilities):
        return math.nan
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=probabilities - correct, minlength=BINS)  # sums, not means
    return float(np.abs(gaps).sum() / len(probabilities))


def too_few_line(confidence: Confidence) -> str | None:
    """One line about the sets of modalities that have too few samples for a fit; None if there are none."""
    lacking = {name: count for name, count in confidence.samples.items() if count < MIN_SAMPLES}
    if not lacking:
        return None
    unfitted = "no intervals or calibrated probabilities"
    if not confidence.fitted:
        most = max(lacking.values())
        return (
            f"{unfitted}: {confidence.split} has {most} samples for them; at least {MIN_SAMPLES} are needed"
        )
    counts = ", ".join(f"{name} ({count})" for name, count in lacking.items())
    return f"{unfitted} for {counts}: fewer than {MIN_SAMPLES} samples of {confidence.split}"


def shortfall_line(
    confidence: Confidence, measured: Mapping[str, Mapping[str, float]], split: str
) -> str | None:
    """One line about intervals that cover far fewer labels of a split than promised; None if there are none.

    Far means four standard deviations of the coverage, of which both numbers of samples are a source.

    Args:
        confidence: The fit.
        measured: `measure_confidence` by condition.
        split: Name of the measured split.
    """
    fewest = min((confidence.samples[name] for name in confidence.half_widths), default=MIN_SAMPLES)
    short = []
    for name, values in measured.items():
        if not confidence.half_widths or not values["samples"]:
            continue
        counts = 1 / values["samples"] + 1 / confidence.samples.get(name, fewest)
        spread = math.sqrt(confidence.level * (1 - confidence.level) * counts)
        if values["coverage"] < confidence.level - 4 * spread:
            short.append(f"{name} ({values['coverage']:.1%})")
    if not short:
        return None
    return (
        f"warning: {split}: intervals at {confidence.level:.0%} contain fewer labels than they should with "
        f"{', '.join(short)}: {confidence.split} and {split} differ, do not rely on these intervals"
    )


def _ends(
    scores: np.ndarray, half_widths: np.ndarray, label_range: Iterable[float] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of intervals. Labels are within their range, so a cut loses none."""
    low, high = scores - half_widths, scores + half_widths
    return (low, high) if label_range is None else (low.clip(*label_range), high.clip(*label_range))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
