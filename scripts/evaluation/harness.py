"""Tasks of lm-evaluation-harness by name, or of one's own as YAML files, for a model before and after training.

They run by the harness's `hf` backend, in a process of its own, with the adapter on (`peft=`) and switched off. Figures
are the harness's; where a figure is a mean over rows, the interval of the difference is the paired bootstrap over them,
as elsewhere in `make evaluate`; else it is made from the harness's standard errors.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common.environment import ROOT
from common.errors import InputError, MachineError, did_you_mean
from common.lm.hub import TOKENIZER_FILES, fetch
from common.run.files import read_object, write_json
from common.run.intervals import interval
from install import overlay

from evaluation.figures import Line
from evaluation.results import Section
from evaluation.subject import Side

CHILD = Path(__file__).with_name("run_tasks.py")
NAME = re.compile(
    r"^['\"]?(?:task|group|tag|- ?task)['\"]?: *['\"]?([\w.+-]+)['\"]?\s*$|^ +- (?!\{)([\w.+-]+)\s*$", re.MULTILINE
)
OWN = re.compile(r"^(?:task|group): *['\"]?([\w.+-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Tasks:
    """What to run: names, the folders of one's own YAML files, and where the harness is."""

    names: list[str]
    folders: list[str]
    public: bool  # is one of them the harness's own?
    overlay: Path


@dataclass(frozen=True)
class Options:
    limit: int | None  # rows of a task
    num_fewshot: int | None  # None: as the task has it
    chat_template: bool
    seed: int


def find(given: Iterable[str]) -> Tasks | None:
    """The tasks that --tasks names; None without any. Installs the harness at its first use.

    Raises InputError for a name that it does not know, with the nearest, and MachineError where it cannot be had.
    """
    names, folders, public = [], [], []
    for name in (part.strip() for word in given for part in word.split(",")):
        if not name:
            continue
        if name.endswith((".yaml", ".yml")):
            names.append(own_name(Path(name).expanduser()))
            folders.append(str(Path(name).expanduser().resolve().parent))
        else:
            names.append(name)
            public.append(name)
    if not names:
        return None
    there = overlay.ensure()
    known = known_names(there) if public else set()
    for name in public:
        if name not in known:
            raise InputError(
                f"--tasks {name}: no task of lm-evaluation-harness{did_you_mean(name, known)}. It has "
                f"{len(known):,}; a task of your own is a YAML file: --tasks my_task.yaml"
            )
    return Tasks(names, list(dict.fromkeys(folders)), bool(public), there)


def own_name(file: Path) -> str:
    """The name of the task in a YAML file. Raises InputError where there is none."""
    try:
        found = OWN.search(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--tasks {file}: {error.strerror}") from None
    if not found:
        raise InputError(f"--tasks {file}: has no line `task: NAME`, which a task of lm-evaluation-harness needs")
    return found[1]


def known_names(overlay: Path) -> set[str]:
    """The names in the YAML files of the harness; its own index takes a quarter of a minute."""
    found: set[str] = set()
    for file in (overlay / "lm_eval" / "tasks").rglob("*.y*ml"):
        for match in NAME.findall(file.read_text(encoding="utf-8", errors="replace")):
            found.update(name for name in match if name)
    return found


def run(tasks: Tasks, after: Side, before: Side | None, folder: Path, options: Options, environment: dict) -> Section:
    """Run the tasks for both models. Raises InputError and MachineError with the harness's reason."""
    sides = {"after": as_request(after)}
    if before:
        switch_off = before.adapter is None and after.adapter and before.model.source == after.model.source
        sides["before"] = as_request(before) | {"switch_off": bool(switch_off)}
    request, answer, log = (folder / f"lm-eval-{name}" for name in ("request.json", "answer.json", "log.txt"))
    write_json(
        request,
        {
            "overlay": str(tasks.overlay),
            "tasks": tasks.names,
            "include": tasks.folders,
            "public": tasks.public,
            "sides": sides,
            "answer": str(answer),
            **options.__dict__,
        },
    )
    print(f"lm-evaluation-harness: {', '.join(tasks.names)}; its progress is in {log}", flush=True)
    ours = {str(ROOT / "recipes"), str(ROOT / "scripts")}  # its package `evaluate` is not our script
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path and path not in ours]
    with log.open("w", encoding="utf-8") as stream:
        done = subprocess.run(
            [sys.executable, "-P", CHILD, request],
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            check=False,
        )
    found = read_object(answer) if answer.exists() else {}
    for file in (request, answer):
        file.unlink(missing_ok=True)
    if done.returncode == 3:
        raise MachineError(
            f"--tasks {','.join(tasks.names)}: the data of a task cannot be had here ({found.get('error')}). Connect "
            "this machine, or bring the data in HF_HOME; a task of your own over a local file needs none"
        )
    if done.returncode == 2:
        raise InputError(f"--tasks {','.join(tasks.names)}: {found.get('error')}")
    if done.returncode:
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
        raise RuntimeError(f"lm-evaluation-harness ended with {done.returncode}; {log} has all of it:\n{last}")
    return section(tasks.names, found["after"], found.get("before"), options.seed)


def as_request(side: Side) -> dict[str, Any]:
    """What the hf backend loads for a side; the tokenizer is the adapter's, whose chat template was trained."""
    base = fetch(side.model)
    own = side.adapter and any((Path(side.adapter) / name).is_file() for name in TOKENIZER_FILES)
    return {
        "pretrained": base.source,
        "revision": base.revision or "main",
        "peft": side.adapter,
        "tokenizer": side.adapter if own else None,
    }


def section(names: list[str], after: dict[str, Any], before: dict[str, Any] | None, seed: int) -> Section:
    """The figures of the named tasks and groups; those of their parts are among the details."""
    found, counts, notes = [], [], []
    for task in names:
        for metric in after["results"].get(task, {}):
            line = metric_line(task, metric, after, before, seed)
            if line:
                found.append(line)
                counts.append(line.rows)
                notes.append(f"{line.name}, as the harness reports it: {as_reported(task, metric, after, before)}")
    if any(line.rows == 0 for line in found):
        notes.append("Where a figure is no mean over rows, its interval is made from the harness's standard errors.")
    errors = {
        name: {task: side["results"][task] for task in names if task in side["results"]}
        for name, side in (("after", after), ("before", before))
        if side
    }
    return Section(
        f"lm-evaluation-harness: {', '.join(names)}", max(counts, default=0), found, notes, {"results": errors}
    )


def as_reported(task: str, metric: str, after: dict[str, Any], before: dict[str, Any] | None) -> str:
    """The figure of both models with the harness's standard error."""
    sides = {"before": before, "after": after}
    return ", ".join(
        f"{name} {side['results'][task][metric]:.4g} ± {stderr(side, task, metric):.2g}"
        for name, side in sides.items()
        if side
    )


def metric_line(task: str, metric: str, after: dict[str, Any], before: dict[str, Any] | None, seed: int) -> Line | None:
    """The line of a metric, which the harness names metric,filter; None for what is no figure."""
    name, comma, filtered = metric.partition(",")
    value = after["results"][task][metric]
    if not comma or name.endswith("_stderr") or isinstance(value, str | bool) or value is None:
        return None
    own, other = rows_of(task, metric, after), rows_of(task, metric, before) if before else None
    shown = f"{task} {name}" + (f", {filtered}" if filtered not in ("none", "") else "")
    if not all(0 <= one <= 1 for one in own or [value]):
        shown += " (points)"
    higher = after["higher_is_better"].get(task, {})
    less = isinstance(higher, dict) and higher.get(name) is False
    error = stderr(after, task, metric)
    if before is None:
        bounds = interval(own, seed=seed) if own else around(value, error)
        return Line(shown, len(own or ()), value, bounds, less_is_better=less)
    old = before["results"][task][metric]
    old_error = stderr(before, task, metric)
    if own and other and len(own) == len(other):
        x, y = np.array(own), np.array(other)
        bounds = interval(x, seed=seed), interval(y, seed=seed), interval(x - y, seed=seed)
    else:
        own = None
        bounds = around(value, error), around(old, old_error), around(value - old, math.hypot(error, old_error))
    return Line(shown, len(own or ()), value, bounds[0], old, bounds[1], value - old, bounds[2], less_is_better=less)


def rows_of(task: str, metric: str, side: dict[str, Any]) -> list[float] | None:
    """The values of the rows that a figure is the mean of, in their order; of a group those of all its tasks."""
    parts = side["subtasks"].get(task) or [task]
    todo, tasks = list(parts), []
    while todo:
        part = todo.pop(0)
        nested = side["subtasks"].get(part)
        if nested and part != task:
            todo = [*nested, *todo]
        else:
            tasks.append(part)
    values = [
        value
        for part in tasks
        for _, value in sorted(side["rows"].get(part, {}).get(metric, {}).items(), key=lambda row: int(row[0]))
    ]
    mean = sum(values) / len(values) if values else math.nan
    return values if math.isclose(mean, side["results"][task][metric], abs_tol=1e-6) else None


def stderr(side: dict[str, Any], task: str, metric: str) -> float:
    """The harness's standard error of a figure; NaN where it has none."""
    name, _, filtered = metric.partition(",")
    found = side["results"][task].get(f"{name}_stderr,{filtered}")
    return float(found) if isinstance(found, int | float) else math.nan


def around(value: float, error: float) -> tuple[float, float]:
    return value - 1.96 * error, value + 1.96 * error
