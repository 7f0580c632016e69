"""Evaluate a model, a base with an adapter beside the base, or a reward model on held-out data.

    make evaluate ADAPTER=outputs/sft-tiny-1a2b3c4d/adapter             the adapter beside its base
    make evaluate MODEL=tiny DATA=data_samples/arithmetic.jsonl SAMPLES=8
    make evaluate MODEL=outputs/merged DATA=data_samples/preferences.jsonl
    make evaluate REWARD=outputs/reward DATA=pairs.jsonl                a reward model

What is measured follows from the data:
  questions with answers   (`prompt`, `answer`, and a `task` where there are several): how often the completion follows
                           the format, ends by itself and is right; greedy, and with --samples N also sampled, for
                           pass@1 (the mean over all samples) and pass@N (at least one right)
  preference pairs         how often the chosen answer is likelier than the rejected one
  feedback                 the log-probability of completions marked good and of those marked bad; signed
                           by the label, it rises where either moves the right way
  conversations            the loss on the assistant's turns; it falls as the model comes to talk like them, and does
                           not tell whether anything is right
  documents (raw text)     the loss on every token
A reward model is judged on pairs by its accuracy, on scores by its correlation with them, and on both by how far it
only counts words.

With an adapter, differences to the base are given with 95 % intervals from 10,000 paired bootstrap samples of the rows.
An interval with 0 in it shows no difference.

Left out: judging completions that no rule can tell right from wrong; for that there is `make compare`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import environment
from common.cli import parse_arguments
from common.data.examples import Conversation, Document, Feedback, Pair
from common.data.rows import Faults, find_source
from common.errors import InputError, run_command
from common.lm.hub import fetch
from common.lm.load import base_of, load_chat_tokenizer, load_for_inference, load_text_tokenizer
from common.run.files import write_json
from common.run.screen import loading
from evaluation import policy, reward_model
from evaluation.figures import Measured, comparison_table, differences, figures, table

SAMPLE = str(environment.ROOT / "data_samples" / "heldout.jsonl")


@dataclass(frozen=True)
class Args:
    model: str | None = None
    """A model card's name, a local directory or a hub id; by default what the adapter was trained on, or tiny."""
    adapter: str | None = None
    """The adapter to put on it: the adapter folder of a run."""
    reward_model: str | None = None
    """A reward model instead: a run of `make reward`, or any sequence classifier with one output."""
    data: tuple[str, ...] = ()
    """Questions with answers, preference pairs, feedback, conversations, raw text, or scores for a reward model; one
    file or several. By default sample data of the tiny model."""
    answer_pattern: str = r"<think>.+</think><answer>(.+)</answer>"
    """A regular expression for a whole completion; its group is compared with the data's answer. Empty: every
    completion will do, and the answer that it ends in is compared, as by the reward `math`."""
    samples: int = 0
    """Sampled completions of each question, besides the greedy one."""
    temperature: float = 1.0
    max_new_tokens: int = 64
    max_length: int = 2048
    """Tokens of a pair, a conversation or a rated answer with its prompt; the rest is truncated."""
    beside_base: bool = True
    """With an adapter, evaluate its base on the same rows, too."""
    load_in_4bit: bool = False
    seed: int = 42
    json: str | None = None
    """A file for the figures and every completion."""


def main() -> None:
    args = parse_arguments(Args, __doc__)
    results = evaluate_reward_model(args, args.reward_model) if args.reward_model else evaluate_policy(args)
    if args.json:
        write_json(Path(args.json), results)


def evaluate_policy(args: Args) -> dict[str, Any]:
    """Print the figures of a model, beside those of its base where it has an adapter; by file, with every row."""
    base = base_of(args.model, args.adapter)
    names = args.data or (SAMPLE,)
    environment.set_variables(models=[base], sources=map(find_source, names))
    sets = {name: policy.read(name) for name in names}

    console = loading(base.name)
    import unsloth  # noqa: F401  first: it changes what is imported after it
    from common.lm.rollout.rollouts import Rollouts

    base = fetch(base)
    raw_text = all(isinstance(rows[0], Document) for rows in sets.values())
    tokenizer, end = (load_text_tokenizer if raw_text else load_chat_tokenizer)(base)
    faults = Faults()
    tokens = {name: policy.tokens_of(tokenizer, rows, args.max_length, faults) for name, rows in sets.items()}
    faults.stop()
    model = load_for_inference(base, args.adapter, args.load_in_4bit)

    def measure(name: str, who: str) -> Measured:
        what = f"{who} on {Path(name).name}"
        if isinstance(sets[name][0], Pair):
            return policy.prefer(model, tokenizer, tokens[name], what)
        if isinstance(sets[name][0], Feedback):
            return policy.approve(model, tokenizer, tokens[name], what)
        if isinstance(sets[name][0], Conversation | Document):
            return policy.imitate(model, tokenizer, tokens[name], what)
        adapter = "default" if args.adapter and who == "adapter" else None
        rollouts = Rollouts(model, tokenizer, end, seed=args.seed, adapter=adapter)
        return policy.answer(
            rollouts, tokens[name], what,
            args.answer_pattern, args.samples, args.temperature, args.max_new_tokens,
        )  # fmt: skip

    results: dict[str, dict[str, Any]] = {}
    for name in names:
        measured = measure(name, "adapter" if args.adapter else base.name)
        found = figures(measured)
        results[name] = {"figures": found, **measured.rows}
        title = f"{len(measured)} rows of {name}"
        if not (args.adapter and args.beside_base):
            console.print(table(f"{base.name}{f' with {args.adapter}' if args.adapter else ''}: {title}", found))
            continue
        with model.disable_adapter():
            of_base = measure(name, "base")
        before, change = figures(of_base), differences(measured, of_base, args.seed)
        results[name] |= {"base": {"figures": before, **of_base.rows}, "differences": change}
        title = f"{base.name} and {args.adapter}: {title}"
        if isinstance(sets[name][0], Feedback):  # over good and bad together it would say nothing
            for task in list(found)[1:]:
                console.print(comparison_table(f"{title}, {task}", before, found, change, task))
            continue
        console.print(comparison_table(title, before, found, change))
        if len(found) > 1:
            console.print(table("By task, base -> adapter", found, before))
    return results


def evaluate_reward_model(args: Args, which: str) -> dict[str, Any]:
    """Print the report on a reward model; by file, with what it gives every answer."""
    if args.adapter:
        raise InputError("--reward-model and --adapter: give one of the two; a reward model has its own adapter")
    trained = reward_model.find(which, args.model)
    names = args.data or (reward_model.sample_data(trained),)
    environment.set_variables(models=[trained.model], sources=map(find_source, names))
    sets = {name: reward_model.read(name) for name in names}

    console = loading(trained.model.name)
    import unsloth  # noqa: F401  first: it changes what is imported after it
    from common.rewards.report import show

    judge = reward_model.Judge(trained, args.load_in_4bit)
    results = {}
    for name, rows in sets.items():
        tokens, truncated = judge.tokens_of(rows, args.max_length)
        if truncated:
            console.print(truncated)
        report, judged = judge.report(rows, tokens, Path(name).name)
        results[name] = {"report": report, "rows": judged}
        show(console, report, f"{which} on {name}")
    return results


if __name__ == "__main__":
    run_command(main)
