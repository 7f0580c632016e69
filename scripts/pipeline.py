"""From stage to stage: SFT, DPO and GRPO one after the other, each on the merged model of the one before.

    make pipeline                                                     all three, the tiny model on sample data
    make pipeline STAGES=sft,grpo MODEL=qwen2.5-7b SFT_DATA=chats.jsonl MATH_DATA=gsm8k.jsonl
    make pipeline ARGS_DPO="--beta 0.2"                               runs DPO and what follows it again, not SFT

After its training a stage is merged into a 16-bit base, which is checked (scripts/merge.py), and scored on held-out
data, as the model was before the first stage. The report says what each stage gained: on the terminal, in report.md and
report.json.

Held out are the files of EVAL_DATA. Without them a twentieth of the prompts of every data set, at most 200, is put
aside before anything is trained: the same ones each time, chosen by a hash. A prompt that is held out of one stage is
held out of all.

Every stage has a folder of its own, STAGE-HASH in the pipeline's folder. The hash is over all that decides the outcome:
data, arguments, the parent's weights, lock. So a stage that is there is not run again, another setting runs that stage
and what follows from it, and an interrupted pipeline goes on where it stopped.

Left out: stages side by side, a choice among several models, PPO.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from common.data.examples import Conversation, Pair, Prompt
from common.data.formats import PAIR_FORMATS, PROBLEM_FORMATS, detect
from common.data.read import column_map, conversations, pairs, problems
from common.data.rows import Faults, find_source, read_rows, source_sha256
from common.environment import ROOT, installed_lock
from common.errors import STOPPED, InputError, did_you_mean, run_command
from common.lm.hub import MERGE_RECORD, Model, contents, find_model
from common.run.files import write_json, write_jsonl
from common.run.stopping import Stop

Example = Conversation | Pair | Prompt
Figures = dict[str, dict[str, float]]  # by held-out file, by what is measured

SAMPLES = ROOT / "data_samples"
SAMPLES_HELD_OUT = ("heldout.jsonl", "preferences.jsonl", "arithmetic.jsonl")
HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 200
# Of the user's own data no form of an answer is known, and 64 tokens are few for a thought.
OWN_DATA_EVAL_ARGS = ("--form", "", "--max-new-tokens", "512")
OURS = ("--model", "--data", "--output-dir", "--no-use-peft")


@dataclass(frozen=True)
class Args:
    stages: str = "sft,dpo,grpo"
    """The stages in their order; sft can only be the first."""
    until: str | None = None
    """End after this one of them: scripts/slurm/submit.py makes each a job."""
    model: str = "tiny"
    """What the first stage starts from: a model card's name, a local directory or a hub id."""
    sft_data: str | None = None
    """Examples of good answers; where no data is given at all, every stage has its sample data."""
    dpo_data: str | None = None
    """Pairs of a better and a worse answer."""
    math_data: str | None = None
    """Problems with gold answers, for GRPO."""
    eval_data: tuple[str, ...] = ()
    """Held-out questions with answers, pairs or conversations, one file or several; else put aside from the data."""
    output_dir: str | None = None
    """The pipeline's folder; by default outputs/pipeline-MODEL."""
    sft_args: str = ""
    """More for recipes/sft.py, as one word: --sft-args="--max-steps 50"."""
    dpo_args: str = ""
    """More for recipes/dpo.py."""
    grpo_args: str = ""
    """More for recipes/grpo.py."""
    eval_args: str = ""
    """More for scripts/evaluate.py, which is run after every stage."""
    time_limit: str | None = None
    """Hours:minutes:seconds, as 3:55:00, after which the stage stops as its recipe does, to be gone on with."""


@dataclass(frozen=True)
class Stage:
    """What a stage is fed: the argument that names its data, the reader of that, and the sample of it."""

    data: str
    read: Callable[..., Iterator[Example]]
    sample: str


STAGES = {
    "sft": Stage("sft_data", conversations, "sft.jsonl"),
    "dpo": Stage("dpo_data", pairs, "preferences-train.jsonl"),
    "grpo": Stage("math_data", problems, "arithmetic-train.jsonl"),
}


@dataclass(frozen=True)
class Data:
    """A stage's data, read: each row's fields under our names, and the example it is; and what the recipe is given."""

    source: str
    words: list[str]  # the stage's arguments
    rows: list[dict[str, Any]]
    examples: list[Example]


@dataclass(frozen=True)
class Done:
    """A stage that is finished, or the start: what came out, and how it does on held-out data."""

    name: str
    folder: Path
    model: str
    seconds: float  # of training
    figures: Figures


class StageFailed(Exception):
    """A step of a stage ended with another exit code than 0, which the pipeline then ends with too."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def main() -> int | None:
    args = tyro.cli(Args, description=__doc__)
    stop = Stop(args.time_limit)
    names = stage_names(args.stages)
    if args.until and args.until not in names:
        raise InputError(f"--until {args.until}: it is none of --stages {args.stages}")
    start = find_model(args.model)
    for name in names:
        if start.card and name not in start.card.methods:
            raise InputError(f"{args.model} is not offered for {name}, only for {', '.join(start.card.methods)}")
    folder = Path(args.output_dir or f"outputs/pipeline-{start.name}").expanduser()
    own_data = any(getattr(args, stage.data) for stage in STAGES.values())
    data = {name: read_data(name, args, own_data) for name in names}
    data, held_out = hold_out(data, args.eval_data, own_data, folder)
    evaluation = [*(OWN_DATA_EVAL_ARGS if own_data else ()), *split(args.eval_args, "--eval-args")]

    began = time.time()
    done = []
    stop.begin_steps(folder)
    try:
        at_start = folder / f"start-{digest(contents(start))}"
        at_start.mkdir(parents=True, exist_ok=True)
        figures = evaluate("start", args.model, at_start, held_out, evaluation, stop)
        done.append(Done("start", at_start, args.model, 0.0, figures))
        for name in names[: names.index(args.until) + 1 if args.until else None]:
            done.append(run_stage(name, data[name], done[-1].model, folder, held_out, evaluation, stop))
    except StageFailed as failure:
        print(failure, file=sys.stderr)
        return failure.exit_code
    report(done, folder, time.time() - began)
    return None


def stage_names(words: str) -> list[str]:
    """The stages named, in order. Raises InputError for one that is none, that comes twice, or for SFT after others."""
    names = [name for name in re.split(r"[,\s]+", words) if name]
    for name in names:
        if name not in STAGES:
            raise InputError(
                f"--stages {words}: unknown stage {name!r}{did_you_mean(name, STAGES)}. There are {', '.join(STAGES)}."
            )
    if not names or len(set(names)) < len(names):
        raise InputError(f"--stages {words}: expected one or more of {', '.join(STAGES)}, each once")
    if "sft" in names[1:]:
        raise InputError(f"--stages {words}: sft after {names[0]} would undo it; put sft first")
    return names


def split(text: str, flag: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"{flag} {text}: {error}") from None


def read_data(name: str, args: Args, own_data: bool) -> Data:
    """The data of a stage, all of it read and checked, and the stage's arguments."""
    stage = STAGES[name]
    source = getattr(args, stage.data) or (None if own_data else str(SAMPLES / stage.sample))
    if source is None:
        raise InputError(
            f"stage {name}: no --{stage.data.replace('_', '-')} ({stage.data.upper()}); where one stage has data of "
            "yours, the sample data of the tiny model would not fit the others"
        )
    words = split(getattr(args, f"{name}_args"), f"--{name}-args")
    if taken := [word for word in words if word.partition("=")[0] in OURS]:
        raise InputError(f"--{name}-args {' '.join(taken)}: the pipeline itself sets {', '.join(OURS)}; leave it out")
    reading, _ = reading_flags(words)
    columns = column_map(reading.columns)
    faults = Faults()
    rows = list(read_rows(find_source(source), faults))
    examples = list(stage.read(rows, faults, reading.format, columns))
    faults.stop()
    if not rows:
        raise InputError(f"{source}: holds no rows")
    fields = [{columns.get(key, key): value for key, value in row.fields.items()} for row in rows]
    return Data(source, words, fields, examples)


def reading_flags(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Those of a recipe's arguments that say how data is read, and the rest of them."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--format", default="auto")
    parser.add_argument("--columns", nargs="*", default=[])
    return parser.parse_known_args(words)


def hold_out(
    data: dict[str, Data], eval_data: tuple[str, ...], own_data: bool, folder: Path
) -> tuple[dict[str, Data], list[str]]:
    """The data of every stage without the prompts that are held out, and the held-out files."""
    files = list(eval_data) or ([] if own_data else [str(SAMPLES / name) for name in SAMPLES_HELD_OUT])
    chosen: dict[str, dict[str, dict[str, Any]]] = {}  # by stage, by prompt: the row to hold out
    for name, one in {} if files else data.items():
        by_prompt: dict[str, dict[str, Any]] = {}
        for fields, example in zip(one.rows, one.examples, strict=True):
            if not isinstance(example, Prompt) or example.answer is not None:
                by_prompt.setdefault(prompt_key(example), fields)
        count = min(HELD_OUT_MOST, max(1, round(len(by_prompt) * HELD_OUT_SHARE)))
        chosen[name] = {key: by_prompt[key] for key in sorted(by_prompt)[:count]}
        if not chosen[name]:
            print(f"{name}: no row of {one.source} has an answer; nothing is held out of it")
    if not files and not any(chosen.values()):
        raise InputError("there is nothing to score the stages on; give held-out data with --eval-data (EVAL_DATA)")
    held = {key for rows in chosen.values() for key in rows} | {
        prompt_key(example) for file in files for example in read_held_out(file)
    }

    for name, rows in chosen.items():
        if rows:
            files.append(str(folder / "data" / f"{name}-heldout.jsonl"))
            Path(files[-1]).parent.mkdir(parents=True, exist_ok=True)
            write_jsonl(Path(files[-1]), rows.values())
            print(f"{name}: {len(rows)} prompts of {data[name].source} are held out, in {files[-1]}")
    return {name: without(name, one, held, folder) for name, one in data.items()}, files


def without(name: str, data: Data, held: set[str], folder: Path) -> Data:
    """The data without the rows whose prompt is in `held`, in a file of its own; itself where there are none."""
    kept = [index for index, example in enumerate(data.examples) if prompt_key(example) not in held]
    if len(kept) == len(data.rows):
        return data
    if not kept:
        raise InputError(f"{data.source}: all its prompts are held-out ones, and nothing is left to train {name} on")
    file = folder / "data" / f"{name}-train.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(file, (data.rows[index] for index in kept))
    print(f"{name}: {len(data.rows) - len(kept)} rows with held-out prompts are left out, {len(kept)} train, in {file}")
    reading, words = reading_flags(data.words)
    words += ["--format", reading.format] if reading.format != "auto" else []  # its columns have our names now
    return Data(str(file), words, [data.rows[index] for index in kept], [data.examples[index] for index in kept])


def prompt_key(example: Example) -> str:
    """A hash of what the user says in a prompt, which of a conversation is all before the assistant's first turn."""
    turns = example.messages if isinstance(example, Conversation) else example.prompt
    asked = []
    for turn in turns:
        if turn["role"] == "assistant" and isinstance(example, Conversation):
            break
        if turn["role"] == "user":
            asked.append(str(turn["content"]).strip())
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def read_held_out(file: str) -> list[Example]:
    faults = Faults()
    rows = list(read_rows(find_source(file), faults))
    faults.stop()
    if not rows:
        raise InputError(f"{file}: holds no rows")
    form = detect(rows[0].fields, PAIR_FORMATS | PROBLEM_FORMATS)
    read = pairs if form in PAIR_FORMATS else conversations if form in (None, "prompt", "instruction") else problems
    examples = list(read(rows, faults))
    faults.stop()
    return examples


def run_stage(
    name: str, data: Data, parent: str, folder: Path, held_out: list[str], evaluation: list[str], stop: Stop
) -> Done:
    """Train, merge and evaluate, as far as it is not done already. Raises StageFailed where one of them fails."""
    base = find_model(parent)
    own = folder / f"{name}-{address(name, data, base)}"
    record = own / "run.json"
    if not (record.is_file() and json.loads(record.read_text(encoding="utf-8"))["status"] == "done"):
        recipe = ["recipes", f"{name}.py", "--model", parent, "--data", data.source, "--output-dir", str(own)]
        run(f"{name}: train", [*recipe, *data.words], stop, folder)
    merged = own / "merged"
    if not (merged / MERGE_RECORD).is_file():
        run(
            f"{name}: merge",
            ["scripts", "merge.py", "--adapter", str(own / "adapter"), "--model", parent, "--output-dir", str(merged)],
            stop,
            folder,
        )
    made_of = json.loads((merged / MERGE_RECORD).read_text(encoding="utf-8"))
    if made_of["base"] != contents(base):
        raise InputError(f"{merged}: merged into {made_of['base'][:16]}, not into {parent}; remove {own}")
    figures = evaluate(name, str(merged), own, held_out, evaluation, stop)
    seconds = json.loads(record.read_text(encoding="utf-8"))["seconds"]
    return Done(name, own, str(merged), seconds, figures)


def address(name: str, data: Data, parent: Model) -> str:
    """The hash of what decides a stage's outcome; files that its arguments name count by their contents."""
    pieces = [piece for word in data.words for piece in re.split("[=:,]", word)]
    return digest(
        name,
        data.words,
        {piece: source_sha256([Path(piece)]) for piece in pieces if Path(piece).is_file()},
        sha256_of(data.source),
        contents(parent),
        getattr(parent.card, name) if parent.card else None,
        installed_lock(),
    )


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def sha256_of(data: str) -> str:
    source = find_source(data)
    return source_sha256(source) or str(source)


def evaluate(name: str, model: str, folder: Path, held_out: list[str], words: list[str], stop: Stop) -> Figures:
    """The figures of `model` on the held-out files: measured now, or before on the same files with the same words."""
    file = folder / f"evaluation-{digest(words, {data: sha256_of(data) for data in held_out}, installed_lock())}.json"
    if not file.is_file():
        command = ["scripts", "evaluate.py", "--model", model, "--data", *held_out, "--json", str(file), *words]
        run(f"{name}: evaluate", command, stop, folder.parent)
    results = json.loads(file.read_text(encoding="utf-8"))
    return {data: results[data]["figures"]["all"] for data in held_out}


def run(what: str, words: list[str], stop: Stop, folder: Path) -> None:
    """Run a recipe or a script, WORDS being its folder, name and arguments; what it prints is seen as it comes.

    When the pipeline in `folder` is told to stop, so is it. Raises StageFailed with the exit code and the last line of
    the errors.
    """
    command = [sys.executable, str(ROOT / words[0] / words[1]), *words[2:]]
    print(f"== {what}: {shlex.join(command)}", flush=True)
    environment = {**os.environ, "PIPELINE_STAGE": what}  # a run then proposes no next command
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
    last = ""

    def pass_on_errors() -> None:
        nonlocal last
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip(" │\n") if re.search(r"\w", line) else last

    reader = threading.Thread(target=pass_on_errors)
    reader.start()
    code = stop.wait(process, folder)
    reader.join()
    if code == STOPPED or stop.requested:
        raise StageFailed(f"{what}: stopped; the same command again goes on from here", STOPPED)
    if code < 0:
        last, code = f"killed by {signal.Signals(-code).name}; last it said: {last}", 128 - code
    if code:
        raise StageFailed(f"{what} failed with exit code {code}: {last}\nTo repeat it: {shlex.join(command)}", code)


def report(done: list[Done], folder: Path, seconds: float) -> None:
    """The figures stage by stage with the change against the stage before: printed, in report.md and report.json."""
    from rich.console import Console
    from rich.table import Table

    header = ["held out", "", *(stage.name for stage in done)]
    lines = []
    for data, figures in done[0].figures.items():
        for figure in figures:
            if figure == "rows":
                continue
            values = [stage.figures[data][figure] for stage in done]
            cells = [shown(figure, values[0])]
            for old, new in itertools.pairwise(values):
                cells.append(f"{shown(figure, new)} ({shown(figure, new - old, sign='+')})")
            lines.append([f"{Path(data).stem} ({figures['rows']})", figure, *cells])

    table = Table(*header, title="Held-out data, and the change against the stage before")
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    markdown = [
        f"# {' → '.join(stage.name for stage in done)}",
        "",
        "In brackets the change against the stage before.",
        "",
        *(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)),
        "",
        *(f"- {stage.name}: `{stage.model}`, {stage.seconds:.0f} s of training" for stage in done[1:]),
        "",
    ]
    (folder / "report.md").write_text("\n".join(markdown), encoding="utf-8")
    write_json(
        folder / "report.json",
        {
            "seconds": round(seconds, 1),
            "stages": [
                {
                    "stage": stage.name,
                    "folder": str(stage.folder),
                    "model": stage.model,
                    "training_seconds": stage.seconds,
                    "figures": stage.figures,
                    "change": {
                        data: {figure: value - before.figures[data][figure] for figure, value in figures.items()}
                        for data, figures in stage.figures.items()
                    }
                    if before
                    else None,
                }
                for before, stage in zip([None, *done], done, strict=False)
            ],
        },
    )
    print(f"{seconds:.0f} s. Report in {folder / 'report.md'}, the last model in {done[-1].model}")


def shown(figure: str, value: float, sign: str = "") -> str:
    """A figure as evaluate.py shows it: nats as they are, shares in per cent."""
    return f"{value:{sign}.2f}" if "nats" in figure else f"{value * 100:{sign}.1f}" + ("" if sign else " %")


if __name__ == "__main__":
    run_command(main)
