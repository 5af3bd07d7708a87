"""Bootstrap intervals against analysis and coverage, not against themselves."""

from __future__ import annotations

import numpy as np
import pytest

from evals.intervals import draws, joined, paired_interval, ratio_intervals


def test_draws_stay_within_their_stratum() -> None:
    strata = np.array([0, 0, 0, 1, 1])
    counts = np.concatenate(list(draws(strata, repeats=50)))
    assert counts.shape == (50, 5)
    assert (counts[:, :3].sum(1) == 3).all()
    assert (counts[:, 3:].sum(1) == 2).all()


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3, 2, 2000)
    found = ratio_intervals({"x": values}, np.ones(2000), np.zeros(2000))
    assert found is not None
    half = 1.96 * values.std() / np.sqrt(2000)
    assert found["x"] == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        weights = generator.integers(1, 9, 80)
        found = ratio_intervals({"x": generator.poisson(2 * weights)}, weights, np.zeros(80))
        assert found is not None
        hits += found["x"][0] <= 2 <= found["x"][1]
    assert 50 <= hits <= 60


def test_pairs_remove_what_samples_vary_by() -> None:
    generator = np.random.default_rng(2)
    first = generator.normal(10, 5, 300)
    second = first + generator.normal(0.2, 0.1, 300)
    ones, strata = np.ones(300), np.zeros(300)
    difference, interval = paired_interval(first, second, ones, ones, strata)
    assert difference == pytest.approx(second.mean() - first.mean())
    assert interval is not None
    assert 0.18 < interval[0] < difference < interval[1] < 0.22


def test_too_few_samples_get_none() -> None:
    assert ratio_intervals({"x": np.ones(4)}, np.ones(4), np.zeros(4)) is None
    four = np.arange(4.0)
    assert paired_interval(four, four + 1, four + 1, four + 1, np.zeros(4))[1] is None


def test_small_strata_are_drawn_as_one() -> None:
    """A stratum of one sample always gives that sample: alone its intervals have no width."""
    values = np.random.default_rng(3).normal(3, 2, 12)
    ones, alone, one = np.ones(12), np.arange(12), np.zeros(12)
    assert ratio_intervals({"x": values}, ones, alone) == ratio_intervals({"x": values}, ones, one)
    found = paired_interval(one, values, ones, ones, alone)[1]
    assert found is not None
    assert found[1] - found[0] > 1
    strata = joined([0, 1, 0, 1, 0, 2, 0, 2, 0, 2])
    assert strata is not None
    assert len(set(strata.tolist())) == 2
    assert len(set(strata[[1, 3, 5, 7, 9]].tolist())) == 1


def test_a_rest_that_is_too_small_joins_the_smallest() -> None:
    strata = joined([0] * 7 + [1] * 6 + [2, 3])
    assert strata is not None
    assert set(strata.tolist()) == {0, 1}
    assert strata[-8:].tolist() == [1] * 8
