"""What a run shows at its end: the time taken, the first and the last value it is about, and what to type next."""

import json
import os
import shlex
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from common.environment import ROOT
from common.run.folder import Run
from common.run.progress import duration
from common.run.screen import end_live

METRICS = {"grpo": ("reward", "reward"), "ppo": ("score", "score/mean")}  # name and key in metrics.jsonl; else the loss


def show_ending(console: Console, run: Run, saved: Path) -> None:
    """Print how the run ended and the next commands, and record its first and last loss, reward or score.

    Args:
        run: a run whose weights are saved, in `saved`.
        saved: the folder of the adapter or of the model.
    """
    end_live()
    name, key = METRICS.get(run.record["recipe"], ("loss", "loss"))
    values = first_and_last(run.folder / "metrics.jsonl", key)
    if values:
        run.update(**{name: {"first": values[0], "last": values[1]}})
    change = f", {name} {values[0]:.4g} at the first step, {values[1]:.4g} at the last" if values else ""
    console.print(f"Done in {duration(run.seconds)}{change}", highlight=False, soft_wrap=True)
    console.print(f"{saved.name.capitalize()} in [bold]{escape(str(saved))}[/bold]", highlight=False, soft_wrap=True)
    if commands := next_commands(run, saved):
        console.print("Next:")
        for command in commands:
            console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


def next_commands(run: Run, saved: Path) -> list[str]:
    """The commands that make sense after a run, with its folders; none in a pipeline, which runs them itself."""
    if "PIPELINE_STAGE" in os.environ:
        return []
    recipe, arguments = run.record["recipe"], run.record["arguments"]
    model, data = (arguments[name]["value"] for name in ("model", "data"))
    own_data = not Path(data).absolute().is_relative_to(ROOT / "data_samples")
    if recipe == "reward" and saved.name == "adapter":
        return [make("ppo", MODEL=model, REWARD=run.folder, DATA=data if own_data else None)]
    if recipe == "reward":
        return [make("test-rewards", REWARDS=f"model:{saved}", DATA=data if own_data else None)]
    held_out = "your-held-out.jsonl" if own_data else None  # to be replaced; evaluate has some for the sample data
    evaluate = make("evaluate", **{"ADAPTER" if saved.name == "adapter" else "MODEL": saved, "DATA": held_out})
    if saved.name == "model":
        return [evaluate, make("compare", A=model, B=saved)]
    return [evaluate if recipe in ("sft", "grpo") else make("compare", A=model, B=saved), make("merge", ADAPTER=saved)]


def make(target: str, **variables: object) -> str:
    """A make command that gives those variables which are not None, quoted for a shell."""
    words = [f"{name}={value}" for name, value in variables.items() if value is not None]
    return " ".join(["make", target, *(shlex.quote(word) for word in words)])


def first_and_last(metrics: Path, key: str) -> tuple[float, float] | None:
    """The first and the last value that was logged under `key`; None where there is none."""
    if not metrics.exists():
        return None
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    values = [row[key] for row in rows if key in row]
    return (values[0], values[-1]) if values else None
