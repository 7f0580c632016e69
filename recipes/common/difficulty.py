"""How hard a problem is to a model, measured on its own answers, and which problems to train on.

A policy gradient learns from the difference between good and bad answers to one problem: where all are right or all
are wrong there is none (DAPO, arXiv:2503.14476, section 3.2).
"""

from typing import Literal

from .errors import InputError

Level = Literal["easy", "medium", "hard", "auto"]
Measure = Literal["pass-rate", "entropy"]

# Pass rates, from above to up to; a problem that is always or never solved is of no level.
PASS_RATES = {"easy": (2 / 3, 1.0), "medium": (1 / 3, 2 / 3), "hard": (0.0, 1 / 3), "auto": (0.0, 1.0)}
# Ranks by entropy, as shares of all problems; the surest third has the least left to find out.
ENTROPY_RANKS = {"easy": (0.0, 1 / 3), "medium": (1 / 3, 2 / 3), "hard": (2 / 3, 1.0), "auto": (1 / 3, 1.0)}


def group_means(values: list[float], size: int) -> list[float]:
    """The mean of each `size` values in a row."""
    return [sum(values[first : first + size]) / size for first in range(0, len(values), size)]


def pass_rates(scores: list[float | None], size: int) -> list[float]:
    """For each problem, the share of its `size` answers that passed: had at least half of the best score of all."""
    known = [score for score in scores if score is not None]
    bar = max(known, default=0.0) / 2
    passed = [float(score is not None and score >= bar and score > 0) for score in scores]
    return group_means(passed, size)


def choose(measures: list[float], level: Level, by: Measure) -> list[int]:
    """The indices of the problems of that level, in order. Raises InputError when there are none."""
    if by == "pass-rate":
        above, up_to = PASS_RATES[level]
        chosen = [index for index, rate in enumerate(measures) if above < rate <= up_to and rate < 1]
        spread = f"{sum(r == 0 for r in measures)} never solved, {sum(r == 1 for r in measures)} always"
    else:
        first, stop = (round(share * len(measures)) for share in ENTROPY_RANKS[level])
        chosen = sorted(sorted(range(len(measures)), key=measures.__getitem__)[first:stop])
        spread = f"{len(measures)} measured"
    if not chosen:
        raise InputError(f"--difficulty {level}: by {by} no problem is ({spread}); take another level or more problems")
    return chosen
