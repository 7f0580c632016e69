"""The 95 % confidence interval of a mean over rows, or of another statistic, by the bootstrap."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
IN_MEMORY = 10_000_000  # numbers of all resamples that are computed together


def interval(values: ArrayLike, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of the mean of values (N,), over resamples of the N rows.

    Of the differences between two models on the same rows it is the paired interval: a row is drawn with both of its
    numbers. One row alone has no spread, and gives its own value twice.
    """
    return interval_of(lambda rows, axis: rows.mean(axis), [np.asarray(values, dtype=float)], seed)


def interval_of(statistic: Callable[..., Any], columns: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float]:
    """The percentile interval of statistic(*columns, axis), whose columns are (N,) each, over resamples of the N rows.

    A row is drawn with its numbers in all columns. One row alone gives its own value twice.
    """
    from scipy.stats import bootstrap

    count = len(columns[0])
    if count == 1:
        return (value := float(statistic(*columns, axis=-1))), value
    found = bootstrap(
        columns,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, IN_MEMORY // count),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
