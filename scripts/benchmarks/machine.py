"""What this machine can do at most, measured in the same run: matrix products and memory traffic; and what it is.

python -m benchmarks.machine RESULT.json
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = 1.0  # of each measurement


def main() -> None:
    from common.environment import describe_code, describe_machine

    facts = {**describe_machine(), **describe_code(), **peaks(), "clocks": clocks()}
    Path(sys.argv[1]).write_text(json.dumps(facts), encoding="utf-8")


def peaks() -> dict[str, float]:
    """FLOP/s of a large product (bfloat16 on a GPU, else float32) and bytes/s, read and written, of a large copy."""
    import torch

    on_gpu = torch.cuda.is_available()
    device, dtype, size = ("cuda", torch.bfloat16, 8192) if on_gpu else ("cpu", torch.float32, 1024)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.empty(2**31 if on_gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def rate(work, amount: float) -> float:
        for _ in range(3):
            work()
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            for _ in range(10 if on_gpu else 1):
                work()
            if on_gpu:
                torch.cuda.synchronize()
            count += 10 if on_gpu else 1
        return count * amount / (time.perf_counter() - started)

    flops = rate(lambda: torch.mm(left, right, out=product), 2.0 * size**3)
    return {"flops_per_second": flops, "bytes_per_second": rate(lambda: target.copy_(source), 2.0 * source.numel())}


def clocks() -> dict[str, Any] | None:
    """The clocks and the power limit of the GPU, as nvidia-smi has them behind the load above; None without it."""
    names = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(names.split(","), values, strict=True)) if len(values) == 6 else None


if __name__ == "__main__":
    main()
