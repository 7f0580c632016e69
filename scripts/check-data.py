"""Check data before training on it: every rule of the recipes, and what a careful reader would look for.

    make check-data DATA=my.jsonl                                  every row, without a model
    make check-data DATA=my.jsonl MODEL=qwen2.5-7b                 with lengths and truncation in its tokens
    make check-data DATA=pairs.jsonl TASK=dpo HTML=report.html JSON=report.json
    make check-data DATA=my.jsonl EVAL_DATA=held-out.jsonl FIX=clean.jsonl
    make check-data DATA=my.jsonl MODEL=qwen2.5-7b SHOW_MASK=2

Rows that a recipe would refuse are faults: they are printed, and the exit code is 2. All else is a finding to look at:
the exit code is 0. Of larger files, near duplicates are searched in 20,000 random rows and n-grams in 5,000.

Left out: whether a completion is true. Languages and refusals are recognised by common words, sometimes wrongly.
"""

import itertools
import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from check_data import cleaned, figures, report
from check_data.findings import Findings, RecordedFaults
from check_data.limits import Limits
from check_data.survey import Prompts, Survey
from check_data.tasks import Example, TaskName, find_task
from common import environment
from common.cli import parse_arguments
from common.data.documents import DOCUMENT_FORMATS
from common.data.read import column_map
from common.data.rows import Faults, Source, find_source, read_rows, source_identity
from common.errors import InputError, run_command
from common.lm.chat import BATCH
from common.lm.hub import find_model
from common.run.files import write_json
from common.run.screen import obey_no_text
from rich.console import Console
from rich.status import Status

SHOWN_ROWS = 5  # on the page

Droppable = Literal[
    "duplicate",
    "near-duplicate",
    "overlap",
    "refusal",
    "empty-thought",
    "unbalanced-tags",
    "repeats-prompt",
    "outlier",
    "near-identical",
    "contradiction",
    "gold-answer",
    "turn-order",
    "long-prompt",
    "special-token",
]


@dataclass(frozen=True)
class Args:
    """Rows are read as the recipes read them."""

    data: str = str(environment.ROOT / "data_samples" / "sft.jsonl")
    """A file, a folder of files or a hub dataset."""
    task: TaskName | None = None
    """The method it is for; taken from the columns if not given."""
    model: str | None = None
    """A model card's name, a local directory or a hub id, for lengths in its tokens; without it, in characters."""
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""
    format: str = "auto"
    """The format of the rows; auto takes it from the columns of the first."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question completion=answer."""
    chat_template_path: str | None = None
    """A .jinja file to use instead of the model's own chat template."""
    max_length: int = 2048
    """Longer rows are truncated to this many tokens."""
    max_prompt_length: int = 1024
    """For GRPO and PPO: longer prompts are dropped."""
    eval_data: str | None = None
    """Held-out data of the same format: prompts that are in both are found."""

    json: str | None = None
    """Write the report to this file as JSON, with the first 100 places of every finding."""
    html: str | None = None
    """Write the report to this file as a page with plots and, with a model, the first rows with their loss mask."""
    show_mask: int = 0
    """Print this many rows as the model will see them, and nothing else."""
    fix: str | None = None
    """Write the rows without faults and without the findings that --drop names to this new .jsonl file."""
    drop: tuple[Droppable, ...] = (
        *("duplicate", "overlap", "empty-thought", "unbalanced-tags", "repeats-prompt"),
        *("gold-answer", "turn-order"),
    )
    """The findings for which --fix drops a row, besides faults."""


def main() -> None:
    started = time.monotonic()
    args = parse_arguments(Args, __doc__)
    columns = column_map(args.columns)
    base = find_model(args.model) if args.model else None
    source = find_source(args.data)
    evaluation_source = find_source(args.eval_data) if args.eval_data else None
    data = [args.data, *([args.eval_data] if args.eval_data else [])]
    for flag, out in (("--json", args.json), ("--html", args.html)):
        if out:
            cleaned.check_report(flag, Path(out), data)
    target = cleaned.check_target(Path(args.fix), data) if args.fix else None
    if args.show_mask and not base:
        raise InputError("--show-mask needs the model whose tokens it shows: --model tiny or another")
    if args.show_mask and (args.json or args.html or args.fix):
        raise InputError("--show-mask prints rows and nothing else; leave it out, or --json, --html and --fix")
    sources = [source, *([evaluation_source] if evaluation_source else [])]
    environment.set_variables(models=[base] if base else [], sources=sources)

    # 1. What kind of data it is, by its first row.
    findings = Findings(keep_all=target is not None)
    faults = RecordedFaults(findings)
    rows = read_rows(source, faults)
    first = next(rows, None)
    if first is None:
        faults.stop()
        raise InputError(f"{args.data}: holds no rows")
    task = find_task(args.task, first, args.format, columns)
    limits = Limits(task.name, args.max_length, args.max_prompt_length, findings)
    rows = itertools.chain([first], rows)
    lengths = None
    if base:
        from check_data.lengths import Lengths  # imports transformers

        raw_text = task.format_of(first, args.format, columns) in DOCUMENT_FORMATS
        lengths = Lengths(base, args.chat_template_path, limits, faults, raw_text)

    if args.show_mask and lengths:
        from check_data import mask

        examples = itertools.islice(task.read(rows, faults, args.format, columns), args.show_mask)
        obey_no_text()
        mask.show(Console(markup=False, emoji=False), mask.masked_rows(lengths, examples, faults))
        faults.stop()
        return

    # 2. Every row once.
    prompts = None
    if evaluation_source:
        evaluation_faults = Faults()
        evaluation = task.read(read_rows(evaluation_source, evaluation_faults), evaluation_faults, args.format, columns)
        prompts = Prompts(evaluation)
        evaluation_faults.stop()
    survey = Survey(findings, prompts, estimate=None if lengths else limits)
    shown: list[Example] = []  # on the page
    reading = time.monotonic()
    with _status() as status:
        for batch in _batches(task.read(rows, faults, args.format, columns), BATCH):
            for example in batch:
                survey.add(example)
            shown += batch[: SHOWN_ROWS - len(shown)]
            if lengths:
                lengths.add(batch)
            if status:
                status.update(f"{survey.rows:,} rows")
        seconds = time.monotonic() - reading
        if status:
            status.update("near duplicates")
        survey.finish()
        if survey.scores and task.name == "reward":
            survey.look_at_scores(args.data, faults)

    # 3. The report, and the cleaned file.
    row_format = task.format_of(first, args.format, columns)
    facts = {
        "data": args.data,
        "identity": source_identity(source),
        "task": task.name,
        "format": row_format,
        "other_formats": task.other_formats(first, row_format, columns),
        "model": base.name if base else None,
        "chat_template": lengths.chat_template if lengths else None,
        "eval_data": args.eval_data,
        "notes": faults.notes(),
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "code": environment.describe_code(),
        "seconds": time.monotonic() - started,
        "rows_per_second": survey.rows / seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    found = figures.figures(survey, findings, lengths, limits, facts)
    obey_no_text()
    console = Console(markup=False, highlight=False, emoji=False)
    report.show(console, found)
    if args.json:
        write_json(Path(args.json), found)
        console.print(f"{args.json} written", soft_wrap=True)
    if args.html:
        from check_data import page

        page.write(Path(args.html), found, lengths, shown)
        console.print(f"{args.html} written", soft_wrap=True)
    if target:
        _fix(console, args, source, target, findings)
    else:
        faults.stop()


def _fix(console: Console, args: Args, source: Source, target: tuple[Path, Path], findings: Findings) -> None:
    rows = read_rows(source, Faults())  # lines that are not rows are among the findings already
    kept, reasons = cleaned.write(*target, rows, findings, {"fault", *args.drop})
    why = ", ".join(f"{count:,} {kind}" for kind, count in reasons.most_common())
    console.print(f"{kept:,} rows in {target[0]}, {sum(reasons.values()):,} left out: {why or 'none'}", soft_wrap=True)
    console.print(f"Row by row in {target[1]}", soft_wrap=True)
    if not kept:
        raise InputError(f"{args.data}: no row is left")


def _batches(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    examples = iter(examples)
    while batch := list(itertools.islice(examples, size)):
        yield batch


def _status() -> AbstractContextManager[Status | None]:
    """A line on the terminal with the rows so far; none without a terminal."""
    console = Console(stderr=True, emoji=False)
    return console.status("reading") if console.is_terminal else nullcontext()


if __name__ == "__main__":
    run_command(main)
