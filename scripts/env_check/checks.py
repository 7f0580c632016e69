"""What a check gives, and what several checks look at."""

from typing import Any, NamedTuple

from env_check.processes import hidden

OK, WARNING, FAILURE = "ok", "warning", "failure"
GIB = 2**30


class Check(NamedTuple):
    """One line of the result. One that is not ok always says how it is mended."""

    name: str
    status: str  # OK, WARNING or FAILURE
    found: str
    wanted: str = ""
    mend: str = ""


class Answer(NamedTuple):
    """What a probe returned, or how it failed; neither where there is nothing to look at."""

    value: Any = None
    error: str = ""


class Facts(NamedTuple):
    """What several checks look at."""

    cards: list  # the GPUs that nvidia-smi sees, each {field: value}
    smi_error: str  # why nvidia-smi failed, "" if it did not
    answers: dict  # {probe: Answer}, of the installed libraries
    online: bool

    def answer(self, probe):
        return self.answers.get(probe, Answer())

    @property
    def torch(self):
        """What torch says of itself; {} where it is missing or broken."""
        return self.answer("torch").value or {}

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
