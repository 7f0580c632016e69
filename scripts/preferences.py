"""Build preference pairs for DPO, a chosen and a rejected completion of each prompt, in one of four ways.

    make preferences MODEL=outputs/merged DATA=problems.jsonl                completions of one model, ranked by rewards
    make preferences MODEL=outputs/merged DATA=prompts.jsonl REWARDS=model:outputs/reward/model
    make preferences DATA=prompts.jsonl STRONG=qwen2.5-7b WEAK=qwen2.5-0.5b  a strong model against a weak one
    make preferences DATA=scored.jsonl                                       rows of prompt, response, score
    make preferences DATA=choices.csv                                        rows of prompt, a, b, choice

The columns of the data decide: scores and human choices are taken as they are, anything else is prompts to be sampled
from. The completions of one model are ranked by rewards as in `make grpo` (right answers, a format, your own function)
or by a reward model, model:CHECKPOINT; the best is chosen and the worst rejected. A strong model's completion is chosen
over a weak model's in any case, or, with --rewards, only where it also scores higher. A human choice is a, b, or tie
(both, neither, skip or nothing are ties too); where several people judged the same two answers, the majority counts.

`make dpo` reads the result. What was dropped, and why, is printed and written to a .counts.json beside the file: ties,
equal texts, differences below --margin, truncated completions.

Left out: a judge that is prompted in words (`make compare` has one), on-policy rounds of DPO.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common import environment
from common.cli import parse_arguments
from common.data.examples import Prompt
from common.data.formats import PROMPT_FORMATS, RATING_FORMATS, detect
from common.data.prompts import as_prompt, distinct
from common.data.read import column_map, read_examples
from common.data.rows import Faults, Source, find_source, read_rows, source_name
from common.data.turns import Turns
from common.errors import InputError, run_command
from common.lm.hub import Model, fetch
from common.lm.load import base_of
from common.lm.rollout.saved import sample_saved
from common.rewards.contract import check_functions, check_models
from common.rewards.reward import Reward
from common.rewards.specification import check_prompts, load, reward_models, score_completions
from common.run.files import write_json, write_jsonl
from common.run.screen import loading

if TYPE_CHECKING:
    from common.lm.generate import Completion

CHOICE_COLUMNS = ("prompt", "a", "b", "choice")
TIES = ("tie", "both", "neither", "skip", "")
SAMPLE = environment.ROOT / "data_samples" / "arithmetic-train.jsonl"


@dataclass(frozen=True)
class Args:
    model: str | None = None
    """The model to sample from: a card's name, a local directory or a hub id; else what the adapter was trained on."""
    adapter: str | None = None
    """The adapter to put on it: the adapter folder of a run."""
    data: str = str(SAMPLE)
    """Prompts to sample completions of, scored answers, or human choices."""
    output: str | None = None
    """The file to write, JSON Lines; by default outputs/preferences-DATA.jsonl."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question choice=winner."""
    strong: str | None = None
    """The model whose completions are chosen, with --weak."""
    weak: str | None = None
    """The model whose completions are rejected, with --strong."""
    rewards: tuple[str, ...] = ()
    """NAME, FILE.py:FUNCTION or model:CHECKPOINT, each with =WEIGHT if it is not 1; for the completions of one model by
    default math and format=0.2."""
    margin: float = 0.0
    """The least difference of the scores of a pair, or of the votes; equal ones are never a pair."""
    pairs_per_prompt: int = 1
    """The most pairs of one prompt; those of the largest difference come first."""
    num_generations: int = 4
    """Completions sampled of each prompt, from one model."""
    temperature: float = 0.9
    max_completion_length: int = 512
    load_in_4bit: bool = False
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""
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
Dropped = Counter[str]  # how many were dropped, by the reason


def main() -> None:
    args = parse_arguments(Args, __doc__)
    output = Path(args.output or f"outputs/preferences-{Path(args.data).stem}.jsonl").expanduser()
    if output.exists():
        raise InputError(f"{output} exists already; give another file with --output")
    if args.margin < 0 or args.pairs_per_prompt < 1 or args.num_generations < 2:
        raise InputError("--margin must not be negative, --pairs-per-prompt at least 1, --num-generations at least 2")
    if bool(args.strong) != bool(args.weak) or (args.strong and (args.model or args.adapter)):
        raise InputError("give --strong and --weak together, or one --model (with or without --adapter)")

    named = [(args.strong, None), (args.weak, None)] if args.strong else [(args.model, args.adapter)]
    models = [(base_of(name, adapter), adapter) for name, adapter in named]
    source = find_source(args.data)
    environment.set_variables(models=[*(base for base, _ in models), *reward_models(args.rewards)], sources=[source])
    kind = kind_of(source, args)
    if kind != "prompts" and (args.model or args.adapter or args.strong or args.rewards):
        raise InputError(
            f"{args.data} has {kind}, so its answers are judged already; leave out the models and --rewards"
        )
    if kind == "choices":
        pairs, dropped = from_choices(source, args)
    elif kind == "scores":
        pairs, dropped = from_scores(source, args)
    else:
        pairs, dropped = from_models(models, source, args)

    why = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "nothing"
    if not pairs:
        raise InputError(f"{args.data}: there is no pair in it; dropped: {why}")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        output.with_name(output.name + ".counts.json"),
        {"pairs": len(pairs), "dropped": dict(dropped), "arguments": asdict(args)},
    )
    write_jsonl(output, pairs)
    print(f"{output}: {len(pairs)} pairs, for make dpo DATA={output}. Dropped: {why}")


def kind_of(source: Source, args: Args) -> Literal["choices", "scores", "prompts"]:
    """What the columns of the first row are those of. Raises InputError when there is none."""
    faults, columns = Faults(), column_map(args.columns)
    first = next(read_rows(source, faults), None)
    faults.stop()
    if first is None:
        raise InputError(f"{source_name(source)}: holds no rows")
    names = {columns.get(name, name): None for name in first.fields}
    if all(column in names for column in CHOICE_COLUMNS):
        return "choices"
    return "scores" if detect(names, RATING_FORMATS) else "prompts"


def from_models(models: list[Loadable], source: Source, args: Args) -> tuple[Pairs, Dropped]:
    """Pairs of completions that are sampled now, from one model or from two."""
    prompts = distinct(map(as_prompt, read_examples(source, PROMPT_FORMATS, columns=args.columns).examples))
    rewards = load(args.rewards or ("math", "format=0.2"), args.max_completion_length)
    if args.strong and not args.rewards:
        rewards = []
    faults = Faults()
    check_prompts(rewards, prompts, faults)
    faults.stop()
    check_functions(rewards, prompts, args.seed)
    if args.strong:
        return from_two_models(models, prompts, rewards, args)
    return from_one_model(models[0], prompts, rewards, args)


def from_one_model(model: Loadable, prompts: list[Prompt], rewards: list[Reward], args: Args) -> tuple[Pairs, Dropped]:
    """Several completions of each prompt by one model, ranked by the rewards."""
    sampled = sample(model, prompts, args.num_generations, rewards, args)
    repeated = [prompt for prompt in prompts for _ in range(args.num_generations)]
    totals, _ = score_completions(rewards, repeated, [completion for group in sampled for completion in group])
    pairs, dropped = [], Counter()
    for index, (prompt, completions) in enumerate(zip(prompts, sampled, strict=True)):
        scores = totals[index * args.num_generations :][: args.num_generations]
        whole = [Scored(turn(c.text), score) for c, score in zip(completions, scores, strict=True) if is_whole(c)]
        if len(whole) < 2:
            dropped["prompts with fewer than two whole completions"] += 1
        else:
            rank(prompt, whole, args, pairs, dropped)
    return pairs, dropped


def from_two_models(
    models: list[Loadable], prompts: list[Prompt], rewards: list[Reward], args: Args
) -> tuple[Pairs, Dropped]:
    """The strong model's completion over the weak one's; with rewards only where it scores higher by the margin."""
    strong, weak = ([group[0] for group in sample(model, prompts, 1, rewards, args)] for model in models)
    totals, _ = score_completions(rewards, [*prompts, *prompts], [*strong, *weak])
    pairs, dropped = [], Counter()
    for index, (prompt, better, worse) in enumerate(zip(prompts, strong, weak, strict=True)):
        gap = totals[index] - totals[index + len(prompts)]
        if not (is_whole(better) and is_whole(worse)):
            dropped["with a truncated or empty completion"] += 1
        elif better.text.split() == worse.text.split():
            dropped["same text"] += 1
        elif rewards and gap < 0:
            dropped["where the weak model scores higher"] += 1
        elif rewards and gap == 0:
            dropped["ties"] += 1
        elif rewards and gap < args.margin:
            dropped["below the margin"] += 1
        else:
            pairs.append(as_pair(prompt.prompt, prompt.tools, turn(better.text), turn(worse.text)))
    return pairs, dropped


def from_scores(source: Source, args: Args) -> tuple[Pairs, Dropped]:
    """The scored answers to each prompt, the higher over the lower."""
    groups = defaultdict(list)
    for rating in read_examples(source, RATING_FORMATS, columns=args.columns).examples:
        groups[repr((rating.prompt, rating.tools))].append(rating)
    pairs, dropped = [], Counter()
    for group in groups.values():
        if len(group) < 2:
            dropped["prompts with one answer"] += 1
        else:
            rank(group[0], [Scored(rating.response, rating.score) for rating in group], args, pairs, dropped)
    return pairs, dropped


def from_choices(source: Source, args: Args) -> tuple[Pairs, Dropped]:
    """What people chose, by the majority of those who judged the same two answers."""
    faults, columns = Faults(), column_map(args.columns)
    votes: dict[tuple[str, frozenset[str]], Counter[str]] = {}
    dropped = Counter()
    for row in read_rows(source, faults):
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

    `prompt` is anything with a prompt and tools.
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


def sample(
    model: Loadable, prompts: list[Prompt], count: int, rewards: list[Reward], args: Args
) -> list[list["Completion"]]:
    """`count` completions of each prompt by a model, whose memory is free afterwards. Checks reward models first."""
    base, adapter = model
    loading(base.name)
    import unsloth  # noqa: F401  first: it patches what is imported after it
    from common.lm.rollout.rollouts import Rollouts, sample_completions

    def draw(rollouts: Rollouts) -> list[list["Completion"]]:
        return sample_completions(rollouts, prompts, count, args.max_completion_length, args.temperature)

    check_models(rewards, prompts, args.seed)
    return sample_saved(fetch(base), adapter, prompts, draw, load_in_4bit=args.load_in_4bit, seed=args.seed)


def is_whole(completion: "Completion") -> bool:
    """Did it end by itself, and is there text in it?"""
    return completion.ended and bool(completion.text.strip())


def turn(text: str) -> Turns:
    return [{"role": "assistant", "content": text}]


def as_pair(prompt: Turns, tools: Turns | None, chosen: Turns, rejected: Turns) -> dict[str, Any]:
    """A row of data for DPO."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | ({"tools": tools} if tools else {})


if __name__ == "__main__":
    run_command(main)
