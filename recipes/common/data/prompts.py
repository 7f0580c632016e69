"""The prompts of a run, before they are sampled from."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from common.data.examples import Prompt

if TYPE_CHECKING:
    pass


def distinct(problems: Iterable[Prompt]) -> list[Prompt]:
    """The problems without those whose prompt has been there before."""
    first: dict[str, Prompt] = {}
    for problem in problems:
        first.setdefault(repr((problem.prompt, problem.tools)), problem)
    return list(first.values())
