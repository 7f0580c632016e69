"""Which request is decoded in which row of the cache."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete: its tokens (P,), the seed of its noise, and where it is truncated, in tokens."""

    prompt: tuple[int, ...]
    seed: int
    limit: int


class Filling(NamedTuple):
    """What to do so that waiting requests are in rows."""

    filled: dict[int, int]  # rows, with the index of the request that each now has
    new: dict[tuple[int, ...], int]  # prompts to compute, each with the row to compute it in
    copies: list[tuple[int, int, int]]  # from row, to row, how many tokens of a prompt


@dataclass(slots=True)
class Rows:
    """What is in the rows of the cache, and which requests wait for a row."""

    request: list[int | None]  # of each row the index of its request, None for a row that waits
    prompt: list[tuple[int, ...] | None]  # of each row the prompt whose keys and values it holds
    left: list[int]  # of each row the tokens until its completion is truncated
    waiting: deque[int] = field(default_factory=deque)  # indices of requests that have no row yet

    @classmethod
    def of(cls, size: int, requests: int) -> "Rows":
        return cls([None] * size, [None] * size, [0] * size, deque(range(requests)))

    def live(self) -> list[int]:
        return [row for row, request in enumerate(self.request) if request is not None]

    def fill(self, size: int, requests: Sequence[Request]) -> Filling:
        """Put waiting requests into the free rows below `size`."""
        free = [row for row in range(size) if self.request[row] is None]
        taken = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
        # A free row that still holds the prompt of a request is its best place.
        filled: dict[int, int] = {}
        others = []
        for request in taken:
            row = next((row for row in free if self.prompt[row] == requests[request].prompt), None)
            if row is None:
                others.append(request)
            else:
                free.remove(row)
                filled[row] = request
        used = free[: len(others)]
        held = {prompt: row for row, prompt in enumerate(self.prompt) if prompt is not None and row not in used}
        new: dict[tuple[int, ...], int] = {}  # prompts to compute, each with the row that they are computed in
        copies: list[tuple[int, int, int]] = []  # from row, to row, tokens
        for row, request in zip(used, others, strict=True):
            prompt = requests[request].prompt
            source = held.get(prompt, new.get(prompt))
            if source is None:
                new[prompt] = row
            else:
                copies.append((source, row, len(prompt) - 1))
            filled[row] = request
        for row, request in filled.items():
            self.request[row], self.prompt[row] = request, requests[request].prompt
            self.left[row] = requests[request].limit
        return Filling(filled, new, copies)

    def compact(self, size: int) -> tuple[list[int], list[int]]:
        """Move the requests at or above `size` to free rows below it. Returns the rows left, and those taken."""
        sources = [row for row in self.live() if row >= size]
        targets = [row for row in range(size) if self.request[row] is None][: len(sources)]
        for source, target in zip(sources, targets, strict=True):
            self.request[target], self.prompt[target] = self.request[source], self.prompt[source]
            self.left[target], self.request[source] = self.left[source], None
        return sources, targets
