"""The machine: system, memory, compiler, shared memory, disks, and the hub."""

import http.client
import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterator

from common.memory_limits import free_memory

from env_check.checks import FAILURE, GIB, OK, TRY_AGAIN, WARNING, Check, Facts, first_line, judge

SHARED_MEMORY = "/dev/shm"
COMPILER_SECONDS = 60


def check_system(facts: Facts) -> Iterator[Check]:
    processor = dict(re.findall(r"^(model name|flags)\s*: (.*)", read("/proc/cpuinfo"), re.M))
    # What a CPU is fast with: bitsandbytes' NF4 kernels, and torch in bfloat16.
    names = (("avx2", "AVX2"), ("avx512f", "AVX512"), ("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX"))
    known = [name for flag, name in names if flag in processor.get("flags", "").split()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    found = f"{system} {surroundings()}, {processor.get('model name', 'unknown CPU')}, {cores} cores, {' '.join(known)}"
    fix = "use a machine with Linux on x86-64, for which the locks are made"
    yield judge("system", system == "Linux x86_64", found, "", fix)
    for name, variable in (("image", "IMAGE_DIGEST"), ("Slurm job", "SLURM_JOB_ID")):
        if os.environ.get(variable):
            gpus = f", GPUs {os.environ.get('SLURM_JOB_GPUS', 'none')}" if name == "Slurm job" else ""
            yield Check(name, OK, os.environ[variable] + gpus)

    if free := free_memory():
        size, by = free
        fix = "end other programs; give a container more with --memory, or a Slurm job with --mem"
        yield judge("memory", size >= 4 * GIB, f"{size / GIB:.1f} GiB: {by}", ">= 4 GiB", fix, WARNING)


def surroundings() -> str:
    if os.path.exists("/.dockerenv"):
        return "in Docker"
    if os.path.exists("/run/.containerenv"):
        return "in Podman"
    if "APPTAINER_CONTAINER" in os.environ or "SINGULARITY_CONTAINER" in os.environ:
        return "in Apptainer"
    return "in Kubernetes" if "KUBERNETES_SERVICE_HOST" in os.environ else "on the host"


def check_compiler(facts: Facts) -> Iterator[Check]:
    """Triton compiles a launcher for every kernel, so it needs a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), "gcc")
    include = sysconfig.get_paths("posix_prefix")["include"]  # as Triton does; not Debian's posix_local
    line = [compiler, "-fsyntax-only", "-I" + include, "-xc", "-"]
    wanted, error = "gcc and Python.h", ""
    try:
        done = subprocess.run(
            line, input=b"#include <Python.h>\n", capture_output=True, check=False, timeout=COMPILER_SECONDS
        )
        error = first_line(done.stderr.decode("utf-8", "replace")) if done.returncode else ""
    except OSError as failure:
        error = failure.strerror
    except subprocess.TimeoutExpired:
        yield Check("compiler", WARNING, f"slow: took more than {COMPILER_SECONDS} s here", wanted, TRY_AGAIN)
        return
    if not error:
        yield Check("compiler", OK, f"{compiler}, Python.h in {include}")
    elif facts.gpus:
        fix = "apt-get install gcc python3-dev, or set CC"
        yield Check("compiler", FAILURE, f"{compiler}: {error}", wanted, fix)
    else:
        yield Check("compiler", OK, f"{compiler}: {error}; not needed without a GPU")


def check_shared_memory(facts: Facts) -> Iterator[Check]:
    name, wanted = "shared memory", ">= 1 GiB in " + SHARED_MEMORY
    fix = f"mount -t tmpfs -o size=8G tmpfs {SHARED_MEMORY}; start a container with --shm-size 8g"
    try:
        disk = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        yield Check(name, FAILURE, f"{SHARED_MEMORY}: {error.strerror}", wanted, fix)
        return
    if not os.access(SHARED_MEMORY, os.W_OK):
        yield Check(name, FAILURE, SHARED_MEMORY + ": no permission to write", wanted, "chmod 1777 " + SHARED_MEMORY)
    else:
        # Docker gives 64 MiB: in so little, data-loader workers, NCCL and vLLM die of a bus error.
        free = disk.f_bavail * disk.f_frsize / GIB
        yield judge(name, free >= 1, f"{free:.2f} GiB free", wanted, fix, WARNING)


def check_disk(facts: Facts) -> Iterator[Check]:
    try:
        temporary = tempfile.gettempdir()  # it tries to write
    except OSError:
        temporary = os.environ.get("TMPDIR", "/tmp")
    folders = (
        ("outputs", os.path.abspath("outputs"), 10, "write runs to another disk, --output-dir=/another/disk/run"),
        ("hub cache", hub_cache(), 20, "move it, export HF_HOME=/another/disk"),
        ("temporary", temporary, 1, "move it, export TMPDIR=/another/disk"),
    )
    good = []
    for name, path, gib, elsewhere in folders:
        nearest, wanted = existing(path), f">= {gib} GiB, writable"
        try:
            free = shutil.disk_usage(nearest).free / GIB
            with tempfile.TemporaryFile(dir=nearest) as file:  # without a name, and gone when closed
                file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())  # a quota is noticed only now
        except OSError as error:
            yield Check(name, FAILURE, f"{path}: {error.strerror or error}", wanted, "fix that, or " + elsewhere)
            continue
        if free >= gib:
            good.append(f"{name} {free:.0f} GiB")
        else:
            status = FAILURE if free < gib / 20 else WARNING
            yield Check(name, status, f"{free:.2f} GiB free in {path}", wanted, "free some space, or " + elsewhere)
    if good:
        yield Check("disk", OK, "free for " + ", ".join(good))


def check_hub(facts: Facts) -> Iterator[Check]:
    endpoint, token = os.environ.get("HF_ENDPOINT") or "https://huggingface.co", hub_token()
    found = re.sub("//[^/]*@", "//", endpoint) + (", a token is set" if token else ", no token")  # no password shown
    found += ", through ModelScope" if os.environ.get("UNSLOTH_USE_MODELSCOPE") == "1" else ""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Check("hub", OK, found + "; HF_HUB_OFFLINE is set")
    elif not facts.online:
        yield Check("hub", OK, found + "; not contacted without --online")
    else:
        error = contact_hub(endpoint, token)
        fix = "check the network, HTTPS_PROXY and HF_ENDPOINT; after a refusal HF_TOKEN"
        yield judge("hub", not error, f"{found}; {error or 'reachable'}", "reachable", fix)


def contact_hub(endpoint: str, token: str) -> str:
    """Why the hub gives no good answer, "" when it does: about the owner of the token, without one about any model."""
    path = "/api/whoami-v2" if token else "/api/models?limit=1"
    try:
        request = urllib.request.Request(endpoint.rstrip("/") + path)
        if token:
            request.add_unredirected_header("Authorization", "Bearer " + token)
        with urllib.request.urlopen(request, timeout=10) as response:
            json.loads(response.read().decode("utf-8", "replace"))
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
        return first_line(error)
    return ""


def hub_home() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.expanduser(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface"))


def hub_cache() -> str:
    """The folder that huggingface_hub downloads into, by the rules of its constants.py."""
    return os.path.abspath(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(hub_home(), "hub")))


def hub_token() -> str:
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    return (token or read(os.environ.get("HF_TOKEN_PATH") or os.path.join(hub_home(), "token"))).strip()


def existing(path: str) -> str:
    """`path`, or the nearest folder above it that exists."""
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def read(path: str | os.PathLike) -> str:
    """The text of a file, "" where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
