"""The tables of docs/plan.md, from runs.json and times.json: planned and measured, for runs that it was not fitted to.

python tests/common/plan/error_table.py
"""

import json
from pathlib import Path
from statistics import mean
from typing import Any

RUNS = Path(__file__).parent / "runs.json"
TIMES = Path(__file__).parent / "times.json"
HEAD = ("run", "planned, GiB", "measured", "off")
HEAD_OF_TIMES = ("run", "planned, s", "measured", "off")


def unseen() -> list[dict[str, Any]]:
    """The runs whose plan was written down before they were measured."""
    return [run for run in json.loads(RUNS.read_text(encoding="utf-8")) if not run["fitted"] and "measured" in run]


def unseen_times() -> list[dict[str, Any]]:
    """The timed runs that set no constant of the plan; `planned` is what docs/plan.md publishes."""
    return [run for run in json.loads(TIMES.read_text(encoding="utf-8")) if not run["fitted"]]


def described(run: dict[str, Any]) -> str:
    """Such as `qwen2.5-7b sft, fp8, nothing recomputed, 2 x 2 x 1024`."""
    given = run["given"]
    precision = "fp8" if given.get("load_in_fp8") else "nf4" if given.get("load_in_4bit") else "16 bit"
    kept = given.get("checkpoint_skip_layers", 0)
    recomputed = f"{kept} layers kept" if kept else "recomputed" if given["gradient_checkpointing"] else "kept"
    length = given.get("max_length") or f"({given['max_prompt_length']} + {given['max_completion_length']})"
    batch = f"{given['per_device_train_batch_size']} x {given['gradient_accumulation_steps']} x {length}"
    model = f"{run['model']} ({run['layers']} layers)" if "layers" in run else run["model"]
    words = [f"{model} {run['method']}", precision, recomputed, batch]
    words += [f"rank {given['lora_r']}"] if given["lora_r"] != 16 else []
    words += [f"groups of {given['num_generations']}"] if "num_generations" in given else []
    words += [f"{given['num_iterations']} iterations"] if "num_iterations" in given else []
    words += [f"{given['num_ppo_epochs']} epochs"] if given.get("num_ppo_epochs", 1) > 1 else []
    words += [word for word in ("packed", "pairs") if run.get(word)]
    words += ["reward model"] if run.get("reward_model") else []
    words += [f"within {run['limit']} GB"] if run.get("limit", 70) < 70 else []
    return ", ".join(words)


def cells(run: dict[str, Any]) -> tuple[str, ...]:
    return (described(run), f"{run['predicted']:.2f}", f"{run['measured']:.2f}", off(run["predicted"], run["measured"]))


def cells_of_time(run: dict[str, Any]) -> tuple[str, ...]:
    return (described(run), f"{run['planned']:.2f}", f"{run['seconds']:.2f}", off(run["planned"], run["seconds"]))


def off(planned: float, took: float) -> str:
    return f"{planned / took - 1:+.1%}".replace("%", " %")


def page(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def line(values) -> str:
    return "| " + " | ".join(values) + " |"


def summary(errors: list[float]) -> str:
    """How many, their mean, the most above and the most below, as cells of a line."""
    shares = mean(map(abs, errors)), max(errors), -min(errors)
    return line((str(len(errors)), *(f"{share:.1%}".replace("%", " %") for share in shares)))


if __name__ == "__main__":
    found, times = unseen(), unseen_times()
    print(page(HEAD, [cells(run) for run in found]))
    print(f"\n{page(HEAD_OF_TIMES, [cells_of_time(run) for run in times])}")
    print("\nMemory: " + summary([run["predicted"] / run["measured"] - 1 for run in found]))
    print("Times: " + summary([run["planned"] / run["seconds"] - 1 for run in times]))
