"""The paired bootstrap in ten lines of the standard library, independent of scipy and of ours."""

import random
from collections.abc import Callable, Sequence


def percentile_interval(
    rows: Sequence[tuple[float, ...]], statistic: Callable[[list[tuple[float, ...]]], float], draws: int, seed: int
) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile of `statistic` over resamples of `rows`, each row drawn whole."""
    draw = random.Random(seed)
    found = sorted(statistic(draw.choices(rows, k=len(rows))) for _ in range(draws))
    return found[round(0.025 * (draws - 1))], found[round(0.975 * (draws - 1))]
