"""The 95 % confidence interval of a mean over rows, by the bootstrap."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
IN_MEMORY = 10_000_000  # numbers of all resamples that are computed together


def interval(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of sum(values) / sum(weights), both (N,), over resamples of the N rows.

    Without weights it is that of the mean. Of the differences between two models on the same rows it is the paired
    interval: a row is drawn with both of its numbers. One row alone has no spread, and gives its own value twice.
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=float)
    if len(values) == 1:
        return (value := float(values[0] / weights[0])), value
    found = bootstrap(
        (values, weights),
        lambda values, weights, axis: values.sum(axis) / weights.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, IN_MEMORY // len(values)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
