"""Draw the rows that are held out from training."""

import random
from typing import TypeVar

T = TypeVar("T")


def hold_out(rows: list[T], count: int, order: random.Random) -> tuple[list[T], list[T]]:
    """`count` rows drawn by `order`, and the rest; both in their old order."""
    drawn = set(order.sample(range(len(rows)), count))
    taken = [row for index, row in enumerate(rows) if index in drawn]
    return taken, [row for index, row in enumerate(rows) if index not in drawn]
