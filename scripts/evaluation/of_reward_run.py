"""`make evaluate RUN=…` of a reward model: how well it scores the rows that its run held out."""

from dataclasses import replace
from typing import Any

from common import environment
from common.data.rows import find_source
from common.errors import InputError
from common.run.screen import loading

from evaluation import results
from evaluation.figures import Line, Measured, lines
from evaluation.reward_model import LoadedRewardModel, Trained, find
from evaluation.subject import Held, RunArgs, Side, Subject, held_rows

ACCURACY, ERROR = "accuracy", "loss: squared error (of a score)"


def evaluate_reward_run(args: RunArgs, subject: Subject) -> None:
    """Print the report on the reward model, with `--base` beside another one, and write it to the run's folder."""
    if args.questions or args.tasks or args.compare:
        raise InputError("--questions, --tasks and --compare are for models that write; a reward model scores")
    trained = find(str(subject.folder), None)
    other = find(args.base, None) if args.base else None
    held = held_rows(subject, args.data)
    if not held:
        raise InputError(
            f"{subject.folder}: the run held out no row; give pairs or scores that it did not train on with --data"
        )
    known = [one.model for one in (trained, other) if one]
    environment.set_variables(models=known, sources=map(find_source, args.data))
    console = loading(trained.model.name)
    import unsloth  # noqa: F401  first: it changes what is imported after it
    from common.rewards.report import show, shown

    max_length = args.max_length or subject.arguments["max_length"]
    after = measure(trained, held, args.load_in_4bit, max_length)
    before = measure(other, held, args.load_in_4bit, max_length) if other else [(None, {})] * len(held)
    sections = []
    for one, (measured, report), (old, _) in zip(held, after, before, strict=True):
        show(console, report, f"{subject.folder} on {one.name}")
        found: list[Line] = lines(measured, old, args.seed)
        rows = len(one.examples)
        correlation = [shown(report[name]) for name in ("pearson", "pearson, 95 %") if name in report]
        notes = [f"Pearson's correlation with the scores given: {', '.join(correlation)}"] if correlation else []
        notes += results.few_rows(rows)
        section = results.Section(one.name, rows, found, notes, {"report": report})
        results.show(console, section)
        sections.append(section)
    if other and args.base:
        subject = replace(subject, before=Side(args.base, other.model, None))
    file = results.write(subject, args.seed, sections, {})
    console.print(f"Figures in {file}, with their intervals in report.html", highlight=False, soft_wrap=True)


def measure(
    trained: Trained, held: list[Held], load_in_4bit: bool, max_length: int
) -> list[tuple[Measured, dict[str, Any]]]:
    """Of each held-out part, row by row whether the chosen completion scores higher, or the squared error of the score;
    and the report."""
    loaded = LoadedRewardModel(trained, load_in_4bit)

    def of_part(part: Held) -> tuple[Measured, dict[str, Any]]:
        tokens, truncated = loaded.tokens_of(part.examples, max_length)
        if truncated:
            print(truncated)
        report, rows = loaded.report(part.examples, tokens, part.name)
        return Measured(row_by_row(rows, trained.facts), {"rows": rows}), report

    return [of_part(part) for part in held]


def row_by_row(rows: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, list[float]]:
    """By figure, a number for each row; none for scores given to a model of pairs: its outputs are on no such scale."""
    outputs = [row["outputs"] for row in rows]
    if rows[0]["score"] is None:
        return {ACCURACY: [(a > b) + 0.5 * (a == b) for a, b in outputs]}
    if facts.get("kind") == "bradley-terry":
        return {}
    mean, std = facts.get("mean", 0.0), facts.get("std", 1.0)
    return {ERROR: [(mean + std * output - row["score"]) ** 2 for (output,), row in zip(outputs, rows, strict=True)]}
