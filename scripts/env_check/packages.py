"""Python and its packages, against the windows that they declare and against our lock."""

import hashlib
import os
import platform
import re
import sys
from importlib import metadata
from importlib.util import find_spec

from common.environment import ROOT, installed_lock

from env_check.checks import FAILURE, OK, WARNING, Check, judge
from env_check.machine import read

OLDEST_PYTHON = (3, 11)
# What every recipe imports, in the order shown: missing or outside its window, it is a failure.
STACK = ("torch", "transformers", "trl", "unsloth", "unsloth_zoo", "peft", "accelerate", "datasets", "bitsandbytes")
BESIDE = ("triton", "torchvision", "torchao", "xformers", "vllm")  # likewise, but some machines do without
DECLARING = ("unsloth", "unsloth_zoo", "trl", "vllm", "torchvision")  # whose metadata give the windows


def check_python(facts):
    wanted = ">={}.{}".format(*OLDEST_PYTHON)
    if find_module("packaging"):
        declared = [metadata.metadata(name).get("Requires-Python") for name in DECLARING if installed(name)]
        wanted = bounds([specifier_set(text) for text in declared if text]) or wanted
        good = specifier_set(wanted).contains(platform.python_version(), prereleases=True)
    else:
        good = True
    found = f"{platform.python_version()}, {sys.executable}"
    mend = "install Python 3.11 or newer, then rm -f .venv/lock.sha256 && make setup PYTHON=/path/to/python3.12"
    yield judge("python", good, found, wanted, mend)


def check_packages(facts):
    """Every package against the windows that the installed ones declare, and against the lock it came from."""
    if not any(map(installed, STACK)):
        has_venv = os.path.exists(os.path.join(ROOT, ".venv", "lock.sha256"))
        mend = "make check, which looks into .venv" if has_venv else "make setup, which installs them into .venv"
        yield Check("packages", FAILURE, "none of " + ", ".join(STACK), "", mend)
        return
    lock, mark = lock_file()
    yield mark
    if not find_module("packaging"):
        yield Check("packages", FAILURE, "no packaging, so no window can be read", "packaging", mend_packages())
        return
    windows, locked, set_aside = declared_windows(), locked_versions(lock), overridden()
    shown = [canonical(name) for name in STACK + BESIDE]
    as_wanted, others = 0, []
    for name in [*shown, *sorted((set(windows) | set(locked)) - set(shown))]:
        window, version = windows.get(name, {}), installed(name)
        refusing = [who for who, asked in window.items() if not (version and asked.contains(version, True))]
        refusing = [] if name in set_aside else refusing
        moved = name in locked and version != locked[name]
        found = (version or "missing") + (", against " + " and ".join(refusing) if refusing else "")
        wanted = [bounds(window.values())] if window else []
        wanted = "; ".join(filter(None, [*wanted, "locked " + locked[name] if name in locked else ""]))
        if name not in shown:
            if refusing or moved:
                others.append(f"{name} {found} ({wanted or 'any'})")
            as_wanted += not (refusing or moved)
        elif refusing or (not version and (moved or name in map(canonical, STACK))):
            yield Check(name, FAILURE, found, wanted, mend_packages())
        elif moved:
            yield Check(name, WARNING, found + ", not as locked", wanted, mend_packages())
        elif version:
            yield Check(name, OK, found, wanted)
    found = f"{as_wanted} as wanted" + "".join(", not " + line for line in others[:3])
    found += f" and {len(others) - 3} more" if len(others) > 3 else ""
    yield judge("other packages", not others, found, "", mend_packages(), WARNING)


def lock_file():
    """The path of the lock that this environment was made from, "" if there is none, and the Check that says so."""
    mark = installed_lock()
    if mark is None:
        found = f"none: what is in {sys.prefix} was installed by other means"
        return "", Check("lock", WARNING, found, "one of docker/*.lock", mend_packages())
    path, now = os.path.join(ROOT, mark["file"]), "gone"
    if os.path.exists(path):
        with open(path, "rb") as file:
            now = hashlib.sha256(file.read()).hexdigest()
    found = "{}, sha256 {}".format(mark["file"], mark["sha256"][:12])
    if now == mark["sha256"]:
        return path, Check("lock", OK, found)
    return path, Check("lock", WARNING, found, now[:12], "make setup; build a container's image again")


def declared_windows():
    """{package: {who asks for it: SpecifierSet}}, from the metadata of DECLARING."""
    from packaging.requirements import Requirement

    windows = {}
    for who in filter(installed, DECLARING):
        # What trl wants of vLLM stands in its extra of that name.
        extras = ["", "vllm"] if who == "trl" and installed("vllm") else [""]
        for asked in map(Requirement, metadata.requires(who) or []):
            if asked.marker is None or any(asked.marker.evaluate({"extra": extra}) for extra in extras):
                window = windows.setdefault(canonical(asked.name), {})
                window[who] = window.get(who, asked.specifier) & asked.specifier
    return windows


def overridden():
    """Packages that our lock keeps outside their declared windows on purpose; the file says why."""
    from packaging.requirements import Requirement

    kind = "cpu" if (installed("torch") or "").endswith("+cpu") else "cuda"
    lines = read(os.path.join(ROOT, "docker", f"overrides-{kind}.txt")).splitlines()
    names = set()
    for override in (Requirement(line) for line in lines if line.strip() and not line.startswith("#")):
        version = installed(override.name)
        if override.specifier.contains(version, True) if version else override.marker is not None:
            names.add(canonical(override.name))
    return names


def locked_versions(path):
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", read(path), re.M)
    return {canonical(name): version for name, version in found}


def locked_cuda():
    """The CUDA that `make setup VARIANT=cuda` would install, as "13.0.96"."""
    return locked_versions(os.path.join(ROOT, "docker", "cuda.lock")).get("nvidia-cuda-runtime", "")


def bounds(windows):
    """The exact versions and the strongest bounds of several SpecifierSets; exclusions between them are left out."""
    from packaging.version import Version

    parts = [part for window in windows for part in window]
    low = sorted((part for part in parts if part.operator in (">", ">=")), key=lambda part: Version(part.version))
    high = sorted((part for part in parts if part.operator in ("<", "<=")), key=lambda part: Version(part.version))
    exact = {str(part) for part in parts if part.operator in ("==", "===", "~=")}
    return ",".join([*sorted(exact), *map(str, low[-1:]), *map(str, high[:1])])


def specifier_set(text):
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(text)


def installed(name):
    """The version that this environment's metadata give, None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def find_module(name):
    """The spec of module `name`, None where there is none. It is not imported, so it may still be broken."""
    try:
        return find_spec(name)
    except (ImportError, ValueError):
        return None


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def mend_packages():
    if os.path.realpath(sys.prefix) != os.path.join(os.path.realpath(ROOT), ".venv"):
        return "make setup, which installs docker/*.lock into .venv; then make check"
    variant = re.search(r"docker/(.+)\.lock", read(os.path.join(sys.prefix, "lock.sha256")))
    return "rm -f .venv/lock.sha256 && make setup" + (" VARIANT=" + variant.group(1) if variant else "")
