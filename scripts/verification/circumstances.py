"""What differs in the circumstances of two runs: code, versions, device, driver, threads, locale, settings."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.environment import ROOT

# The name in run.json, the name for a reader, and a note.
MACHINE = {
    "cpu": ("processor", "libraries choose their kernels by it"),
    "cpu_capability": ("instructions of the processor that PyTorch uses", "ATEN_CPU_CAPABILITY sets them"),
    "threads": ("threads", "sums are added in another order; OMP_NUM_THREADS={then} has those of the run"),
    "gpu": ("GPU", "kernels are chosen by it"),
    "gpu_memory_gib": ("memory of the GPU in GiB", "some libraries divide their work by it"),
    "capability": ("compute capability of the GPU", "kernels are compiled for it"),
    "cuda": ("CUDA", ""),
    "driver": ("driver of the GPU", ""),
    "locale": ("locale", ""),
}
RUN = {
    "dtype": ("type of the numbers", ""),
    "revision": ("commit of the base on the hub", "pin it: make pin"),
    "fit": ("what --fit=auto chose", ""),
    "micro_batch": ("micro-batch by --oom=retry", "a run that ran out of memory on its way is not repeated exactly"),
}
HARMLESS = ("machine's name", "commit")  # by themselves they change no bit


@dataclass(frozen=True)
class Circumstance:
    """Something that was `then` and is `now` otherwise; `note` says what it means, or how to have it as it was."""

    name: str
    then: str
    now: str
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note.format(then=self.then)})" if self.note else ""
        return f"{self.name}: {self.then} in the run, {self.now} now{note}"


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[Circumstance]:
    """The circumstances that differ between two run.json; what an older one did not record is left out."""
    return [one for one in _all(then, now) if one.then != one.now]


def _all(then: dict[str, Any], now: dict[str, Any]) -> Iterator[Circumstance]:
    old, new = then.get("machine", {}), now.get("machine", {})
    for name, (called, note) in MACHINE.items():
        if name in old or (name in new and "gpu" in name and old):
            yield Circumstance(called, _text(old.get(name)), _text(new.get(name)), note)
    if "settings" in old:
        was, are = old["settings"], new.get("settings", {})
        for name in sorted(was.keys() | are.keys()):
            if name != "OMP_NUM_THREADS":  # as threads, above
                yield Circumstance(f"setting {name}", _text(was.get(name)), _text(are.get(name)))
    for name, (called, note) in RUN.items():
        yield Circumstance(called, _text(then.get(name)), _text(now.get(name)), note)
    yield Circumstance("processes", _text(then.get("ranks", 1)), _text(now.get("ranks", 1)))
    yield from _of_code(then["code"], now["code"])
    if "host" in old:
        yield Circumstance("machine's name", _text(old["host"]), _text(new.get("host")))


def _of_code(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Circumstance]:
    was, are = old.get("git") or {}, new.get("git") or {}
    yield Circumstance("commit", _text(was.get("commit"))[:12], _text(are.get("commit"))[:12])
    if "recipes" in old:
        note = changed_files(was)
        yield Circumstance("code below recipes/", old["recipes"][:12], new["recipes"][:12], note)
    for name in dict.fromkeys([*old.get("packages", {}), *new.get("packages", {})]):
        yield Circumstance(name, _text(old.get("packages", {}).get(name)), _text(new.get("packages", {}).get(name)))
    yield Circumstance("Python", _text(old.get("python")), _text(new.get("python")))
    locks = [(code.get("lock") or {}) for code in (old, new)]
    yield Circumstance("lock", *(f"{lock.get('file', 'none')} {lock.get('sha256', '')[:12]}".strip() for lock in locks))
    yield Circumstance("image", _text(old.get("image")), _text(new.get("image")))


def changed_files(git: dict[str, Any]) -> str:
    """Which files below recipes/ are not those of the run's commit, in a few words."""
    uncommitted = "; then it had changes of its own that were not committed" if git.get("dirty") else ""
    command = ["git", "-C", str(ROOT), "diff", "--name-only", str(git.get("commit")), "--", "recipes"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return f"without git here the files cannot be named{uncommitted}"
    if done.returncode:
        return f"its commit is not in this clone{uncommitted}"
    files = done.stdout.split("\n")[:-1]
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    return f"changed since its commit: {', '.join(files[:5])}{more}{uncommitted}" if files else uncommitted.strip("; ")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    return "none" if value is None else str(value)
