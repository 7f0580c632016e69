"""What each stage of a pipeline gained: on the terminal, in report.md and in report.json."""

import itertools
from pathlib import Path
from typing import Any

from common.run.files import write_json
from common.run.screen import console

from stages.steps import Done

COUNTS = ("rows", "pairs", "rated completions")  # of a held-out file: how many there are, not how good the model is


def write_report(done: list[Done], folder: Path, seconds: float) -> None:
    """Print the figures stage by stage and write them to `folder`."""
    from rich.table import Table

    sections = []
    if done[0].figures:
        sections.append(("Held-out data, and the change against the stage before", *policy_lines(done)))
    if lines := own_lines(done):
        sections.append(("The rewards, on held-out data", ["stage", "held out", "", ""], lines))
    for title, header, lines in sections:
        table = Table(*header, title=title)
        for line in lines:
            table.add_row(*line)
        console().print(table)
    (folder / "report.md").write_text(as_markdown(done, sections), encoding="utf-8")
    write_json(folder / "report.json", {"seconds": round(seconds, 1), "stages": as_json(done)})
    last = done[-1]
    what = f"the reward model in {last.folder}" if last.name == "reward" else f"the last model in {last.model}"
    print(f"{seconds:.0f} s. Report in {folder / 'report.md'}, {what}")


def policies(done: list[Done]) -> list[Done]:
    """The stages after which the policy is another one, and the start."""
    return [stage for stage in done if stage.name != "reward"]


def policy_lines(done: list[Done]) -> tuple[list[str], list[list[str]]]:
    """A line for each figure on each held-out file, a column for each policy; and the header."""
    lines = []
    for data, figures in done[0].figures.items():
        for name in figures:
            if name in COUNTS:
                continue
            values = [stage.figures[data][name] for stage in policies(done)]
            cells = [shown(name, values[0])]
            for old, new in itertools.pairwise(values):
                cells.append(f"{shown(name, new)} ({shown(name, new - old, sign='+')})")
            lines.append([f"{Path(data).stem} ({figures['rows']})", name, *cells])
    return ["held out", "", *(stage.name for stage in policies(done))], lines


def own_lines(done: list[Done]) -> list[list[str]]:
    """What a reward model is worth, and how far PPO raised its reward."""
    from common.rewards.report import shown as number

    lines = []
    for stage in done:
        for data, report in stage.judged.items():
            count = next((str(report[name]) for name in COUNTS if name in report), "0")
            lines += [
                [stage.name, f"{Path(data).stem} ({count})", name, number(value)]
                for name, value in report.items()
                if name not in COUNTS
            ]
        if stage.scored.get("prompts"):
            before, after = stage.scored["before"], stage.scored["after"]
            cells = f"{number(before['score'])} -> {number(after['score'])}"
            lines.append([stage.name, f"its own prompts ({stage.scored['prompts']})", "mean score", cells])
    return lines


def as_markdown(done: list[Done], sections: list[tuple[str, list[str], list[list[str]]]]) -> str:
    lines = [f"# {' → '.join(stage.name for stage in done)}", ""]
    for title, header, rows in sections:
        lines += [f"{title}:", "", *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)), ""]
    for stage in done[1:]:
        made = stage.folder if stage.name == "reward" else stage.model
        lines.append(f"- {stage.name}: `{made}`, {stage.seconds:.0f} s of training")
    return "\n".join([*lines, ""])


def as_json(done: list[Done]) -> list[dict[str, Any]]:
    """A record for each stage; `change` is against the policy before it."""
    records = []
    before: Done | None = None
    for stage in done:
        record: dict[str, Any] = {
            "stage": stage.name,
            "folder": str(stage.folder),
            "model": stage.model,
            "training_seconds": stage.seconds,
        }
        if stage.name == "reward":
            record["report"] = stage.judged
        else:
            record |= {"figures": stage.figures, "change": change(before, stage) if before else None}
            before = stage
        if stage.scored:
            record["held_out_score"] = stage.scored
        records.append(record)
    return records


def change(before: Done, after: Done) -> dict[str, dict[str, float]]:
    return {
        data: {name: value - before.figures[data][name] for name, value in figures.items()}
        for data, figures in after.figures.items()
    }


def shown(name: str, value: float, sign: str = "") -> str:
    """A figure as scripts/evaluate.py shows it: shares in per cent, what has its unit in brackets as it is."""
    return f"{value:{sign}.2f}" if "(" in name else f"{value * 100:{sign}.1f}" + ("" if sign else " %")
