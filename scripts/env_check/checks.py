"""What a check gives, and what several checks look at."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from common.nvidia import free_gib

OK, WARNING, FAILURE = "ok", "warning", "failure"
GIB = 2**30
TRY_AGAIN = "try again when the machine is idle"


class Check(NamedTuple):
    """One line of the result. One that is not ok always says how it is mended."""

    name: str
    status: str  # OK, WARNING or FAILURE
    found: str
    wanted: str = ""
    mend: str = ""


class Result(NamedTuple):
    """What a probe returned, or why it did not; nothing of these where there is nothing to look at."""

    value: Any = None
    error: str = ""  # how its library failed
    slow: str = ""  # how the machine kept it from a result: nothing is known of the library

    @property
    def works(self) -> bool:
        return not (self.error or self.slow)


@dataclass(frozen=True)
class Facts:
    """What several checks look at."""

    smi: Result = field(default_factory=Result)  # of nvidia-smi: the GPUs it lists, each {field: value}
    results: dict[str, Result] = field(default_factory=dict)  # by probe, of the installed libraries
    online: bool = False  # ask the hub

    def result(self, probe):
        return self.results.get(probe, Result())

    @property
    def cards(self):
        """The GPUs that nvidia-smi lists."""
        return self.smi.value or []

    @property
    def torch(self):
        """What torch says of itself; {} where it is missing, broken or slow."""
        return self.result("torch").value or {}

    @property
    def gpus(self):
        """The GPUs that torch sees, each with name, capability, free and total bytes."""
        return self.torch.get("gpus", [])

    @property
    def free_gib(self):
        """The free memory of the first GPU, by torch or else by nvidia-smi; None without a GPU."""
        return self.gpus[0]["free"] / GIB if self.gpus else free_gib(self.cards)


def judge(name, good, found, wanted, mend, otherwise=FAILURE):
    return Check(name, OK, found, wanted) if good else Check(name, otherwise, found, wanted, mend)


def judge_probe(name, result, found, wanted, mend, otherwise=FAILURE):
    """The line of a probe, none where there was nothing to look at. A slow one is a warning, whatever its library."""
    if result.slow:
        yield Check(name, WARNING, result.slow, wanted, TRY_AGAIN)
    elif result.error or found:
        yield judge(name, not result.error, result.error or found, wanted, mend, otherwise)


def first_line(message):
    """The first line of an error: what compilers and drivers add is advice."""
    return next((line.strip()[:200] for line in str(message).splitlines() if line.strip()), "no reason given")
