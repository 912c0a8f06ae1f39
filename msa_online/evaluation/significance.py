# SPDX-License-Identifier: Apache-2.0
"""Whether two systems differ: paired bootstrap and permutation tests over test clips and training seeds."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 5_000
CHUNK = 500  # resamples at a time
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Difference in mean error between a system and a reference; negative if the system is better.

    Attributes:
        mean: The difference, in the unit of the errors.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p_clips: P value over clips: could these trained models be equal on all clips?
        p_runs: P value over runs: could the two ways of training be equal? None with fewer than two runs of
            one of them.
        p_runs_least: The least p value that so many runs can give.
    """

    mean: float
    low: float
    high: float
    p_clips: float
    p_runs: float | None
    p_runs_least: float | None

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def difference_in_error(
    errors: np.ndarray, reference: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """Compare the errors of a system with those of a reference on the same clips.

    The interval is the percentile interval of a bootstrap that draws clips, the same for both, and runs, for
    each of the two. The test over clips exchanges the two mean errors of single clips at random. The test
    over runs exchanges whole runs between the two, and is exact: with five runs each its least p value is
    2 / 252. Runs with equal seeds are not pairs, because models of different parts share no initial weights.

    Args:
        errors: Error of each run on each clip, `(runs, clips)`, lower is better.
        reference: Those of the reference, `(its runs, clips)`.
        seed: Seed of the resampling.
        resamples: Number of resamples.

    Raises:
        ValueError: The numbers of clips differ, or there are none.
    """
    from scipy.stats import permutation_test

    if errors.shape[1:] != reference.shape[1:] or 0 in (*errors.shape, *reference.shape):
        raise ValueError(f"errors are {errors.shape} and {reference.shape}: the same clips are needed")
    rng = np.random.default_rng(seed)
    clips = errors.shape[1]
    drawn = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        weights = rng.multinomial(clips, np.full(clips, 1 / clips), size) / clips
        of_system = _resampled_means(errors, weights, rng)
        drawn.append(of_system - _resampled_means(reference, weights, rng))
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    paired = errors.mean(axis=0) - reference.mean(axis=0)
    over_clips = permutation_test(
        (paired,),
        _mean,
        permutation_type="samples",
        n_resamples=resamples,
        vectorized=True,
        rng=rng,
        batch=CHUNK,
    )
    over_runs, least = None, None
    if min(len(errors), len(reference)) > 1:
        exact = permutation_test(
            (errors.mean(axis=1), reference.mean(axis=1)),
            _difference_of_means,
            permutation_type="independent",
            n_resamples=resamples,
            vectorized=True,
            rng=rng,
        )
        over_runs, least = float(exact.pvalue), 2 / len(exact.null_distribution)
    return Difference(
        mean=float(paired.mean()),
        low=float(low),
        high=float(high),
        p_clips=float(over_clips.pvalue),
        p_runs=over_runs,
        p_runs_least=least,
    )


def _resampled_means(errors: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mean error in each resample, `(resamples,)`, of runs drawn here and of clips by `weights`.

    Args:
        errors: `(runs, clips)`.
        weights: Share of each clip in each resample, `(resamples, clips)`.
        rng: Draws the runs.
    """
    runs = len(errors)
    counts = rng.multinomial(runs, np.full(runs, 1 / runs), len(weights))  # (resamples, runs)
    return (counts @ errors * weights).sum(axis=1) / runs


def _mean(values: np.ndarray, axis: int) -> np.ndarray:
    return values.mean(axis=axis)


def _difference_of_means(one: np.ndarray, other: np.ndarray, axis: int) -> np.ndarray:
    return one.mean(axis=axis) - other.mean(axis=axis)
