"""What is measured of a policy on the held-out rows of its run, by the kind of the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from check_data.texts import layout, marks
from common.data.examples import Conversation, Document, Feedback, Pair, Prompt
from common.data.prompts import render_prompts
from common.data.rows import Faults
from common.errors import InputError
from common.lm.render import prompt_ids
from common.rewards.answers import Gold, final_answer, gold, same
from common.run.progress import bar
from common.run.samples import Sample, as_samples

from evaluation.figures import LOSS, PERPLEXITY, Line, Measured, lines
from evaluation.policy import Question, approve, draw, grade, imitate, prefer, tokens_of
from evaluation.scorer import Scorer
from evaluation.subject import Held

if TYPE_CHECKING:
    from common.lm.generate import Completion
    from common.lm.rollout.rollouts import Rollouts

COMPLETED = 200  # held-out prompts that are completed, at most
ANSWER_MARKS = {"</answer>", "\\boxed{", "####"}  # of a completion in the data that ends in an answer to compare with
FEWEST_TOKENS, MOST_TOKENS = 64, 512  # of a completion, where those of the data decide
FEW_TASKS = 2  # so many have lines of their own


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: the greedy one, and `samples` more at a temperature."""

    samples: int
    temperature: float
    max_new_tokens: int
    pattern: str  # what a whole completion of a question looks like; empty: anything


def read_tokens(tokenizer: Any, held: Held, max_length: int) -> list[Any]:
    """Rows in tokens; prompts as they are. Raises InputError for rows that the model cannot read."""
    first, faults = held.examples[0], Faults()
    if isinstance(first, Prompt):
        render_prompts(tokenizer, held.examples)
        return held.examples
    if not isinstance(first, Conversation | Document | Pair | Feedback):
        raise InputError(f"{held.name}: scores judge a reward model, not a policy")
    return tokens_of(tokenizer, held.examples, max_length, faults)


def measure(
    model: Any, rollouts: "Rollouts", held: Held, tokens: list[Any], sampling: Sampling, scorer: Scorer | None, who: str
) -> list[Measured]:
    """Everything that the rows of one kind can tell of a policy; of each part the rows that it is about."""
    first, tokenizer, what = held.examples[0], rollouts.tokenizer, f"{who}: {held.name}"
    if isinstance(first, Prompt):
        return solve(rollouts, held.examples[:COMPLETED], sampling, scorer, what)
    if isinstance(first, Document):
        return [imitate(model, tokenizer, tokens, what)]
    samples = [one for row in held.examples for one in as_samples_of(row)]
    if isinstance(first, Conversation):
        return [imitate(model, tokenizer, tokens, what), *write(rollouts, samples, sampling, what)]
    if isinstance(first, Pair):
        preferred = prefer(model, tokenizer, tokens, what)
        chosen = likelihood(preferred.rows["margins"])
        return [preferred, chosen, *write(rollouts, samples, sampling, what)]
    approved = approve(model, tokenizer, tokens, what)
    good = [row for row in approved.rows["log_probs"] if row["good"]]
    return [approved, *([likelihood(good)] if good else []), *write(rollouts, samples, sampling, what)]


def as_samples_of(row: Any) -> list[Sample]:
    """The prompt of a row with its good completion; none of a document, a bad completion, or a prompt alone."""
    if isinstance(row, Conversation):
        return as_samples([row])
    if not isinstance(row, Pair | Feedback) or (isinstance(row, Feedback) and not row.label):
        return []
    completion = row.chosen if isinstance(row, Pair) else row.completion
    return [Sample(Conversation(row.place, row.prompt, row.tools), str(completion[-1].get("content") or ""))]


def likelihood(rows: Sequence[dict[str, Any]]) -> Measured:
    """Loss and perplexity by token of completions, of which the log-probability and the tokens are known."""
    losses = [-row["log_prob"] / row["tokens"] for row in rows]
    return Measured({LOSS: losses, PERPLEXITY: losses}, {}, weights=[float(row["tokens"]) for row in rows])


def write(rollouts: "Rollouts", samples: Sequence[Sample], sampling: Sampling, what: str) -> list[Measured]:
    """Whether greedy completions are laid out as the data's, end by themselves, and give its answer if it has one."""
    samples = [one for one in samples if isinstance(one.prompt, Conversation)][:COMPLETED]
    if not samples:
        return []
    prompts = [one.prompt for one in samples if isinstance(one.prompt, Conversation)]
    with bar(what, len(samples)) as advance:
        limit = room(rollouts, prompts, sampling.max_new_tokens)
        completions = rollouts.sample(prompts, limit, 0.0, advance=advance)
    kept = [
        completion.ended and layout(marks(completion.text)) == layout(marks(one.reference))
        for one, completion in zip(samples, completions, strict=True)
    ]
    rows = [
        {"place": prompt.place, "prompt": prompt.messages, "completion": completion.text, "reference": one.reference}
        for one, prompt, completion in zip(samples, prompts, completions, strict=True)
    ]
    values = {"format kept": kept, "stops": [completion.ended for completion in completions]}
    answered = [
        same(right, final_answer(completion.text))
        for one, completion in zip(samples, completions, strict=True)
        if (right := marked_answer(one.reference))
    ]
    return [
        Measured(values, {"completions": rows}),
        *([Measured({"answer right": answered}, {})] if answered else []),
    ]


def marked_answer(reference: str) -> Gold | None:
    """The answer that a completion of the data marks as such; None without one that could be compared with."""
    if not ANSWER_MARKS & set(marks(reference)):
        return None
    try:
        return gold(reference)
    except ValueError:
        return None


def longest(tokenizer: Any, held: Sequence[Held]) -> int:
    """Tokens that a completion may take: twice the longest of the data, and of data without completions MOST_TOKENS."""
    references = [one.reference for rows in held for row in rows.examples for one in as_samples_of(row)]
    if not references:
        return MOST_TOKENS
    counts = [len(ids) for ids in tokenizer(references, add_special_tokens=False, verbose=False)["input_ids"]]
    return min(max(2 * max(counts), FEWEST_TOKENS), MOST_TOKENS)


def room(rollouts: "Rollouts", prompts: Sequence[Prompt | Conversation], limit: int) -> int:
    """`limit`, or what the model's positions leave after the longest prompt."""
    positions = getattr(rollouts.model.config.get_text_config(), "max_position_embeddings", None)
    return (
        max(1, min(limit, positions - max(map(len, prompt_ids(rollouts.tokenizer, prompts))))) if positions else limit
    )


def solve(
    rollouts: "Rollouts", prompts: Sequence[Prompt], sampling: Sampling, scorer: Scorer | None, what: str
) -> list[Measured]:
    """The rewards of completions, where the run has some, and how often they are right, of those with a gold answer."""
    limit = room(rollouts, prompts, sampling.max_new_tokens)
    drawn = draw(rollouts, prompts, what, sampling.samples, sampling.temperature, limit)
    found = [rewarded(drawn, prompts, scorer)] if scorer else []
    questions = {index: question for index, prompt in enumerate(prompts) if (question := as_question(prompt))}
    if questions:
        own = [[draw[index] for index in questions] for draw in drawn]
        return [*found, grade(own, list(questions.values()), sampling.pattern)]
    ended = Measured({"stops": [completion.ended for completion in drawn[0]]}, {"completions": texts(drawn, prompts)})
    return [*found, ended]


def as_question(prompt: Prompt) -> Question | None:
    try:
        return Question(prompt, gold(prompt.answer)) if prompt.answer is not None else None
    except ValueError:
        return None


def texts(drawn: "list[list[Completion]]", prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    return [
        {"place": prompt.place, "prompt": prompt.prompt, "greedy": greedy.text}
        for prompt, greedy in zip(prompts, drawn[0], strict=True)
    ]


def rewarded(drawn: "list[list[Completion]]", prompts: Sequence[Prompt], scorer: Scorer) -> Measured:
    """The rewards of the greedy completions, all and by function, and the mean over the sampled ones of a prompt."""
    greedy, *sampled = drawn
    totals, parts = scorer(prompts, greedy)
    values: dict[str, list[float]] = {"reward (greedy)": totals}
    if len(parts) > 1:  # of one alone it is the reward, but for the weight
        for name, scores in parts.items():
            known = [score for score in scores if score is not None]
            if len(known) == len(scores):
                values[f"{name} (greedy)"] = known
    if sampled:
        draws = [scorer(prompts, draw)[0] for draw in sampled]
        values["reward (sampled)"] = [sum(own) / len(own) for own in zip(*draws, strict=True)]
    return Measured(values, {})


def all_lines(after: Sequence[Measured], before: Sequence[Measured] | None, seed: int) -> list[Line]:
    """The lines of all parts that were measured of the same rows; of few tasks each one's, too."""
    found: list[Line] = []
    for index, own in enumerate(after):
        other = before[index] if before else None
        whole, *tasks = own.task_names()
        split = {"good", "bad"} == set(tasks)
        # Of good and bad completions together only what is signed by the label says something.
        found += [line for line in lines(own, other, seed, whole) if not split or line.name.startswith("signed")]
        for task in tasks if len(tasks) <= FEW_TASKS else ():
            for line in lines(own, other, seed, task):
                if not (split and line.name.startswith("signed")):
                    found.append(replace(line, name=named(line.name, task)))
    return found


def named(name: str, task: str) -> str:
    """A figure of a task: its name comes before the unit in brackets."""
    before, bracket, unit = name.partition(" (")
    return f"{before}, {task}{bracket}{unit}"
