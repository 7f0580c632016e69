"""Python and its packages, compared with the version windows that they declare and with our lock."""

import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import TYPE_CHECKING

from common.environment import ROOT, installed_lock

from env_check.checks import FAILURE, OK, WARNING, Check, Facts, judge
from env_check.machine import read

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

OLDEST_PYTHON = ">=3.11"
# What every recipe imports, in the order shown: one that is missing or outside its window is a failure.
STACK = ("torch", "transformers", "trl", "unsloth", "unsloth_zoo", "peft", "accelerate", "datasets", "bitsandbytes")
BESIDE = ("triton", "torchvision", "torchao", "xformers", "vllm")  # the same, but some machines do not need them
DECLARING = ("unsloth", "unsloth_zoo", "trl", "vllm", "torchvision")  # whose metadata declare the windows


def check_python(facts: Facts) -> Iterator[Check]:
    wanted, good = OLDEST_PYTHON, True
    if find_module("packaging"):
        declared = [metadata.metadata(name).json.get("requires_python") for name in DECLARING if installed(name)]
        wanted = bounds([specifier_set(str(text)) for text in declared if text]) or wanted
        good = specifier_set(wanted).contains(platform.python_version(), prereleases=True)
    found = f"{platform.python_version()}, {sys.executable}"
    fix = f"install a Python {wanted}, then rm -f .venv/lock.sha256 && make setup PYTHON=/path/to/it"
    yield judge("python", good, found, wanted, fix)


def check_packages(facts: Facts) -> Iterator[Check]:
    """Compare every package with the windows that the installed ones declare, and with the lock it came from."""
    if not any(map(installed, STACK)):
        has_venv = os.path.exists(os.path.join(ROOT, ".venv", "lock.sha256"))
        fix = "make check, which looks at .venv" if has_venv else "make setup, which installs them into .venv"
        yield Check("packages", FAILURE, "none of " + ", ".join(STACK), "", fix)
        return
    lock, mark = lock_file()
    yield mark
    if not find_module("packaging"):
        yield Check("packages", FAILURE, "no packaging, so no window can be read", "packaging", fix_packages())
        return
    windows, locked, set_aside = declared_windows(), locked_versions(lock), overridden()
    shown = [canonical(name) for name in STACK + BESIDE]
    as_locked, others = 0, []
    for name in [*shown, *sorted((set(windows) | set(locked)) - set(shown))]:
        window, version = windows.get(name, {}), installed(name)
        refusing = [who for who, allowed in window.items() if not (version and allowed.contains(version, True))]
        refusing = [] if name in set_aside else refusing
        moved = name in locked and version != locked[name]
        found = (version or "missing") + (", refused by " + " and ".join(refusing) if refusing else "")
        lock_text = f"locked {locked[name]}" if name in locked else ""
        wanted = "; ".join(filter(None, [bounds(window.values()), lock_text]))
        if name not in shown:
            if refusing or moved:
                others.append(f"{name} {found} ({wanted or 'any'})")
            as_locked += not (refusing or moved)
        elif refusing or (not version and (moved or name in map(canonical, STACK))):
            yield Check(name, FAILURE, found, wanted, fix_packages())
        elif moved:
            yield Check(name, WARNING, found + ", not as locked", wanted, fix_packages())
        elif version:
            yield Check(name, OK, found, wanted)
    found = f"{as_locked} as locked" + "".join(", not " + line for line in others[:3])
    found += f" and {len(others) - 3} more" if len(others) > 3 else ""
    yield judge("other packages", not others, found, "", fix_packages(), WARNING)


def check_converter(facts: Facts) -> Iterator[Check]:
    """Is llama.cpp's converter beside the packages, which `make export` runs? None where there is no environment."""
    if not any(map(installed, STACK)):
        return
    pins = read(os.path.join(ROOT, "docker", "sources.txt"))
    wanted = re.findall(r"^llama-cpp-python==(\S+) --hash=sha256:(\w+)$", pins, re.M)
    found = read(os.path.join(sys.prefix, "share", "llama.cpp", "source.sha256")).partition(" ")[0].strip()
    version, sha256 = wanted[0] if wanted else ("", found)
    state = f"of llama-cpp-python {version}" if found == sha256 else "another version" if found else "missing"
    fix = "make setup; in a container: make image"
    yield judge("converter", bool(found) and found == sha256, state, version, fix, WARNING)


def lock_file() -> tuple[str, Check]:
    """The path of the lock that this environment was made from, "" if there is none, and the Check of it."""
    mark = installed_lock()
    if mark is None:
        found = f"none: {sys.prefix} was not installed from one"
        return "", Check("lock", WARNING, found, "one of docker/*.lock", fix_packages())
    path, now = os.path.join(ROOT, mark["file"]), "gone"
    if os.path.exists(path):
        with open(path, "rb") as file:
            now = hashlib.sha256(file.read()).hexdigest()
    found = "{}, sha256 {}".format(mark["file"], mark["sha256"][:12])
    if now == mark["sha256"]:
        return path, Check("lock", OK, found)
    return path, Check("lock", WARNING, found, now[:12], "make setup; in a container: make image")


def declared_windows() -> dict[str, dict[str, "SpecifierSet"]]:
    """{package: {package that declares the window: window}}, from the metadata of DECLARING."""
    from packaging.requirements import Requirement

    windows: dict[str, dict[str, SpecifierSet]] = {}
    for who in filter(installed, DECLARING):
        # trl declares its window of vLLM in its extra of that name.
        extras = ["", "vllm"] if who == "trl" and installed("vllm") else [""]
        for requirement in map(Requirement, metadata.requires(who) or []):
            marker, specifier = requirement.marker, requirement.specifier
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                window = windows.setdefault(canonical(requirement.name), {})
                window[who] = window.get(who, specifier) & specifier
    return windows


def overridden() -> set[str]:
    """Packages that our lock keeps outside their declared windows on purpose; docker/overrides-*.txt say why."""
    from packaging.requirements import Requirement

    kind = "cpu" if (installed("torch") or "").endswith("+cpu") else "cuda"
    lines = read(os.path.join(ROOT, "docker", f"overrides-{kind}.txt")).splitlines()
    names = set()
    for override in (Requirement(line) for line in lines if line.strip() and not line.startswith("#")):
        version = installed(override.name)
        if override.specifier.contains(version, True) if version else override.marker is not None:
            names.add(canonical(override.name))
    return names


def locked_versions(path: str | os.PathLike) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", read(path), re.M)
    return {canonical(name): version for name, version in found}


def locked_cuda() -> str:
    """The CUDA that `make setup VARIANT=cuda` would install, as "13.0.96"."""
    return locked_versions(os.path.join(ROOT, "docker", "cuda.lock")).get("nvidia-cuda-runtime", "")


def bounds(windows: Iterable["SpecifierSet"]) -> str:
    """The exact versions and the strongest bounds of several windows, without the exclusions between them."""
    from packaging.version import Version

    parts = [part for window in windows for part in window]
    low = sorted((part for part in parts if part.operator in (">", ">=")), key=lambda part: Version(part.version))
    high = sorted((part for part in parts if part.operator in ("<", "<=")), key=lambda part: Version(part.version))
    exact = {str(part) for part in parts if part.operator in ("==", "===", "~=")}
    return ",".join([*sorted(exact), *map(str, low[-1:]), *map(str, high[:1])])


def specifier_set(text: str) -> "SpecifierSet":
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(text)


def installed(name: str) -> str | None:
    """The installed version of a package, None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def find_module(name: str) -> ModuleSpec | None:
    """The spec of module `name`, None where there is none. It is not imported, so it may be broken."""
    try:
        return find_spec(name)
    except (ImportError, ValueError):
        return None


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def fix_packages() -> str:
    if os.path.realpath(sys.prefix) != os.path.join(os.path.realpath(ROOT), ".venv"):
        return "make setup, which installs docker/*.lock into .venv; then make check"
    variant = re.search(r"docker/(.+)\.lock", read(os.path.join(sys.prefix, "lock.sha256")))
    return "rm -f .venv/lock.sha256 && make setup" + (" VARIANT=" + variant.group(1) if variant else "")
