"""Rejection sampling: let a trained model answer, keep what the rewards accept, and write it as data for SFT.

    make distill MODEL=outputs/pipeline-tiny/grpo-1a2b3c4d/merged DATA=problems.jsonl OUT=outputs/distilled.jsonl
    make distill ADAPTER=outputs/sft-tiny-1a2b3c4d/adapter ARGS="--num-generations 16 -k 2 --keep diverse"
    make sft DATA=outputs/distilled.jsonl

The fourth step of R1's way (arXiv:2501.12948, section 2.3.3): a model that reinforcement has taught writes the examples
from which its base, or a smaller model, learns afresh. An answer is accepted when it ended by itself and its rewards,
weighted and added, come to --accept of the most that rewards of at most 1 can come to. Of the accepted answers to a
problem, none twice, -k are kept.

The rewards and the problems are those of `make grpo`, and held to the same contract first. Beside the file a
.counts.json says how many answers were drawn, and what became of them.

Left out: going on with an interrupted run, vLLM, mixing in other data.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from common import environment
from common.data.examples import Prompt
from common.data.prompts import distinct
from common.data.read import column_map, problems
from common.data.rows import Faults, find_source, read_rows
from common.errors import InputError, run_command
from common.lm.generate import sample_completions
from common.lm.hub import contents, fetch
from common.lm.load import base_of, load_chat_tokenizer, load_for_inference
from common.rewards.contract import check_contract
from common.rewards.specification import check_prompts, load, score_completions
from common.run.files import write_json, write_jsonl

if TYPE_CHECKING:
    from common.lm.generate import Completion


@dataclass(frozen=True)
class Args:
    model: str | None = None
    """A model card's name, a local directory or a hub id; by default what the adapter was trained on, or tiny."""
    adapter: str | None = None
    """The adapter to put on it: the adapter folder of a run."""
    data: str = str(environment.ROOT / "data_samples" / "arithmetic-train.jsonl")
    """Problems, with what the rewards need: a file, a folder of files or a hub dataset."""
    output: str | None = None
    """The file to write, JSON Lines; by default outputs/distill-MODEL.jsonl."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=problem answer=solution."""
    rewards: tuple[str, ...] = ("math", "format=0.2")
    """NAME, FILE.py:FUNCTION or model:CHECKPOINT, each with =WEIGHT if it is not 1."""
    accept: float = 1.0
    """Accept answers whose rewards come to this share of the sum of the positive weights; lower it where a reward
    never reaches 1, as the penalties do not."""
    num_generations: int = 8
    """Answers drawn to each problem."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 1
    """The most answers kept to each problem."""
    keep: Literal["shortest", "diverse"] = "shortest"
    """Which: those of the fewest tokens, or the shortest and then what is least like those kept before."""
    temperature: float = 0.9
    max_completion_length: int = 512
    load_in_4bit: bool = False
    seed: int = 42


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if min(args.num_generations, args.k) < 1 or args.temperature <= 0:
        raise InputError("--num-generations and -k must be at least 1, and --temperature more than 0")
    base = base_of(args.model, args.adapter)
    output = Path(args.output or f"outputs/distill-{base.name}.jsonl").expanduser()
    if output.exists():
        raise InputError(f"{output} is there already; give another file with --output (OUT)")

    faults = Faults()
    source = find_source(args.data)
    judged = any("model:" in word for word in args.rewards)  # the judge may be on the hub
    environment.set_variables(offline=base.local and not isinstance(source, str) and not judged)
    rows = distinct(problems(read_rows(source, faults), faults, "auto", column_map(args.columns)))
    faults.stop()
    if not rows:
        raise InputError(f"{args.data}: holds no rows")
    rewards = load(args.rewards, args.max_completion_length)
    check_prompts(rewards, rows, faults)
    faults.stop()
    check_contract(rewards, rows, args.seed)
    threshold = args.accept * sum(max(reward.weight, 0.0) for reward in rewards)

    environment.quiet_loggers()
    import unsloth  # noqa: F401  first: it changes what is imported after it
    from transformers import set_seed

    base = fetch(base)
    tokenizer, end = load_chat_tokenizer(base)
    model = load_for_inference(base, args.adapter, args.load_in_4bit)
    set_seed(args.seed)
    drawn = sample_completions(
        model, tokenizer, rows, end, args.num_generations, args.max_completion_length, args.temperature
    )
    totals, _ = score_completions(
        rewards, [row for row in rows for _ in range(args.num_generations)], [answer for row in drawn for answer in row]
    )

    kept, counts = [], Counter()
    for index, (row, answers) in enumerate(zip(rows, drawn, strict=True)):
        first = index * args.num_generations
        accepted, why = accept(answers, totals[first : first + args.num_generations], threshold)
        chosen = shortest(accepted, args.k) if args.keep == "shortest" else diverse(accepted, args.k)
        counts += why + Counter({"solved problems": bool(accepted), "kept": len(chosen)})
        kept += [as_example(row, answer) for answer in chosen]
    outcomes = ("cut off", "below the bar", "the same text again", "accepted", "solved problems", "kept")
    figures = {"problems": len(rows), "answers": len(totals), **{name: counts[name] for name in outcomes}}
    print(", ".join(f"{number} {name}" for name, number in figures.items()))
    if not kept:
        raise InputError(
            f"no answer was accepted: the best of {len(totals)} scores {max(totals):g}, and --accept {args.accept:g} "
            f"asks for {threshold:g}. Take a stronger model, easier problems, more answers (--num-generations), or a "
            "lower --accept"
        )

    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        output.with_name(output.name + ".counts.json"),
        {**figures, "threshold": threshold, "base": contents(base), "arguments": asdict(args)},
    )
    write_jsonl(output, kept)
    learner = base.card.name if base.card else base.source
    print(f"{output}: {len(kept)} examples. To train the base on them: make sft MODEL={learner} DATA={output}")


def accept(
    answers: Sequence["Completion"], totals: Sequence[float], threshold: float
) -> tuple[list["Completion"], Counter[str]]:
    """The answers to one problem that ended and reach the threshold, no text twice; and what became of all."""
    accepted: dict[str, Completion] = {}
    counts = Counter()
    for answer, total in zip(answers, totals, strict=True):
        text = " ".join(answer.text.split())
        if not answer.ended:
            counts["cut off"] += 1
        elif total < threshold - 1e-9:  # the sum of weights is not exact
            counts["below the bar"] += 1
        elif text in accepted:
            counts["the same text again"] += 1
        else:
            accepted[text] = answer
            counts["accepted"] += 1
    return list(accepted.values()), counts


def shortest(answers: Sequence["Completion"], k: int) -> list["Completion"]:
    """The `k` answers of the fewest tokens; of equally long ones the first drawn."""
    return sorted(answers, key=lambda answer: len(answer.completion_ids))[:k]


def diverse(answers: Sequence["Completion"], k: int) -> list["Completion"]:
    """The shortest answer, and then again and again the one least like any before it, by the trigrams they share."""
    trigrams = {id(answer): {answer.text[at : at + 3] for at in range(len(answer.text))} for answer in answers}

    def distance(
        one: "Completion", other: "Completion"
    ) -> float:  # Jaccard's: 0 for the same trigrams, 1 for none in common
        first, second = trigrams[id(one)], trigrams[id(other)]
        return 1 - len(first & second) / len(first | second)

    chosen = shortest(answers, 1)
    while len(chosen) < min(k, len(answers)):
        rest = [answer for answer in answers if answer not in chosen]
        chosen.append(max(rest, key=lambda answer: min(distance(answer, before) for before in chosen)))
    return chosen


def as_example(problem: Prompt, answer: "Completion") -> dict:
    """A row of data for SFT."""
    messages = [*problem.prompt, {"role": "assistant", "content": answer.text}]
    return {"messages": messages} | ({"tools": problem.tools} if problem.tools else {})


if __name__ == "__main__":
    run_command(main)
