# SPDX-License-Identifier: Apache-2.0
"""A corpus of features on which balancing can matter, with the best possible error known.

Four independent standard normal factors make a label: one of each modality's own, f_m, and a shared one, s.

    y = clip(scale (sum_m w_m f_m + w_s s), -3, 3)

The features of modality m are one step a sample:

    x_m = a f_m k_m + b k_m + v s c + 0.5 N n + noise_m e

a, b and c are random directions, N random nuisance directions, n and e standard normal. k_m is a random sign
of each sample: f_m is its own factor times that sign, so no linear reader sees it; a reader must find both
directions among the nuisance and multiply. The difficulty d_m in [0, 1] sets how hard a modality is: the sign
is negative with probability d_m / 2, there are 10 d_m nuisance factors, and the shared factor is visible with
v = 1 - 0.7 d_m. With d_m = 0 the sign is always positive and b is 0: x_m is linear in f_m and s.

Above 1, up to 2, the rest stays as with 1 and k_m is the product of two random signs, each with a direction
of its own in the features; the second is negative with probability (d_m - 1) / 2. A reader must multiply
three directions, of which no pair tells anything of the label. Such a modality is learned late.

By default each modality's own factor makes a quarter of the label's variance and the shared one a quarter,
text is easy, and audio and vision are hard. A model trained on all three learns the text fast and may neglect
the rest.

`solve` computes the best predictions from the true distribution: given the signs, everything is Gaussian, so
the label has a mixture of clipped Gaussians as its exact distribution. Its median has the least absolute
error, and whether it is above 0 the best accuracy of the sign.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msa_online.corpora.corpus import CorpusError
from msa_online.corpora.splits import SPLITS
from msa_online.layers.shapley import SUBSETS, shapley_values
from msa_online.modalities import COMPLETE, CONDITIONS, MODALITIES, VISIBLE_SETS
from msa_online.precomputed.corpus import FeatureSteps
from msa_online.precomputed.files import write_feature_folder
from msa_online.synthetic.plan import CONTROL_WEIGHT, READERS

SHARED = "shared"
FACTORS = (*MODALITIES, SHARED)
WIDTHS = {"text": 64, "audio": 48, "vision": 48}
LIMIT = 3.0
LABEL_DEVIATION = 1.44  # of the label before it is clipped
NUISANCES, NUISANCE = 10, 0.5  # number and size of the nuisance factors of a modality of difficulty 1
HIDDEN_SHARE = 0.7  # by which the shared factor is weaker in a modality of difficulty 1
HARDEST = 2  # difficulty; each unit adds a random sign
BISECTIONS = 40  # steps that find a median to 1e-11
FRESH_SAMPLES = 20_000  # new samples on which the best possible error is measured
TRUTH = "truth.json"

LARGEST = 1_000_000  # strength and noise

# Each kind of random choice has its own random stream.
DIRECTIONS, SAMPLES, FRESH = range(3)


@dataclass(frozen=True)
class ControlRecipe:
    """Parameters of a control corpus; equal recipes give equal corpora.

    Attributes:
        sizes: Samples in training, validation and test.
        seed: Seed of all random choices.
        strengths: Weight of each factor in the label, relative to the others; `shared` is the fourth.
        difficulty: From 0 (the modality's own factor is linear in its features) over 1 (it has a random sign,
            and ten nuisance factors hide it) to 2 (it has two random signs).
        noise: Standard deviation of the noise of each feature; the features of a factor have about 1.

    Raises:
        CorpusError: A value is out of range.
    """

    sizes: tuple[int, int, int] = (1284, 229, 686)
    seed: int = 1111
    strengths: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(FACTORS, 1.0))
    difficulty: Mapping[str, float] = field(
        default_factory=lambda: {"text": 0.0, "audio": 1.0, "vision": 1.0}
    )
    noise: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0.5))

    def __post_init__(self) -> None:
        if len(self.sizes) != len(SPLITS) or min(self.sizes) < 2:
            raise CorpusError(f"sizes are {self.sizes}: give at least 2 samples for each of {SPLITS}")
        if self.seed < 0:
            raise CorpusError(f"seed is {self.seed}: choose 0 or more")
        for title, values, names in (
            ("strengths", self.strengths, FACTORS),
            ("difficulty", self.difficulty, MODALITIES),
            ("noise", self.noise, MODALITIES),
        ):
            if set(values) != set(names):
                raise CorpusError(f"{title} name {sorted(values)}: give one for each of {names}")
        for name, value in self.strengths.items():
            if not 0 <= value <= LARGEST:
                raise CorpusError(f"strength of {name} is {value}: choose a number from 0 to {LARGEST:,}")
        if not any(self.strengths.values()):
            raise CorpusError("all strengths are 0: give one factor a strength above 0")
        for name, value in self.difficulty.items():
            if not 0 <= value <= HARDEST:
                raise CorpusError(f"difficulty of {name} is {value}: choose a number from 0 to {HARDEST}")
        for name, value in self.noise.items():
            if not 0.01 <= value <= LARGEST:
                raise CorpusError(f"noise of {name} is {value}: choose a number from 0.01 to {LARGEST:,}")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each factor in the unclipped label."""
        norm = math.hypot(*self.strengths.values())  # the square of a small number may be 0
        return {name: LABEL_DEVIATION * self.strengths[name] / norm for name in FACTORS}

    @property
    def variance_shares(self) -> dict[str, float]:
        """Share of each factor in the variance of the unclipped label."""
        return {name: (weight / LABEL_DEVIATION) ** 2 for name, weight in self.weights.items()}


@dataclass(frozen=True)
class Mixing:
    """How the factors of a modality become its features.

    Attributes:
        signal: Directions of its own factor times its signs, of the shared factor, and of each sign,
            `(width, 2 + signs)`.
        nuisance: Directions of the nuisance factors, `(width, nuisances)`.
        noise: Standard deviation of the noise.
        negative: Probability that a sign is negative, of each.
    """

    signal: np.ndarray
    nuisance: np.ndarray
    noise: float
    negative: tuple[float, ...]

    @classmethod
    def draw(cls, recipe: ControlRecipe, modality: str) -> "Mixing":
        """Draw the directions of a modality."""
        rng = np.random.default_rng([recipe.seed, DIRECTIONS, MODALITIES.index(modality)])
        difficulty = recipe.difficulty[modality]
        first, second = min(difficulty, 1.0), max(difficulty - 1.0, 0.0)
        nuisances = round(NUISANCES * first)
        directions = rng.standard_normal((WIDTHS[modality], 3 + nuisances))
        visible = np.array([1.0, 1 - HIDDEN_SHARE * first, float(first > 0)])
        signal, negative = directions[:, :3] * visible, (first / 2,)
        if second:
            signal = np.c_[signal, rng.standard_normal(WIDTHS[modality])]
            negative = (*negative, second / 2)
        return cls(signal, NUISANCE * directions[:, 3:], recipe.noise[modality], negative)

    def features(self, own: np.ndarray, shared: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Features `(samples, width)` of samples with the factors `own` and `shared`, `(samples,)`."""
        signs = [np.where(rng.random(len(own)) < negative, -1.0, 1.0) for negative in self.negative]
        nuisance = rng.standard_normal((len(own), self.nuisance.shape[1]))
        noise = self.noise * rng.standard_normal((len(own), len(self.signal)))
        carried = np.stack([own * np.prod(signs, axis=0), shared, *signs], axis=1)
        return carried @ self.signal.T + nuisance @ self.nuisance.T + noise

    def signs(self) -> list[tuple[float, ...]]:
        """All values that the signs can have together."""
        return list(product(*((1.0, -1.0) if negative else (1.0,) for negative in self.negative)))

    def log_probability(self, signs: tuple[float, ...]) -> float:
        """Log of the probability of these signs."""
        chances = (
            negative if sign < 0 else 1 - negative
            for sign, negative in zip(signs, self.negative, strict=True)
        )
        return sum(math.log(chance) for chance in chances)

    def evidence(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the features say about t = (own factor times signs, shared factor, each sign).

        Returns:
            The linear term r `(samples, size of t)` and the square matrix G of the log likelihood of t, which
            is r t - t G t / 2 and a constant.
        """
        covariance = self.nuisance @ self.nuisance.T + self.noise**2 * np.eye(len(self.signal))
        reader = np.linalg.solve(covariance, self.signal)
        return features @ reader, self.signal.T @ reader


@dataclass(frozen=True)
class ControlSamples:
    """Samples of a control corpus.

    Attributes:
        features: `(samples, width)` by modality.
        factors: Each of `FACTORS`, `(samples,)`.
        labels: `(samples,)`, in [-3, 3].
    """

    features: dict[str, np.ndarray]
    factors: dict[str, np.ndarray]
    labels: np.ndarray

    @classmethod
    def draw(cls, recipe: ControlRecipe, count: int, stream: int) -> "ControlSamples":
        """Draw `count` samples from one of the random streams."""
        rng = np.random.default_rng([recipe.seed, stream])
        factors = dict(zip(FACTORS, rng.standard_normal((len(FACTORS), count)), strict=True))
        features = {
            name: Mixing.draw(recipe, name).features(factors[name], factors[SHARED], rng)
            for name in MODALITIES
        }
        label = sum(weight * factors[name] for name, weight in recipe.weights.items())
        return cls(features, factors, label.clip(-LIMIT, LIMIT))


@dataclass(frozen=True)
class Mixture:
    """Distribution of each label before clipping: a mixture of Gaussians, `(samples, components)` each."""

    weights: np.ndarray
    means: np.ndarray
    deviations: np.ndarray

    def median(self) -> np.ndarray:
        """Median of the clipped label, `(samples,)`: the prediction with the least absolute error."""
        low, high = np.full(len(self.means), -LIMIT), np.full(len(self.means), LIMIT)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = self._below(middle) < 0.5
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2

    def sign_accuracy(self) -> np.ndarray:
        """Probability that the best prediction of the label's sign is right, `(samples,)`."""
        below = self._below(np.zeros(len(self.means)))
        return np.maximum(below, 1 - below)

    def absolute_error(self, predictions: np.ndarray) -> np.ndarray:
        """Expected absolute error of `predictions` `(samples,)` in [-3, 3]; `(samples,)`.

        It is the integral of the distribution function from -3 to the prediction, plus that of its complement
        from there to 3.
        """
        below = self._integral(predictions) - self._integral(np.full_like(predictions, -LIMIT))
        above = self._integral(np.full_like(predictions, LIMIT)) - self._integral(predictions)
        return below + (LIMIT - predictions) - above

    def _below(self, where: np.ndarray) -> np.ndarray:
        """Distribution function at `where`, `(samples,)`."""
        from scipy.special import ndtr

        return (self.weights * ndtr((where[:, None] - self.means) / self.deviations)).sum(axis=1)

    def _integral(self, where: np.ndarray) -> np.ndarray:
        """Integral of the distribution function up to `where`, `(samples,)`."""
        from scipy.special import ndtr

        z = (where[:, None] - self.means) / self.deviations
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        return (self.weights * self.deviations * (z * ndtr(z) + density)).sum(axis=1)


def posterior(recipe: ControlRecipe, features: Mapping[str, np.ndarray], visible: Iterable[str]) -> Mixture:
    """Exact distribution of the unclipped labels, given the features of some modalities.

    Args:
        recipe: The corpus.
        features: `(samples, width)` by modality.
        visible: Modalities that may be used.
    """
    count, visible = len(next(iter(features.values()))), set(visible)
    mixing = {name: Mixing.draw(recipe, name) for name in MODALITIES}
    evidence = {name: mixing[name].evidence(features[name]) for name in visible}
    weights = np.array([recipe.weights[name] for name in FACTORS])
    precision = np.eye(len(FACTORS))  # of the own factors times their signs, and the shared factor
    places = {name: [number, len(MODALITIES)] for number, name in enumerate(MODALITIES)}
    for name, (_, matrix) in evidence.items():
        precision[np.ix_(places[name], places[name])] += matrix[:2, :2]
    covariance = np.linalg.inv(precision)
    logs, means, deviations = [], [], []
    for signs in product(*(mixing[name].signs() for name in MODALITIES)):
        linear, log = np.zeros((count, len(FACTORS))), np.zeros(count)
        for name, own in zip(MODALITIES, signs, strict=True):
            log += mixing[name].log_probability(own)
            if name in visible:
                of_features, matrix = evidence[name]
                linear[:, places[name]] += of_features[:, :2] - matrix[:2, 2:] @ own
                log += of_features[:, 2:] @ own
                # the squares of the signs are 1, so their terms are equal in all components
                pairs = combinations(range(2, 2 + len(own)), 2)
                log -= sum(matrix[i, j] * own[i - 2] * own[j - 2] for i, j in pairs)
        centre = linear @ covariance
        of_label = weights * np.array([*map(math.prod, signs), 1.0])
        logs.append(log + (linear * centre).sum(axis=1) / 2)
        means.append(centre @ of_label)
        deviations.append(np.full(count, math.sqrt(of_label @ covariance @ of_label)))
    logs = np.stack(logs, axis=1)
    share = np.exp(logs - logs.max(axis=1, keepdims=True))
    return Mixture(share / share.sum(axis=1, keepdims=True), np.stack(means, 1), np.stack(deviations, 1))


def solve(recipe: ControlRecipe, test: ControlSamples, fresh: int = FRESH_SAMPLES) -> dict[str, Any]:
    """The best possible errors of a control corpus and the true shares of its modalities.

    Args:
        recipe: The corpus.
        test: Its test split.
        fresh: New samples on which expectations are measured. For each of them the expected error over its
            label is exact, so that only the choice of features is random.

    Returns:
        By condition under "bayes_mae" the `mean` error of the best prediction with its `standard_error`, and
        its error on the `test` split; the same of the best constant under "nothing". Under "incomplete" the
        mean over the six incomplete conditions. Under "bayes_accuracy" the `mean` accuracy of the best
        prediction of the label's sign. Under "shares" the shares of the modalities in the best
        predictions, by mean absolute Shapley value as in `modality_shares`. Under "variance_shares" those of
        the factors in the unclipped label.
    """
    samples = ControlSamples.draw(recipe, fresh, FRESH)
    truth = _truth({subset: posterior(recipe, samples.features, subset) for subset in SUBSETS})
    for subset, name in _conditions().items():
        on_test = posterior(recipe, test.features, subset).median()
        truth["bayes_mae"][name]["test"] = float(np.abs(on_test - test.labels).mean())
    incomplete = [truth["bayes_mae"][name]["test"] for name in CONDITIONS if name != COMPLETE]
    truth["incomplete"]["test"] = float(np.mean(incomplete))
    return {**truth, "variance_shares": recipe.variance_shares}


def _truth(expected: Mapping[frozenset[str], Mixture]) -> dict[str, Any]:
    """Best errors by condition and shares of the modalities, from the distributions given each subset."""
    errors, medians, accuracies = {}, {}, {}
    for subset, name in _conditions().items():
        medians[subset] = expected[subset].median()
        accuracies[name] = {"mean": float(expected[subset].sign_accuracy().mean())}
        each = expected[subset].absolute_error(medians[subset])
        errors[name] = {
            "mean": float(each.mean()),
            "standard_error": float(each.std(ddof=1) / math.sqrt(len(each))),
        }
    values = shapley_values({subset: torch.from_numpy(median) for subset, median in medians.items()})
    sizes = {name: float(values[name].abs().mean()) for name in MODALITIES}
    incomplete = [errors[name]["mean"] for name in CONDITIONS if name != COMPLETE]
    return {
        "bayes_mae": errors,
        "bayes_accuracy": accuracies,
        "incomplete": {"mean": float(np.mean(incomplete))},
        "shares": {name: size / sum(sizes.values()) for name, size in sizes.items()},
        "fresh_samples": len(medians[SUBSETS[0]]),
    }


def _conditions() -> dict[frozenset[str], str]:
    """Name of the condition of every subset of the modalities."""
    return {frozenset(shown): name for name, shown in VISIBLE_SETS.items()}


def solve_clips(seed: int, fresh: int = FRESH_SAMPLES) -> dict[str, Any]:
    """The best possible errors and the true shares of a rendered control, if cues and signs are read exactly.

    Each visible cue, corrected by its sign, is then a linear mix of the own and the shared factor without
    noise. Clipping and rounding of the cues change the figures by a few thousandths.

    Args:
        seed: Seed of the samples on which expectations are measured.
        fresh: Their number.

    Returns:
        As `solve`, without the test split.
    """
    factors = np.random.default_rng([seed, FRESH]).standard_normal((fresh, len(FACTORS)))
    of_label = np.full(len(FACTORS), CONTROL_WEIGHT)
    readers = np.zeros((len(MODALITIES), len(FACTORS)))
    for row, name in enumerate(MODALITIES):
        readers[row, [row, -1]] = READERS[name]

    def expected(subset: Iterable[str]) -> Mixture:
        read = readers[[row for row, name in enumerate(MODALITIES) if name in subset]]
        known = read.T @ np.linalg.inv(read @ read.T) @ read  # projection on what is visible
        deviation = math.sqrt(of_label @ (np.eye(len(FACTORS)) - known) @ of_label)
        means = factors @ known @ of_label
        return Mixture(np.ones((fresh, 1)), means[:, None], np.full((fresh, 1), deviation))

    return _truth({subset: expected(subset) for subset in SUBSETS})


def write_control(folder: str | Path, recipe: ControlRecipe) -> dict[str, Any]:
    """Write a control corpus as a folder of features, with `truth.json` beside them.

    `metadata.csv` has the factors of each sample in the columns `<name>_factor`, and the sign of the
    label as a class in the column `polarity`.

    Returns:
        The truth, see `solve`.

    Raises:
        CorpusError: The folder exists or cannot be written.
    """
    samples = ControlSamples.draw(recipe, sum(recipe.sizes), SAMPLES)
    splits = np.repeat(SPLITS, recipe.sizes)
    tested = splits == "test"
    test = ControlSamples(
        {name: values[tested] for name, values in samples.features.items()},
        {name: values[tested] for name, values in samples.factors.items()},
        samples.labels[tested],
    )
    truth = {"recipe": asdict(recipe), **solve(recipe, test)}
    rows = [
        {"id": f"sample_{index:05d}", "text": "", "label": f"{label:.4f}", "split": str(split), "speaker": ""}
        | {"polarity": "positive" if label > 0 else "negative"}
        | {f"{name}_factor": f"{samples.factors[name][index]:.4f}" for name in FACTORS}
        for index, (label, split) in enumerate(zip(samples.labels, splits, strict=True))
    ]
    steps = {
        name: FeatureSteps(
            torch.from_numpy(values.astype(np.float32)), np.arange(len(values) + 1, dtype=np.int64)
        )
        for name, values in samples.features.items()
    }
    origin = {"source": "msa-online synthesize --kind control", "recipe": asdict(recipe)}
    write_feature_folder(Path(folder), rows, steps, origin, documents={TRUTH: truth})
    return truth
