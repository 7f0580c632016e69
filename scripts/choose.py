"""Which stages suit your data, model and GPU: an interview, or the same by arguments.

    make choose                                                            asks on the terminal
    make choose DATA=my.jsonl MODEL=qwen2.5-7b                             looks at the file and proposes
    make choose HAVE="demonstrations pairs" MODEL=qwen2.5-7b GPU_GIB=24    without a file

The answer: the stages in their order, the commands, what each stage can and cannot do, and whether it fits into the
GPU's memory. Every kind of data has one method: demonstrations and raw text SFT, pairs DPO, feedback KTO, checkable
answers GRPO, scores a reward model and PPO. The row format decides; `make check-data` tells whether the data is any
good.

Left out: full-parameter training, several GPUs.
"""

import itertools
import json
import shlex
import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from common.cli import parse_arguments
from common.commands import make
from common.data.documents import DOCUMENT_FORMATS
from common.data.feedback import FEEDBACK_FORMATS
from common.data.formats import FORMATS, GRADED_FORMATS, PAIR_FORMATS, PROBLEM_FORMATS, RATING_FORMATS, detect
from common.data.rows import Faults, find_source, read_rows
from common.errors import InputError, MachineError, run_command
from common.lm.cards import card_names, read_card
from common.lm.hub import Model, find_model
from common.nvidia import free_gib, nvidia_smi
from common.plan.search import device_with, fit, least, measure, plan
from common.plan.shape import sizes_of
from common.plan.words import as_flag, recomputed
from common.plan.workload import workload
from common.rewards.answers import gold

LOOKED_AT = 20  # rows of a file
Kind = Literal["demonstrations", "pairs", "feedback", "answers", "scores", "reward-model", "documents"]
KINDS: dict[Kind, str] = {
    "demonstrations": "examples of good answers, to imitate",
    "pairs": "two answers to a prompt, one better than the other",
    "feedback": "single answers marked good or bad, thumbs up and down",
    "answers": "problems with an answer that can be checked: mathematics, code, a fixed form",
    "scores": "answers with a number that says how good each is",
    "reward-model": "a model that scores answers",
    "documents": "raw text of a field or a language, to continue pre-training on",
}
CAN = {
    "sft": "bring out what the model can do already, in the form and tone of your examples",
    "dpo": "bring out the better of the answers that the model gives already",
    "kto": "bring out what is marked good and push back what is marked bad, with no pairs to make",
    "grpo": "add a skill: every right answer is rewarded, however the model found it",
    "reward": "give any answer a score, learned from yours",
    "ppo": "raise the score where nothing can be checked, such as style or helpfulness",
}
CANNOT = {
    "sft": "add a skill; what the model does not know it learns to make up",
    "dpo": "add a skill; an answer that the model never gives stays unlikely",
    "kto": "add a skill, or learn from good answers alone; an answer that the model never gives stays unlikely",
    "grpo": "start from nothing: where every try is wrong, there is nothing to reward",
    "reward": "know better than its data; what it overrates, PPO will find",
    "ppo": "get better than the reward model, and it takes the most care of all",
}
EMBEDDED = "tiny"  # a base model, and quick on a CPU; the other cards are instruction-tuned
CHOSEN_ANSWER = ("--columns", "completion=chosen")  # a pair's chosen answer read as an example for SFT
PIPELINE_DATA = {
    "sft": "SFT_DATA",
    "dpo": "DPO_DATA",
    "kto": "KTO_DATA",
    "grpo": "MATH_DATA",
    "reward": "REWARD_DATA",
    "ppo": "PPO_DATA",
}  # the variable of `make pipeline` that names the data of a stage


@dataclass(frozen=True)
class Args:
    data: tuple[str, ...] = ()
    """Files to look at, instead of --have."""
    have: tuple[Kind, ...] = ()
    """Your data. demonstrations: examples of good completions; pairs: two completions of a prompt, one better than the
    other; feedback: completions marked good or bad; answers: prompts with an answer that can be checked; scores:
    completions with a number for how good each is; reward-model: a model that scores completions; documents: raw
    text."""
    model: str | None = None
    """A model card's name (`make models`), a local directory or a hub id."""
    base: bool = False
    """The model is a base model: it knows no chat template yet."""
    gpu_gib: float | None = None
    """Free memory of the GPU in GiB, 0 for no GPU; by default what nvidia-smi shows."""
    json: bool = False
    """Print the answer as JSON."""


@dataclass(frozen=True)
class Data:
    """A file that was looked at: what it is for, and why. `flags` are what SFT needs to read it, None if it cannot."""

    kind: str
    path: str
    why: str
    flags: tuple[str, ...] | None = ()


@dataclass
class Stage:
    method: str
    reason: str
    data: str
    flags: list[str] = field(default_factory=list)
    gib: float | None = None  # what it needs; None where the model's sizes are not known
    fits: bool | None = None  # None where it is not known either
    settings: str = ""
    commands: list[str] = field(default_factory=list)
    name: str = ""  # of its folder, where that is not the method's


def main() -> None:
    args = parse_arguments(Args, __doc__)
    data = [look_at(path) for path in args.data]
    have = list(dict.fromkeys([*args.have, *(item.kind for item in data)]))
    gib = gpu_gib() if args.gpu_gib is None else args.gpu_gib
    missing = [
        *([] if have else ["--have=KIND (or --data=FILE)"]),
        *([] if args.model else ["--model=NAME"]),
        *([] if gib is not None else ["--gpu-gib=N (nvidia-smi shows no GPU here; 0 for none)"]),
    ]
    if missing and not sys.stdin.isatty():
        raise InputError(f"There is no terminal to ask on; give {', '.join(missing)}")
    have = have or ask_kinds()
    model = args.model or ask_model()
    gib = ask_gib() if gib is None else gib
    if not gib >= 0:
        raise InputError(f"--gpu-gib={gib:g}: expected the GPU's free memory in GiB, or 0 for no GPU")
    found = find_model(model)
    stages, notes = choose(have, data, args.base or model == EMBEDDED)
    for stage in stages:
        plan_memory(stage, found, gib)
    pipeline = write_commands(stages, model, found.name)
    if args.json:
        answer: dict[str, Any] = {"model": model, "gpu_gib": gib, "data": [asdict(item) for item in data]}
        answer["stages"] = [
            asdict(stage) | {"can": CAN[stage.method], "cannot": CANNOT[stage.method]} for stage in stages
        ]
        print(json.dumps(answer | {"pipeline": pipeline, "notes": notes}, indent=2, ensure_ascii=False))
    else:
        show(stages, pipeline, notes, data, model, gib)


def look_at(path: str) -> Data:
    """What the first rows of a data source are good for. Raises InputError when their columns are of no known form."""
    faults = Faults()
    rows = list(itertools.islice(read_rows(find_source(path), faults), LOOKED_AT))
    faults.stop()
    if not rows:
        raise InputError(f"{path}: holds no rows")
    fields = rows[0].fields
    if form := detect(fields, PAIR_FORMATS):
        return Data("pairs", path, f"columns {', '.join(PAIR_FORMATS[form].columns)}", chosen_as_examples(fields))
    for kind, known in (
        ("scores", RATING_FORMATS),
        ("feedback", FEEDBACK_FORMATS),
        ("answers", GRADED_FORMATS),
        ("demonstrations", FORMATS),
        ("documents", DOCUMENT_FORMATS),
    ):
        if form := detect(fields, known):
            return Data(kind, path, f"columns {', '.join(known[form].columns)}")
    form = detect(fields, PROBLEM_FORMATS)
    if form is None:
        raise InputError(
            f"{path}: the columns are {', '.join(map(str, fields))}, which no recipe knows. Rename them as the "
            "README's table of forms has them, or say what the file holds with --have in place of --data."
        )
    columns = PROBLEM_FORMATS[form].columns
    if len(columns) == 1:
        return Data("prompts", path, f"only {columns[0]}, no answer")
    unclear = sum(not is_checkable(row.fields.get(columns[1], "")) for row in rows)
    if unclear * 2 <= len(rows):
        return Data("answers", path, f"columns {', '.join(columns)}; the answers can be checked")
    renamed = zip(("prompt", "completion"), columns, strict=True)
    flags = ("--columns", *(f"{ours}={theirs}" for ours, theirs in renamed if ours != theirs))
    why = f"columns {', '.join(columns)}; in {unclear} of {len(rows)} rows the {columns[1]} cannot be checked"
    return Data("demonstrations", path, why, flags)


def chosen_as_examples(fields: dict[str, Any]) -> tuple[str, ...] | None:
    """The flags by which SFT reads the chosen answers of such pairs; None where it cannot."""
    prompt, chosen = fields.get("prompt"), fields["chosen"]
    if isinstance(chosen, list) and (prompt is None or chosen[: len(prompt)] == prompt):
        return ("--columns", "messages=chosen")  # the whole dialogue
    if prompt is None and "instruction" in fields and isinstance(chosen, str):
        return ("--columns", "output=chosen")
    return CHOSEN_ANSWER if prompt is not None else None


def is_checkable(answer: Any) -> bool:
    try:
        gold(str(answer))
    except ValueError:
        return False
    return True


def gpu_gib() -> float | None:
    """Free memory of the first GPU in GiB, as nvidia-smi says; None where there is none."""
    try:
        gib = free_gib(nvidia_smi())
    except (MachineError, TimeoutError):
        return None
    return None if gib is None else round(gib, 1)


def ask(question: str) -> str:
    try:
        return input(question).strip()
    except EOFError:
        raise InputError("\nno answer; the same questions as flags: --have, --model, --gpu-gib") from None


def ask_kinds() -> list[str]:
    print("What data do you have?")
    for number, (kind, meaning) in enumerate(KINDS.items(), start=1):
        print(f"  {number}  {kind}: {meaning}")
    while True:
        words = ask("Numbers, separated by spaces: ").replace(",", " ").split()
        if words and all(word.isdecimal() and 1 <= int(word) <= len(KINDS) for word in words):
            return [list(KINDS)[int(word) - 1] for word in words]
        print(f"Please give numbers from 1 to {len(KINDS)}, such as 1 3.")


def ask_model() -> str:
    print(f"Which model? A card ({', '.join(card_names())}), a folder or a hub id.")
    return ask("Model [qwen2.5-7b]: ") or "qwen2.5-7b"


def ask_gib() -> float:
    while True:
        try:
            return float(ask("GiB of free memory on the GPU, 0 for no GPU: "))
        except ValueError:
            print("Please give a number, such as 24.")


def choose(have: list[str], data: list[Data], base: bool) -> tuple[list[Stage], list[str]]:
    """The stages for these kinds of data in their order, and notes about them."""
    files = {item.kind: item for item in reversed(data)}  # of two files of a kind the first
    paths = {kind: files[kind].path if kind in files else f"{kind}.jsonl" for kind in (*KINDS, "prompts")}
    chosen = files["pairs"].flags if "pairs" in files else CHOSEN_ANSWER
    stages, notes = [], []
    if "documents" in have:
        reason = "raw text teaches words and facts, on every token of it."
        stages.append(Stage("sft", reason, paths["documents"], name="pretrained"))
        notes.append(
            "Raw text teaches no answering, and a chat model forgets some of it: let demonstrations follow. For words "
            "or a language new to the model, add TRAIN_EMBEDDINGS=yes, which needs more memory."
        )
    if "demonstrations" in have:
        flags = files["demonstrations"].flags if "demonstrations" in files else ()
        stages.append(Stage("sft", "demonstrations are there to imitate.", paths["demonstrations"], list(flags or ())))
    elif base and "pairs" in have and chosen:
        reason = "a base model must learn to answer first; the chosen answers are its examples."
        stages.append(Stage("sft", reason, paths["pairs"], list(chosen)))
    elif base:
        notes.append(
            "A base model knows no chat form. Write some hundred demonstrations for SFT first, or take the model's "
            "instruct variant."
        )
    if "pairs" in have:
        stages.append(Stage("dpo", "pairs say which of two answers is better.", paths["pairs"]))
    if "feedback" in have:
        stages.append(Stage("kto", "marks say of each answer whether it is good.", paths["feedback"]))
    if "answers" in have:
        reason = "an answer that can be checked is a reward that is hard to fool."
        stages.append(Stage("grpo", reason, paths["answers"]))
    if "scores" in have and "reward-model" not in have:
        stages.append(Stage("reward", "scores teach a model to score.", paths["scores"]))
    if "scores" in have or "reward-model" in have:
        prompts = paths["scores"] if "scores" in have else paths["prompts"]
        stages.append(Stage("ppo", "where nothing can be checked, a reward model is the judge.", prompts))
    if not stages:
        raise InputError(
            "prompts alone teach nothing: they need good answers, pairs, feedback, answers to check against, scores or "
            "a model that scores (--have reward-model)"
        )
    if "answers" in have:
        notes.append("GRPO needs a model that is right now and then: see its pass@8 first, make evaluate SAMPLES=8.")
        if stages[0].method != "sft":
            notes.append(
                "GRPO pays for the form <think>...</think><answer>...</answer> too. No SFT teaches it here: ask for it "
                "with SYSTEM_PROMPT=..."
            )
    return stages, notes


def plan_memory(stage: Stage, base: Model, gib: float) -> None:
    """Fill in what `stage` needs, whether it fits, and the flags of the fastest settings under which it does."""
    card = base.card
    sizes = sizes_of(base)
    if sizes is None:
        stage.settings = "not known: there is no card of the model, and no config.json on this machine"
        return
    if card and stage.method not in card.methods:
        stage.settings = f"{card.name} is not offered for {stage.method}, only for {', '.join(card.methods)}"
        stage.fits = False
        return
    device = device_with(gib or 80)
    given = {"reward_model": "one"} if stage.method == "ppo" else {}  # an adapter on the same base
    if gib == 0:
        stage.gib = measure(sizes, least(workload(sizes, stage.method, given)), device).total
        stage.fits = card is not None and card.name == EMBEDDED
        stage.settings = (
            "it is small enough for the CPU"
            if stage.fits
            else f"needs a GPU with {stage.gib:.1f} GiB at the least; without one take MODEL={EMBEDDED}"
        )
        return
    planned = plan(sizes, stage.method, device, given, fixed=())
    stage.gib, stage.fits = planned.total, planned.fits
    if planned.fits:
        work = planned.work
        rows = f"{work.rows} x {work.length} tokens"
        stage.settings = f"{stage.gib:.1f} of {gib:g} GiB: {work.precision}, {recomputed(work)}, {rows}"
        stage.flags += [word for name, value in planned.changed.items() for word in as_flag(name, value)]
        return
    smaller = [name for name in by_size() if name != EMBEDDED]
    fitting = [name for name in smaller if fit(read_card(name), stage.method, device, given, fixed=())]
    stage.settings = (
        f"does not fit: {stage.gib:.1f} GiB at the least, of {gib:g}. Take a larger GPU"
        f"{', or a smaller model: ' + ', '.join(fitting[-3:]) if fitting else ''}"
    )


def by_size() -> list[str]:
    return sorted(card_names(), key=lambda name: read_card(name).parameters)


def write_commands(stages: list[Stage], model: str, name: str) -> str | None:
    """Put each stage's commands into it; return the one command for all of them, None where there is none."""
    base, reward_model = model, "my-reward-model"
    for number, stage in enumerate(stages):
        run = f"outputs/{name}-{stage.name or stage.method}"
        given = {"MODEL": base, "DATA": stage.data, "OUT": run, **as_variables(stage.flags)}
        if stage.method == "ppo":
            given["REWARD"] = reward_model
        stage.commands = [make(stage.method, **given)]
        if stage.method == "reward":
            reward_model = run  # it changes no weights of the base, on which PPO starts
        elif number + 1 < len(stages):
            # The next stage starts from the model that this one is merged into; that is its reference, too.
            base = f"{run}-merged"
            stage.commands.append(make("merge", ADAPTER=f"{run}/adapter", OUT=base))
    methods = [stage.method for stage in stages]
    if len(stages) < 2 or len(set(methods)) < len(methods):  # a pipeline has each method once
        return None
    if "ppo" in methods and "reward" not in methods:  # a reward model that is there has a base
        return None
    given = {PIPELINE_DATA[stage.method]: stage.data for stage in stages}
    if given.get("PPO_DATA") == given.get("REWARD_DATA"):
        given.pop("PPO_DATA", None)  # it takes its prompts from there
    given |= {f"{stage.method.upper()}_ARGS": shlex.join(stage.flags) for stage in stages if stage.flags}
    return make("pipeline", STAGES=",".join(methods), MODEL=model, **given)


def as_variables(flags: list[str]) -> dict[str, str]:
    """The flags of a recipe as variables of make: {"LOAD_IN_4BIT": "no", "MAX_LENGTH": "1024"}."""
    variables: dict[str, list[str]] = {}
    name = ""
    for word in flags:
        if word.startswith("--"):
            off = word.startswith("--no-")
            name = word.removeprefix("--no-" if off else "--").replace("-", "_").upper()
            variables[name] = ["no"] if off else []
        else:
            variables[name].append(word)
    return {name: shlex.join(values) for name, values in variables.items()}


def show(stages: list[Stage], pipeline: str | None, notes: list[str], data: list[Data], model: str, gib: float) -> None:
    for item in data:
        print(f"{item.path}: {item.kind} ({item.why})")
    gpu = f"{gib:g} GiB of GPU memory" if gib else "no GPU"
    print(f"{' -> '.join(stage.method.upper() for stage in stages)}, for {model} with {gpu}")
    for number, stage in enumerate(stages, start=1):
        print(f"\n{number}. {stage.method.upper()}: {stage.reason}")
        paragraph(CAN[stage.method], "can     ")
        paragraph(CANNOT[stage.method], "cannot  ")
        paragraph(stage.settings, "memory  ")
        for command in stage.commands:
            print(f"   {command}")  # whole, however long: it is there to be copied
    if pipeline:
        print(f"\nAll in one command, with an evaluation after every stage:\n   {pipeline}")
    for note in notes:
        print()
        paragraph(note, "")


def paragraph(text: str, label: str) -> None:
    indent = " " * (3 + len(label))
    width = min(shutil.get_terminal_size().columns, 100)
    print(textwrap.fill(text, width, initial_indent=f"   {label}", subsequent_indent=indent, break_on_hyphens=False))


if __name__ == "__main__":
    run_command(main)
