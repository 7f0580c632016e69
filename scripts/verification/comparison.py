"""Compare two records of the same steps: every logged number bit for bit, the weights' sha256, the completions."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from verification.record import Recorded

# In the names of metrics: what a clock or an allocator says, which no two runs have alike. Rewards have users' names.
MEASURED = re.compile(r"^(?!rewards/)(.*[/_])?(times?|timestamp|seconds?|runtime|memory|allocated|flos)([/_]|$)")
ABSENT = "absent"


@dataclass(frozen=True)
class Difference:
    """The value of `what` after `step`, in the run and now; each as JSON has it, which is bit for bit."""

    step: int
    what: str
    then: str
    now: str


@dataclass
class Compared:
    """How many rows and numbers were compared, weights after which steps, how many completions; and what differs."""

    rows: int = 0
    numbers: int = 0
    weights: list[int] = field(default_factory=list)
    samples: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def first(self) -> Difference | None:
        return min(self.differences, key=lambda one: one.step, default=None)


def compare(then: Recorded, now: Recorded, steps: int) -> Compared:
    """What differs in the first `steps` steps, in the order in which it came to be."""
    found = Compared()
    _samples(found, then, now, steps)
    _metrics(found, then, now, steps)
    _weights(found, then, now, steps)
    return found


def numbers_of(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row of metrics.jsonl decides nothing but the run itself: no time, speed or memory."""
    return {name: value for name, value in row.items() if not MEASURED.match(name)}


def _metrics(found: Compared, then: Recorded, now: Recorded, steps: int) -> None:
    # A summary is written where training ends, which the replay does earlier.
    kept = [
        [row for row in one.metrics if row.get("step", 0) <= steps and "train_runtime" not in row]
        for one in (then, now)
    ]
    for number in range(max(map(len, kept))):
        old, new = (numbers_of(rows[number]) if number < len(rows) else {} for rows in kept)
        step = int((old or new).get("step", 0))
        found.rows += 1
        for name in dict.fromkeys([*old, *new]):
            found.numbers += 1
            _look(found, step, name, old.get(name, ABSENT), new.get(name, ABSENT))


def _weights(found: Compared, then: Recorded, now: Recorded, steps: int) -> None:
    old, new = (one.record.get("weights_sha256", {}) for one in (then, now))
    for step in sorted(int(step) for step in old.keys() & new.keys()):
        if step <= steps:
            found.weights.append(step)
            _look(found, step, "sha256 of the trained weights", old[str(step)], new[str(step)])


def _samples(found: Compared, then: Recorded, now: Recorded, steps: int) -> None:
    """Of completions the `step` is the steps done before: they come to be in the next one."""
    kept = [[row for row in one.samples if row.get("step", 0) < steps] for one in (then, now)]
    for number in range(max(map(len, kept))):
        old, new = (rows[number] if number < len(rows) else {} for rows in kept)
        found.samples += 1
        step = (old or new).get("step", 0) + 1
        for name, was, value in _parts(old, new):
            _look(found, step, f"samples.jsonl, line {number + 1}{name}", was, value)


def _parts(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The parts of two entries of samples.jsonl, of which the first may be known by its sha256 only."""
    if "sha256" in old:
        yield ", sha256", old["sha256"], sample_sha256(new)
        return
    for name in dict.fromkeys([*old, *new]):
        yield f", {name}", old.get(name, ABSENT), new.get(name, ABSENT)


def sample_sha256(sample: dict[str, Any]) -> str:
    """What an archive has of a completion in place of its text, which is the user's data."""
    return hashlib.sha256(_as_json(sample).encode()).hexdigest()


def _look(found: Compared, step: int, what: str, then: Any, now: Any) -> None:
    if (old := _as_json(then)) != (new := _as_json(now)):
        found.differences.append(Difference(step, what, old, new))


def _as_json(value: Any) -> str:
    """Exact for floats; NaN is NaN, and -0.0 is not 0.0."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
