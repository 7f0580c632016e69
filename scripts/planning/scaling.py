"""What several GPUs of one host are expected to gain, and what they exchange for it."""

from dataclasses import replace
from typing import Any

from common.plan.memory import GIB, adapter_weights, base_bytes
from common.plan.search import Plan, measure
from common.plan.time import LINK_SHARE


def scaling(one: Plan, sizes: Any) -> float:
    """The tokens/s of a plan over those of one GPU that takes the same steps alone, whether or not they fit it."""
    work = one.work
    alone = replace(
        work, gpus=1, sharded=False, accumulation=work.accumulation * work.gpus, generated=work.generated * work.gpus
    )
    return one.time.tokens_per_second / measure(sizes, alone, one.device).time.tokens_per_second


def scaling_words(one: Plan, sizes: Any) -> list[str]:
    """The expected gain of a plan on several GPUs in words, with its formula; [] for one GPU."""
    work, device = one.work, one.device
    if work.gpus == 1:
        return []
    n, speed = work.gpus, device.link * LINK_SHARE
    gradients = adapter_weights(sizes.architecture, work.lora_r, work.attention_only) * 4 / GIB
    gain = f"{n} GPUs: {scaling(one, sizes):.2f} times the tokens/s of one that takes the same steps"
    lines = [
        f"{gain}; {one.time.exchange * 1e3:.1f} ms of a step are exchange.",
        f"  gradients of the adapter: 2 x {n - 1}/{n} x {gradients:.2f} GiB at {speed:.0f} GB/s "
        f"({LINK_SHARE:.0%} of the link), once a step",
    ]
    if work.sharded:
        base, _ = base_bytes(sizes, work)
        lines.append(f"  the base: 2 x {work.accumulation} x {n - 1}/{n} x {base / GIB:.1f} GiB")
    return lines
