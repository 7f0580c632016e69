"""The GPUs as NVIDIA's driver sees them, without torch. Standard library only: env-check.py is run before that."""

import contextlib
import os
import shutil
import signal
import subprocess

from common.errors import MachineError

FIELDS = ("index", "name", "driver_version", "memory.total", "memory.free")  # memory in MiB
HEALTH_FIELDS = ("ecc.mode.current", "ecc.errors.uncorrected.volatile.total", "clocks_event_reasons.active")
SECONDS = 60  # for nvidia-smi; without its persistence daemon it wakes the cards first


def nvidia_smi() -> list[dict[str, str]]:
    """The GPUs that nvidia-smi lists, each {field: value} as it writes them; [] where there is no nvidia-smi.

    HEALTH_FIELDS are missing where the driver is too old for one of them. Raises MachineError with the reason when
    nvidia-smi fails, and TimeoutError when it does not end.
    """
    if not shutil.which("nvidia-smi"):
        return []
    for fields in (FIELDS + HEALTH_FIELDS, FIELDS):  # an older driver refuses the whole query for one unknown field
        status, output = _run("nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits")
        if status == 0:
            rows = [[value.strip() for value in line.split(",")] for line in output.splitlines()]
            return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]
    raise MachineError(next((line.strip()[:200] for line in output.splitlines() if line.strip()), "no reason given"))


def gpus_hidden() -> bool:
    """Does CUDA_VISIBLE_DEVICES hide every GPU?"""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def free_gib(gpus: list[dict[str, str]]) -> float | None:
    """The free memory of the first of these GPUs in GiB; None without one, or when the user hides them."""
    free = [gpu["memory.free"] for gpu in gpus if gpu["memory.free"].isdigit()]  # or "[N/A]"
    return int(free[0]) / 1024 if free and not gpus_hidden() else None


def _run(*command: str) -> tuple[int, str]:
    """Exit status and output. A process that is stuck in the driver survives its kill, so nothing waits for it."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return 127, error.strerror or str(error)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, signal.SIGKILL)
        raise TimeoutError(f"took more than {SECONDS:g} s") from None
    return process.returncode, output
