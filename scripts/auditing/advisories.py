"""Known advisories of locked packages, from a database in OSV's format: a folder or a zip of JSON files.

https://ossf.github.io/osv-schema. OSV offers each ecosystem as one zip, all.zip of PyPI is the one for these locks; any
network is the user's own step. A version counts as affected as the schema has it: it is listed, or it is in a range.
"""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError, one_line
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from auditing.locks import Package

ECOSYSTEM = "PyPI"


@dataclass(frozen=True)
class Advisory:
    """An advisory that affects a package of a lock: where it was fixed, and its other names."""

    name: str
    version: str
    id: str
    aliases: tuple[str, ...]
    severity: str
    summary: str
    fixed: tuple[str, ...]

    def known_as(self, ids: tuple[str, ...]) -> bool:
        return bool({self.id, *self.aliases} & set(ids))


class Database:
    """The advisories of a folder or zip about these packages. Raises InputError where it is none, or is damaged."""

    def __init__(self, path: Path, packages: set[str]) -> None:
        self.read = 0
        self.newest = ""
        self.by_package: dict[str, list[dict[str, Any]]] = {}
        for place, text in _files(path):
            entry = _entry(place, text)
            self.read += 1
            self.newest = max(self.newest, str(entry.get("modified", "")))
            if entry.get("withdrawn"):
                continue
            names = {name for affected in entry.get("affected", []) if (name := _package(affected))}
            for name in names & packages:
                self.by_package.setdefault(name, []).append(entry)
        if not self.read:
            raise InputError(f"--advisories {path}: holds no advisory, no .json file in OSV's format")

    def of(self, package: Package) -> list[Advisory]:
        """The advisories that affect this version, each once: one that is an alias of another is left out."""
        found: list[Advisory] = []
        for entry in sorted(self.by_package.get(package.name, []), key=lambda entry: str(entry["id"])):
            hits = [one for one in entry["affected"] if _package(one) == package.name and _affects(one, package)]
            if not hits or any(one.known_as((entry["id"], *entry.get("aliases", []))) for one in found):
                continue
            events = [event for one in hits for ranges in one.get("ranges", []) for event in ranges.get("events", [])]
            found.append(
                Advisory(
                    package.name,
                    package.version,
                    str(entry["id"]),
                    tuple(sorted(entry.get("aliases", []))),
                    str(entry.get("database_specific", {}).get("severity", "")).lower(),
                    " ".join(str(entry.get("summary") or entry.get("details") or "").split()),
                    tuple(sorted({event["fixed"] for event in events if "fixed" in event})),
                )
            )
        return found


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.rglob("*.json")):
            yield str(file), file.read_bytes()
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".json"):
                    yield f"{path}: {name}", archive.read(name)
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"--advisories {path}: give a folder or a zip of OSV's JSON files ({one_line(error)})"
        ) from None


def _entry(place: str, text: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--advisories {place}: is no JSON ({one_line(error)})") from None
    if not isinstance(entry, dict) or "id" not in entry or not isinstance(entry.get("affected", []), list):
        raise InputError(f"--advisories {place}: is no advisory in OSV's format, with an id and what is affected")
    return entry


def _package(affected: dict[str, Any]) -> str | None:
    package = affected.get("package", {})
    return canonicalize_name(package["name"]) if package.get("ecosystem", "").startswith(ECOSYSTEM) else None


def _affects(affected: dict[str, Any], package: Package) -> bool:
    """Whether the version is listed, or is in one of the ranges. A local part, +cpu, is no other version."""
    version = Version(Version(package.version).public)
    if any(version == other for text in affected.get("versions", []) if (other := _version(text))):
        return True
    ranges = [one for one in affected.get("ranges", []) if one.get("type") in ("ECOSYSTEM", "SEMVER")]
    return any(_in_range(one.get("events", []), version) for one in ranges)


def _in_range(events: list[dict[str, str]], version: Version) -> bool:
    """By the events of a range in their order: introduced opens it, fixed closes it before, last_affected after.

    A range whose versions cannot be compared, because one is older than PEP 440, counts as one that has the version.
    """
    inside = False
    order = {"introduced": 0, "fixed": 1, "last_affected": 2}
    known = [(_version(text), order[kind]) for event in events for kind, text in event.items() if kind in order]
    if any(at is None for at, _ in known):
        return True
    for at, kind in sorted((at, kind) for at, kind in known if at is not None):
        if kind == 0 and version >= at:
            inside = True
        elif (kind == 1 and version >= at) or (kind == 2 and version > at):
            inside = False
    return inside


def _version(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None
