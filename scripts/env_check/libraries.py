"""What the probes of the libraries found: see probes.py and children.py."""

import sys
from collections.abc import Iterator

from env_check.checks import FAILURE, OK, TRY_AGAIN, WARNING, Check, Facts, judge_probe
from env_check.packages import fix_packages

# GPUs whose direct copies go wrong give wrong numbers, an error, or most often no answer at all.
CONFINED = "a newer kernel, or a container that permits Landlock or user namespaces; only the code reward needs it"
NO_PEERS = "keep NCCL from direct copies: export NCCL_P2P_DISABLE=1; `scripts/run exec unsloth doctor --gpus` says more"


def check_torch(facts: Facts) -> Iterator[Check]:
    result, about = facts.result("torch"), facts.torch
    found = ""
    if about:
        found = ("CUDA {cuda}, cuDNN {cudnn}" if about["cuda"] else "a CPU build, {threads} threads").format(**about)
    yield from judge_probe("torch call", result, found, "a product of two matrices", fix_packages())


def check_libraries(facts: Facts) -> Iterator[Check]:
    lines = (
        ("unsloth", "unsloth import", FAILURE, fix_packages()),
        ("bitsandbytes", "4 bit", FAILURE, fix_packages() + "; or train with --no-load-in-4bit"),
        ("triton", "triton kernel", FAILURE, "first fix the compiler line; then " + fix_packages()),
        ("torchao", "torchao import", WARNING, fix_packages()),
        ("torchvision", "torchvision call", FAILURE, fix_packages()),
        ("vllm", "vllm import", WARNING, "make setup VARIANT=cuda-vllm; only --rollouts vllm needs it"),
        ("nccl", "several GPUs", WARNING, NO_PEERS),
        ("sandbox", "code sandbox", WARNING, CONFINED),
    )
    for probe, name, status, fix in lines:
        result = facts.result(probe)
        if_slow = f"{TRY_AGAIN}; if it is idle, {fix}" if probe == "nccl" else TRY_AGAIN
        yield from judge_probe(name, result, result.value, "", fix, status, if_slow)


def check_attention(facts: Facts) -> Iterator[Check]:
    """Which attention Unsloth will use here, in the order of its utils/attention_dispatch.py and flash_impl.py."""
    if not facts.torch:
        return
    works = {name for name, result in facts.results.items() if result.value}
    for name in ("sdpa", "varlen"):
        if not facts.result(name).works:
            yield from judge_probe(name, facts.result(name), "", "torch's own attention", fix_packages())
    if not facts.gpus:
        yield Check("attention", OK, "torch's SDPA; rows are padded, not packed")
        return
    packages = {"flash-attn 2": "flash-attn", "flash-attn 3": "flash_attn_3", "flash-attn 4": "flash-attn-4"}
    for name in (*packages, "xformers"):
        if not facts.result(name).works:
            fix = f"{sys.executable} -m pip uninstall {packages.get(name, name)}; it is not needed"
            yield from judge_probe(name, facts.result(name), "", "one that works, or none", fix, WARNING)
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
