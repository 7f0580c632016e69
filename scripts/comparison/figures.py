"""The means of two models' ratings, their difference and the win rate, with intervals."""

from typing import Any

import numpy as np
from common.run.intervals import interval

from comparison.rules import DIMENSIONS, Ratings


def tabulate(one: list[Ratings], other: list[Ratings], seed: int) -> dict[str, dict[str, Any]]:
    """By dimension and over all of them, of the prompts where both completions are rated: the means, the difference
    B - A, and the share of prompts that B wins, ties counted half; the last two with 95 % bootstrap intervals."""
    columns = {name: ([row[name] for row in one], [row[name] for row in other]) for name in DIMENSIONS}
    means = [both_means(a, b) for a, b in zip(one, other, strict=True)]
    columns["all"] = ([a for a, _ in means], [b for _, b in means])
    table: dict[str, dict[str, Any]] = {}
    for name, (a, b) in columns.items():
        rated = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        table[name] = {"prompts": len(rated)}
        if rated:
            x, y = np.array(rated).T  # (N,) each
            wins = (y > x) + 0.5 * (y == x)
            table[name] |= {
                "A": float(x.mean()),
                "B": float(y.mean()),
                "difference": float((y - x).mean()),
                "difference interval": interval(y - x, seed=seed),
                "B wins": float(wins.mean()),
                "B wins interval": interval(wins, seed=seed),
            }
    return table


def both_means(one: Ratings, other: Ratings) -> tuple[float | None, float | None]:
    """Each completion's mean over the dimensions in which both are rated."""
    both = [(a, b) for name in DIMENSIONS if (a := one[name]) is not None and (b := other[name]) is not None]
    if not both:
        return None, None
    a, b = np.array(both).mean(0)
    return float(a), float(b)
