"""What must be set before unsloth is imported, and what is known about this machine and the code it runs."""

import logging
import os
import platform
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "trl", "unsloth", "unsloth_zoo", "peft", "bitsandbytes", "accelerate")
PACKAGES += ("datasets", "tokenizers", "vllm")


def set_variables(offline: bool) -> None:
    """Set the environment that torch, unsloth and the hub read when they are imported; so before any of them is.

    `offline` forbids every request to the hub: right when the model and the data are local. A value that the user set
    stays. Mirrors (HF_ENDPOINT) and UNSLOTH_USE_MODELSCOPE are the libraries' own and are left alone.
    """
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # else it downloads to count users, and waits for it
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(ROOT / ".cache" / "unsloth"))  # else the working directory
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else a warning at every fork
    # Threads that wait for each other spin this often, then sleep. The default spins so long that beside any other
    # process a small model trained ten times slower; never to spin costs a fifth on a machine of its own.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if offline:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def quiet_loggers() -> None:
    """Silence what the libraries say of their own business: none of it is news a user can act on. Imports torch."""
    import torch  # noqa: F401  it sets the levels of its loggers when it is imported, so ours come after

    # transformers.generation warns that max_new_tokens, which we give, wins over the model's own limit.
    for name in ("torch.utils._pytree", "torchao", "bitsandbytes", "transformers.generation.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def is_first_process() -> bool:
    """Is this the one that writes and prints, of the processes that torchrun started? True where there is only one."""
    return os.environ.get("RANK", "0") == "0"


def describe_code() -> dict[str, Any]:
    """Commit, dirty flag, lock, image and package versions: what ran."""
    return {
        # An image with the recipes in it has no repository, but says which commit it was built from.
        "git": {
            "commit": _git("rev-parse", "HEAD") or os.environ.get("IMAGE_COMMIT"),
            "dirty": bool(_git("status", "--porcelain")),
        },
        "lock": installed_lock(),
        "image": os.environ.get("IMAGE_DIGEST"),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def describe_machine() -> dict[str, Any]:
    """Host, processor, and the GPU with its driver where there is one. Imports torch."""
    import torch

    machine: dict[str, Any] = {"host": platform.node(), "cpu": _cpu_name(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        driver = Path("/proc/driver/nvidia/version")
        machine |= {
            "gpu": gpu.name,
            "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
            "capability": f"{gpu.major}.{gpu.minor}",
            "cuda": torch.version.cuda,
            "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        }
    if "SLURM_JOB_ID" in os.environ:
        machine["slurm_job"] = os.environ["SLURM_JOB_ID"]
    return machine


def installed_lock() -> dict[str, str] | None:
    """Name and sha256 of the lock this environment was installed from; None if it was made by other means."""
    mark = Path(sys.prefix) / "lock.sha256"  # written by scripts/install
    if not mark.exists():
        return None
    sha256, name = mark.read_text().split()
    return {"file": name, "sha256": sha256}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()
