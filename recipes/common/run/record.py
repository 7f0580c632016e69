"""What other commands read of a run in its folder: its record, its adapter, and the value that it is about."""

import hashlib
import json
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.run.files import read_object

METRICS = {"grpo": ("reward", "reward"), "ppo": ("score", "score/mean")}


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of the run in `folder`. Raises InputError where there is none, or none that can be read."""
    file = folder / "run.json"
    if not file.is_file():
        raise InputError(f"{folder}: holds no run; give the folder of a run, which has a run.json")
    return read_object(file)


def identity_of(matters: dict[str, Any]) -> str:
    """The identity of a run: one sha256 over everything that decides its outcome."""
    return hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()


def adapter_of(folder: Path) -> Path:
    """The adapter of the run in `folder`. Raises InputError where there is no run in it, or no adapter yet."""
    record = read_record(folder)
    if record["recipe"] == "reward":
        raise InputError(
            f"{folder}: a reward model scores and writes nothing; judge it with `make evaluate REWARD={folder}`"
        )
    adapter = folder / "adapter"
    if not adapter.is_dir():
        step = f" after step {record['step']}" if record.get("step") else ""
        raise InputError(f"{folder}: has no adapter yet; the run is {record['status']}{step}, and its command resumes")
    return adapter


def measure_of(recipe: str) -> tuple[str, str]:
    """The value that a run of `recipe` is about, its name and its key in metrics.jsonl."""
    return METRICS.get(recipe, ("loss", "loss"))
