"""Ask a model held-out questions and say how often it keeps the form, stops by itself, and is right.

    make evaluate ADAPTER=outputs/sft-tiny-1a2b3c4d/adapter
    make evaluate MODEL=tiny DATA=data_samples/arithmetic.jsonl ARGS="--samples 8"

The data has a `prompt` and an `answer` a row, and a `task` where the rows are of several kinds. One greedy answer is
asked for; with --samples N also N sampled ones, for pass@1 (the mean over all samples) and pass@N (at least one right).

Left out: answers that are right in other words; they are compared as text.
"""

import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import tyro
from common import environment
from common.chat import end_token, set_chat_template, set_pad_token
from common.errors import InputError, MachineError, run_command
from common.formats import Conversation
from common.models import fetch, find_model, load_tokenizer
from common.record import write_json
from common.rows import Faults, find_source, read_rows


@dataclass(frozen=True)
class Args:
    model: str = "tiny"
    """A model card's name, a local directory or a hub id."""
    adapter: str | None = None
    """The adapter to put on it: the adapter folder of a run."""
    data: str = str(environment.ROOT / "data_samples" / "heldout.jsonl")
    """Questions with answers: prompt, answer and, if there are several kinds, task."""
    form: str = r"<think>.+</think><answer>(.+)</answer>"
    """What a whole answer must match; its group is what is compared with the data's answer."""
    samples: int = 0
    """Sampled answers to each question, besides the greedy one."""
    temperature: float = 1.0
    max_new_tokens: int = 64
    load_in_4bit: bool = False
    seed: int = 42
    json: str | None = None
    """A file to write the figures and every answer to."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    base = find_model(args.model)
    source = find_source(args.data)
    environment.set_variables(offline=base.local and not isinstance(source, str))
    questions = read_questions(source)
    if args.adapter and not (Path(args.adapter) / "adapter_config.json").is_file():
        raise InputError(f"--adapter {args.adapter}: no adapter_config.json there; give the adapter folder of a run")
    environment.quiet_loggers()
    import unsloth  # noqa: F401, I001  first: it changes what is imported after it
    import torch
    from peft import PeftModel
    from rich.console import Console
    from rich.table import Table
    from transformers import set_seed
    from unsloth import FastLanguageModel

    from common.generate import generate

    base = fetch(base)
    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, None, base.name)
    end = end_token(tokenizer)
    set_pad_token(tokenizer, base.card.pad_token if base.card else None, end)
    if args.load_in_4bit and not torch.cuda.is_available():
        raise MachineError("--load-in-4bit needs a GPU")
    model, _ = FastLanguageModel.from_pretrained(
        base.source,
        revision=base.revision,
        dtype=None if torch.cuda.is_available() else torch.float32,
        load_in_4bit=args.load_in_4bit,
        use_exact_model_name=True,
    )
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    FastLanguageModel.for_inference(model)

    prompts = [Conversation(q["place"], [{"role": "user", "content": q["prompt"]}]) for q in questions]
    greedy = generate(model, tokenizer, prompts, end, args.max_new_tokens)
    set_seed(args.seed)
    sampled = [
        generate(model, tokenizer, prompts, end, args.max_new_tokens, args.temperature) for _ in range(args.samples)
    ]

    figures = defaultdict(lambda: defaultdict(list))
    for index, question in enumerate(questions):
        answer = greedy[index]
        right = [is_right(args.form, draw[index].text, question["answer"]) for draw in sampled]
        for task in {"all", question.get("task", "all")}:
            row = figures[task]
            row["keeps the form"].append(answer.ended and matches(args.form, answer.text) is not None)
            row["stops"].append(answer.ended)
            row["greedy right"].append(is_right(args.form, answer.text, question["answer"]))
            if sampled:
                row["pass@1"].append(mean(right))
                row[f"pass@{args.samples}"].append(any(right))
    table = Table("task", "questions", *figures["all"], title=f"{base.name} {args.adapter or ''} on {args.data}")
    for task, row in sorted(figures.items(), key=lambda item: item[0] != "all"):
        table.add_row(task, str(len(row["stops"])), *(f"{mean(values):.1%}" for values in row.values()))
    Console().print(table)
    if args.json:
        write_json(
            Path(args.json),
            {
                "figures": {task: {name: mean(v) for name, v in row.items()} for task, row in figures.items()},
                "answers": [
                    {**question, "greedy": greedy[index].text, "sampled": [draw[index].text for draw in sampled]}
                    for index, question in enumerate(questions)
                ],
            },
        )


def read_questions(source: list[Path] | str) -> list[dict[str, str]]:
    """Rows with a prompt and an answer, both text."""
    faults = Faults()
    questions = []
    for row in read_rows(source, faults):
        missing = [name for name in ("prompt", "answer") if not isinstance(row.fields.get(name), str)]
        for name in missing:
            faults.add(row.place, f"{name}: expected text, found {json.dumps(row.fields.get(name))[:40]}")
        if not missing:
            questions.append({"place": row.place, **row.fields})
    faults.stop()
    return questions


def matches(form: str, text: str) -> str | None:
    """What the group of `form` catches when the whole text has that form, once; else None."""
    found = re.fullmatch(form, text.strip(), flags=re.DOTALL)
    if not found or any(text.count(tag) > 1 for tag in re.findall(r"</?\w+>", form)):
        return None
    return (found[1] if found.groups() else found[0]).strip()


def is_right(form: str, text: str, answer: str) -> bool:
    said = matches(form, text)
    return said is not None and said.casefold() == answer.strip().casefold()


if __name__ == "__main__":
    run_command(main)
