"""Settings in words, and as the arguments that make them. Standard library only."""

import shlex
from typing import Any

from common.arguments import variable
from common.errors import SPELLING
from common.plan.workload import Workload


def setting_words(work: Workload) -> str:
    """Precision, recomputation and micro-batch, such as "nf4, activations recomputed, 4 x 4 rows"."""
    return f"{work.precision}, {recomputed(work)}, {work.rows} x {work.accumulation} {unit(work)}"


def recomputed(work: Workload) -> str:
    """What is recomputed in the backward pass."""
    if not work.gradient_checkpointing:
        return "nothing recomputed"
    return f"{work.kept_layers} layers kept" if work.kept_layers else "activations recomputed"


def unit(work: Workload) -> str:
    """What a row of the method is."""
    return {"dpo": "pairs", "grpo": "completions", "ppo": "completions"}.get(work.method, "rows")


def arguments(changed: dict[str, Any]) -> str:
    """Arguments as the user gives them: as variables where make started this command, else as flags."""
    if SPELLING == "make":
        return variables(changed)
    return " ".join(word for name, value in changed.items() for word in as_flag(name, value))


def as_flag(name: str, value: Any) -> list[str]:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    return [f"--{dashed}", *map(str, value)] if isinstance(value, tuple) else [f"--{dashed}", str(value)]


def variables(changed: dict[str, Any]) -> str:
    """Arguments as variables of make: "MAX_LENGTH=1024 LOAD_IN_4BIT=no"."""
    return " ".join(f"{variable(name)}={shlex.quote(_typed(value))}" for name, value in changed.items())


def _typed(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
