# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  the repository joins sys.path before its modules are imported
"""Probe precomputed features without training a network: how much of the label do they show?

    msa-online extract-features PATH/TO/CLIPS features/faces --text-encoder NAME --vision-encoder NAME
    python scripts/probe_features.py features/faces --modality vision --columns 512:564 0:512 0:564

The probe is kernel ridge regression (Gaussian kernel) on the mean over the steps of each sample. It is fit on
the training and validation splits; its two settings have the least leave-one-out error there. The test split
is scored once. The first columns are the baseline: for the others, the differences from it have 95 %
intervals of a bootstrap over test samples, paired. All splits leave out samples without the modality.
"""

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
from rich.console import Console

from msa_online.modalities import MODALITIES
from msa_online.precomputed.reading import read_features
from msa_online.user_errors import run_command

METRICS = ("Acc-2 Non0", "Corr", "MAE")
GAMMAS = (0.03, 0.1, 0.3, 1.0)
"""Widths of the kernel: exp(-gamma d^2), where d^2 is the mean squared distance of standardised features."""

PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LARGEST = 8.0
"""Standardised features are cut at so many standard deviations."""

DRAWS = 1000
"""Draws of the bootstrap."""


def probe(options: argparse.Namespace, console: Console) -> None:
    """Print a table in Markdown, one row for each range of columns."""
    corpus = read_features(options.features, label_range=options.label_range)
    steps = corpus.steps[options.modality]
    samples = [sample for sample in corpus.samples if steps.lengths[sample.row]]
    means = np.array([steps.of(sample.row).double().mean(dim=0).numpy() for sample in samples])
    labels = np.array([sample.label for sample in samples])
    tested = np.array([sample.split == "test" for sample in samples])
    draws = np.random.default_rng(0).integers(tested.sum(), size=(DRAWS, tested.sum()))
    console.out(f"{(~tested).sum():,} samples to fit, {tested.sum():,} to test; differences [95 % interval]")
    console.out("| columns | LOO MAE |", *(f"{name} | difference |" for name in METRICS))
    console.out("|---" * (2 + 2 * len(METRICS)) + "|")
    baseline = None
    for first, end in options.columns:
        features = means[:, first:end]
        predicted, error = kernel_ridge(features[~tested], labels[~tested], features[tested])
        scores = score(predicted, labels[tested])
        resampled = score(predicted[draws], labels[tested][draws])
        baseline = baseline or (scores, resampled)
        low, high = np.percentile(resampled - baseline[1], [2.5, 97.5], axis=1)
        row = zip(scores, scores - baseline[0], low, high, strict=True)
        cells = [
            f"{value:.3f} | {change:+.3f} [{least:+.3f}, {most:+.3f}]" for value, change, least, most in row
        ]
        console.out(f"| {first}:{end} | {error:.3f} | {' | '.join(cells)} |")


def kernel_ridge(features: np.ndarray, labels: np.ndarray, tested: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit kernel ridge regression with the settings of the least leave-one-out error.

    Args:
        features: `(samples, width)`.
        labels: `(samples,)`.
        tested: Features to predict from, `(others, width)`.

    Returns:
        Predictions `(others,)`, and the mean absolute leave-one-out error.
    """
    centre, scale = features.mean(axis=0), features.std(axis=0)
    scale[scale == 0] = 1
    known, new = (np.clip((it - centre) / scale, -LARGEST, LARGEST) for it in (features, tested))
    mean = labels.mean()
    best = None
    for gamma in GAMMAS:
        values, vectors = np.linalg.eigh(np.exp(-gamma * _distances(known, known)))
        rotated = vectors.T @ (labels - mean)
        for penalty in PENALTIES:
            weights = vectors @ (rotated / (values + penalty))
            diagonal = (vectors**2 / (values + penalty)).sum(axis=1)  # of the inverse
            error = np.abs(weights / diagonal).mean()  # exact: no fit is repeated
            if best is None or error < best[0]:
                best = (error, gamma, weights)
    error, gamma, weights = best
    return mean + np.exp(-gamma * _distances(new, known)) @ weights, float(error)


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mean squared differences over the features, `(samples of first, samples of second)`."""
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    return np.maximum(squares, 0) / first.shape[1]


def score(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The values of `METRICS`, `(3, ...)`, of predictions and labels `(..., samples)`."""
    right = ((predicted > 0) == (labels > 0)) & (labels != 0)
    accuracy = right.sum(axis=-1) / (labels != 0).sum(axis=-1)
    centred = [it - it.mean(axis=-1, keepdims=True) for it in (predicted, labels)]
    products = [(first * second).sum(axis=-1) for first in centred for second in centred]
    correlation = products[1] / np.sqrt(products[0] * products[3])
    return np.stack([accuracy, correlation, np.abs(predicted - labels).mean(axis=-1)])


def columns(text: str) -> tuple[int, int]:
    """Parse "FIRST:END"."""
    first, end = map(int, text.split(":"))
    if not 0 <= first < end:
        raise ValueError
    return first, end


def main(argv: list[str]) -> int:
    """Parse the command line and probe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features", type=Path, help="folder of features, or an .npz file")
    parser.add_argument("--modality", choices=MODALITIES, default="vision")
    parser.add_argument("--columns", type=columns, nargs="+", required=True, metavar="FIRST:END")
    parser.add_argument("--label-range", type=float, nargs=2, default=(-3.0, 3.0))
    options = parser.parse_args(argv)
    return run_command(lambda: probe(options, Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
