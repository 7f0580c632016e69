"""What a run shows while it trains, and the metrics.jsonl it leaves.

On a terminal a live bar with the numbers below it; in a log file one line per logged step. Speed counts useful tokens:
those of the data, never padding.
"""

import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from common.run.files import keep_rows
from common.run.profile import Profile
from common.run.progress import LiveBar
from common.run.ranks import gather_objects
from common.run.screen import end_live, wait_for

Shown = Mapping[str, str | tuple[str, str]]  # {name on the screen: key in the log, or the keys of mean and spread}


class ProgressCallback(TrainerCallback):
    """A live bar and metrics.jsonl. The last step is logged, whether or not `logging_steps` divides it.

    Args:
        metrics: the file to append one JSON object per logged step to. Rows of steps that a resumed run repeats are
            dropped first.
        epoch_tokens: useful tokens in one pass over the training data; None where the model writes them, which the
            trainer then counts.
        console: where the lines of a log file go.
        shown: the logged values to show. The first one is what the run is about.
    """

    def __init__(self, metrics: Path, epoch_tokens: int | None, console: Console, shown: Shown | None = None) -> None:
        self.metrics = metrics
        self.epoch_tokens = epoch_tokens
        self.console = console
        self.shown: Shown = {**(shown or {"loss": "loss"}), "eval loss": "eval_loss"}
        self.latest: dict[str, Any] = {}  # the newest value under every key
        self.profile = Profile(metrics.parent / "profile")

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:  # a summary is of an end that was not the run's: it comes again
            keep_rows(self.metrics, lambda row: row.get("step", 0) <= state.global_step and "train_runtime" not in row)
        self.last_time, self.last_tokens = time.monotonic(), self._tokens(state)
        self.bar = LiveBar("step", state.max_steps, state.global_step)
        self.bar.start()
        self.profile.before(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update(state.global_step, [f"{memory_gib():.1f} GiB", *self.bar.facts[1:]])
        if state.global_step >= state.max_steps:
            control.should_log = True
        self.profile.after(state.global_step)
        self.profile.before(state.global_step + 1)

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs) -> None:
        row: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **logs}
        if "loss" in logs:
            tokens, now = self._tokens(state), time.monotonic()
            speed = (tokens - self.last_tokens) / max(now - self.last_time, 1e-9)
            row |= {
                "tokens": round(tokens),
                "tokens_per_second": round(speed, 1),
                "memory_gib": round(memory_gib(), 2),
                "timestamp": round(time.time(), 3),
            }
            if (allocated := allocated_gib()) is not None:
                row["allocated_gib"] = round(allocated, 2)
            of_ranks = gather_objects({name: row[name] for name in ("memory_gib", "allocated_gib") if name in row})
            row |= {name: max(one[name] for one in of_ranks) for name in of_ranks[0]}  # the one with the least room
            self.last_tokens, self.last_time = tokens, now
            self.bar.facts = [f"{row['memory_gib']:.1f} GiB", f"{speed:,.0f} tok/s"]
        self.latest |= row
        self.bar.values = as_text(self.latest, self.shown)
        if state.is_world_process_zero:
            with self.metrics.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
        if not self.console.is_terminal and ("loss" in logs or "eval_loss" in logs):
            self.console.print(self.bar.line(as_text(row, self.shown)), soft_wrap=True, highlight=False)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.profile.finish(state.global_step)
        end_live()
        if state.global_step >= state.max_steps:
            wait_for("Saving, and running the held-out data")  # until show_ending

    def _tokens(self, state) -> float:
        if self.epoch_tokens is None:
            return float(state.num_input_tokens_seen)
        return (state.epoch or 0.0) * self.epoch_tokens


def as_text(row: Mapping[str, Any], shown: Shown) -> list[str]:
    """Those values of a row that are to be shown, as "loss 0.4121"; mean and spread as "math 0.312±0.464"."""
    texts = []
    for number, (name, keys) in enumerate(shown.items()):
        keys = (keys,) if isinstance(keys, str) else keys
        if all(key in row for key in keys):
            digits = 4 if number == 0 else 3
            texts.append(f"{name} " + "±".join(f"{row[key]:.{digits}g}" for key in keys))
    return texts


def mean_loss(log_history: list[dict[str, float]]) -> float | None:
    """The mean over the steps of the loss that the trainer logged, of a run that was stopped and resumed too.

    The trainer's own training_loss divides the sum since the resume by the number of all steps.
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


def allocated_gib() -> float | None:
    """Peak memory of the tensors so far in GiB, without what the allocator reserved besides; None without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
