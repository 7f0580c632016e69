"""What a check gives, and the facts that several checks look at."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from common.nvidia import free_gib

OK, WARNING, FAILURE = "ok", "warning", "failure"
GIB = 2**30
TRY_AGAIN = "try again when the machine is idle"


class Check(NamedTuple):
    """One line of the result. One that is not ok always says how to fix it."""

    name: str
    status: str  # OK, WARNING or FAILURE
    found: str
    wanted: str = ""
    fix: str = ""


class Result(NamedTuple):
    """What a probe returned, or why it did not; all empty where there is nothing to try."""

    value: Any = None
    error: str = ""  # how its library failed
    slow: str = ""  # why the machine gave no result: nothing is known of the library

    @property
    def works(self) -> bool:
        return not (self.error or self.slow)


@dataclass(frozen=True)
class Facts:
    """What several checks look at."""

    smi: Result = field(default_factory=Result)  # of nvidia-smi: the GPUs it lists, each {field: value}
    results: dict[str, Result] = field(default_factory=dict)  # by probe, of the installed libraries
    online: bool = False  # contact the hub

    def result(self, probe: str) -> Result:
        return self.results.get(probe, Result())

    @property
    def cards(self) -> list[dict[str, str]]:
        """The GPUs that nvidia-smi lists."""
        return self.smi.value or []

    @property
    def torch(self) -> dict[str, Any]:
        """What the torch probe returned; {} where torch is missing, broken or slow."""
        return self.result("torch").value or {}

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """The GPUs that torch sees, each with name, capability, free and total bytes."""
        return self.torch.get("gpus", [])

    @property
    def free_gib(self) -> float | None:
        """The free memory of the first GPU, from torch or else from nvidia-smi; None without a GPU."""
        return self.gpus[0]["free"] / GIB if self.gpus else free_gib(self.cards)


def judge(name: str, good: bool, found: str, wanted: str, fix: str, otherwise: str = FAILURE) -> Check:
    return Check(name, OK, found, wanted) if good else Check(name, otherwise, found, wanted, fix)


def judge_probe(
    name: str, result: Result, found: str, wanted: str, fix: str, otherwise: str = FAILURE, if_slow: str = TRY_AGAIN
) -> Iterator[Check]:
    """The line of a probe; none where there was nothing to try. A slow one is a warning, whatever its library."""
    if result.slow:
        yield Check(name, WARNING, result.slow, wanted, if_slow)
    elif result.error or found:
        yield judge(name, not result.error, result.error or found, wanted, fix, otherwise)


def first_line(message: object) -> str:
    """The first line of an error: what compilers and drivers add is advice."""
    return next((line.strip()[:200] for line in str(message).splitlines() if line.strip()), "no reason given")
