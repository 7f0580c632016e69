"""Which prompts to train on, by how difficult they are to the model: measured on its own completions of them.

A policy gradient learns from the difference between good and bad completions of one prompt: where all are right or all
are wrong there is none (DAPO, arXiv:2503.14476, section 3.2). GRPO measures before training and selects; PPO measures
while it trains and draws the prompts of the wanted level more often.
"""

import random
from statistics import fmean, pstdev
from typing import Any

from common.data.examples import Prompt
from common.errors import InputError

# Pass rates: above the first, up to the second. A prompt that always or never passes is of no level.
PASS_RATES = {"easy": (2 / 3, 1.0), "medium": (1 / 3, 2 / 3), "hard": (0.0, 1 / 3), "auto": (0.0, 1.0)}
# Ranks by entropy, as shares of all prompts. The third with the lowest has the least left to learn.
ENTROPY_RANKS = {"easy": (0.0, 1 / 3), "medium": (1 / 3, 2 / 3), "hard": (2 / 3, 1.0), "auto": (1 / 3, 1.0)}
HISTORY = 8  # the last completions of a prompt that tell how difficult it is


def group_means(values: list[float], size: int) -> list[float]:
    """The mean of each group of `size` consecutive values."""
    return [sum(values[first : first + size]) / size for first in range(0, len(values), size)]


def pass_rates(scores: list[float | None], size: int) -> list[float]:
    """For each prompt, the share of its `size` completions that pass: with at least half of the best score of all."""
    known = [score for score in scores if score is not None]
    bar = max(known, default=0.0) / 2
    passed = [float(score is not None and score >= bar and score > 0) for score in scores]
    return group_means(passed, size)


def select(measures: list[float], level: str, by: str) -> list[int]:
    """The indices of the prompts of that level, in order. `measures` are their pass rates or entropies.

    Raises InputError when there are none.
    """
    if by == "pass-rate":
        above, up_to = PASS_RATES[level]
        selected = [index for index, rate in enumerate(measures) if above < rate <= up_to and rate < 1]
        counts = f"{sum(r == 0 for r in measures)} never solved, {sum(r == 1 for r in measures)} always"
    else:
        first, stop = (round(share * len(measures)) for share in ENTROPY_RANKS[level])
        selected = sorted(sorted(range(len(measures)), key=measures.__getitem__)[first:stop])
        counts = f"{len(measures)} measured"
    if not selected:
        raise InputError(
            f"--difficulty {level}: by {by} no prompt is of this level ({counts}); take another level or more prompts"
        )
    return selected


class PromptSampler:
    """Draws prompts: all in turn, shuffled each epoch; or, by difficulty, those of one level more often.

    The policy's last completions of a prompt tell how difficult it is. By entropy, and by the standard deviation of the
    scores, the lowest third of the prompts is "easy"; by pass rate the bounds are PASS_RATES, and a completion passes
    with half of the best score so far. Prompts that were never drawn count as of the wanted level, so they come soon;
    those of another level are drawn a tenth as often, to see whether they still are.

    Args:
        prompts: what to draw from.
        level: off, easy, medium or hard.
        by: entropy, reward-spread or pass-rate.
        seed: of its own random numbers.
    """

    def __init__(self, prompts: list[Prompt], level: str, by: str, seed: int) -> None:
        self.prompts, self.level, self.by = prompts, level, by
        self.random = random.Random(seed)
        self.order: list[int] = []  # what is left of this epoch
        self.drawn: list[int] = []  # indices, by the last draw
        self.seen: dict[int, list[tuple[float, float]]] = {}  # entropy and score of the last completions

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts; by difficulty none of them twice, unless there are fewer."""
        self.drawn = []
        while len(self.drawn) < count:
            self.drawn += self._turn(count - len(self.drawn)) if self.level == "off" else self._weighted(count)
        self.drawn = self.drawn[:count]
        return [self.prompts[index] for index in self.drawn]

    def learn(self, entropies: list[float], scores: list[float]) -> None:
        """Take in the completions of the last draw: the mean entropy of each, in nats a token, and its score."""
        for index, entropy, score in zip(self.drawn, entropies, scores, strict=True):
            self.seen[index] = [*self.seen.get(index, []), (entropy, score)][-HISTORY:]

    def weights(self) -> list[float]:
        """How often to draw each prompt: 1 at the wanted level, 0.1 elsewhere."""
        if self.by == "pass-rate":
            bar = max((score for history in self.seen.values() for _, score in history), default=0.0) / 2
            rates = {i: fmean(s >= bar and s > 0 for _, s in history) for i, history in self.seen.items()}
            above, up_to = PASS_RATES[self.level]
            fits = {index for index, rate in rates.items() if above < rate <= up_to and rate < 1}
        else:
            if self.by == "entropy":
                measure = {i: fmean(entropy for entropy, _ in history) for i, history in self.seen.items()}
            else:
                measure = {i: pstdev(score for _, score in history) for i, history in self.seen.items()}
            ranked = sorted(measure, key=measure.__getitem__)
            first, stop = (round(share * len(ranked)) for share in ENTROPY_RANKS[self.level])
            fits = set(ranked[first:stop])
        return [1.0 if index in fits or index not in self.seen else 0.1 for index in range(len(self.prompts))]

    def _turn(self, count: int) -> list[int]:
        if not self.order:
            self.order = self.random.sample(range(len(self.prompts)), len(self.prompts))
        taken, self.order = self.order[:count], self.order[count:]
        return taken

    def _weighted(self, count: int) -> list[int]:
        """Sampled without replacement: the largest u^(1/weight) (Efraimidis and Spirakis 2006)."""
        keys = [self.random.random() ** (1 / weight) for weight in self.weights()]
        return sorted(range(len(keys)), key=keys.__getitem__, reverse=True)[:count]

    def state(self) -> dict[str, Any]:
        """What `restore` takes: plain values."""
        return {"random": self.random.getstate(), "order": self.order, "seen": self.seen}

    def restore(self, state: dict[str, Any]) -> None:
        self.random.setstate(state["random"])
        self.order, self.seen = state["order"], state["seen"]
