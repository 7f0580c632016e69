"""`common/run/intervals.py`: the bootstrap interval against the one of the normal distribution."""

import math

import numpy as np
import pytest
from common.run.intervals import interval, interval_of


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(3).normal(1.0, 2.0, size=400)
    low, high = interval(values, seed=1)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert interval(values, seed=1) == (low, high)
    assert interval(values, seed=2) != (low, high)


def test_equal_rows_have_no_spread():
    assert interval([2.0, 2.0]) == (2, 2)
    assert interval([2.0]) == (2, 2)
    assert interval_of(by_token, (np.array([6.0]), np.array([3.0]))) == (2, 2)


def by_token(values, weights, axis):
    return values.sum(axis) / weights.sum(axis)


def test_a_row_is_drawn_with_its_weight():
    """Losses of 1 a token in rows of any length: the mean by token is 1 in every resample."""
    weights = np.random.default_rng(0).integers(1, 50, size=100)
    assert interval_of(by_token, (weights.astype(float), weights)) == (1, 1)
    # One row of 90 tokens beside ten of one: without it the mean is 0, with it more than 0.8.
    rows = np.array([90.0, *[0.0] * 10]), np.array([90.0, *[1.0] * 10])
    assert interval_of(by_token, rows) == (0, pytest.approx(0.97, abs=0.02))
