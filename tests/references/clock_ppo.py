"""Run recipes/ppo.py unchanged, and record what every step took and the peak memory, as plain_ppo.py does.

python tests/references/clock_ppo.py FIGURES.json FLAGS...
"""

import atexit
import json
import resource
import sys
import time
from pathlib import Path

import ppo

figures = Path(sys.argv.pop(1))
marks: list[list[float]] = []  # before the first step, and at the end of each


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mark() -> None:
    marks.append([time.monotonic(), time.process_time(), peak_mib()])


def timed_step(*args):
    if not marks:
        mark()
    result = ppo_step(*args)
    mark()
    return result


def write() -> None:
    import torch

    gpu_gib = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
    figures.write_text(json.dumps({"marks": marks, "peak_mib": peak_mib(), "gpu_gib": gpu_gib}), encoding="utf-8")


ppo_step, ppo.ppo_step = ppo.ppo_step, timed_step
atexit.register(write)
sys.argv[0] = ppo.__file__
ppo.run_command(ppo.main)
