"""What this machine can run, what is wrong with it, and the command that mends it.

    make check                                        inside .venv, or with the system's python3 before there is one
    make check MODEL=qwen2.5-7b ARGS="--recipe sft"   one job: exit 3 and the reason if it cannot run here
    make check ARGS=--json                            for machines; --online asks the hub, too

One line per check: what was found, what is wanted, and under it what mends it. Versions are held against the windows
that the installed packages declare themselves, and against our lock. Libraries are not only imported: each runs one
small call in a child process (scripts/probes.py), so that one that crashes or hangs is a line, not the end. Nothing is
changed, Python's own bytecode cache aside. Exit 0: ready, warnings allowed; 3: not ready; 2: a wrong argument.

Standard library only, before anything is installed. A Python older than 3.11 gets one line, so this file must parse on
Python 3.6.

Left out: GPUs that are not NVIDIA's; several machines.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    version = ".".join(map(str, sys.version_info[:3]))
    print(
        f"This needs Python 3.11 or newer, and {sys.executable} is {version}. Install one, then: "
        "make check PYTHON=/path/to/python3.12",
        file=sys.stderr,
    )
    sys.exit(3)

import argparse
import contextlib
import difflib
import glob
import hashlib
import http.client
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import threading
import tomllib
import urllib.request
from importlib import metadata
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(ROOT, "recipes"))

from common.environment import installed_lock  # noqa: E402
from common.lm import memory  # noqa: E402

OK, WARNING, FAILURE = "ok", "warning", "failure"
READY, NOT_READY = 0, 3
GIB = 2**30

OLDEST_PYTHON = (3, 11)
# What every recipe imports, in the order shown: missing or outside its window, it is a failure.
STACK = ("torch", "transformers", "trl", "unsloth", "unsloth_zoo", "peft", "accelerate", "datasets", "bitsandbytes")
BESIDE = ("triton", "torchvision", "torchao", "xformers", "vllm")  # likewise, but some machines do without
DECLARING = ("unsloth", "unsloth_zoo", "trl", "vllm", "torchvision")  # whose metadata give the windows
# The oldest driver for each major version of CUDA (CUDA Toolkit release notes, minor version compatibility).
DRIVERS = {"11": "450.80.02", "12": "525.60.13", "13": "580.65.06"}
# Bits of NVML's clocks event reasons that mean trouble; the others are idleness and power caps.
THROTTLES = {0x08: "hardware slowdown", 0x20: "too hot", 0x40: "too hot", 0x80: "power brake"}
# In the order they are asked, torch first: without it none of the others can answer. See scripts/probes.py.
PROBES = ("torch", "sdpa", "bitsandbytes", "torchao", "torchvision", "triton", "varlen")
PROBES += ("flash-attn 2", "flash-attn 3", "flash-attn 4", "xformers", "nccl", "unsloth", "vllm")
ALONE = ("unsloth", "vllm")  # slow, and each changes other libraries: a child of its own, beside that of the others
SMALL = 50e6  # parameters that a CPU trains while one waits

# Where facts of the machine are read.
DRIVER_FILE = "/proc/driver/nvidia/version"
PCI_DEVICES = "/sys/bus/pci/devices"
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
SHARED_MEMORY = "/dev/shm"
COMMAND_SECONDS = 20  # for nvidia-smi or the compiler
CHILD_SECONDS = 90  # for a child; the first import after an installation compiles for a minute


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


def main():
    recipes, models = recipe_names(), card_names()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", help="ask about one recipe: " + ", ".join(recipes))
    parser.add_argument("--model", help="ask about one model card; `make models` lists them")
    parser.add_argument("--online", action="store_true", help="ask the hub, too")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the screen")
    args = parser.parse_args()
    for flag, asked, known in (("--recipe", args.recipe, recipes), ("--model", args.model, models)):
        if asked and asked not in known:
            near = difflib.get_close_matches(asked, known, 1) or [", ".join(known)]
            parser.error(f"{flag} {asked}: there is none of that name; there is {near[0]}")
    cards = read_cards()
    if args.recipe and args.model and args.recipe not in cards[args.model].methods:
        parser.error(f"--recipe {args.recipe}: {args.model} is offered for {', '.join(cards[args.model].methods)}")

    if sys.stderr.isatty():
        print("Importing the libraries and running a call of each ...", file=sys.stderr)
    facts = Facts(*nvidia_smi(), ask_children(), args.online)
    checks = [line for check in CHECKS for line in check(facts)]
    recipes = [args.recipe] if args.recipe else recipes
    runs = {recipe: what_runs(recipe, cards, facts) for recipe in recipes}
    for recipe in recipes if args.model else []:
        if recipe in cards[args.model].methods:
            checks += check_job(recipe, args.model, cards[args.model], runs[recipe], facts)
    ready = all(line.status != FAILURE for line in checks)
    if args.json:
        print(json.dumps({"ready": ready, "checks": [line._asdict() for line in checks], "runs": runs}, indent=1))
    else:
        show(checks, runs, facts)
    return READY if ready else NOT_READY


# --- the machine --------------------------------------------------------------------------------------------------


def check_system(facts):
    processor = dict(re.findall(r"^(model name|flags)\s*: (.*)", read("/proc/cpuinfo"), re.M))
    # What a CPU is fast with: bitsandbytes' NF4 kernels, and torch in bfloat16.
    names = (("avx2", "AVX2"), ("avx512f", "AVX512"), ("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX"))
    known = [name for flag, name in names if flag in processor.get("flags", "").split()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    found = f"{system} {place()}, {processor.get('model name', 'unknown CPU')}, {cores} cores, {' '.join(known)}"
    mend = "use a machine with Linux on x86-64: the locks are for it"
    yield judge("system", system == "Linux x86_64", found, "", mend)
    for name, variable in (("image", "IMAGE_DIGEST"), ("Slurm job", "SLURM_JOB_ID")):
        if os.environ.get(variable):
            gpus = f", GPUs {os.environ.get('SLURM_JOB_GPUS', 'none')}" if name == "Slurm job" else ""
            yield Check(name, OK, os.environ[variable] + gpus)

    limits = [int(text) for text in map(read, MEMORY_LIMITS) if text.strip().isdigit()]
    limits += [int(kib) * 1024 for kib in re.findall(r"^MemAvailable: +(\d+) kB", read("/proc/meminfo"), re.M)]
    if limits:
        free, mend = min(limits) / GIB, "end other programs; give a container more with --memory"
        yield judge("memory", free >= 4, f"{free:.1f} GiB available", ">= 4 GiB", mend, WARNING)


def place():
    if os.path.exists("/.dockerenv"):
        return "in Docker"
    if os.path.exists("/run/.containerenv"):
        return "in Podman"
    if "APPTAINER_CONTAINER" in os.environ or "SINGULARITY_CONTAINER" in os.environ:
        return "in Apptainer"
    return "in Kubernetes" if "KUBERNETES_SERVICE_HOST" in os.environ else "on the host"


def check_driver(facts):
    version = driver_version(facts.cards)
    if facts.smi_error:
        mend = "install the NVIDIA driver again and reboot"
        if "mismatch" in facts.smi_error:
            mend = "reboot: the driver was updated while it ran"
        found = "nvidia-smi: " + facts.smi_error
        yield Check("driver", WARNING if facts.gpus else FAILURE, found, "an answer", mend)
    elif version:
        cuda = facts.torch.get("cuda") if "torch" in facts.answers else locked_cuda()
        oldest = DRIVERS.get((cuda or "").partition(".")[0])
        if oldest is None:  # a CPU build of torch, or a CUDA that the table does not know
            yield Check("driver", OK, version)
            return
        good, wanted = numbers(version) >= numbers(oldest), f">= {oldest} for CUDA {cuda}"
        # A forward compatibility package makes a data-centre card work all the same.
        otherwise = WARNING if facts.gpus else FAILURE
        yield judge("driver", good, version, wanted, "update the NVIDIA driver on the host and reboot", otherwise)
    elif nvidia_on_the_bus():
        mend = "install the NVIDIA driver; a container gets it with --gpus all (Apptainer: --nv)"
        yield Check("driver", WARNING, "none, but there is an NVIDIA card", ">= " + DRIVERS["13"], mend)


def check_gpu(facts):
    for index, gpu in enumerate(facts.gpus):
        name, (major, minor) = f"gpu {index}", gpu["capability"]
        free, total = gpu["free"] / GIB, gpu["total"] / GIB
        found = f"{gpu['name']}, {free:.1f} of {total:.1f} GiB free, capability {major}.{minor}"
        if major < 7:
            yield Check(name, FAILURE, found, "capability >= 7.0", "use a newer GPU: Unsloth's kernels need 7.0")
        elif major < 8:
            mend = "use a newer GPU; this one trains in float16, and packed rows cost more"
            yield Check(name, WARNING, found, "capability >= 8.0 for bfloat16", mend)
        else:
            mend = "nvidia-smi shows who holds the rest: end that program"
            yield judge(name, free > 0.9 * total, found + ", bfloat16", "most of it free", mend, WARNING)
    if facts.gpus:
        return
    seen = "nvidia-smi sees {}, ".format(facts.cards[0]["name"] if facts.cards else "none")
    mask = "CUDA_VISIBLE_DEVICES={}".format(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not facts.cards:
        mend = "use a machine with an NVIDIA GPU for more than that"
        yield Check("gpu", WARNING, "none; a CPU trains the tiny model", "an NVIDIA GPU", mend)
    elif not facts.torch:
        mend = "see torch" if "torch" in facts.answers else "make setup VARIANT=cuda"
        yield Check("gpu", WARNING, seen + "and there is no torch that works", "torch sees it", mend)
    elif hidden():
        yield Check("gpu", WARNING, seen + mask + " hides it", "torch sees it", "unset CUDA_VISIBLE_DEVICES")
    elif not facts.torch["cuda"]:
        found = seen + "but torch {} is a CPU build".format(facts.torch["version"])
        yield Check("gpu", FAILURE, found, "torch sees it", "make setup VARIANT=cuda")
    else:
        mend = f"first what driver says; then look at {mask}, and start a container with --gpus all"
        yield Check("gpu", FAILURE, seen + "torch does not: " + facts.torch["why"], "torch sees it", mend)


def check_health(facts):
    """What slows a card or makes it compute wrongly, of every card that the driver sees."""
    ecc = set()
    for card in facts.cards:
        name = "gpu health " + card["index"]
        errors = card.get("ecc.errors.uncorrected.volatile.total", "")  # or "[N/A]"
        reasons = card.get("clocks_event_reasons.active", "")
        bits = int(reasons, 16) if re.match("0x[0-9a-fA-F]+$", reasons) else 0
        slowed = sorted({why for bit, why in THROTTLES.items() if bits & bit})
        if errors.isdigit() and int(errors):
            mend = "train on another card, and ask who runs the machine to see to this one"
            yield Check(name, WARNING, errors + " uncorrected memory errors since boot", "0", mend)
        elif slowed:
            mend = "see to its cooling and power: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER"
            yield Check(name, WARNING, "slowed down: " + ", ".join(slowed), "full speed", mend)
        else:
            ecc.add("ECC " + {"Enabled": "on", "Disabled": "off"}.get(card.get("ecc.mode.current"), "unknown"))
    if ecc:
        yield Check("gpu health", OK, "no memory errors, not slowed down, " + ", ".join(sorted(ecc)))


def check_compiler(facts):
    """Triton compiles a launcher for every kernel, so it needs a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), "gcc")
    include = sysconfig.get_paths("posix_prefix")["include"]  # not Debian's posix_local: as Triton looks for it
    status, said = command(compiler, "-fsyntax-only", "-I" + include, "-xc", "-", stdin=b"#include <Python.h>\n")
    if status == 0:
        yield Check("compiler", OK, f"{compiler}, Python.h in {include}")
    elif facts.gpus:
        mend = "apt-get install gcc python3-dev, or set CC"
        yield Check("compiler", FAILURE, f"{compiler}: {first_line(said)}", "gcc and Python.h", mend)
    else:
        yield Check("compiler", OK, f"{compiler}: {first_line(said)}; not needed without a GPU")


def check_shared_memory(facts):
    name, wanted = "shared memory", ">= 1 GiB in " + SHARED_MEMORY
    mend = f"mount -t tmpfs -o size=8G tmpfs {SHARED_MEMORY}; start a container with --shm-size 8g"
    try:
        disk = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        yield Check(name, FAILURE, f"{SHARED_MEMORY}: {error.strerror}", wanted, mend)
        return
    if not os.access(SHARED_MEMORY, os.W_OK):
        yield Check(name, FAILURE, SHARED_MEMORY + ": no permission to write", wanted, "chmod 1777 " + SHARED_MEMORY)
    else:
        # Docker gives 64 MiB: in so little, data-loader workers, NCCL and vLLM die of a bus error.
        free = disk.f_bavail * disk.f_frsize / GIB
        yield judge(name, free >= 1, f"{free:.2f} GiB free", wanted, mend, WARNING)


def check_disk(facts):
    try:
        temporary = tempfile.gettempdir()  # it tries to write
    except OSError:
        temporary = os.environ.get("TMPDIR", "/tmp")
    places = (
        ("outputs", os.path.abspath("outputs"), 10, "name a run on another disk, OUT=/another/disk/run"),
        ("hub cache", hub_cache(), 20, "move it, export HF_HOME=/another/disk"),
        ("temporary", temporary, 1, "move it, export TMPDIR=/another/disk"),
    )
    good = []
    for name, path, gib, elsewhere in places:
        there, wanted = existing(path), f">= {gib} GiB, writable"
        try:
            free = shutil.disk_usage(there).free / GIB
            with tempfile.TemporaryFile(dir=there) as file:  # without a name, and gone when closed
                file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())  # only now is a quota noticed
        except OSError as error:
            yield Check(name, FAILURE, f"{path}: {error.strerror or error}", wanted, "mend that, or " + elsewhere)
            continue
        if free >= gib:
            good.append(f"{name} {free:.0f} GiB")
        else:
            status = FAILURE if free < gib / 20 else WARNING
            yield Check(name, status, f"{free:.2f} GiB free in {path}", wanted, "free some space, or " + elsewhere)
    if good:
        yield Check("disk", OK, "free for " + ", ".join(good))


def check_hub(facts):
    endpoint, token = os.environ.get("HF_ENDPOINT") or "https://huggingface.co", hub_token()
    found = re.sub("//[^/]*@", "//", endpoint) + (", a token is set" if token else ", no token")  # no password shown
    found += ", by way of ModelScope" if os.environ.get("UNSLOTH_USE_MODELSCOPE") == "1" else ""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Check("hub", OK, found + "; HF_HUB_OFFLINE is set")
    elif not facts.online:
        yield Check("hub", OK, found + "; not asked (--online)")
    else:
        error = ask_hub(endpoint, token)
        mend = "check the network, HTTPS_PROXY and HF_ENDPOINT, and after a refusal HF_TOKEN"
        yield judge("hub", not error, found + "; " + (error or "it answers"), "an answer", mend)


def ask_hub(endpoint, token):
    """Why the hub does not answer as it should, "" when it does: to whom does the token belong, or for any model."""
    path = "/api/whoami-v2" if token else "/api/models?limit=1"
    try:
        request = urllib.request.Request(endpoint.rstrip("/") + path)
        if token:
            request.add_unredirected_header("Authorization", "Bearer " + token)
        with urllib.request.urlopen(request, timeout=10) as answer:
            json.loads(answer.read().decode("utf-8", "replace"))
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
        return first_line(error)
    return ""


def nvidia_smi():
    """The GPUs as the driver sees them, each {field: value}, and why nvidia-smi failed, if it is there and did."""
    if not shutil.which("nvidia-smi"):
        return [], ""
    fields = ["index", "name", "driver_version", "memory.total", "memory.free"]
    health = ["ecc.mode.current", "ecc.errors.uncorrected.volatile.total", "clocks_event_reasons.active"]
    for asked in (fields + health, fields):  # an older driver refuses the whole question for one field it lacks
        status, said = command("nvidia-smi", "--query-gpu=" + ",".join(asked), "--format=csv,noheader,nounits")
        if status == 0:
            rows = [[value.strip() for value in line.split(",")] for line in said.splitlines()]
            return [dict(zip(asked, row, strict=True)) for row in rows if len(row) == len(asked)], ""
        if status is None:  # it hangs: so it would again
            break
    return [], first_line(said)


def driver_version(cards):
    """The version of the NVIDIA driver that runs, "" where there is none."""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", read(DRIVER_FILE))
    return found.group() if found else cards[0]["driver_version"] if cards else ""


def nvidia_on_the_bus():
    """Is an NVIDIA display or 3D controller (PCI class 0x03) plugged in, with or without a driver?"""
    for device in glob.glob(os.path.join(PCI_DEVICES, "*")):
        vendor, kind = read(os.path.join(device, "vendor")), read(os.path.join(device, "class"))
        if vendor.startswith("0x10de") and kind.startswith("0x03"):
            return True
    return False


def hidden():
    """Does the user hide every GPU?"""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def hub_home():
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.expanduser(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface"))


def hub_cache():
    """The folder that huggingface_hub downloads into, by the rules of its constants.py."""
    return os.path.abspath(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(hub_home(), "hub")))


def hub_token():
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    return (token or read(os.environ.get("HF_TOKEN_PATH") or os.path.join(hub_home(), "token"))).strip()


# --- Python and packages ------------------------------------------------------------------------------------------


def check_python(facts):
    wanted = ">={}.{}".format(*OLDEST_PYTHON)
    if has_module("packaging"):
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
    if not has_module("packaging"):
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


def has_module(name):
    """The place of module `name`, None where there is none. It is not imported, so it may still be broken."""
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


# --- libraries, each by one small call in a child ------------------------------------------------------------------


def ask_children():
    """{probe: Answer} of every installed library. Children run side by side, each with several probes."""
    names = [name for name in PROBES if has_library(name)]
    if "torch" not in names:
        return {}
    try:
        folder = tempfile.mkdtemp(prefix="env-check-")
    except OSError as error:
        return {"torch": Answer(error=f"not tried: {error}")}
    answers, children = {}, []
    groups = [[name for name in names if name not in ALONE], *([name] for name in names if name in ALONE)]
    threads = [threading.Thread(target=ask_group, args=(group, folder, answers, children)) for group in groups]
    try:
        for thread in threads:
            thread.daemon = True  # so that Ctrl-C ends this
            thread.start()
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        answers["torch"] = Answer(error="stopped")  # and no group starts another child
        for child in children:
            kill(child)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return answers


def has_library(probe):
    """Is what `probe` looks at installed? flash-attn 4 alone leaves a flash_attn that is no package of its own."""
    modules = {"sdpa": "torch", "varlen": "torch", "nccl": "torch"}
    modules.update({"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn"})
    place = has_module(modules.get(probe, probe))
    if place and probe == "flash-attn 2":
        return place.origin is not None
    if place and probe == "flash-attn 4":
        return any(os.path.isdir(os.path.join(path, "cute")) for path in place.submodule_search_locations or ())
    return place is not None


def ask_group(names, folder, answers, children):
    """Fill `answers` for `names`, with a new child after each one that failed, crashed or hung."""
    left = list(names)
    while left and not answers.get("torch", Answer()).error:
        child = start_child(left, folder)
        children.append(child)
        cause = ""
        try:
            out, err = child.communicate(timeout=CHILD_SECONDS)
        except subprocess.TimeoutExpired:
            cause = f"no answer in {CHILD_SECONDS} s"
            out, err = end(child)
        error = ""
        for line in out.decode("utf-8", "replace").splitlines():
            name, value, error = json.loads(line)
            answers[name] = Answer(value, error)
            left.remove(name)
        if left and not error:  # it ended without a word on the next one
            if not cause:
                status = child.returncode
                cause = "crashed with " + signal.Signals(-status).name if status < 0 else f"ended with status {status}"
            said = [line.strip() for line in err.decode("utf-8", "replace").splitlines() if line.strip()]
            answers[left.pop(0)] = Answer(error=": ".join([cause, *said[-1:]])[:300])


def start_child(names, folder):
    # Whatever a library would leave behind goes into `folder`.
    places = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "UNSLOTH_COMPILE_LOCATION")
    places += ("HF_HOME", "MPLCONFIGDIR", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "FLASHINFER_WORKSPACE_BASE")
    environment = dict(os.environ, VLLM_NO_USAGE_STATS="1", **{name: os.path.join(folder, name) for name in places})
    flags = ["-I"] if sys.flags.isolated else []
    line = [sys.executable, *flags, os.path.join(ROOT, "scripts", "probes.py"), *names]
    return subprocess.Popen(line, cwd=folder, env=environment, start_new_session=True, **pipes(subprocess.PIPE))


def check_torch(facts):
    error, about = facts.answer("torch").error, facts.torch
    if error:
        yield Check("torch call", FAILURE, error, "a product of two matrices", mend_packages())
    elif about:
        cuda = "CUDA {cuda}, cuDNN {cudnn}" if about["cuda"] else "a CPU build, {threads} threads"
        yield Check("torch call", OK, cuda.format(**about))


def check_libraries(facts):
    lines = (
        ("unsloth", "unsloth import", FAILURE, mend_packages()),
        ("bitsandbytes", "4 bit", FAILURE, mend_packages() + "; or train with ARGS=--no-load-in-4bit"),
        ("triton", "triton kernel", FAILURE, "first what compiler says; then " + mend_packages()),
        ("torchao", "torchao import", WARNING, mend_packages()),
        ("torchvision", "torchvision call", FAILURE, mend_packages()),
        ("vllm", "vllm import", WARNING, "make setup VARIANT=cuda-vllm; without it GRPO samples more slowly"),
        ("nccl", "several GPUs", WARNING, "unsloth doctor --gpus says more; try export NCCL_P2P_DISABLE=1"),
    )
    for probe, name, status, mend in lines:
        value, error = facts.answer(probe)
        if error or value:
            yield judge(name, not error, error or value, "", mend, status)


def check_attention(facts):
    """Which attention Unsloth will use here: the order is that of its utils/attention_dispatch.py and flash_impl.py."""
    if not facts.torch:
        return
    works = {name for name, answer in facts.answers.items() if answer.value}
    for name in ("sdpa", "varlen"):
        if facts.answer(name).error:
            yield Check(name, FAILURE, facts.answer(name).error, "torch's own attention", mend_packages())
    if not facts.gpus:
        yield Check("attention", OK, "torch's SDPA; rows are padded, not packed")
        return
    packages = {"flash-attn 2": "flash-attn", "flash-attn 3": "flash_attn_3", "flash-attn 4": "flash-attn-4"}
    for name in (*packages, "xformers"):
        if facts.answer(name).error:
            mend = f"{sys.executable} -m pip uninstall {packages.get(name, name)}; it is not needed"
            yield Check(name, WARNING, facts.answer(name).error, "one that works, or none", mend)
    major = facts.gpus[0]["capability"][0]
    dense = packed = "flash-attn 2" if major >= 8 and "flash-attn 2" in works else ""
    if not dense:
        dense = "xformers" if "xformers" in works else "torch's SDPA"
        packed = "torch's varlen" if "varlen" in works else dense
        # From hidden size 2048 on, torch's kernel gives way to one of these while a packed run trains.
        for name in {9: ("flash-attn 3", "flash-attn 4"), 10: ("flash-attn 4",)}.get(major, ()):
            if name in works and packed == "torch's varlen":
                packed = name + " in " + packed
    yield Check("attention", OK, f"{packed} for packed rows, {dense} for others")


# --- what runs here -----------------------------------------------------------------------------------------------


def recipe_names():
    return sorted(os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, "recipes", "*.py")))


def card_names():
    return sorted(os.path.basename(path)[:-5] for path in glob.glob(os.path.join(ROOT, "recipes", "models", "*.toml")))


def read_cards():
    """{name: card}, smallest first. Plain objects, because common.lm.cards, which checks cards, needs packages."""
    cards = {}
    for name in card_names():
        card = tomllib.loads(read(os.path.join(ROOT, "recipes", "models", name + ".toml")))
        cards[name] = SimpleNamespace(**dict(card, architecture=SimpleNamespace(**card["architecture"])))
    return dict(sorted(cards.items(), key=lambda item: item[1].parameters))


def sizes(recipe, card):
    """The sizes of a batch where the card sets its own; memory.fit knows the recipe's."""
    names = ("max_length", "per_device_train_batch_size")
    return {name: value for name, value in getattr(card, recipe, {}).items() if name in names}


def what_runs(recipe, cards, facts):
    """[{model, fits, ...}] of every card that is offered for `recipe`, smallest first."""
    lines = []
    for name, card in cards.items():
        if recipe not in card.methods:
            continue
        line = {"model": name, "fits": card.parameters <= SMALL}
        if facts.free_gib is not None:
            fit = memory.fit(card, recipe, facts.free_gib, **sizes(recipe, card))
            line["fits"] = fit is not None
            if fit:
                line.update(load_in_4bit=fit.load_in_4bit, gradient_checkpointing=fit.gradient_checkpointing)
                line["gib"] = round(fit.total, 1)
        lines.append(line)
    return lines


def check_job(recipe, model, card, lines, facts):
    """Can `recipe` train `model` here? `lines` are those of what_runs."""
    name = f"{recipe} {model}"
    line = next(line for line in lines if line["model"] == model)
    fitting = [line["model"] for line in lines if line["fits"]]
    smaller = "make {} MODEL={}".format(recipe, fitting[-1] if fitting else "tiny")
    if facts.free_gib is None:
        found = f"{card.parameters / 1e6:,.0f} M parameters on a CPU, " + ("minutes" if line["fits"] else "days")
        yield judge(name, line["fits"], found, "", "use a machine with an NVIDIA GPU; here " + smaller)
    elif line["fits"]:
        flags = ("--" if line["load_in_4bit"] else "--no-") + "load-in-4bit"
        flags += " --" + ("" if line["gradient_checkpointing"] else "no-") + "gradient-checkpointing"
        yield Check(name, OK, f"{line['gib']} GiB with {flags}", f"<= {facts.free_gib:.1f} GiB, what is free")
    else:
        settings = {"max_length": memory.MAX_LENGTH[recipe], "per_device_train_batch_size": 4, **sizes(recipe, card)}
        need = memory.estimate(card, recipe, load_in_4bit=True, gradient_checkpointing=True, **settings).total
        one = memory.fit(card, recipe, facts.free_gib, **{**sizes(recipe, card), "per_device_train_batch_size": 1})
        mend = f'make {recipe} MODEL={model} ARGS="--per-device-train-batch-size 1"' if one else smaller
        yield Check(name, FAILURE, f"{need:.1f} GiB at the least", f"<= {facts.free_gib:.1f} GiB, what is free", mend)
    yield from check_download(name, card)


def check_download(name, card):
    """Room for the weights, and leave to fetch them, unless they are on this machine."""
    hub_id = getattr(card, "hub_id", None)
    if hub_id is None or glob.glob(os.path.join(hub_cache(), "models--" + hub_id.replace("/", "--"), "snapshots", "*")):
        return
    need, free = card.parameters * 2 / GIB, shutil.disk_usage(existing(hub_cache())).free / GIB
    if free < need:
        mend = "free some space, or move the cache, export HF_HOME=/another/disk"
        yield Check(name, FAILURE, f"{free:.1f} GiB free in {hub_cache()}", f">= {need:.1f} GiB of weights", mend)
    if card.gated and not hub_token():
        mend = f"accept the licence on the page of {hub_id}, then export HF_TOKEN=..."
        yield Check(name, FAILURE, "it is gated, and there is no token", "HF_TOKEN", mend)


# --- the screen ---------------------------------------------------------------------------------------------------

CHECKS = (check_system, check_python, check_packages, check_driver, check_gpu, check_health, check_torch)
CHECKS += (check_compiler, check_libraries, check_attention, check_shared_memory, check_disk, check_hub)

SLOTH = (
    r"====((=======((====",
    r"    //  ___  \\    ",
    r"   ((  (o.o)  ))   ",
    r"    \\  \_/  //    ",
    r"     '--___--'     ",
)


def show(checks, runs, facts):
    for drawing, text in zip(SLOTH, banner(facts), strict=True):
        print(drawing, text)
    print()
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    colours = {OK: 32, WARNING: 33, FAILURE: 31} if coloured else {}
    name_width, found_width = max(len(line.name) for line in checks), 40
    for line in checks:
        mark = f"{line.status:8}"
        if line.status in colours:
            mark = f"\033[{colours[line.status]}m{mark}\033[0m"
        text = f"{line.found:{found_width}}  {line.wanted}" if line.wanted else line.found
        print(f"{mark} {line.name:{name_width}}  {text}")
        if line.mend:
            print(f"{'':8} {'':{name_width}}  -> {line.mend}")
    failed = [line.name for line in checks if line.status == FAILURE]
    warnings = sum(line.status == WARNING for line in checks)
    print(f"\n{'Not ready: ' + ', '.join(failed) if failed else 'Ready'}; warnings: {warnings}.")
    texts = {}
    for recipe, lines in runs.items():
        texts.setdefault(in_words(lines, facts), []).append(recipe)
    for text, recipes in texts.items():
        print(f"{' '.join(recipes)}: {text}{', once that is mended' if failed else ''}")


def banner(facts):
    """What Unsloth says when it loads a model, as far as it is known before one is named."""
    absent = {"unsloth": "missing", "trl": "missing", "transformers": "missing", "torch": "missing", "triton": "none"}
    versions = {name: installed(name) or word for name, word in absent.items()}
    gpu = facts.gpus[0] if facts.gpus else {"name": "No GPU", "total": 0, "capability": (0, 0)}
    capability = "{}.{}".format(*gpu["capability"]) if facts.gpus else "none"
    return (
        "Unsloth {unsloth}. TRL: {trl}. Transformers: {transformers}.".format(**versions),
        f"{gpu['name']}. Num GPUs = {len(facts.gpus)}. Max memory: {gpu['total'] / GIB:.1f} GiB. "
        f"Platform: {platform.system()}.",
        f"Torch: {versions['torch']}. CUDA: {capability}. CUDA Toolkit: {facts.torch.get('cuda') or 'none'}. "
        f"Triton: {versions['triton']}",
        f"Bfloat16 = {str(gpu['capability'][0] >= 8).upper()}. Python: {platform.python_version()}.",
        "Post-training recipes; `make` lists what there is.",
    )


def in_words(lines, facts):
    """What what_runs found, in one line."""
    fits = [line for line in lines if line["fits"]]
    if facts.free_gib is None:
        names = ", ".join(line["model"] for line in fits) or "nothing"
        return f"{names} in minutes; other cards would take days without a GPU"
    parts = []
    for bits, in_4bit in ((16, False), (4, True)):
        chosen = [line for line in fits if line["load_in_4bit"] == in_4bit]
        if chosen:
            parts.append("{} in {} bit ({} GiB)".format(up_to(chosen), bits, chosen[-1]["gib"]))
    large = [line for line in lines if not line["fits"]]
    return "; ".join([*parts, *(["too large " + up_to(large)] if large else [])]) or "no card is offered for it"


def up_to(lines):
    names = [line["model"] for line in lines]
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} models up to {names[-1]}"


# --- processes and files ------------------------------------------------------------------------------------------


def command(*line, stdin=b""):
    """The exit status and what was printed; the status is None when it is not there or gave no answer in time."""
    try:
        process = subprocess.Popen(line, start_new_session=True, **pipes(subprocess.STDOUT, subprocess.PIPE))
    except OSError as error:
        return None, f"{error.strerror}"
    try:
        said, _ = process.communicate(stdin, COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        end(process)
        return None, f"no answer in {COMMAND_SECONDS} s"
    return process.returncode, said.decode("utf-8", "replace")


def pipes(stderr, stdin=subprocess.DEVNULL):
    return {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": stderr}


def end(process):
    """Kill a process and return what it had printed. One that is stuck in the driver stays behind."""
    kill(process)
    try:
        return process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        return b"", b""


def kill(process):
    """Kill a process and what it started."""
    with contextlib.suppress(ProcessLookupError):  # it ended by itself
        os.killpg(process.pid, signal.SIGKILL)


def existing(path):
    """`path`, or the nearest folder above it that exists."""
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def read(path):
    """The text of a file, "" where there is none to be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def first_line(said):
    """What an error says first; compilers and drivers go on with advice."""
    return next((line.strip()[:200] for line in str(said).splitlines() if line.strip()), "no reason given")


def numbers(version):
    """ "580.65.06" as (580, 65, 6), to be compared."""
    return tuple(map(int, re.findall(r"\d+", version)))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
