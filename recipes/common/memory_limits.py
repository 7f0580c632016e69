"""How much CPU memory this process may have, and what limits it. Standard library only."""

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def memory_limit() -> tuple[int, str] | None:
    """The lowest limit in bytes and what sets it: the machine's memory, a cgroup, Slurm or ulimit; None without one."""
    return min(_limits(), default=None)


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
    if megabytes := os.environ.get("SLURM_MEM_PER_NODE", ""):
        yield int(megabytes) * 2**20, "Slurm's --mem"
    cpus = os.environ.get("SLURM_CPUS_ON_NODE", "")
    if (megabytes := os.environ.get("SLURM_MEM_PER_CPU", "")) and cpus.isdigit():
        yield int(megabytes) * int(cpus) * 2**20, "Slurm's --mem-per-cpu"
    for limit, name in ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")):
        if (soft := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
            yield soft, name


def _parents(path: str) -> Iterator[str]:
    while path := path.strip("/"):
        yield path
        path = path.rpartition("/")[0]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
