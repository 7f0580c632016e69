"""What a report tells of a run in words and numbers: its outcome, its arguments, its data, and how to repeat it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.arguments import variable
from common.commands import make
from common.errors import as_variables
from common.pages.curves import HELD_OUT, NO_CURVE, title_of, values
from common.pages.reading import RunFiles
from common.run.health.files import FILE, judge_again, read_findings
from common.run.progress import duration
from common.run.record import measure_of

TITLES = {
    "sft": "SFT",
    "dpo": "DPO",
    "kto": "KTO",
    "grpo": "GRPO",
    "reward": "Reward model",
    "ppo": "PPO",
}
COLOUR = {"done": "green", "running": "blue", "stopped": "yellow", "failed": "red"}
NO_OUTCOME = ("output_dir", "time_limit", "report_to")  # arguments that a repeated run leaves out
FIGURES = {  # of PPO's held_out
    "score": "mean score",
    "score_std": "its standard deviation",
    "kl": "KL from the reference policy, nats per completion",
    "length": "mean length, tokens",
    "truncated": "truncated, share",
}


@dataclass(frozen=True)
class Table:
    """A table of the page: its heading, the names of its columns, and rows of text."""

    title: str
    header: list[str]
    rows: list[list[str]]


def title(run: RunFiles) -> str:
    """What was trained on what, as "SFT of qwen2.5-7b on my.jsonl"."""
    given = run.arguments
    of = f" of {short(given['model'])}" if given.get("model") else ""
    on = f" on {short(given['data'])}" if given.get("data") else ""
    return f"{TITLES.get(run.recipe, run.recipe)}{of}{on}"


def status(run: RunFiles) -> tuple[str, str]:
    """How the run ended, and the colour of that."""
    record = run.record
    name = str(record.get("status", "unknown"))
    why = record.get("reason") if name == "stopped" else record.get("error") if name == "failed" else None
    return f"{name}: {why}" if why else name, COLOUR.get(name, "dim")


def tiles(run: RunFiles) -> list[tuple[str, str]]:
    """The few figures that a reader looks for first: (name, value)."""
    name, key = measure_of(run.recipe)
    found = [(name, _first_last(run, key)), (f"held-out {name}", _first_last(run, HELD_OUT + key))]
    if both := _before_after(run):
        found.append(("held-out score", " → ".join(number(side.get("score")) for side in both)))
    steps = [row["step"] for row in run.metrics]
    seconds = run.record.get("seconds")
    tokens = run.record.get("tokens") or max((row["tokens"] for row in run.metrics if "tokens" in row), default=None)
    speeds = sorted(value for _, value in values(run.metrics, "tokens_per_second"))
    memory = max((value for _, value in values(run.metrics, "memory_gib")), default=None)
    truncated = [value for _, value in values(run.metrics, "completions/clipped_ratio")]
    found += [
        ("steps", f"{steps[-1]:,}" if steps else None),
        ("time", duration(seconds) if seconds is not None else None),
        ("useful tokens", f"{tokens:,.0f}" if tokens else None),
        ("tokens/s, median", f"{speeds[len(speeds) // 2]:,.0f}" if speeds else None),
        ("peak memory", f"{memory:.1f} GiB" if memory else None),
        ("truncated, last step", f"{truncated[-1]:.1%}" if truncated else None),
    ]
    return [(name, value) for name, value in found if value]


def health(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """The findings about the run: (name, steps, evidence, what to change, in make variables).

    Of a run that has no health.jsonl, made by an older version, they are found in what it logged.
    """
    known = (run.folder / FILE).exists()
    findings = read_findings(run.folder) if known else judge_again(run.folder, run.record).findings
    spelled = {"--" + name.replace("_", "-"): variable(name) for name in run.arguments}

    def spell(text: str) -> str:
        return as_variables(text, spelled)

    return [(one.name, one.steps, spell(one.evidence), spell(one.advice)) for one in findings]


def held_out(run: RunFiles) -> list[Table]:
    """The figures on held-out data: before and after, while it trained, and those of a reward model or of KTO."""
    tables = []
    if both := _before_after(run):
        count = run.record["held_out"].get("prompts", 0)
        rows = [
            [FIGURES.get(name, name), number(both[0].get(name)), number(value), _change(both[0].get(name), value)]
            for name, value in both[1].items()
        ]
        tables.append(Table(f"{count:,} held-out prompts", ["", "before", "after", "change"], rows))
    keys = {key: None for row in run.metrics for key in row if key.startswith(HELD_OUT) and not NO_CURVE.fullmatch(key)}
    rows = []
    for key in keys:
        if points := [point for point in values(run.metrics, key) if math.isfinite(point[1])]:
            low, high = min(points, key=lambda one: one[1]), max(points, key=lambda one: one[1])
            cells = [f"{number(value)} ({step:,})" for step, value in (points[0], low, high, points[-1])]
            rows.append([title_of(key.removeprefix(HELD_OUT)), *cells])
    if rows:
        header = ["", "first (step)", "lowest", "highest", "last"]
        tables.append(Table("Held-out rows, while it trained", header, rows))
    if isinstance(report := run.record.get("report"), dict):
        tables.append(
            Table("Held-out rows, at the end", ["", ""], [[name, number(one)] for name, one in report.items()])
        )
    return tables


def provenance(run: RunFiles) -> list[tuple[str, str]]:
    """The base, the code, its versions and the machine."""
    record = run.record
    code, machine, matters = record.get("code") or {}, record.get("machine") or {}, record.get("matters", {})
    git, lock = code.get("git") or {}, code.get("lock") or {}
    commit = (git.get("commit") or "unknown") + (", with uncommitted changes" if git.get("dirty") else "")
    gpu = ", ".join(
        str(part)
        for part in (
            machine.get("gpu"),
            f"{machine['gpu_memory_gib']} GiB" if machine.get("gpu_memory_gib") else None,
            f"CUDA {machine['cuda']}" if machine.get("cuda") else None,
        )
        if part
    )
    packages = ", ".join(f"{name} {version}" for name, version in (code.get("packages") or {}).items())
    known = {
        "base": run.arguments.get("model"),
        "its identity": identity(matters.get("base")),
        "revision on the hub": record.get("revision"),
        "trained in": str(record.get("dtype", "")).removeprefix("torch."),
        "GPU": gpu,
        "CPU": f"{machine['cpu']}, threads: {machine.get('threads')}" if machine.get("cpu") else None,
        "Slurm job": machine.get("slurm_job"),
        "recipes": commit if code else None,
        "lock": f"{lock['file']}, sha256 {lock['sha256']}" if lock else None,
        "image": code.get("image"),
        "versions": f"Python {code['python']}, {packages}" if code.get("python") else None,
        "started": record.get("started"),
        "ended": record.get("finished"),
        "folder": str(run.folder),
        "identity of the run": record.get("identity"),
    }
    return [(name, str(value)) for name, value in known.items() if value]


def chosen(run: RunFiles) -> list[list[str]]:
    """The arguments that are not the recipe's defaults: [make variable, value, what gave it]."""
    return [row for row in arguments(run) if row[2] != "recipe"]


def arguments(run: RunFiles) -> list[list[str]]:
    """All arguments: [make variable, value, what gave it]; those that --fit auto chose as it chose them."""
    fitted = run.record.get("fit") or {}
    return [
        [
            variable(name),
            text(fitted.get(name, argument["value"])),
            "fit" if name in fitted else argument.get("from", ""),
        ]
        for name, argument in run.record.get("arguments", {}).items()
    ]


def differing(runs: list[RunFiles]) -> list[list[str]]:
    """What is not the same in all runs: [argument or fact, its value in each run]."""
    rows = [["recipe", *(run.recipe for run in runs)]]
    for name in dict.fromkeys(name for run in runs for name in run.arguments if name != "output_dir"):
        rows.append([variable(name), *(text(run.arguments[name]) if name in run.arguments else "–" for run in runs)])
    for name, key in (("data, identity", "data"), ("base, identity", "base"), ("lock", "lock")):
        rows.append([name, *(str(run.record.get("matters", {}).get(key) or "–")[:12] for run in runs)])
    rows.append(["recipes", *(str(_git(run).get("commit") or "–")[:12] for run in runs)])
    rows.append(["device", *(str(machine.get("gpu") or machine.get("cpu") or "–") for machine in map(_machine, runs))])
    return [row for row in rows if len(set(row[1:])) > 1]


def commands(run: RunFiles) -> list[str]:
    """How to repeat it: the code, the run from its run.json, and the same in full for one who has only the report."""
    if run.recipe not in TITLES:
        return []
    again = make(run.recipe, FROM=str(run.folder / "run.json"), OUT="outputs/again")
    given = {
        variable(name): _typed(argument["value"])
        for name, argument in run.record.get("arguments", {}).items()
        if argument.get("from") != "recipe" and argument["value"] is not None and name not in NO_OUTCOME
    }
    commit = _git(run).get("commit")
    code = [f"git checkout {commit}"] if commit and not _git(run).get("dirty") else []
    return [*code, again, make(run.recipe, **given, OUT="outputs/again")]


def text(value: Any) -> str:
    """A value as one would type it."""
    if value is None:
        return "none"
    typed = _typed(value)
    return " ".join(map(str, typed)) if isinstance(typed, list) else str(typed)


def number(value: Any) -> str:
    """A figure to four digits; – for none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def short(path: str) -> str:
    """A model or a file by the last part of its name; a hub id, which is no path, as it is."""
    return Path(path).name if path.startswith(("/", ".", "~")) or path.count("/") > 1 else path


def _typed(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return [str(one) for one in value] if isinstance(value, list | tuple) else value


def identity(value: Any) -> str | None:
    """A sha256 with its name; a hub id with its commit as it is."""
    if not value:
        return None
    return f"sha256 {value}" if len(str(value)) == 64 and "@" not in str(value) else str(value)


def _first_last(run: RunFiles, key: str) -> str | None:
    found = [value for _, value in values(run.metrics, key)]
    return f"{number(found[0])} → {number(found[-1])}" if found else None


def _before_after(run: RunFiles) -> tuple[dict[str, Any], dict[str, Any]] | None:
    found = run.record.get("held_out") or {}
    return (found["before"], found["after"]) if found.get("before") and found.get("after") else None


def _change(before: Any, after: Any) -> str:
    return f"{after - before:+.4g}" if isinstance(before, int | float) and isinstance(after, int | float) else "–"


def _git(run: RunFiles) -> dict[str, Any]:
    return (run.record.get("code") or {}).get("git") or {}


def _machine(run: RunFiles) -> dict[str, Any]:
    return run.record.get("machine") or {}
