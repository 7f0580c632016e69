"""The 95 % confidence interval of a mean over rows, or of another statistic, by the bootstrap."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
IN_MEMORY = 10_000_000  # numbers of all resamples that are computed together


def interval(values: ArrayLike, weights: ArrayLike | None = None, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of sum(values) / sum(weights), both (N,), over resamples of the N rows.

    Without weights it is that of the mean. Of the differences between two models on the same rows it is the paired
    interval: a row is drawn with both of its numbers. One row alone has no spread, and gives its own value twice.
    """
    rows = np.asarray(values, dtype=float)
    counts = np.ones_like(rows) if weights is None else np.asarray(weights, dtype=float)
    return interval_of(lambda values, weights, axis: values.sum(axis) / weights.sum(axis), (rows, counts), seed)


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
