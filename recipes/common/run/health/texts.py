"""Whether completions are still texts: repetition, and one completion for every prompt."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from common.rewards.builtin import repetition_reward

REPEATED = 0.5  # of its phrases of four words; a text that writes everything twice is at it, prose far below
LONG = 40  # characters that a text must have to be judged: a short answer repeats by chance


def repeats(text: str) -> bool:
    """Whether at least half of the four-word phrases of a text came in it before."""
    (score,) = repetition_reward([text])
    return len(text) >= LONG and score is not None and -score >= REPEATED


def broken(texts: Sequence[str], prompts: Sequence[Any]) -> list[bool]:
    """For each completion, whether it repeats itself or is also that of more than half of the other prompts."""
    others: dict[str, set[str]] = {}
    for text, prompt in zip(texts, prompts, strict=True):
        others.setdefault(text, set()).add(repr(prompt))
    distinct = len({repr(prompt) for prompt in prompts})
    return [repeats(text) or (distinct > 2 and 2 * len(others[text]) > distinct) for text in texts]


def most_common(texts: Sequence[str]) -> tuple[str, int]:
    """The text that comes most often, and how often."""
    return Counter(texts).most_common(1)[0]


def median_length(texts: Sequence[str]) -> float:
    return statistics.median(map(len, texts)) if texts else 0.0
