"""Build pairs for DPO, a better and a worse answer to each prompt, in one of four ways.

    make preferences MODEL=outputs/merged DATA=problems.jsonl                 answers of one model, ranked by rewards
    make preferences MODEL=outputs/merged DATA=prompts.jsonl ARGS="--rewards model:outputs/reward/model"
    make preferences DATA=prompts.jsonl ARGS="--strong qwen2.5-7b --weak qwen2.5-0.5b"
    make preferences DATA=scored.jsonl                                        rows of prompt, response, score
    make preferences DATA=choices.csv                                         rows of prompt, a, b, choice

The data says which: scores and human choices are known by their columns, anything else is prompts to be answered. One
model's answers are ranked by rewards as in `make grpo` (right answers, a form, your own function) or by a judge, the
reward model:CHECKPOINT; best stands against worst. A strong model's answer stands against a weak one's as it is, or,
with --rewards, only where it also scores more. A human choice is a, b, or tie (both, neither, skip or nothing are ties
too); where several people judged the same two answers, the majority counts.

What comes out is read by `make dpo`. What was dropped, and why, is printed and stands in a .counts.json beside the
file: ties, answers with the same text, differences below --margin, answers that were cut off.

Left out: a judge that is asked in words, on-policy rounds of DPO.
"""

import gc
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from common import environment
from common.data.examples import Prompt
from common.data.formats import RATING_FORMATS, detect
from common.data.prompts import distinct
from common.data.read import column_map, prompts, ratings
from common.data.rows import Faults, Row, find_source, read_rows
from common.data.turns import Turns
from common.errors import InputError, run_command
from common.lm.generate import sample_completions
from common.lm.hub import Model, fetch
from common.lm.load import base_of, load_chat_tokenizer, load_for_inference
from common.rewards.contract import check_contract
from common.rewards.specification import Reward, check_prompts, load, score_completions
from common.run.files import write_json, write_jsonl

if TYPE_CHECKING:
    from common.lm.generate import Completion

CHOICE_COLUMNS = ("prompt", "a", "b", "choice")
TIES = ("tie", "both", "neither", "skip", "")
SAMPLE = environment.ROOT / "data_samples" / "arithmetic-train.jsonl"


@dataclass(frozen=True)
class Args:
    model: str | None = None
    """The model that answers: a card's name, a local directory or a hub id; else what the adapter was trained on."""
    adapter: str | None = None
    """The adapter to put on it: the adapter folder of a run."""
    data: str = str(SAMPLE)
    """Prompts or problems to answer, scored answers, or human choices."""
    output: str | None = None
    """The file to write, JSON Lines; by default outputs/preferences-DATA.jsonl."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question choice=winner."""
    strong: str | None = None
    """The model whose answers are chosen, with --weak."""
    weak: str | None = None
    """The model whose answers are rejected, with --strong."""
    rewards: tuple[str, ...] = ()
    """NAME, FILE.py:FUNCTION or model:CHECKPOINT, each with =WEIGHT if it is not 1; for the answers of one model by
    default math and format=0.2."""
    margin: float = 0.0
    """The least difference of the scores of a pair, or of the votes; equal ones are never a pair."""
    pairs_per_prompt: int = 1
    """The most pairs of one prompt; those of the largest difference come first."""
    num_generations: int = 4
    """Answers of one model to each prompt."""
    temperature: float = 0.9
    max_completion_length: int = 512
    load_in_4bit: bool = False
    seed: int = 42


@dataclass(frozen=True)
class Scored:
    """An answer, as the turns of an assistant, and its score."""

    turns: Turns
    score: float

    @property
    def text(self) -> str:
        return str([(turn["role"], str(turn.get("content")).split(), turn.get("tool_calls")) for turn in self.turns])


Loadable = tuple[Model, str | None]  # a base, and the adapter on it
Pairs = list[dict[str, Any]]
Dropped = Counter[str]  # what was dropped, by why


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    output = Path(args.output or f"outputs/preferences-{Path(args.data).stem}.jsonl").expanduser()
    if output.exists():
        raise InputError(f"{output} is there already; give another file with --output (OUT)")
    if args.margin < 0 or args.pairs_per_prompt < 1 or args.num_generations < 2:
        raise InputError("--margin must not be negative, --pairs-per-prompt at least 1, --num-generations at least 2")
    if bool(args.strong) != bool(args.weak) or (args.strong and (args.model or args.adapter)):
        raise InputError("give --strong and --weak together, or one --model (with or without --adapter)")

    named = [(args.strong, None), (args.weak, None)] if args.strong else [(args.model, args.adapter)]
    models = [(base_of(name, adapter), adapter) for name, adapter in named]
    faults = Faults()
    columns = column_map(args.columns)
    source = find_source(args.data)
    judged = any("model:" in word for word in args.rewards)  # the judge may be on the hub
    local = all(base.local for base, _ in models) and not isinstance(source, str)
    environment.set_variables(offline=local and not judged)
    rows = list(read_rows(source, faults))
    faults.stop()
    if not rows:
        raise InputError(f"{args.data}: holds no rows")
    names = {columns.get(name, name): None for name in rows[0].fields}
    is_choices = all(column in names for column in CHOICE_COLUMNS)
    if is_choices or detect(names, RATING_FORMATS):
        if args.model or args.adapter or args.strong or args.rewards:
            raise InputError(
                f"{args.data} holds answers that are judged already, so no model and no --rewards have a say in it"
            )
        build = from_choices if is_choices else from_scores
        pairs, dropped = build(rows, columns, faults, args)
    else:
        problems = distinct(prompts(rows, faults, "auto", columns))
        faults.stop()
        rewards = load(args.rewards or ("math", "format=0.2"), args.max_completion_length)
        if args.rewards or not args.strong:
            check_prompts(rewards, problems, faults)
            faults.stop()
            check_contract(rewards, problems, args.seed)
        if args.strong:
            pairs, dropped = from_two_models(models, problems, rewards if args.rewards else [], args)
        else:
            pairs, dropped = from_one_model(models[0], problems, rewards, args)

    why = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "nothing"
    if not pairs:
        raise InputError(f"{args.data}: no pair came of it; dropped: {why}")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        output.with_name(output.name + ".counts.json"),
        {"pairs": len(pairs), "dropped": dict(dropped), "arguments": asdict(args)},
    )
    write_jsonl(output, pairs)
    print(f"{output}: {len(pairs)} pairs, for make dpo DATA={output}. Dropped: {why}")


def from_one_model(model: Loadable, problems: list[Prompt], rewards: list[Reward], args: Args) -> tuple[Pairs, Dropped]:
    """Several answers of one model to each prompt, ranked by the rewards."""
    drawn = answers_of(model, problems, args.num_generations, args)
    asked = [problem for problem in problems for _ in range(args.num_generations)]
    totals, _ = score_completions(rewards, asked, [answer for answers in drawn for answer in answers])
    pairs, dropped = [], Counter()
    for index, (problem, answers) in enumerate(zip(problems, drawn, strict=True)):
        scores = totals[index * args.num_generations :][: args.num_generations]
        whole = [Scored(turn(a.text), score) for a, score in zip(answers, scores, strict=True) if is_whole(a)]
        if len(whole) < 2:
            dropped["prompts with fewer than two whole answers"] += 1
        else:
            rank(problem, whole, args, pairs, dropped)
    return pairs, dropped


def from_two_models(
    models: list[Loadable], problems: list[Prompt], rewards: list[Reward], args: Args
) -> tuple[Pairs, Dropped]:
    """The strong model's answer against the weak one's; with rewards only where it scores more by the margin."""
    strong, weak = ([answers[0] for answers in answers_of(model, problems, 1, args)] for model in models)
    totals, _ = score_completions(rewards, [*problems, *problems], [*strong, *weak])
    pairs, dropped = [], Counter()
    for index, (problem, better, worse) in enumerate(zip(problems, strong, weak, strict=True)):
        gap = totals[index] - totals[index + len(problems)]
        if not (is_whole(better) and is_whole(worse)):
            dropped["where an answer is cut off or empty"] += 1
        elif better.text.split() == worse.text.split():
            dropped["same text"] += 1
        elif rewards and gap < 0:
            dropped["where the weak model scores more"] += 1
        elif rewards and gap == 0:
            dropped["ties"] += 1
        elif rewards and gap < args.margin:
            dropped["below the margin"] += 1
        else:
            pairs.append(as_pair(problem.prompt, problem.tools, turn(better.text), turn(worse.text)))
    return pairs, dropped


def from_scores(rows: Iterable[Row], columns: dict[str, str], faults: Faults, args: Args) -> tuple[Pairs, Dropped]:
    """The scored answers of each prompt, the higher against the lower."""
    groups = defaultdict(list)
    for rating in ratings(rows, faults, "auto", columns):
        groups[repr((rating.prompt, rating.tools))].append(rating)
    faults.stop()
    pairs, dropped = [], Counter()
    for group in groups.values():
        if len(group) < 2:
            dropped["prompts with one answer"] += 1
        else:
            rank(group[0], [Scored(rating.response, rating.score) for rating in group], args, pairs, dropped)
    return pairs, dropped


def from_choices(rows: Iterable[Row], columns: dict[str, str], faults: Faults, args: Args) -> tuple[Pairs, Dropped]:
    """What people chose, the majority of those who judged the same two answers."""
    votes: dict[tuple[str, frozenset[str]], Counter[str]] = {}
    dropped = Counter()
    for row in rows:
        fields = {columns.get(name, name): value for name, value in row.fields.items()}
        texts = {name: str(fields.get(name) or "").strip() for name in CHOICE_COLUMNS}
        choice = texts["choice"].lower()
        if empty := [name for name in ("prompt", "a", "b") if not texts[name]]:
            faults.add(row.place, f"{', '.join(empty)}: is empty; expected text")
        elif choice not in ("a", "b", *TIES):
            faults.add(row.place, f"choice: {texts['choice']!r}; expected a, b or tie")
        elif texts["a"].split() == texts["b"].split():
            dropped["same text"] += 1
        else:
            judged = votes.setdefault((texts["prompt"], frozenset((texts["a"], texts["b"]))), Counter())
            judged[texts[choice] if choice in ("a", "b") else ""] += 1
    faults.stop()
    pairs = []
    for (prompt, answers), judged in votes.items():
        one, other = sorted(answers, key=lambda text: -judged[text])
        if judged[one] == judged[other]:
            dropped["ties" if not judged[one] else "where people disagree evenly"] += 1
        elif judged[one] - judged[other] < args.margin:
            dropped["below the margin"] += 1
        else:
            pairs.append(as_pair([{"role": "user", "content": prompt}], None, turn(one), turn(other)))
    return pairs, dropped


def rank(prompt: Any, answers: Sequence[Scored], args: Args, pairs: Pairs, dropped: Dropped) -> None:
    """Add to `pairs` those of the largest difference, or to `dropped` why there is none.

    `prompt` is what the answers are to, anything with a prompt and tools.
    """
    both = [
        sorted(two, key=lambda answer: -answer.score)
        for two in itertools.combinations(answers, 2)
        if two[0].text != two[1].text
    ]
    wide = [two for two in both if two[0].score > two[1].score and two[0].score - two[1].score >= args.margin]
    wide.sort(key=lambda two: two[1].score - two[0].score)
    for better, worse in wide[: args.pairs_per_prompt]:
        pairs.append(as_pair(prompt.prompt, prompt.tools, better.turns, worse.turns))
    if not both:
        dropped["prompts whose answers are all the same text"] += 1
    elif all(better.score == worse.score for better, worse in both):
        dropped["prompts whose answers all score the same"] += 1
    elif not wide:
        dropped["prompts with no difference of the margin"] += 1


def answers_of(model: Loadable, problems: list[Prompt], count: int, args: Args) -> list[list["Completion"]]:
    """`count` sampled answers of a model to each prompt. The model's memory is free afterwards."""
    base, adapter = model
    environment.quiet_loggers()
    import unsloth  # noqa: F401, I001  first: it changes what is imported after it
    import torch
    from transformers import set_seed

    base = fetch(base)
    tokenizer, end = load_chat_tokenizer(base)
    loaded = load_for_inference(base, adapter, args.load_in_4bit)
    set_seed(args.seed)
    said = sample_completions(loaded, tokenizer, problems, end, count, args.max_completion_length, args.temperature)
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return said


def is_whole(answer: "Completion") -> bool:
    """Did it end by itself, with something said?"""
    return answer.ended and bool(answer.text.strip())


def turn(text: str) -> Turns:
    return [{"role": "assistant", "content": text}]


def as_pair(prompt: Turns, tools: Turns | None, chosen: Turns, rejected: Turns) -> dict[str, Any]:
    """A row of data for DPO."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | ({"tools": tools} if tools else {})


if __name__ == "__main__":
    run_command(main)
