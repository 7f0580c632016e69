"""What a run shows at its end: the time taken, the first and the last value it is about, and what to type next."""

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from common.commands import command
from common.environment import ROOT
from common.run.files import read_jsonl
from common.run.folder import Run
from common.run.health.ending import end_health
from common.run.progress import duration
from common.run.record import measure_of
from common.run.screen import end_live

WORTH_EVALUATING = 10  # held-out rows


def show_ending(console: Console, run: Run, saved: Path) -> None:
    """Print how the run ended and the next commands, and record its first and last loss, reward or score.

    Args:
        run: a run whose weights are saved, in `saved`.
        saved: the folder of the adapter or of the model.
    """
    end_live()
    name, key = measure_of(run.record["recipe"])
    values = first_and_last(run.folder / "metrics.jsonl", key)
    if values:
        run.update(**{name: {"first": values[0], "last": values[1]}})
    end_health(run)
    change = f", {name} {values[0]:.4g} at the first step, {values[1]:.4g} at the last" if values else ""
    console.print(f"Done in {duration(run.seconds)}{change}", highlight=False, soft_wrap=True)
    console.print(Text.assemble(f"{saved.name.capitalize()} in ", (str(saved), "bold")), soft_wrap=True)
    if commands := next_commands(run, saved):
        console.print("Next:")
        for one in commands:
            console.print(f"  {one}", markup=False, highlight=False, soft_wrap=True)


def next_commands(run: Run, saved: Path) -> list[str]:
    """Up to three commands that make sense after a run and run as they stand; none in a pipeline, which runs them."""
    if "PIPELINE_STAGE" in os.environ:
        return []
    recipe = run.record["recipe"]
    given = {name: argument["value"] for name, argument in run.record["arguments"].items()}
    is_sample = Path(given["data"]).absolute().is_relative_to(ROOT / "data_samples")
    evaluate = command("evaluate", run=run.folder)
    # Rows of the run's own, where they are more than a few, or sample data that nothing trains on.
    held_out = (is_sample and recipe in ("sft", "dpo", "grpo", "reward")) or (run.record.get("data") or {}).get(
        "held_out", 0
    ) >= WORTH_EVALUATING
    if recipe == "reward":
        ppo: dict[str, Any] = {"model": given["model"]}
        ppo |= {"reward_model": run.folder} if saved.name == "adapter" else {"rewards": [f"model:{saved}"]}
        if not is_sample:  # PPO reads the same rows, for their prompts
            ppo |= {name: given.get(name) for name in ("data", "format", "columns") if given.get(name) != "auto"}
        return [*([evaluate] if held_out or given.get("eval_data") else []), command("ppo", **ppo)]
    compare = command("compare", a=given["model"], b=saved)
    first = evaluate if held_out else compare
    second = command("merge", adapter=saved) if saved.name == "adapter" else compare
    chat = command("chat", run=run.folder) if saved.name == "adapter" else command("chat", model=saved)
    return list(dict.fromkeys([first, chat, second]))


def first_and_last(metrics: Path, key: str) -> tuple[float, float] | None:
    """The first and the last value that was logged under `key`; None where there is none."""
    values = [row[key] for row in read_jsonl(metrics) if key in row]
    return (values[0], values[-1]) if values else None
