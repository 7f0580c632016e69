"""Run a recipe unchanged as a rank of several, and write down what its training steps exchange with the other ranks.

python tests/system/collectives.py CALLS.json recipes/grpo.py FLAGS...

CALLS.json of rank 0 has a list for each micro-batch: the names of torch.distributed's functions that were called in it.
"""

import atexit
import json
import runpy
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from common.run import ranks, stopping

NAMES = ["all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast", "gather"]
NAMES += ["broadcast_object_list", "gather_object", "monitored_barrier", "reduce", "scatter"]
calls, recipe = Path(sys.argv[1]), sys.argv[2]
micro_batches: list[list[str]] = []
within: list[str] | None = None


def noted(function: Callable) -> Callable:
    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if within is not None:
            within.append(function.__name__)
        return function(*args, **kwargs)

    return called


def begin_steps(*args: Any, **kwargs: Any) -> None:
    from torch import distributed
    from transformers import Trainer

    for name in NAMES:
        setattr(distributed, name, noted(getattr(distributed, name)))
    compute = Trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        global within
        within = []
        micro_batches.append(within)
        try:
            return compute(*args, **kwargs)
        finally:
            within = None

    Trainer.training_step = training_step
    begin(*args, **kwargs)


begin, stopping.Stop.begin_steps = stopping.Stop.begin_steps, begin_steps
if ranks.is_first():
    atexit.register(lambda: calls.write_text(json.dumps(micro_batches), encoding="utf-8"))
sys.argv = [recipe, *sys.argv[3:]]
runpy.run_path(recipe, run_name="__main__")
