"""Rejection sampling: sample completions from a trained model, and write those that its rewards accept as SFT data.

    make distill MODEL=outputs/pipeline-tiny/grpo-1a2b3c4d/merged DATA=problems.jsonl OUT=outputs/distilled.jsonl
    make distill ADAPTER=outputs/sft-tiny-1a2b3c4d/adapter NUM_GENERATIONS=16 K=2 KEEP=diverse
    make sft DATA=outputs/distilled.jsonl

The fourth step of R1 (arXiv:2501.12948, section 2.3.3): a model that reinforcement learning has trained writes the
examples from which its base, or a smaller model, learns afresh. A completion is accepted when it ended by itself and
the weighted sum of its rewards reaches --accept times the sum that rewards of 1 would give. Of the accepted completions
of a prompt -k are kept, no two of them the same text.

Rewards and prompts are those of `make grpo`, and the rewards are held to the same contract first. Beside the file a
.counts.json has the number of sampled completions and what became of them.

Left out: resuming an interrupted run, vLLM, mixing in other data.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from common import environment
from common.cli import parse_arguments
from common.data.examples import Prompt
from common.data.formats import PROBLEM_FORMATS
from common.data.prompts import distinct
from common.data.read import read_examples
from common.data.rows import Faults, find_source
from common.errors import InputError, run_command
from common.lm.hub import contents, fetch
from common.lm.load import base_of
from common.lm.rollout.saved import sample_saved
from common.rewards.contract import check_functions, check_models
from common.rewards.specification import check_prompts, load, reward_models, score_completions
from common.run.files import write_json, write_jsonl
from common.run.screen import loading

if TYPE_CHECKING:
    from common.lm.generate import Completion

FATES = ("truncated", "below the threshold", "duplicates", "accepted")  # of a completion; each has one


@dataclass(frozen=True)
class Args:
    model: str | None = None
    """A model card's name, a local directory or a hub id; by default what the adapter was trained on, or tiny."""
    adapter: str | None = None
    """The adapter to put on it: the adapter folder of a run."""
    data: str = str(environment.ROOT / "data_samples" / "arithmetic-train.jsonl")
    """Prompts, with the columns that the rewards read: a file, a folder of files or a hub dataset."""
    output: str | None = None
    """The file to write, JSON Lines; by default outputs/distill-MODEL.jsonl."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=problem answer=solution."""
    rewards: tuple[str, ...] = ("math", "format=0.2")
    """NAME, FILE.py:FUNCTION or model:CHECKPOINT, each with =WEIGHT if it is not 1."""
    accept: float = 1.0
    """Accept completions whose rewards come to this share of the sum of the positive weights; lower it where a reward
    never reaches 1, as the penalties do not."""
    num_generations: int = 8
    """Completions sampled of each prompt."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 1
    """The most completions kept of each prompt."""
    keep: Literal["shortest", "diverse"] = "shortest"
    """Which: those of the fewest tokens, or the shortest and then the one least like those already kept."""
    temperature: float = 0.9
    max_completion_length: int = 512
    load_in_4bit: bool = False
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""
    seed: int = 42


def main() -> None:
    args = parse_arguments(Args, __doc__)
    if min(args.num_generations, args.k) < 1 or args.temperature <= 0:
        raise InputError("--num-generations and -k must be at least 1, and --temperature more than 0")
    base = base_of(args.model, args.adapter)
    output = Path(args.output or f"outputs/distill-{base.name}.jsonl").expanduser()
    if output.exists():
        raise InputError(f"{output} exists already; give another file with --output")

    source = find_source(args.data)
    environment.set_variables(models=[base, *reward_models(args.rewards)], sources=[source])
    prompts = distinct(read_examples(source, PROBLEM_FORMATS, columns=args.columns).examples)
    rewards = load(args.rewards, args.max_completion_length)
    faults = Faults()
    check_prompts(rewards, prompts, faults)
    faults.stop()
    check_functions(rewards, prompts, args.seed)
    threshold = args.accept * sum(max(reward.weight, 0.0) for reward in rewards)

    loading(base.name)
    import unsloth  # noqa: F401  first: it patches what is imported after it
    from common.lm.rollout.rollouts import Rollouts, sample_completions

    def sample(rollouts: Rollouts) -> list[list["Completion"]]:
        limit = args.max_completion_length
        return sample_completions(rollouts, prompts, args.num_generations, limit, args.temperature)

    check_models(rewards, prompts, args.seed)
    base = fetch(base)
    sampled = sample_saved(base, args.adapter, prompts, sample, load_in_4bit=args.load_in_4bit, seed=args.seed)
    totals, _ = score_completions(
        rewards,
        [prompt for prompt in prompts for _ in range(args.num_generations)],
        [completion for group in sampled for completion in group],
    )

    kept, counts = [], Counter()
    for index, (prompt, completions) in enumerate(zip(prompts, sampled, strict=True)):
        first = index * args.num_generations
        accepted, fates = accept(completions, totals[first : first + args.num_generations], threshold)
        chosen = shortest(accepted, args.k) if args.keep == "shortest" else diverse(accepted, args.k)
        counts += fates + Counter({"solved prompts": bool(accepted), "kept": len(chosen)})
        kept += [as_example(prompt, completion) for completion in chosen]
    figures = {"prompts": len(prompts), "completions": len(totals)}
    figures |= {name: counts[name] for name in (*FATES, "solved prompts", "kept")}
    print(", ".join(f"{number} {name}" for name, number in figures.items()))
    if not kept:
        raise InputError(
            f"no completion was accepted: the best of {len(totals)} scores {max(totals):g}, and --accept "
            f"{args.accept:g} needs {threshold:g}. Take a stronger model, easier prompts, more completions "
            "(--num-generations), or a lower --accept"
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
    completions: Sequence["Completion"], totals: Sequence[float], threshold: float
) -> tuple[list["Completion"], Counter[str]]:
    """The completions of one prompt that ended and reach the threshold, no text twice; and the FATES of all."""
    accepted: dict[str, Completion] = {}
    fates = Counter()
    for completion, total in zip(completions, totals, strict=True):
        text = " ".join(completion.text.split())
        if not completion.ended:
            fates["truncated"] += 1
        elif total < threshold - 1e-9:  # the sum of weights is not exact
            fates["below the threshold"] += 1
        elif text in accepted:
            fates["duplicates"] += 1
        else:
            accepted[text] = completion
            fates["accepted"] += 1
    return list(accepted.values()), fates


def shortest(completions: Sequence["Completion"], k: int) -> list["Completion"]:
    """The `k` completions of the fewest tokens; of equally long ones the first sampled."""
    return sorted(completions, key=lambda completion: len(completion.completion_ids))[:k]


def diverse(completions: Sequence["Completion"], k: int) -> list["Completion"]:
    """The shortest completion, and then `k` - 1 times the one least like those chosen so far, by shared trigrams."""
    trigrams = {id(one): {one.text[at : at + 3] for at in range(len(one.text))} for one in completions}

    def distance(one: "Completion", other: "Completion") -> float:
        """Jaccard's: 0 for the same trigrams, 1 for none in common."""
        first, second = trigrams[id(one)], trigrams[id(other)]
        return 1 - len(first & second) / len(first | second)

    chosen = shortest(completions, 1)
    while len(chosen) < min(k, len(completions)):
        rest = [completion for completion in completions if completion not in chosen]
        chosen.append(max(rest, key=lambda completion: min(distance(completion, before) for before in chosen)))
    return chosen


def as_example(prompt: Prompt, completion: "Completion") -> dict:
    """A row of data for SFT."""
    messages = [*prompt.prompt, {"role": "assistant", "content": completion.text}]
    return {"messages": messages} | ({"tools": prompt.tools} if prompt.tools else {})


if __name__ == "__main__":
    run_command(main)
