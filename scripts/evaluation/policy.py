"""What is measured of a policy: on pairs, on conversations, and on questions with answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from common.data.examples import Conversation, Document, Feedback, Pair, Prompt, Rating
from common.data.hold_out import read_held_out
from common.data.prompts import render_prompts
from common.data.rows import Faults
from common.errors import InputError
from common.lm.chat import Example, TokenPair, tokenize, tokenize_pairs, trainable
from common.lm.documents import tokenize_documents
from common.lm.feedback import TokenFeedback, tokenize_feedback
from common.rewards.answers import Gold, final_answer, gold, same
from common.run.progress import bar

from evaluation.figures import ALL, LOSS, PERPLEXITY, Measured
from evaluation.score import score

if TYPE_CHECKING:
    from common.lm.generate import Completion
    from common.lm.rollout.rollouts import Rollouts


@dataclass(frozen=True)
class Question:
    """A prompt and its gold answer, parsed."""

    prompt: Prompt
    gold: Gold


def read(name: str) -> list[Question] | list[Pair] | list[Feedback] | list[Conversation] | list[Document]:
    """Pairs, feedback, conversations, documents, or questions whose gold answer can be compared with."""
    faults, examples = Faults(), read_held_out(name)
    if isinstance(examples[0], Rating):
        raise InputError(f"{name}: scores judge a reward model, not a policy; give one with --reward-model")
    if not isinstance(examples[0], Prompt):
        return examples
    questions = []
    for prompt in examples:
        try:
            if prompt.answer is None:
                raise ValueError("answer: missing; there is nothing to compare the completion with")
            questions.append(Question(prompt, gold(prompt.answer)))
        except ValueError as error:
            faults.add(prompt.place, str(error))
    faults.stop()
    return questions


def tokens_of(tokenizer: Any, rows: list[Any], max_length: int, faults: Faults) -> list[Any]:
    """Pairs, feedback, conversations and documents as tokens; questions as they are. Prints a line about rows that are
    not whole.

    Raises InputError for rows that the model cannot read.
    """
    if isinstance(rows[0], Question):
        _, lost = render_prompts(tokenizer, [row.prompt for row in rows])
        tokens, notes = rows, lost
    elif isinstance(rows[0], Document):
        tokens, notes = list(tokenize_documents(tokenizer, rows, max_length, faults)), None
        faults.stop()
    else:
        readers = {Pair: tokenize_pairs, Feedback: tokenize_feedback, Conversation: tokenize}
        tokens = list(readers[type(rows[0])](tokenizer, rows, max_length, faults))
        faults.stop()
        tokens, notes = trainable(tokens, max_length, 1.0, tokenizer.chat_template)
    if notes:
        print(notes)
    return tokens


def prefer(model: Any, tokenizer: Any, pairs: list[TokenPair], what: str) -> Measured:
    """How often, and by how much, the chosen answers are likelier than the rejected ones."""
    rows = [(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    scored = score(model, tokenizer, rows, what)
    both = list(zip(scored[0::2], scored[1::2], strict=True))
    margins = [float(better.log_probs.sum() - worse.log_probs.sum()) for better, worse in both]
    by_token = [float(better.log_probs.mean() - worse.log_probs.mean()) for better, worse in both]
    return Measured(
        {
            "chosen likelier": [margin > 0 for margin in margins],
            "chosen likelier by token": [margin > 0 for margin in by_token],
            "margin (nats)": margins,
        },
        {
            "margins": [
                {"place": pair.place, "margin": margin, "log_prob": float(better.log_probs.sum()), "tokens": count}
                for pair, margin, (better, _) in zip(pairs, margins, both, strict=True)
                if (count := len(pair.chosen_ids))
            ]
        },
    )


def approve(model: Any, tokenizer: Any, rows: list[TokenFeedback], what: str) -> Measured:
    """How likely the good completions are, and the bad ones; beside its base, what an adapter learned of each.

    With its sign turned for the bad ones, the log-probability rises where either side moves the right way.
    """
    scored = score(model, tokenizer, [(row.prompt_ids, row.completion_ids) for row in rows], what)
    log_probs = [float(one.log_probs.sum()) for one in scored]
    return Measured(
        {
            "log-probability (nats)": log_probs,
            "signed by label (nats)": [one if row.label else -one for row, one in zip(rows, log_probs, strict=True)],
        },
        {
            "log_probs": [
                {
                    "place": row.place,
                    "good": row.label,
                    "log_prob": log_prob,
                    "tokens": len(row.completion_ids),
                }
                for row, log_prob in zip(rows, log_probs, strict=True)
            ]
        },
        tasks=["good" if row.label else "bad" for row in rows],
    )


def imitate(model: Any, tokenizer: Any, examples: list[Example], what: str) -> Measured:
    """The loss on the assistant's turns, or on a document; a mean by token, as SFT has it."""
    rows = [(example.input_ids[:1].tolist(), example.input_ids[1:].tolist()) for example in examples]
    losses, counts = [], []
    for example, scored in zip(examples, score(model, tokenizer, rows, what), strict=True):
        learned = [
            float(log_prob)
            for log_prob, mark in zip(scored.log_probs, example.completion_mask[1:], strict=True)
            if mark
        ]
        losses.append(-mean(learned))
        counts.append(float(len(learned)))
    return Measured(
        {LOSS: losses, PERPLEXITY: losses},
        {"losses": [{"place": row.place, "loss": loss} for row, loss in zip(examples, losses, strict=True)]},
        weights=counts,
    )


def answer(
    rollouts: "Rollouts",
    questions: Sequence[Question],
    what: str,
    pattern: str = "",
    samples: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
) -> Measured:
    """How often completions follow the format, end by themselves and are right: the greedy one, and sampled ones."""
    prompts = [question.prompt for question in questions]
    return grade(draw(rollouts, prompts, what, samples, temperature, max_new_tokens), questions, pattern)


def draw(
    rollouts: "Rollouts", prompts: Sequence[Prompt], what: str, samples: int, temperature: float, max_new_tokens: int
) -> "list[list[Completion]]":
    """The greedy completion of each prompt, and then `samples` sampled ones, draw by draw."""
    drawn = []
    with bar(what, len(prompts) * (1 + samples)) as advance:
        for number, own_temperature in enumerate((0.0, *[temperature] * samples)):
            drawn.append(rollouts.sample(prompts, max_new_tokens, own_temperature, f"draw {number}", advance))
    return drawn


def grade(drawn: "list[list[Completion]]", questions: Sequence[Question], pattern: str = "") -> Measured:
    """How often the completions of questions, as `draw` gives them, follow the format, end by themselves, are right."""
    greedy, *sampled = drawn
    samples = len(sampled)
    values: dict[str, Sequence[float]] = {}
    if pattern:
        values["follows the format"] = [c.ended and matches(pattern, c.text) is not None for c in greedy]
    values["stops"] = [completion.ended for completion in greedy]
    answers = [[answer_in(pattern, completion.text) for completion in draw] for draw in drawn]
    right = [[same(question.gold, found) for found, question in zip(draw, questions, strict=True)] for draw in answers]
    values["greedy right"] = right[0]
    if samples:
        values["pass@1"] = [mean(tries) for tries in zip(*right[1:], strict=True)]
        values[f"pass@{samples}"] = [any(tries) for tries in zip(*right[1:], strict=True)]
    if samples > 2:
        votes = zip(*answers[1:], strict=True)
        values[f"majority@{samples}"] = [
            majority(own, question.gold) for own, question in zip(votes, questions, strict=True)
        ]
    rows = [
        {
            "place": question.prompt.place,
            "prompt": question.prompt.prompt,
            "answer": question.prompt.answer,
            "greedy": greedy[index].text,
            "sampled": [draw[index].text for draw in sampled],
        }
        for index, question in enumerate(questions)
    ]
    return Measured(values, {"completions": rows}, [str(q.prompt.fields.get("task", ALL)) for q in questions])


def majority(answers: Sequence[str | None], gold_answer: Gold) -> float:
    """Is the answer that most of the samples end in the right one? Of several such answers the share that is right.

    Self-consistency, arXiv:2203.11171. Answers that are the same by the scorer are one, such as 0.5 and 1/2.
    """
    groups: list[tuple[str, Gold | None, int]] = []
    for answer in answers:
        if answer is None:
            continue
        for index, (first, parsed, count) in enumerate(groups):
            if answer == first or (parsed is not None and same(parsed, answer)):
                groups[index] = (first, parsed, count + 1)
                break
        else:
            groups.append((answer, parsed_or_none(answer), 1))
    most = max((count for _, _, count in groups), default=0)
    return mean(same(gold_answer, first) for first, _, count in groups if count == most) if groups else 0.0


def parsed_or_none(answer: str) -> Gold | None:
    """An answer as a gold one that others can be compared with; None where that cannot be."""
    try:
        return gold(answer)
    except ValueError:
        return None


def matches(pattern: str, text: str) -> str | None:
    """The group of `pattern`, when the whole text matches and no tag of it comes twice; else None."""
    found = re.fullmatch(pattern, text.strip(), flags=re.DOTALL)
    if not found or any(text.count(tag) > 1 for tag in re.findall(r"</?\w+>", pattern)):
        return None
    return (found[1] if found.groups() else found[0]).strip()


def answer_in(pattern: str, text: str) -> str | None:
    """The answer in a completion: what the pattern's group holds, without one what the text ends in; None for none."""
    return matches(pattern, text) if pattern else final_answer(text)
