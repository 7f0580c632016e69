"""NVIDIA's driver, and each GPU: whether torch sees it, and what slows it down."""

import glob
import os
import re
from collections.abc import Iterator

from common.errors import MachineError
from common.nvidia import gpus_hidden, nvidia_smi

from env_check.checks import FAILURE, GIB, OK, TRY_AGAIN, WARNING, Check, Facts, Result, judge
from env_check.machine import read
from env_check.packages import locked_cuda

# The oldest driver for each major version of CUDA (CUDA Toolkit release notes, minor version compatibility).
DRIVERS = {"11": "450.80.02", "12": "525.60.13", "13": "580.65.06"}
# Bits of NVML's clocks event reasons that mean trouble; the others are idleness and power caps.
THROTTLES = {0x08: "hardware slowdown", 0x20: "too hot", 0x40: "too hot", 0x80: "power brake"}
DRIVER_FILE = "/proc/driver/nvidia/version"
PCI_DEVICES = "/sys/bus/pci/devices"


def check_driver(facts: Facts) -> Iterator[Check]:
    version = driver_version(facts.cards)
    if facts.smi.slow:
        yield Check("driver", WARNING, facts.smi.slow, "the GPUs", f"{TRY_AGAIN}; if it hangs then too, reboot")
    elif facts.smi.error:
        fix = "install the NVIDIA driver again and reboot"
        if "mismatch" in facts.smi.error:
            fix = "reboot: the driver was updated while it ran"
        yield Check("driver", WARNING if facts.gpus else FAILURE, facts.smi.error, "the GPUs", fix)
    elif version:
        cuda = facts.torch.get("cuda") if "torch" in facts.results else locked_cuda()
        oldest = DRIVERS.get((cuda or "").partition(".")[0])
        if oldest is None:  # a CPU build of torch, or a CUDA that the table does not know
            yield Check("driver", OK, version)
            return
        good, wanted = numbers(version) >= numbers(oldest), f">= {oldest} for CUDA {cuda}"
        # With a forward compatibility package a data-centre card works all the same.
        otherwise = WARNING if facts.gpus else FAILURE
        yield judge("driver", good, version, wanted, "update the NVIDIA driver on the host and reboot", otherwise)
    elif nvidia_on_the_bus():
        fix = "install the NVIDIA driver; a container gets it with --gpus all (Apptainer: --nv)"
        yield Check("driver", WARNING, "none, but there is an NVIDIA card", ">= " + DRIVERS["13"], fix)


def check_gpu(facts: Facts) -> Iterator[Check]:
    for index, gpu in enumerate(facts.gpus):
        name, (major, minor) = f"gpu {index}", gpu["capability"]
        free, total = gpu["free"] / GIB, gpu["total"] / GIB
        found = f"{gpu['name']}, {free:.1f} of {total:.1f} GiB free, capability {major}.{minor}"
        if major < 7:
            yield Check(name, FAILURE, found, "capability >= 7.0", "use a newer GPU: Unsloth's kernels need 7.0")
        elif major < 8:
            fix = "use a newer GPU; this one trains in float16, and packed rows cost more"
            yield Check(name, WARNING, found, "capability >= 8.0 for bfloat16", fix)
        else:
            fix = "end the program that holds the rest; nvidia-smi shows it"
            yield judge(name, free > 0.9 * total, found + ", bfloat16", "most of it free", fix, WARNING)
    if facts.gpus:
        return
    seen = "nvidia-smi sees {}, ".format(facts.cards[0]["name"] if facts.cards else "none")
    mask = "CUDA_VISIBLE_DEVICES={}".format(os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not facts.cards and facts.smi.slow:
        yield Check("gpu", WARNING, "not known: nvidia-smi is slow", "torch sees it", TRY_AGAIN)
    elif not facts.cards:
        fix = "use a machine with an NVIDIA GPU for larger models"
        yield Check("gpu", WARNING, "none; a CPU trains the tiny model", "an NVIDIA GPU", fix)
    elif not facts.torch:
        fix = "see torch call" if "torch" in facts.results else "make setup VARIANT=cuda"
        why = "torch is slow" if facts.result("torch").slow else "there is no torch that works"
        yield Check("gpu", WARNING, f"{seen}and {why}", "torch sees it", fix)
    elif gpus_hidden():
        yield Check("gpu", WARNING, seen + mask + " hides it", "torch sees it", "unset CUDA_VISIBLE_DEVICES")
    elif not facts.torch["cuda"]:
        found = seen + "but torch {} is a CPU build".format(facts.torch["version"])
        yield Check("gpu", FAILURE, found, "torch sees it", "make setup VARIANT=cuda")
    else:
        fix = f"first fix the driver line; then check {mask}, and start a container with --gpus all"
        yield Check("gpu", FAILURE, seen + "torch does not: " + facts.torch["why"], "torch sees it", fix)


def check_health(facts: Facts) -> Iterator[Check]:
    """What slows a card or makes it compute wrongly, of every card that the driver sees."""
    ecc = set()
    for card in facts.cards:
        name = "gpu health " + card["index"]
        errors = card.get("ecc.errors.uncorrected.volatile.total", "")  # or "[N/A]"
        reasons = card.get("clocks_event_reasons.active", "")
        bits = int(reasons, 16) if re.match("0x[0-9a-fA-F]+$", reasons) else 0
        slowed = sorted({why for bit, why in THROTTLES.items() if bits & bit})
        if errors.isdigit() and int(errors):
            fix = "train on another card, and report this one to whoever runs the machine"
            yield Check(name, WARNING, errors + " uncorrected memory errors since boot", "0", fix)
        elif slowed:
            fix = "check its cooling and power: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER"
            yield Check(name, WARNING, "slowed down: " + ", ".join(slowed), "full speed", fix)
        else:
            ecc.add("ECC " + {"Enabled": "on", "Disabled": "off"}.get(card.get("ecc.mode.current", ""), "unknown"))
    if ecc:
        yield Check("gpu health", OK, "no memory errors, not slowed down, " + ", ".join(sorted(ecc)))


def query_driver() -> Result:
    """The GPUs that nvidia-smi lists, or why it lists none."""
    try:
        return Result(nvidia_smi())
    except MachineError as error:
        return Result(error=f"nvidia-smi: {error}")
    except TimeoutError as error:
        return Result(slow=f"slow: nvidia-smi {error} here")


def driver_version(cards: list[dict[str, str]]) -> str:
    """The version of the running NVIDIA driver, "" where there is none."""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", read(DRIVER_FILE))
    return found.group() if found else cards[0]["driver_version"] if cards else ""


def nvidia_on_the_bus() -> bool:
    """Is an NVIDIA display or 3D controller (PCI class 0x03) plugged in, with or without a driver?"""
    for device in glob.glob(os.path.join(PCI_DEVICES, "*")):
        vendor, kind = read(os.path.join(device, "vendor")), read(os.path.join(device, "class"))
        if vendor.startswith("0x10de") and kind.startswith("0x03"):
            return True
    return False


def numbers(version: str) -> tuple[int, ...]:
    """ "580.65.06" as (580, 65, 6), to compare it."""
    return tuple(map(int, re.findall(r"\d+", version)))
