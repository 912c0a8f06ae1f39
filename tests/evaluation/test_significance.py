# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from msa_online.evaluation.significance import difference_in_error


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def test_a_constant_gain_on_every_clip_is_found_with_its_size_whatever_the_clips_vary(rng):
    reference = rng.gamma(2, 0.5, (1, 200)) + rng.normal(0, 0.05, (5, 200))
    found = difference_in_error(reference - 0.1, reference)
    assert found.mean == pytest.approx(-0.1)
    assert found.low < -0.1 < found.high < 0 and found.beyond_chance
    assert found.p_clips < 0.001


def test_runs_of_one_system_in_two_halves_do_not_differ(rng):
    runs = rng.gamma(2, 0.5, (1, 300)) + rng.normal(0, 0.3, (8, 300))
    found = difference_in_error(runs[:4], runs[4:])
    assert not found.beyond_chance and found.p_clips > 0.05 and found.p_runs > 0.05


def test_the_interval_holds_zero_in_about_95_of_100_equal_systems(rng):
    holds = 0
    for _ in range(100):
        runs = rng.gamma(2, 0.5, (1, 80)) + rng.normal(0, 0.3, (2, 80))
        holds += not difference_in_error(runs[:1], runs[1:], resamples=200).beyond_chance
    assert 88 <= holds <= 100


def test_the_test_over_runs_is_exact_and_states_the_least_value_it_can_have():
    better, worse = np.tile([[1.0], [1.1], [1.2]], 4), np.tile([[2.0], [2.1], [2.2]], 4)
    found = difference_in_error(better, worse, resamples=500)
    assert found.p_runs == found.p_runs_least == pytest.approx(2 / 20)  # 3 of 6 runs: 20 ways
    one = difference_in_error(better[:1], worse, resamples=500)
    assert one.p_runs is None and one.p_runs_least is None


def test_systems_on_different_clips_are_refused():
    with pytest.raises(ValueError, match="same clips"):
        difference_in_error(np.ones((2, 5)), np.ones((2, 6)))
