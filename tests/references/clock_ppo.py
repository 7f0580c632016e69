"""Run recipes/ppo.py as it is, and write down what every step took and the most memory held, as plain_ppo.py.

python tests/references/clock_ppo.py FIGURES.json FLAGS...
"""

import atexit
import json
import resource
import sys
import time
from pathlib import Path

figures = Path(sys.argv.pop(1))
recipe = Path(__file__).parents[2] / "recipes" / "ppo.py"
sys.path.insert(0, str(recipe.parent))
import ppo  # noqa: E402  from the recipe's folder

marks: list[list[float]] = []  # before the first step, and at the end of each


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def mark() -> None:
    marks.append([time.monotonic(), time.process_time(), peak_mib()])


def generate(*args):
    if not marks:
        mark()
    return sample(*args)


def step(*args):
    stats = move(*args)
    mark()
    return stats


def write() -> None:
    import torch

    gpu_gib = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
    figures.write_text(json.dumps({"marks": marks, "peak_mib": peak_mib(), "gpu_gib": gpu_gib}), encoding="utf-8")


sample, move = ppo.generate, ppo.step
ppo.generate, ppo.step = generate, step
atexit.register(write)
sys.argv[0] = str(recipe)
ppo.run_command(ppo.main)
