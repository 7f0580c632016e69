"""`make evaluate RUN=…`: the model of a run before and after training, on rows that it never saw."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import environment
from common.commands import command
from common.data.examples import Document, Prompt
from common.data.prompts import render_prompts
from common.data.rows import find_source
from common.errors import InputError, spell
from common.lm.hub import Model, fetch, find_model
from common.lm.load import load_chat_tokenizer, load_text_tokenizer, use_for_inference
from common.run.screen import loading
from comparison.judges import judge_here, server_of
from comparison.sampling import Sampling as JudgeSampling

from evaluation import general, harness, held_out, questions, results
from evaluation.figures import Measured
from evaluation.results import Section
from evaluation.scorer import Scorer
from evaluation.subject import Held, RunArgs, Side, Subject, find_subject, held_rows

if TYPE_CHECKING:
    from comparison.judge import Judge
    from rich.console import Console

GENERAL = "general ability"
LONGEST_ROW = 2048  # tokens of a row, where the run has no limit of its own
ANSWER_TOKENS = 512  # of an answer to a question
SAMPLED = {"grpo": 8}  # completions of a prompt for pass@k, by method
NOTHING_HELD_OUT = (
    "The run held out no row: give rows that it did not train on with --data. "
    "EVAL_RATIO=0.05 of a recipe holds some out."
)


@dataclass
class Findings:
    """What one of the two models does: by the name of the rows what was measured, and its answers to the questions."""

    measured: dict[str, list[Measured]] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)


def evaluate_run(args: RunArgs, sample_pattern: str) -> None:
    """Print what training changed, and write it to the run's folder. Everything is checked before a model is loaded."""
    subject = find_subject(str(args.run), args.base)
    if subject.method == "reward":
        from evaluation.of_reward_run import evaluate_reward_run

        evaluate_reward_run(args, subject)
        return
    before = subject.before
    assert before is not None
    held = held_rows(subject, args.data)
    given = subject.arguments
    scorer = Scorer(given, args.load_in_4bit) if subject.method in ("grpo", "ppo") else None
    for one in held:
        if scorer and isinstance(one.examples[0], Prompt):
            scorer.check(one.name, one.examples)
    to_answer = questions.read(args.questions) if args.questions else []
    server, judge_model = server_of(args), find_model(args.judge) if args.judge else None
    compared = subject.folder / "compare"
    if args.compare and compared.exists():
        raise InputError(f"--compare: {compared} exists already; move it away, or leave --compare out")
    tasks = harness.find(args.tasks)
    if server:
        server.check()
    outside = dict(os.environ)  # for the harness, whose data may be on the hub where our models are not
    environment.set_variables(models=models(subject, scorer, judge_model), sources=map(find_source, args.data))

    sections = []
    if tasks:
        options = harness.Options(args.task_limit, args.num_fewshot, args.apply_chat_template, args.seed)
        sections.append(harness.run(tasks, subject.after, before, subject.folder, options, outside))
    console = loading(subject.after.model.name)
    import unsloth  # noqa: F401  first: it changes what is imported after it

    sample_data = Path(given["data"]).absolute().parent == environment.ROOT / "data_samples"
    sampling = held_out.Sampling(
        samples=SAMPLED.get(subject.method, 0) if args.samples is None else args.samples,
        temperature=given.get("temperature", 1.0) if args.temperature is None else args.temperature,
        max_new_tokens=args.max_new_tokens or given.get("max_completion_length") or 0,
        pattern=sample_pattern if args.answer_pattern is None and sample_data else args.answer_pattern or "",
    )
    after, earlier = both(args, subject, before, held, scorer, to_answer, sampling)

    own = [table(one.name, after.measured[one.name], earlier.measured[one.name], args.seed) for one in held]
    if args.general:
        own.append(table(GENERAL, after.measured[GENERAL], earlier.measured[GENERAL], args.seed))
    sections = [*own, *sections]
    console.print(f"before: {before.name}\nafter:  {subject.after.name}", soft_wrap=True, highlight=False, markup=False)
    if not held:
        console.print(spell(NOTHING_HELD_OUT), soft_wrap=True, highlight=False)
    for section in sections:
        results.show(console, section)
    more: dict[str, Any] = {}
    if to_answer:
        judge = server or (judge_here(judge_model, JudgeSampling(0, 0.0, False, args.seed)) if judge_model else None)
        more["questions"] = answer_questions(console, to_answer, earlier.answers, after.answers, judge, args.seed)
    file = results.write(subject, args.seed, sections, more)
    console.print(f"Figures in {file}, with their intervals in report.html", highlight=False, soft_wrap=True)
    compare(args, before, subject.after, compared, console)


def models(subject: Subject, scorer: Scorer | None, judge: Model | None) -> list[Model]:
    sides = [side.model for side in (subject.after, subject.before) if side]
    return [*sides, *(scorer.models if scorer else []), *([judge] if judge else [])]


def both(
    args: RunArgs,
    subject: Subject,
    before: Side,
    held: list[Held],
    scorer: Scorer | None,
    to_answer: list[Prompt],
    sampling: held_out.Sampling,
) -> tuple[Findings, Findings]:
    """What is measured of the model after training and before: one model, its adapter on and off, where it can be.

    Raises InputError, before a model is loaded, where the two read text as different tokens.
    """
    off = before.adapter is None and subject.after.adapter is not None
    off = off and before.model.source == subject.after.model.source

    def all_of(model: Any, rows: "InTokens", who: str, adapter: str | None) -> Findings:
        from common.lm.rollout.rollouts import Rollouts

        rollouts = Rollouts(model, rows.tokenizer, rows.end, seed=args.seed, adapter=adapter)
        found = Findings()
        own = sampling if sampling.max_new_tokens else replace(sampling, max_new_tokens=rows.longest)
        for one in held:
            found.measured[one.name] = held_out.measure(model, rollouts, one, rows.tokens[one.name], own, scorer, who)
        if args.general:
            found.measured[GENERAL] = [general.know(model, rows.tokenizer, f"{who}: {GENERAL}")]
        if to_answer:
            limit = held_out.room(rollouts, to_answer, args.max_new_tokens or ANSWER_TOKENS)
            found.answers = [one.text for one in rollouts.sample(to_answer, limit, 0.0)]
        return found

    rows = in_tokens(args, subject, subject.after, held, to_answer)
    others = rows if off else in_tokens(args, subject, before, held, to_answer)
    if others.tokenizer.get_vocab() != rows.tokenizer.get_vocab():
        raise InputError(
            f"--base {before.name}: reads text as other tokens than {subject.after.model.name}, so that their "
            f"likelihoods cannot be compared; `{command('compare', a=before.name, b=subject.folder)}` compares "
            "what they write"
        )

    def of_after(model: Any) -> tuple[Findings, Findings | None]:
        after = all_of(model, rows, "after", "default" if subject.after.adapter else None)
        if not off:
            return after, None
        with model.disable_adapter():
            return after, all_of(model, others, "before", None)

    after, earlier = use_for_inference(rows.base, subject.after.adapter, args.load_in_4bit, of_after)
    if earlier:
        return after, earlier

    def of_before(model: Any) -> Findings:
        return all_of(model, others, "before", "default" if before.adapter else None)

    return after, use_for_inference(others.base, before.adapter, args.load_in_4bit, of_before)


@dataclass(frozen=True)
class InTokens:
    """The rows as a model reads them: by its tokenizer, in its tokens."""

    base: Model
    tokenizer: Any
    end: str
    tokens: dict[str, list[Any]]
    longest: int  # tokens that a completion may take, by the data


def in_tokens(args: RunArgs, subject: Subject, side: Side, held: list[Held], to_answer: list[Prompt]) -> InTokens:
    """The rows in the tokens of a side, by the chat template of the run. Raises InputError where it refuses one."""
    base = fetch(side.model)
    raw_text = bool(held) and all(isinstance(one.examples[0], Document) for one in held)
    given = subject.arguments.get("chat_template_path"), subject.arguments.get("pad_token")
    tokenizer, end = (load_text_tokenizer if raw_text and not to_answer else load_chat_tokenizer)(base, *given)
    max_length = args.max_length or subject.arguments.get("max_length") or LONGEST_ROW
    tokens = {one.name: held_out.read_tokens(tokenizer, one, max_length) for one in held}
    if to_answer:
        render_prompts(tokenizer, to_answer)
    return InTokens(base, tokenizer, end, tokens, held_out.longest(tokenizer, held))


def table(name: str, after: list[Measured], before: list[Measured], seed: int) -> Section:
    rows = max(map(len, after))  # that were measured: those that are truncated to nothing are not, nor is every prompt
    details = {
        label: {key: listed for part in parts for key, listed in part.rows.items()}
        for label, parts in (("after", after), ("before", before))
    }
    return Section(name, rows, held_out.all_lines(after, before, seed), results.few_rows(rows), details)


def answer_questions(
    console: "Console", to_answer: list[Prompt], before: list[str], after: list[str], judge: "Judge | None", seed: int
) -> dict[str, Any]:
    """Print each question with both answers and the verdict, and the total; as JSON."""
    answers = questions.judged(to_answer, before, after, judge, seed)
    total = questions.total(answers)
    console.print(questions.as_table(answers, f"{len(to_answer)} questions"))
    console.print(f"{len(to_answer)} questions: {total.in_words()}", soft_wrap=True, highlight=False)
    return {
        "rows": [one.as_json() for one in answers],
        "total": {**total.__dict__, "verdict": total.verdict, "in words": total.in_words()},
    }


def compare(args: RunArgs, before: Side, after: Side, folder: Path, console: "Console") -> None:
    """Run `make compare` on the two models, or print its command."""
    a, b = (side.adapter or side.model.source for side in (before, after))
    if not args.compare:
        console.print("Both models' answers on four dimensions, rated blind:")
        console.print(f"  {command('compare', a=a, b=b)}", markup=False, highlight=False, soft_wrap=True)
        return
    from compare import Args as CompareArgs
    from compare import compare as compare_both

    limit = {"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {}
    judge = {name: getattr(args, name) for name in ("judge", "judge_url", "judge_model", "judge_key")}
    more = {"load_in_4bit": args.load_in_4bit, "seed": args.seed, **limit, **judge}
    compare_both(CompareArgs(a=a, b=b, output_dir=str(folder), **more))
