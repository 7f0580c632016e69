"""Score a model, or a base with an adapter, on held-out data.

    make evaluate ADAPTER=outputs/sft-tiny-1a2b3c4d/adapter
    make evaluate MODEL=tiny DATA=data_samples/arithmetic.jsonl ARGS="--samples 8"
    make evaluate MODEL=outputs/merged DATA=data_samples/preferences.jsonl

What is measured follows from the data. Questions with answers (`prompt`, `answer`, and a `task` where the rows are of
several kinds) are asked: how often the answer keeps the form, ends by itself, and is right, greedily and with
--samples N also sampled, for pass@1 (the mean over all samples) and pass@N (at least one right). Preference pairs are
read: how often the chosen answer is likelier than the rejected one. Conversations are read too: the loss on what the
assistant says, which falls as the model comes to talk like them, and does not say whether anything is right.

Left out: judging answers that no rule can tell right from wrong.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import tyro
from common import environment
from common.data.examples import Conversation, Pair, Prompt
from common.data.formats import FORMATS, PAIR_FORMATS, PROBLEM_FORMATS, detect
from common.data.read import conversations, pairs, problems
from common.data.rows import Faults, find_source, read_rows
from common.errors import InputError, run_command
from common.lm.chat import Example, TokenPair, tokenize, tokenize_pairs
from common.lm.hub import fetch
from common.lm.load import base_of, load_chat_tokenizer, load_for_inference
from common.rewards.answers import Gold, final_answer, gold, same
from common.run.files import write_json


@dataclass(frozen=True)
class Args:
    model: str | None = None
    """A model card's name, a local directory or a hub id; by default what the adapter was trained on, or tiny."""
    adapter: str | None = None
    """The adapter to put on it: the adapter folder of a run."""
    data: tuple[str, ...] = (str(environment.ROOT / "data_samples" / "heldout.jsonl"),)
    """Questions with answers, preference pairs or conversations; one file or several."""
    form: str = r"<think>.+</think><answer>(.+)</answer>"
    """What a whole answer must match; its group is what is compared with the data's answer. Empty: any answer will do,
    and what it ends in is compared, as by the reward `math`."""
    samples: int = 0
    """Sampled answers to each question, besides the greedy one."""
    temperature: float = 1.0
    max_new_tokens: int = 64
    max_length: int = 2048
    """Tokens of a pair or a conversation; the rest is cut off at the end."""
    load_in_4bit: bool = False
    seed: int = 42
    json: str | None = None
    """A file to write the figures and every answer to."""


@dataclass(frozen=True)
class Question:
    """A problem and its gold answer, parsed."""

    problem: Prompt
    gold: Gold


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    base = base_of(args.model, args.adapter)
    sources = {data: find_source(data) for data in args.data}
    local = base.local and not any(isinstance(source, str) for source in sources.values())
    environment.set_variables(offline=local)
    sets = {data: read(source) for data, source in sources.items()}
    environment.quiet_loggers()
    import unsloth  # noqa: F401  first: it changes what is imported after it
    from rich.console import Console
    from transformers import set_seed

    base = fetch(base)
    tokenizer, end = load_chat_tokenizer(base)
    faults = Faults()
    tokenized = {}
    for data, rows in sets.items():
        if not isinstance(rows[0], Question):
            read_as = tokenize_pairs if isinstance(rows[0], Pair) else tokenize
            tokenized[data] = list(read_as(tokenizer, rows, args.max_length, faults))
    faults.stop()
    model = load_for_inference(base, args.adapter, args.load_in_4bit)

    results = {}
    for data, rows in sets.items():
        if isinstance(rows[0], Pair):
            results[data] = prefer(model, tokenizer, tokenized[data])
        elif isinstance(rows[0], Conversation):
            results[data] = imitate(model, tokenizer, tokenized[data])
        else:
            set_seed(args.seed)
            results[data] = ask(model, tokenizer, end, rows, args)
        Console().print(table(f"{base.name} {args.adapter or ''} on {data}", results[data]["figures"]))
    if args.json:
        write_json(Path(args.json), results)


def read(source: list[Path] | str) -> list[Question] | list[Pair] | list[Conversation]:
    """Pairs, conversations, or questions with a gold answer that can be compared with."""
    faults = Faults()
    rows = list(read_rows(source, faults))
    faults.stop()
    if not rows:
        raise InputError(f"{source}: holds no rows")
    if detect(rows[0].fields, PAIR_FORMATS):
        examples: list[Any] = list(pairs(rows, faults))
    elif detect(rows[0].fields, PROBLEM_FORMATS) in (None, "prompt", "instruction") and detect(rows[0].fields, FORMATS):
        examples = list(conversations(rows, faults))
    else:
        examples = []
        for problem in problems(rows, faults):
            try:
                if problem.answer is None:
                    raise ValueError("answer: missing; there is nothing to hold the model's answer against")
                examples.append(Question(problem, gold(problem.answer)))
            except ValueError as error:
                faults.add(problem.place, str(error))
    faults.stop()
    return examples


def prefer(model: Any, tokenizer: Any, examples: list[TokenPair]) -> dict[str, Any]:
    """How often, and by how much, the chosen answers are likelier than the rejected ones."""
    from common.lm.log_probs import score_tokens

    chosen = score_tokens(model, [(p.prompt_ids, p.chosen_ids) for p in examples], tokenizer.pad_token_id)
    rejected = score_tokens(model, [(p.prompt_ids, p.rejected_ids) for p in examples], tokenizer.pad_token_id)
    both = list(zip(chosen, rejected, strict=True))
    margins = [float(better.log_probs.sum() - worse.log_probs.sum()) for better, worse in both]
    by_token = [float(better.log_probs.mean() - worse.log_probs.mean()) for better, worse in both]
    return {
        "figures": {
            "all": {
                "rows": len(examples),
                "chosen likelier": mean(margin > 0 for margin in margins),
                "chosen likelier by token": mean(margin > 0 for margin in by_token),
                "margin (nats)": mean(margins),
            }
        },
        "margins": [{"place": pair.place, "margin": margin} for pair, margin in zip(examples, margins, strict=True)],
    }


def imitate(model: Any, tokenizer: Any, examples: list[Example]) -> dict[str, Any]:
    """The loss on what the assistant says, by token, as SFT has it."""
    from common.lm.log_probs import score_tokens

    rows = [(example.input_ids[:1].tolist(), example.input_ids[1:].tolist()) for example in examples]
    scored = score_tokens(model, rows, tokenizer.pad_token_id)
    losses = [
        [
            -float(log_prob)
            for log_prob, learned in zip(s.log_probs, example.completion_mask[1:], strict=True)
            if learned
        ]
        for s, example in zip(scored, examples, strict=True)
    ]
    return {
        "figures": {"all": {"rows": len(examples), "loss (nats)": mean(loss for row in losses for loss in row)}},
        "losses": [{"place": row.place, "loss": mean(loss)} for row, loss in zip(examples, losses, strict=True)],
    }


def ask(model: Any, tokenizer: Any, end: str, questions: list[Question], args: Args) -> dict[str, Any]:
    """How often the answers keep the form, end by themselves and are right; by task, and over all."""
    from common.lm.generate import generate

    prompts = [Conversation(q.problem.place, q.problem.prompt, q.problem.tools) for q in questions]
    greedy = generate(model, tokenizer, prompts, end, args.max_new_tokens)
    sampled = [
        generate(model, tokenizer, prompts, end, args.max_new_tokens, args.temperature) for _ in range(args.samples)
    ]
    figures = defaultdict(lambda: defaultdict(list))
    for index, question in enumerate(questions):
        answer = greedy[index]
        right = [is_right(args.form, draw[index].text, question.gold) for draw in sampled]
        for task in {"all", question.problem.fields.get("task", "all")}:
            row = figures[task]
            if args.form:
                row["keeps the form"].append(answer.ended and matches(args.form, answer.text) is not None)
            row["stops"].append(answer.ended)
            row["greedy right"].append(is_right(args.form, answer.text, question.gold))
            if sampled:
                row["pass@1"].append(mean(right))
                row[f"pass@{args.samples}"].append(any(right))
    return {
        "figures": {
            task: {"rows": len(row["stops"]), **{name: mean(values) for name, values in row.items()}}
            for task, row in figures.items()
        },
        "answers": [
            {
                "place": question.problem.place,
                "prompt": question.problem.prompt,
                "answer": question.problem.answer,
                "greedy": greedy[index].text,
                "sampled": [draw[index].text for draw in sampled],
            }
            for index, question in enumerate(questions)
        ],
    }


def table(title: str, figures: dict[str, dict[str, float]]) -> Any:
    """The figures as a table, a row for each task; shares in per cent."""
    from rich.table import Table

    rows = Table("task", *figures["all"], title=title)
    for task, row in sorted(figures.items(), key=lambda item: item[0] != "all"):
        cells = (str(v) if name == "rows" else f"{v:.2f}" if "nats" in name else f"{v:.1%}" for name, v in row.items())
        rows.add_row(task, *cells)
    return rows


def matches(form: str, text: str) -> str | None:
    """What the group of `form` catches when the whole text has that form, once; else None."""
    found = re.fullmatch(form, text.strip(), flags=re.DOTALL)
    if not found or any(text.count(tag) > 1 for tag in re.findall(r"</?\w+>", form)):
        return None
    return (found[1] if found.groups() else found[0]).strip()


def is_right(form: str, text: str, gold: Gold) -> bool:
    return same(gold, matches(form, text) if form else final_answer(text))


if __name__ == "__main__":
    run_command(main)
