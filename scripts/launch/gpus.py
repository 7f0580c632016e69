"""Which GPUs a command gets: GPUS says how many, CUDA_VISIBLE_DEVICES which ones."""

import os
import re

from common.errors import InputError, MachineError
from install import installed

DRIVER = "/proc/driver/nvidia/gpus"  # a folder for each


def chosen_gpus() -> list[str] | None:
    """The GPUs as CUDA_VISIBLE_DEVICES names them, [] for none; None where neither variable is set, so that all are."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = None if named is None else [gpu.strip() for gpu in named.split(",") if gpu.strip() not in ("", "-1")]
    count = os.environ.get("GPUS", "")
    if not count:
        return visible
    if not re.fullmatch(r"\d+", count):
        raise InputError(f"GPUS={count}: expected how many GPUs; which ones is CUDA_VISIBLE_DEVICES, such as 0,2.")
    if visible is not None and int(count) > len(visible):
        raise InputError(f"GPUS={count}: CUDA_VISIBLE_DEVICES={named} has {len(visible)}.")
    if visible is None and int(count) > (there := machine_gpus()):
        raise MachineError(f"GPUS={count}: this machine has {there or 'no'} NVIDIA GPU{'s' if there > 1 else ''}.")
    return (visible or [str(index) for index in range(int(count))])[: int(count)]


def machine_gpus() -> int:
    """How many NVIDIA GPUs this machine has; 64, which is more than there are, where only nvidia-smi could tell."""
    if not installed.gpu_visible():
        return 0
    return len(os.listdir(DRIVER)) if os.path.isdir(DRIVER) else 64
