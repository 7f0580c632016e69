"""Run one small call of each library and compare it with what it must compute; `make check` does so in children.

    python -P scripts/env_check/probes.py torch sdpa bitsandbytes

A probe returns what is worth showing, None where there is nothing to try, and raises when the library fails. Each
prints one JSON line: its name, what it returned, its error. The first that fails is the last, because it may have left
the process broken: children.py starts a new one for the rest.
"""

import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

from common.environment import set_variables


def torch_itself() -> dict[str, Any]:
    """Its build, and each GPU that it sees, after a matrix product on it."""
    import torch

    gpus, why = [], ""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)  # bytes
            ones = torch.ones(64, 64, device=index)
            if (ones @ ones).sum().item() != 64**3:
                raise RuntimeError(f"GPU {index} multiplies wrongly")
            gpus.append({"name": about.name, "capability": (about.major, about.minor), "free": free, "total": total})
    elif torch.version.cuda:
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            why = first_line(error)
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,  # None for a CPU build
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "why": why,  # a CUDA build sees none
    }


def sandbox() -> str:
    """What confines the programs that the `code` reward runs."""
    from common.rewards.sandbox import confinement

    return confinement()


def bitsandbytes() -> str:
    """A forward and a backward pass through an NF4 layer, compared with the layer it was made from."""
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Without its native library it imports all the same, and on a CPU computes with a fallback, 400 times slower.
    handle = "cdequantize_blockwise_fp32" if device == "cuda" else "cdequantize_blockwise_cpu_fp32"
    if not hasattr(getattr(bitsandbytes.functional.lib, handle), "restype"):  # which a ctypes function has
        raise RuntimeError("its native library is missing or does not load")
    dtype = half_precision() if device == "cuda" else torch.float32
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
    weights = layer.weight.detach().clone().float().to(device)
    layer = layer.to(device)  # this quantizes
    inputs = torch.randn(32, 128, device=device, dtype=dtype, requires_grad=True)
    outputs = layer(inputs)
    (gradient,) = torch.autograd.grad(outputs.float().sum(), inputs)
    for what, found, exact in (
        ("NF4", outputs.detach(), inputs.detach().float() @ weights.T),
        ("the gradient through NF4", gradient, weights.sum(0).expand(32, 128)),
    ):
        error = ((found.float() - exact).norm() / exact.norm()).item()
        if not error < 0.3:  # nf4 is off by a tenth
            raise RuntimeError(f"{what} is off by {error:.0%}")
    return f"forward and backward on the {'GPU' if device == 'cuda' else 'CPU'}"


def triton() -> str | None:
    """Compile and launch a kernel."""
    import torch

    if not torch.cuda.is_available():
        return None
    import triton

    global language  # a kernel finds its names among the module's
    import triton.language as language

    @triton.jit
    def double(source, target, length, block: language.constexpr):
        offsets = language.program_id(0) * block + language.arange(0, block)
        inside = offsets < length
        language.store(target + offsets, 2 * language.load(source + offsets, mask=inside), mask=inside)

    source = torch.arange(1000, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    double[(8,)](source, target, 1000, block=128)
    if not torch.equal(target, 2 * source):
        raise RuntimeError("a compiled kernel computes wrongly")
    return "compiled and ran"


def torchao() -> str:
    import torchao

    return torchao.__version__


def torchvision() -> str:
    """A call of its native code, which must fit torch's."""
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0], [20.0, 20.0, 30.0, 30.0]])
    if torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() != [0, 2]:  # the second is the first
        raise RuntimeError("torchvision.ops.nms computes wrongly")
    return torchvision.__version__


def nccl() -> str | None:
    """A sum over all GPUs, and unless NCCL_P2P_DISABLE is set, copies between every two of them."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return None
    peers, by_host = True, os.environ.get("NCCL_P2P_DISABLE") == "1"  # each process trains on one GPU: NCCL copies
    for one, other in [] if by_host else itertools.permutations(range(count), 2):
        source = torch.arange(2**20, dtype=torch.float32, device=one)
        target = torch.full_like(source, -1.0, device=other)  # an IOMMU can drop a copy that CUDA calls done
        target.copy_(source)
        torch.cuda.synchronize(one)
        torch.cuda.synchronize(other)
        if not torch.equal(target.cpu(), source.cpu()):
            raise RuntimeError(f"a copy from GPU {one} to GPU {other} arrives wrong")
        peers = peers and torch.cuda.can_device_access_peer(one, other)
    shares = [torch.full((1024,), index + 1.0, device=index) for index in range(count)]
    torch.cuda.nccl.all_reduce(shares)
    if any((share != count * (count + 1) / 2).any().item() for share in shares):
        raise RuntimeError(f"an all-reduce over {count} GPUs sums wrongly")
    version = ".".join(map(str, torch.cuda.nccl.version()))
    access = "peer access" if peers else "no peer access, so through the memory of the host"
    access = "no peer access (NCCL_P2P_DISABLE=1)" if by_host else access
    return f"NCCL {version}, all-reduce over {count} GPUs, {access}"


def unsloth() -> str:
    import unsloth

    return unsloth.__version__


def vllm() -> str:
    from vllm import LLM  # noqa: F401  which loads the engine and its kernels

    return metadata.version("vllm")


def sdpa() -> str:
    import torch

    def attend(*heads):
        swapped = (tensor.transpose(1, 2) for tensor in heads)  # it takes (B, H, T, D)
        return torch.nn.functional.scaled_dot_product_attention(*swapped, is_causal=True).transpose(1, 2)

    return try_attention(attend)


def varlen() -> str | None:
    """torch's attention over packed documents. Unsloth uses the one of torch 2.12 and later, on capability 8.0."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 8:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    if not {"enable_gqa", "window_size"} <= set(inspect.signature(varlen_attn).parameters):
        return None

    def attend(*heads):
        query, key, value = (tensor.squeeze(0) for tensor in heads)  # it takes (T, H, D)
        length = len(query)
        starts = torch.tensor([0, length], device="cuda", dtype=torch.int32)
        causal = (-1, 0)
        out = varlen_attn(query, key, value, starts, starts, length, length, window_size=causal)
        return (out[0] if isinstance(out, tuple) else out).unsqueeze(0)

    return try_attention(attend)


def flash_attention(module: str) -> str:
    attend = import_module(module).flash_attn_func
    return try_attention(lambda *heads: attend(*heads, causal=True))


def xformers() -> str:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    return try_attention(lambda *heads: memory_efficient_attention(*heads, attn_bias=LowerTriangularMask()))


def try_attention(attend: Callable) -> str:
    """Run `attend` on query, key and value, each (B, T, H, D), and compare it with the definition of attention."""
    import torch

    on_gpu = torch.cuda.is_available()
    dtype, device = (half_precision(), "cuda") if on_gpu else (torch.float32, "cpu")
    heads = [torch.randn(1, 64, 4, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    out = attend(*heads)
    out = out[0] if isinstance(out, tuple) else out  # some return the log-sum-exp, too
    query, key, value = (tensor.detach().float().transpose(1, 2) for tensor in heads)
    scores = query @ key.transpose(-1, -2) / 64**0.5
    later = torch.ones(64, 64, dtype=torch.bool, device=device).triu(1)
    exact = (scores.masked_fill(later, float("-inf")).softmax(-1) @ value).transpose(1, 2)
    error = (out.detach().float() - exact).abs().max().item()
    if not error < 0.05:  # bfloat16 rounds values of this size by 0.02
        raise RuntimeError(f"attention is off by {error:.2g}")
    gradients = torch.autograd.grad(out.float().sum(), heads)
    if not all(torch.isfinite(gradient).all().item() for gradient in gradients):
        raise RuntimeError("the gradients of attention are not finite")
    return "forward and backward"


def half_precision():
    import torch

    return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16


def first_line(error: BaseException) -> str:
    """The first line of an error; those of torch continue with advice for its developers."""
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), "")


PROBES: dict[str, Callable[[], Any]] = {
    "torch": torch_itself,
    "sandbox": sandbox,
    "sdpa": sdpa,
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
    "torchvision": torchvision,
    "triton": triton,
    "varlen": varlen,
    "flash-attn 2": lambda: flash_attention("flash_attn"),
    "flash-attn 3": lambda: flash_attention("flash_attn_interface"),
    "flash-attn 4": lambda: flash_attention("flash_attn.cute.interface"),
    "xformers": xformers,
    "nccl": nccl,
    "unsloth": unsloth,
    "vllm": vllm,
}


def main() -> None:
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    set_variables()
    os.system = lambda command: 1  # as root, unsloth would run ldconfig to link CUDA; a check changes nothing
    for name in sys.argv[1:]:
        value, error = None, ""
        try:
            value = PROBES[name]()
        except (Exception, SystemExit) as failure:  # noqa: BLE001  whatever it is, it is the result
            error = f"{type(failure).__name__}: {first_line(failure)}"
        print(json.dumps([name, value, error]), file=results, flush=True)
        if error:
            break
    os._exit(0)  # some libraries hang or crash when the interpreter ends


if __name__ == "__main__":
    main()
