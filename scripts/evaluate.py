"""Evaluate what a run has learned, or any model, an adapter beside its base, or a reward model, on held-out data.

    make evaluate RUN=outputs/sft-tiny-1a2b3c4d                         before and after, on what the run held out
    make evaluate RUN=outputs/grpo TASKS=gsm8k,mmlu QUESTIONS=my.jsonl  and tasks of lm-eval, and questions of yours
    make evaluate RUN=outputs/dpo BASE=qwen2.5-7b                       before is another model than it was trained on
    make evaluate ADAPTER=outputs/sft-tiny-1a2b3c4d/adapter             the adapter beside its base
    make evaluate MODEL=tiny DATA=data_samples/arithmetic.jsonl SAMPLES=8
    make evaluate MODEL=outputs/merged DATA=data_samples/preferences.jsonl
    make evaluate REWARD=outputs/reward DATA=pairs.jsonl                a reward model

Of a run everything is found in its run.json: method, base, adapter, data, and the rows that were held out. By method:
loss and perplexity (SFT, DPO, KTO), the format and the answers of greedy completions, preference accuracy (DPO, reward
model), reward, pass@k and majority@k (GRPO, PPO); and of all whether general ability is kept, by a small fixed set of
facts in English and Chinese. The figures with their intervals go to RUN/evaluation.json and RUN/report.html.

Without a run, what is measured follows from the data:
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

Left out: judging completions of held-out rows that no rule can tell right from wrong; for that there are QUESTIONS and
`make compare`.
"""

import math
import re
from collections.abc import Iterable
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
from evaluation.of_run import evaluate_run

SAMPLE = str(environment.ROOT / "data_samples" / "heldout.jsonl")
SAMPLE_PATTERN = r"<think>.+</think><answer>(.+)</answer>"  # the format that the sample data teaches
MAX_NEW_TOKENS = 64  # enough for the sample data
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Args:
    # A run, and what it is compared with.
    run: str | None = None
    """The folder of a run: what it made is evaluated beside what it was trained on."""
    base: str | None = None
    """With --run, another model to compare with: a run, an adapter, a card's name, a local directory or a hub id."""

    # Or a model.
    model: str | None = None
    """A model card's name, a local directory or a hub id; by default what the adapter was trained on, or tiny."""
    adapter: str | None = None
    """The adapter to put on it: the adapter folder of a run."""
    reward_model: str | None = None
    """A reward model instead: a run of `make reward`, or any sequence classifier with one output."""
    beside_base: bool = True
    """With an adapter, evaluate its base on the same rows, too."""
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""

    # On what.
    data: tuple[str, ...] = ()
    """Questions with answers, preference pairs, feedback, conversations, raw text, or scores for a reward model; one
    file or several. By default what --run held out; without a run, sample data of the tiny model."""
    general: bool = True
    """With --run, the fixed set of facts that shows forgetting."""
    questions: str | None = None
    """With --run, a file of your own questions with reference answers: both models answer, each answer is judged."""
    tasks: tuple[str, ...] = ()
    """With --run, tasks of lm-evaluation-harness: names as gsm8k,mmlu, or a .yaml file of your own."""
    task_limit: int | None = None
    """Rows of a task, at most."""
    num_fewshot: int | None = None
    """Examples before each row of a task; by default as the task has it."""
    apply_chat_template: bool = False
    """Give the rows of a task to the model as a user's turn."""
    compare: bool = False
    """With --run, also run `make compare` on the two models, into RUN/compare."""

    # How completions are sampled and graded.
    answer_pattern: str | None = None
    """A regular expression for a whole completion; its group is compared with the data's answer. Empty: every
    completion will do, and the answer that it ends in is compared, as by the reward `math`. By default that of the
    sample data, for the sample data and without a run."""
    samples: int | None = None
    """Sampled completions of each question, besides the greedy one: by default 8 of a run of GRPO, else none."""
    temperature: float | None = None
    """Of sampled completions; by default that of the run, else 1."""
    max_new_tokens: int | None = None
    """By default what the run's completions had, or twice the longest of its data; without a run 64."""
    max_length: int | None = None
    """Tokens of a pair, a conversation or a rated answer with its prompt; the rest is truncated. By default the run's,
    without a run 2048."""
    judge: str | None = None
    """A model to judge the answers to --questions that no rule can judge: a card's name, a directory or a hub id."""
    judge_url: str | None = None
    """Or the URL of an OpenAI-compatible server, up to /v1."""
    judge_model: str | None = None
    """The name of the model there."""
    judge_key: str | None = None
    """The name of the environment variable that holds the key for it; the key itself is written nowhere."""
    load_in_4bit: bool = False
    seed: int = 42
    json: str | None = None
    """Without a run, a file for the figures and every completion."""


OF_A_TASK = ("task_limit", "num_fewshot", "apply_chat_template")
OF_A_JUDGE = ("judge", "judge_url", "judge_model", "judge_key")
OF_A_RUN = ("base", "questions", "tasks", *OF_A_TASK, "compare", *OF_A_JUDGE)
NOT_OF_A_RUN = ("model", "adapter", "reward_model", "json")


def main() -> None:
    args = parse_arguments(Args, __doc__)
    check(args)
    if args.run:
        evaluate_run(args, SAMPLE_PATTERN)
        return
    results = evaluate_reward_model(args, args.reward_model) if args.reward_model else evaluate_policy(args)
    if args.json:
        write_json(Path(args.json).expanduser(), results)


def check(args: Args) -> None:
    """Raise InputError for arguments that do not go together."""
    if strange := given(args, NOT_OF_A_RUN if args.run else OF_A_RUN):
        there = "the run names its models, and its folder takes the figures" if args.run else "they are about a run"
        raise InputError(f"{strange}: {'not with --run' if args.run else 'give --run too'}; {there}")
    if (strange := given(args, OF_A_TASK)) and not args.tasks:
        raise InputError(f"{strange}: give --tasks too; without tasks of lm-eval there is nothing for it")
    if (strange := given(args, OF_A_JUDGE)) and not (args.questions or args.compare):
        raise InputError(f"{strange}: give --questions or --compare too; a judge judges their answers")
    if args.tasks and args.load_in_4bit:
        raise InputError("--load-in-4bit and --tasks: the harness runs in 16 bit; leave one of the two out")
    if args.samples is not None and args.samples < 0:
        raise InputError(f"--samples {args.samples}: expected 0 or more")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        raise InputError(
            f"--temperature {args.temperature:g}: expected more than 0; the greedy completion is always there"
        )
    for name in ("max_new_tokens", "max_length", "task_limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"{flag(name)} {value}: expected at least 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise InputError(f"--num-fewshot {args.num_fewshot}: expected 0 or more")
    try:
        re.compile(args.answer_pattern or "")
    except re.error as error:
        raise InputError(f"--answer-pattern {args.answer_pattern}: no regular expression: {error}") from None
    if args.json and not (folder := Path(args.json).expanduser().parent).is_dir():
        raise InputError(f"--json {args.json}: there is no folder {folder}")


def given(args: Args, names: Iterable[str]) -> str:
    """Those of the arguments that have been given, as flags in a row."""
    return ", ".join(flag(name) for name in names if not any(getattr(args, name) is one for one in (None, False, ())))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
    tokens = {
        name: policy.tokens_of(tokenizer, rows, args.max_length or MAX_LENGTH, faults) for name, rows in sets.items()
    }
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
            SAMPLE_PATTERN if args.answer_pattern is None else args.answer_pattern,
            args.samples or 0, 1.0 if args.temperature is None else args.temperature,
            args.max_new_tokens or MAX_NEW_TOKENS,
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

    loaded = reward_model.LoadedRewardModel(trained, args.load_in_4bit)
    results = {}
    for name, rows in sets.items():
        tokens, truncated = loaded.tokens_of(rows, args.max_length or MAX_LENGTH)
        if truncated:
            console.print(truncated)
        report, judged = loaded.report(rows, tokens, Path(name).name)
        results[name] = {"report": report, "rows": judged}
        show(console, report, f"{which} on {name}")
    return results


if __name__ == "__main__":
    run_command(main)
