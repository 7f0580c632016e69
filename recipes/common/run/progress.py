"""What a run shows while it trains, and the metrics.jsonl it leaves.

On a terminal one live bar; elsewhere (a batch job, a log file) one line per logged step. Speed counts useful tokens:
those of the data, never padding.
"""

import atexit
import json
import resource
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ProgressCallback(TrainerCallback):
    """A live bar and metrics.jsonl.

    Args:
        metrics: the file to append one JSON object per logged step to. Rows of steps that a resumed run does again are
            dropped first.
        epoch_tokens: useful tokens in one pass over the training data; None where the model writes them, which the
            trainer then counts.
        console: where the bar or the lines go.
        shown: the logged values to show, as {name on the line: key in the log}.
    """

    def __init__(
        self, metrics: Path, epoch_tokens: int | None, console: Console, shown: dict[str, str] | None = None
    ) -> None:
        self.metrics = metrics
        self.epoch_tokens = epoch_tokens
        self.console = console
        self.shown = shown or {"loss": "loss"}
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            TextColumn("{task.fields[memory]:.1f} GiB"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task: Any = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.metrics.exists() and state.is_world_process_zero:
            rows = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [row for row in rows if json.loads(row)["step"] <= state.global_step]
            self.metrics.write_text("".join(kept), encoding="utf-8")
        self.start = self.last_time = time.monotonic()
        self.start_step = state.global_step
        self.start_tokens = self.last_tokens = self._tokens(state)
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, values="", speed="-", memory=0.0
        )
        self.bar.start()
        atexit.register(self.bar.stop)  # else an error leaves the terminal without its cursor

    def on_step_end(self, args, state, control, **kwargs) -> None:
        speed = self._speed(self.start_tokens, self.start, state)
        self.bar.update(self.task, completed=state.global_step, speed=f"{speed:,.0f}", memory=memory_gib())

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs) -> None:
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **logs}
        if "loss" in logs:
            row |= {
                "tokens": round(self._tokens(state)),
                "tokens_per_second": round(self._speed(self.last_tokens, self.last_time, state), 1),
                "memory_gib": round(memory_gib(), 2),
            }
            self.last_tokens, self.last_time = self._tokens(state), time.monotonic()
            self.bar.update(self.task, values=self._values(row))
        if state.is_world_process_zero:
            with self.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
        if not self.console.is_terminal and ("loss" in logs or "eval_loss" in logs):
            self.console.print(self._line(row, state), soft_wrap=True, highlight=False)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.bar.stop()

    def _tokens(self, state) -> float:
        if self.epoch_tokens is None:
            return float(state.num_input_tokens_seen)
        return (state.epoch or 0.0) * self.epoch_tokens

    def _values(self, row: dict[str, Any]) -> str:
        return "  ".join(f"{name} {row[key]:.4g}" for name, key in self.shown.items() if key in row)

    def _speed(self, since_tokens: float, since: float, state) -> float:
        return (self._tokens(state) - since_tokens) / max(time.monotonic() - since, 1e-9)

    def _line(self, row: dict[str, Any], state) -> str:
        step = f"step {row['step']}/{state.max_steps}"
        if "eval_loss" in row:
            return f"{step}  eval loss {row['eval_loss']:.4f}"
        elapsed = time.monotonic() - self.start
        left = elapsed / max(row["step"] - self.start_step, 1) * (state.max_steps - row["step"])
        return (
            f"{step}  {self._values(row)}  {row['tokens_per_second']:,.0f} tok/s  "
            f"{row['memory_gib']:.1f} GiB  {left:.0f} s left"
        )


def mean_loss(log_history: list[dict[str, float]]) -> float | None:
    """The mean over the steps of what the trainer logged, of a run that was stopped and gone on with too.

    The trainer's own training_loss divides what it summed up since by the steps of all.
    """
    logged = [(row["step"], row["loss"]) for row in log_history if "loss" in row]
    total = sum(loss * (step - before) for (before, _), (step, loss) in zip([(0, 0), *logged], logged, strict=False))
    return total / logged[-1][0] if logged else None


def memory_gib() -> float:
    """Peak memory so far in GiB: what the GPU's allocator reserved, or without a GPU the process's resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
