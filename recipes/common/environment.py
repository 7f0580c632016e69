"""Environment variables to set before unsloth is imported, and a description of this machine and code for run.json."""

import functools
import hashlib
import os
import platform
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.data.rows import Source
    from common.lm.hub import Model

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "trl", "unsloth", "unsloth_zoo", "peft", "bitsandbytes", "accelerate")
PACKAGES += ("datasets", "tokenizers", "vllm")
COMPILED = ("torch", "triton", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "accelerate", "bitsandbytes")
COMPILED += ("vllm",)
GPUS = Path("/proc/driver/nvidia/gpus")
# Variables that change how numbers are computed, or could; none that holds a path or a key.
SETTINGS = re.compile(
    r"PYTHONHASHSEED|ATEN_CPU_CAPABILITY|CUBLAS_WORKSPACE_CONFIG|CUDA_LAUNCH_BLOCKING|NVIDIA_TF32_OVERRIDE"
    r"|(OMP|MKL|TORCH|TORCHINDUCTOR|PYTORCH|UNSLOTH)_(?!\w*(KEY|TOKEN|SECRET|PASSWORD))\w+"
)


def set_variables(
    *, models: Iterable["Model"] = (), sources: Iterable["Source"] = (), sharded: bool = False, reference: bool = False
) -> None:
    """Set the environment that torch, unsloth and the hub's libraries read when they are imported.

    Call it before the first of them is imported. `models` and `sources` are everything that the command loads or
    reads, reward models included: where all of it is on this machine, every request to the hub is forbidden. A value
    that the user set stays. Mirrors (HF_ENDPOINT) and UNSLOTH_USE_MODELSCOPE are read by the libraries themselves.
    With `sharded` Unsloth divides the model among the ranks (FSDP2) when the trainer is made. With `reference` a policy
    is compared with its reference policy.
    """
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # else it downloads to count users, and waits for it
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # No torch.load, of whichever library, runs what a pickle names: it reads tensors and plain values, or raises.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # the opposite, with which torch would refuse both
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # a core holds tokens
    compiled = compiled_code()
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(compiled / "unsloth"))  # else the working directory
    os.environ.setdefault("TRITON_CACHE_DIR", str(compiled / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled / "inductor"))  # else in /tmp
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else a warning at every fork
    _tokenize_alone_in_forks()
    # Threads that wait for each other spin this often, then sleep. With the default, a small model trained ten times
    # slower beside any other process; without spinning it is a fifth slower on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if sharded:
        os.environ["UNSLOTH_FSDP2"] = "1"
    if reference:
        # Policy and reference policy are compiled as two graphs. What torch fuses it computes in 32 bit, with roundings
        # left out that one graph has and the other not: a new adapter would differ from its base, in fp8 by nats.
        os.environ.setdefault("TORCHINDUCTOR_EMULATE_PRECISION_CASTS", "1")
    models = list(models)
    if models:
        from common.lm.own_code import check_trusted, import_anew  # late, as check_hub below

        check_trusted(models)
        if any(model.trusted for model in models):
            import_anew()
    datasets = [source for source in sources if isinstance(source, str)]
    if all(model.local for model in models) and not datasets:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    else:
        from common.lm.network import check_hub  # late, for it imports what is imported by nearly everything

        check_hub(models, datasets)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@functools.cache
def _tokenize_alone_in_forks() -> None:
    """Have every fork of this process tokenize on one thread.

    It has none of the threads that this process tokenizes with, and by "true" a batch would wait for them forever.
    """
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


def compiled_code() -> Path:
    """The folder for what Unsloth, Triton and torch compile, kept between runs: compiling a 7B takes most of a minute.

    It is below COMPILED_CODE, which an image sets to a volume, else below .cache. Another version of what compiles or
    is compiled, another GPU, processor or C library has another folder: two images, or two machines, that share a cache
    do not undo each other's, and none runs instructions that its processor lacks.
    """
    versions = [f"{name} {_version(name)}" for name in COMPILED]
    versions += [platform.python_version(), *platform.libc_ver(), _cpu_name()]
    key = f"torch-{_version('torch')}-{hashlib.sha256(' '.join(versions).encode()).hexdigest()[:8]}-{_device()}"
    return Path(os.environ.get("COMPILED_CODE") or ROOT / ".cache" / "compiled") / re.sub(r"[^\w.+-]+", "-", key)


def quiet_loggers() -> None:
    """Silence log messages of the libraries that a user can do nothing about. Imports torch."""
    import logging  # late, as importlib.metadata below: the launcher, which every make target starts, needs ROOT alone

    import torch  # noqa: F401  the import sets the levels of its loggers, so ours come after it

    # transformers.generation warns that max_new_tokens, which we set, overrides the model's own limit.
    for name in ("torch.utils._pytree", "torchao", "bitsandbytes", "transformers.generation.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def describe_code() -> dict[str, Any]:
    """Commit, dirty flag, lock, image and package versions."""
    return {
        # An image that holds the recipes has no repository; it names the commit that it was built from.
        "git": {
            "commit": _git("rev-parse", "HEAD") or os.environ.get("IMAGE_COMMIT"),
            "dirty": bool(_git("status", "--porcelain")),
        },
        "lock": installed_lock(),
        "image": os.environ.get("IMAGE_DIGEST"),
        "recipes": recipes_sha256(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def recipes_sha256() -> str:
    """One sha256 over the code and the model cards below recipes/: the same in every clone, dirty or not."""
    total = hashlib.sha256()
    folder = ROOT / "recipes"
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".toml")):
        total.update(f"{file.relative_to(folder).as_posix()}\n".encode() + file.read_bytes())
    return total.hexdigest()


def describe_machine() -> dict[str, Any]:
    """Host, processor, what else decides the bits of a run, and the GPU with its driver; of several ranks all of them.

    Imports torch. Every rank has to call it.
    """
    import torch

    from common.run.ranks import gather_objects, world_size

    machine: dict[str, Any] = {
        "host": platform.node(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "locale": next((os.environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), "C"),
        "settings": {
            name: value
            for name, value in sorted(os.environ.items())
            if SETTINGS.fullmatch(name) and os.sep not in value
        },
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        driver = Path("/proc/driver/nvidia/version")
        machine |= {
            "gpu": gpu.name,
            "gpu_memory_gib": round(gpu.total_memory / 2**30, 1),
            "capability": f"{gpu.major}.{gpu.minor}",
            "cuda": torch.version.cuda,
            "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        }
    if world_size() > 1:
        of_ranks = gather_objects((machine["host"], machine.get("gpu", "cpu"), os.environ.get("SLURM_NODEID", "0")))
        machine |= {
            "ranks": world_size(),
            "nodes": len({(host, node) for host, _, node in of_ranks}),
            "devices": [f"{host}: {device}" for host, device, _ in of_ranks],
        }
    if "SLURM_JOB_ID" in os.environ:
        machine["slurm_job"] = os.environ["SLURM_JOB_ID"]
    return machine


def installed_lock() -> dict[str, str] | None:
    """Name and sha256 of the lock that this environment was installed from; None if it was made another way."""
    mark = Path(sys.prefix) / "lock.sha256"  # written by scripts/install
    if not mark.exists():
        return None
    sha256, name = mark.read_text().split()
    return {"file": name, "sha256": sha256}


def code_sha256(*places: str) -> str:
    """One hash over Python files of this repository, given as files or folders: the code that made something."""
    found = {file for place in places for file in [ROOT / place, *(ROOT / place).rglob("*.py")] if file.is_file()}
    total = hashlib.sha256()
    for file in sorted(found):
        total.update(f"{file.relative_to(ROOT)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def _version(name: str) -> str | None:
    from importlib import metadata

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


def _device() -> str:
    """The models of the GPUs as the driver names them, without torch; of a machine without any, the processor."""
    from common.nvidia import gpus_hidden  # late, for the launcher needs nothing of this module but ROOT

    if not gpus_hidden():
        lines = [line for file in GPUS.glob("*/information") for line in file.read_text().splitlines()]
        if models := {line.partition(":")[2].strip() for line in lines if line.startswith("Model:")}:
            return " ".join(sorted(models))
        if Path("/dev/nvidiactl").exists():  # a container without the driver's folder
            return "GPU"
    return _cpu_name()


def _cpu_name() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()
