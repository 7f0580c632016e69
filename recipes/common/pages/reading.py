"""What the folder of a run holds, read while the run may still write it."""

import heapq
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.pages.evaluation import read_evaluation
from common.run.files import read_jsonl
from common.run.record import read_record
from common.run.samples import read_samples

SHOWN = 5  # completions of either kind


@dataclass(frozen=True)
class RunFiles:
    """A run as its files have it. Lines that a running or a killed process left half are not in it."""

    folder: Path
    record: dict[str, Any]  # run.json
    metrics: list[dict[str, Any]]  # rows of metrics.jsonl, in their order
    samples: list[dict[str, Any]]  # samples.json: held-out prompts, completed before and after; empty until the end
    completions: int  # in samples.jsonl, which GRPO and PPO write
    best: list[dict[str, Any]]  # of these the distinct ones with the highest rewards, of equal ones the latest
    worst: list[dict[str, Any]]
    evaluation: dict[str, Any]  # evaluation.json, by `make evaluate`; empty without one

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def recipe(self) -> str:
        return str(self.record.get("recipe", "run"))

    @property
    def arguments(self) -> dict[str, Any]:
        """{name: value} of the recipe's arguments."""
        return {name: argument["value"] for name, argument in self.record.get("arguments", {}).items()}


def run_folders(run: tuple[str, ...]) -> list[Path]:
    """The folders that --run names. Raises InputError where there are none, and where one holds no run."""
    if not run:
        raise InputError("--run needs the folder of a run, for example --run outputs/try")
    folders = [Path(one).expanduser() for one in run]
    for folder in folders:
        read_run(folder)
    return folders


def read_run(folder: Path) -> RunFiles:
    """The run in a folder. Raises InputError where there is none."""
    record = read_record(folder)
    completions = Ends()
    for entry in read_jsonl(folder / "samples.jsonl"):
        completions.add(entry)
    return RunFiles(
        folder=folder,
        record=record,
        metrics=[row for row in read_jsonl(folder / "metrics.jsonl") if isinstance(row.get("step"), int)],
        samples=read_samples(folder),
        completions=completions.count,
        best=completions.best(),
        worst=completions.worst(),
        evaluation=read_evaluation(folder),
    )


class Ends:
    """The completions with the highest and the lowest rewards among many, few of which are kept."""

    def __init__(self) -> None:
        self.count = 0
        self.highest: dict[tuple[str, str], tuple[float, int, dict[str, Any]]] = {}
        self.lowest: dict[tuple[str, str], tuple[float, int, dict[str, Any]]] = {}

    def add(self, entry: dict[str, Any]) -> None:
        reward = reward_of(entry)
        self.count += 1
        if reward is None:
            return
        key = (json.dumps(entry.get("prompt")), str(entry.get("completion")))
        for kept, sign in ((self.highest, 1), (self.lowest, -1)):
            kept[key] = (sign * reward, self.count, entry)
            if len(kept) > 20 * SHOWN:
                first = heapq.nlargest(SHOWN, kept.items(), key=lambda item: item[1][:2])
                kept.clear()
                kept.update(first)

    def best(self) -> list[dict[str, Any]]:
        return self._first(self.highest)

    def worst(self) -> list[dict[str, Any]]:
        """None that is among the best: of few completions each is shown once."""
        return self._first({key: one for key, one in self.lowest.items() if one[2] not in self.best()})

    def _first(self, kept: dict[tuple[str, str], tuple[float, int, dict[str, Any]]]) -> list[dict[str, Any]]:
        return [entry for _, _, entry in heapq.nlargest(SHOWN, kept.values(), key=lambda one: one[:2])]


def reward_of(entry: dict[str, Any]) -> float | None:
    """The reward of a line of samples.jsonl; PPO, whose reward has the KL in it, calls it a score."""
    reward = entry.get("reward", entry.get("score"))
    return float(reward) if isinstance(reward, int | float) and math.isfinite(reward) else None
