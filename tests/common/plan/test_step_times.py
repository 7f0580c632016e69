"""The planned time of a step against runs that were measured, times.json: the error that docs/plan.md publishes."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import error_table
from common.lm.cards import read_card
from common.plan.devices import DEVICES
from common.plan.memory import linear_weights
from common.plan.search import measure
from common.plan.workload import METHODS, workload

# Seconds of a step, the median of three after two, alone on the GPU: torch 2.13.0+cu130, triton 3.7.1, transformers
# 5.17.0, trl 1.15.0, unsloth 2026.10.9, 2026-11-26. `planned` was written down before the run; the runs that are
# `fitted` were known when the constants of passes.py and time.py were set.
RUNS = json.loads(error_table.TIMES.read_text(encoding="utf-8"))


def card_of(run: dict[str, Any]) -> Any:
    """The run's card, with as many layers as it had."""
    card = read_card(run["model"])
    if "layers" not in run:
        return card
    shape = card.architecture.model_copy(update={"layers": run["layers"]})
    lost = linear_weights(card.architecture) - linear_weights(shape)
    own = {method: getattr(card, method) for method in METHODS if hasattr(card, method)}
    return SimpleNamespace(parameters=card.parameters - lost, architecture=shape, **own)


def planned(run: dict[str, Any]) -> float:
    card = card_of(run)
    given = run["given"] | ({"reward_model": "outputs/reward"} if run.get("reward_model") else {})
    work = workload(card, run["method"], given)
    pairs = bool(run.get("pairs")) or run["method"] != "reward"
    device = DEVICES[run["card"]]
    device = replace(device, gib=min(device.gib, run["limit"]))
    return measure(card, replace(work, packing=bool(run.get("packed")), pairs=pairs), device).time.seconds


def errors(fitted: bool, *, as_published: bool = False) -> dict[str, float]:
    return {
        run["name"]: (run["planned"] if as_published else planned(run)) / run["seconds"] - 1
        for run in RUNS
        if run["fitted"] == fitted
    }
