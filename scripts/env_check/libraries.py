"""Each library by one small call in a child process: see probes.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

from common.environment import ROOT

from env_check.checks import FAILURE, OK, WARNING, Answer, Check, judge
from env_check.packages import has_module, mend_packages
from env_check.processes import end, kill, pipes

# In the order they are asked, torch first: without it none of the others can answer. See scripts/env_check/probes.py.
PROBES = ("torch", "sdpa", "bitsandbytes", "torchao", "torchvision", "triton", "varlen")
PROBES += ("flash-attn 2", "flash-attn 3", "flash-attn 4", "xformers", "nccl", "unsloth", "vllm")
ALONE = ("unsloth", "vllm")  # slow, and each changes other libraries: a child of its own, beside that of the others
CHILD_SECONDS = 90  # for a child; the first import after an installation compiles for a minute


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
    here = str(ROOT / "scripts")  # in which `import evaluate` would find evaluate.py
    path = [str(ROOT / "recipes"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(folder for folder in path if folder not in (here, ""))
    line = [sys.executable, "-P", os.path.join(ROOT, "scripts", "env_check", "probes.py"), *names]
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
