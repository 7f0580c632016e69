"""How hard a problem is to a model, measured on its own answers, and which problems to train on.

A policy gradient learns from the difference between good and bad answers to one problem: where all are right or all
are wrong there is none (DAPO, arXiv:2503.14476, section 3.2).
"""

import random
from statistics import fmean, pstdev
from typing import Any, Literal

from common.data.examples import Prompt
from common.errors import InputError

Level = Literal["easy", "medium", "hard", "auto"]
Measure = Literal["pass-rate", "entropy"]

# Pass rates, from above to up to; a problem that is always or never solved is of no level.
PASS_RATES = {"easy": (2 / 3, 1.0), "medium": (1 / 3, 2 / 3), "hard": (0.0, 1 / 3), "auto": (0.0, 1.0)}
# Ranks by entropy, as shares of all problems; the surest third has the least left to find out.
ENTROPY_RANKS = {"easy": (0.0, 1 / 3), "medium": (1 / 3, 2 / 3), "hard": (2 / 3, 1.0), "auto": (1 / 3, 1.0)}
HISTORY = 8  # the last answers to a prompt that say how hard it is


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


class PromptSampler:
    """Which prompts come next: all in turn, shuffled anew each epoch; or, by difficulty, those of the wanted level.

    How hard a prompt is, the policy's own last answers to it say. By entropy and by the spread of the scores the lowest
    third of the prompts is "easy"; by pass rate the bounds are PASS_RATES, and an answer passes with
    half of the best score seen. Prompts that were never asked are taken for the wanted level, so they come soon; those
    of another level are drawn a tenth as often, to see whether they still are.
    """

    def __init__(self, rows: list[Prompt], level: str, by: str, seed: int) -> None:
        self.rows, self.level, self.by = rows, level, by
        self.random = random.Random(seed)
        self.order: list[int] = []  # what is left of this epoch
        self.drawn: list[int] = []  # by the last draw
        self.seen: dict[int, list[tuple[float, float]]] = {}  # entropy and score of the last answers

    def draw(self, count: int) -> list[Prompt]:
        self.drawn = []
        while len(self.drawn) < count:
            self.drawn += self._turn(count - len(self.drawn)) if self.level == "off" else self._weighted(count)
        self.drawn = self.drawn[:count]
        return [self.rows[index] for index in self.drawn]

    def learn(self, entropies: list[float], scores: list[float]) -> None:
        """What the answers to the prompts of the last draw were like."""
        for index, entropy, score in zip(self.drawn, entropies, scores, strict=True):
            self.seen[index] = [*self.seen.get(index, []), (entropy, score)][-HISTORY:]

    def weights(self) -> list[float]:
        """How often to draw each prompt: 1 at the wanted level, 0.1 elsewhere."""
        if self.by == "pass-rate":
            bar = max((score for said in self.seen.values() for _, score in said), default=0.0) / 2
            rates = {i: sum(s >= bar and s > 0 for _, s in said) / len(said) for i, said in self.seen.items()}
            above, up_to = PASS_RATES[self.level]
            fits = {index for index, rate in rates.items() if above < rate <= up_to and rate < 1}
        else:
            if self.by == "entropy":  # the mean of the entropies, or the spread of the scores
                measure = {i: fmean(entropy for entropy, _ in said) for i, said in self.seen.items()}
            else:
                measure = {i: pstdev(score for _, score in said) for i, said in self.seen.items()}
            ranked = sorted(measure, key=measure.__getitem__)
            first, stop = (round(share * len(ranked)) for share in ENTROPY_RANKS[self.level])
            fits = set(ranked[first:stop])
        return [1.0 if index in fits or index not in self.seen else 0.1 for index in range(len(self.rows))]

    def _turn(self, count: int) -> list[int]:
        if not self.order:
            self.order = self.random.sample(range(len(self.rows)), len(self.rows))
        taken, self.order = self.order[:count], self.order[count:]
        return taken

    def _weighted(self, count: int) -> list[int]:
        """Without replacement: the largest u^(1/weight) (Efraimidis and Spirakis 2006)."""
        keys = [self.random.random() ** (1 / weight) for weight in self.weights()]
        return sorted(range(len(keys)), key=keys.__getitem__, reverse=True)[:count]

    def state(self) -> dict[str, Any]:
        return {"random": self.random.getstate(), "order": self.order, "seen": self.seen}

    def restore(self, state: dict[str, Any]) -> None:
        self.random.setstate(state["random"])
        self.order, self.seen = state["order"], state["seen"]
