"""What a check gives, and what several checks look at."""

from typing import Any, NamedTuple

from env_check.processes import hidden

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


class Facts(NamedTuple):
    """What several checks look at."""

    cards: list  # the GPUs that nvidia-smi sees, each {field: value}
    smi_error: str  # why nvidia-smi failed, "" if it did not
    results: dict  # {probe: Result}, of the installed libraries
    online: bool

    def result(self, probe):
        return self.results.get(probe, Result())

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
        if self.gpus:
            return self.gpus[0]["free"] / GIB
        free = [card["memory.free"] for card in self.cards if card["memory.free"].isdigit()]  # MiB
        return int(free[0]) / 1024 if free and not hidden() else None


def judge(name, good, found, wanted, mend, otherwise=FAILURE):
    return Check(name, OK, found, wanted) if good else Check(name, otherwise, found, wanted, mend)


def judge_probe(name, result, found, wanted, mend, otherwise=FAILURE):
    """The line of a probe, none where there was nothing to look at. A slow one is a warning, whatever its library."""
    if result.slow:
        yield Check(name, WARNING, result.slow, wanted, TRY_AGAIN)
    elif result.error or found:
        yield judge(name, not result.error, result.error or found, wanted, mend, otherwise)
