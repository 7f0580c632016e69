"""The 95 % confidence interval of a mean over rows, by the bootstrap."""

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
IN_MEMORY = 10_000_000  # numbers of all resamples that are computed together


def interval(values: ArrayLike, weights: ArrayLike | None = None, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of sum(values) / sum(weights), both (N,), over resamples of the N rows.

    Without weights it is that of the mean. Of the differences between two models on the same rows it is the paired
    interval: a row is drawn with both of its numbers. One row alone has no spread, and gives its own value twice.
    """
    from scipy.stats import bootstrap

    rows = np.asarray(values, dtype=float)
    counts = np.ones_like(rows) if weights is None else np.asarray(weights, dtype=float)
    if len(rows) == 1:
        return (value := float(rows[0] / counts[0])), value
    found = bootstrap(
        (rows, counts),
        lambda values, weights, axis: values.sum(axis) / weights.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, IN_MEMORY // len(rows)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
