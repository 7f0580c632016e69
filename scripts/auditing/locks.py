"""The packages that docker/*.lock and docker/sources.txt pin: name, version, hashes, and which package needs which."""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from common.environment import ROOT
from common.errors import InputError, did_you_mean
from packaging.utils import canonicalize_name

DOCKER = ROOT / "docker"
PACKAGE = re.compile(r"^([\w.-]+)==([^\s;]+)((?:[ \\\n]+--hash=sha256:[0-9a-f]{64})+)((?:\n    #.*)*)", re.MULTILINE)
SOURCES = "sources"  # docker/sources.txt: what the image compiles, and the converter to GGUF


@dataclass(frozen=True)
class Package:
    """One package of a lock; a hash for each of its files, who needs it, and whether an .in file names it."""

    name: str
    version: str
    sha256: tuple[str, ...]
    needed_by: tuple[str, ...]
    direct: bool


@dataclass(frozen=True)
class Lock:
    """A lock by its name, such as "cpu", and its packages in the order of their names."""

    name: str
    file: Path
    packages: tuple[Package, ...]

    @property
    def versions(self) -> set[tuple[str, str]]:
        return {(package.name, package.version) for package in self.packages}


def lock_names() -> list[str]:
    """The names of the locks, and "sources"."""
    return [*sorted(file.stem for file in DOCKER.glob("*.lock")), SOURCES]


def read_locks(names: tuple[str, ...]) -> list[Lock]:
    """The locks of these names, all of them without one. Raises InputError for an unknown name, or no hash."""
    known = lock_names()
    for name in names:
        if name not in known:
            raise InputError(f"--lock {name}: is none of {', '.join(known)}{did_you_mean(name, known)}")
    return [_read(name) for name in names or known]


def _read(name: str) -> Lock:
    file = DOCKER / (f"{name}.txt" if name == SOURCES else f"{name}.lock")
    text = file.read_text(encoding="utf-8")
    found: dict[str, Package] = {}
    for package, version, hashes, comments in PACKAGE.findall(text):
        key = canonicalize_name(package)
        by = re.findall(r"#(?: via)? +([\w.-]+)$", comments, re.MULTILINE)
        sha256 = tuple(re.findall(r"[0-9a-f]{64}", hashes))
        found[key] = Package(key, version, sha256, tuple(by), direct=" -r " in comments)
    for number, line in enumerate(text.splitlines(), start=1):
        if re.match(r"[\w.-]+ *==", line) and canonicalize_name(re.split(r" *==", line)[0]) not in found:
            raise InputError(f"{file}:{number}: {line.strip()}: has no hash; write it with `make lock`")
    return Lock(name, file, tuple(found[key] for key in sorted(found)))


def needs(lock: Lock) -> dict[str, list[str]]:
    """For each package of a lock the names of those in it that it needs; under "" those that nothing in it needs, or
    that an .in file names.
    """
    names = {package.name for package in lock.packages}
    found: defaultdict[str, list[str]] = defaultdict(list)
    for package in lock.packages:
        inside = [parent for parent in package.needed_by if parent in names]
        for parent in [*inside, *([""] if package.direct or not inside else [])]:
            found[parent].append(package.name)
    return found
