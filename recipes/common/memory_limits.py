"""How much CPU memory this process may have, and what limits it. Standard library only."""

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
# Megabytes, what they are for, and the option of Slurm.
SLURM = (
    ("SLURM_MEM_PER_NODE", "", "Slurm's --mem"),
    ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE", "Slurm's --mem-per-cpu"),
    ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE", "Slurm's --mem-per-gpu"),
)


def memory_limit() -> tuple[int, str] | None:
    """The lowest limit in bytes and what sets it: the machine's memory, a cgroup, Slurm or ulimit; None without one."""
    return min(_limits(), default=None)


def free_memory() -> tuple[int, str] | None:
    """The bytes that this process may still take, at the most, and what says so: what is free, or a lower limit."""
    found = re.search(r"^MemAvailable: +(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    free = [(int(found[1]) * 1024, "what is free")] if found else []
    return min([*free, *_limits()], default=None)


def swap() -> int:
    """The bytes of the machine's swap, to which a limit of memory may or may not apply."""
    found = re.search(r"^SwapTotal:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _limits(groups: Path = CGROUPS, proc: Path = Path("/proc")) -> Iterator[tuple[int, str]]:
    found = re.search(r"^MemTotal:\s+(\d+) kB", _text(proc / "meminfo"), re.MULTILINE)
    if found:
        yield int(found[1]) * 1024, "the machine's memory"
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (groups / "memory", "memory.limit_in_bytes") if controllers else (groups, "memory.max")
        for group in [*_parents(path), ""]:  # every group above has a limit too; a container sees its own as the root
            if (text := _text(root / group / name).strip()).isdigit():
                yield int(text), f"a container's or job's limit ({root / group / name})"
    for megabytes, count, name in SLURM:
        size = _number(megabytes) * (_number(count) if count else 1)
        if size:  # --mem=0 is all the memory of a node
            yield size * 2**20, name
    for limit, name in ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")):
        if (soft := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
            yield soft, name


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else 0


def _parents(path: str) -> Iterator[str]:
    while path := path.strip("/"):
        yield path
        path = path.rpartition("/")[0]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
