"""What every reward function must keep to, tried out on a few rows before a run spends hours on its scores.

Right answers score the most; scores stay with their rows when the batch is shuffled, which the widely copied
`answer[0]` breaks; chat messages and text score the same; the same input the same, on any thread; nothing is printed,
nothing that was given is changed, and it does not take forever. A reward that does not read the gold answer is not
held to the first. What cannot be told from scores stays open: whether the reward means what its author wants.
"""

import contextlib
import copy
import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from random import Random
from typing import Any

from common.data.examples import Prompt
from common.errors import InputError
from common.rewards.answers import gold, same
from common.rewards.builtin import Scores, text_of
from common.rewards.specification import FORM, Reward, columns_of

ROWS, SLOW_ROWS = 16, 2
TOLERANCE = 0.02  # of the spread of the scores: a model's depend a little on what they share a batch with


@dataclass(frozen=True, slots=True)
class Attempt:
    """A completion of a problem; `kind` says whether it is right, wrong, empty or prose, `answer` what it answers."""

    problem: Prompt
    kind: str
    answer: str
    text: str


Batch = list[Attempt]


def check_contract(
    rewards: Sequence[Reward], problems: Sequence[Prompt], seed: int = 0, may_be_silent: bool = False
) -> None:
    """Raise InputError with all that is wrong with the rewards, as `contract` finds it."""
    faults = [fault for reward in rewards for fault in contract(reward, problems, seed, may_be_silent=may_be_silent)]
    if faults:
        raise InputError("\n".join(faults))


def contract(
    reward: Reward,
    problems: Sequence[Prompt],
    seed: int = 0,
    form: str | None = None,
    seconds: float = 60.0,
    may_be_silent: bool = False,
) -> list[str]:
    """What is wrong with `reward`, tried on some of `problems` that `seed` draws; an empty list if nothing is.

    `form` is a completion with {answer} in the place of the answer, by default the one that the recipes ask for, or
    the reward's own. No call may take longer than `seconds`. A reward that gives all that is tried the same score is a
    fault unless it `may_be_silent`, as a rule may be on answers it was not written for. Raises MachineError if the
    reward does.
    """
    drawn = Random(seed).sample(list(problems), len(problems))
    batch = _batch(reward, drawn, form or reward.form or FORM)
    printed = io.StringIO()
    faults = []
    with contextlib.redirect_stdout(printed):
        try:
            faults += _faults(reward, batch, seconds, may_be_silent)
        except InputError as error:
            faults.append(str(error))
    if printed.getvalue():
        faults.append(f"{reward.place}: prints {printed.getvalue()[:40]!r}; that would break the display of the run")
    return faults


def _faults(reward: Reward, batch: Batch, seconds: float, may_be_silent: bool) -> Iterator[str]:
    # Off the main thread first: there a call that does not come back can be left behind.
    refused = None
    try:
        on_thread = _start(reward, batch).result(seconds)
    except TimeoutError:
        yield f"{reward.place}: takes more than {seconds:g} s for {len(batch)} completions"
        return
    except InputError as error:
        refused = error
    given = _arguments(batch)
    scores = reward(**given)
    if refused:
        yield f"{refused} (off the main thread, where rewards run; on it there is no error)"
    if changed := [name for name, value in _arguments(batch).items() if given[name] != value]:
        yield f"{reward.place}: changes what it is given ({', '.join(changed)}), which other rewards get too"
    if _differ(scores, reward(**_arguments(batch))):
        yield f"{reward.place}: gives the same completions other scores the second time"
        return
    if not refused and _differ(scores, on_thread):
        yield f"{reward.place}: gives other scores off the main thread, where rewards run"

    order = list(range(len(batch)))
    Random(0).shuffle(order)
    if _differ([scores[place] for place in order], reward(**_arguments([batch[place] for place in order]))):
        yield (
            f"{reward.place}: its scores do not move with their rows when the batch is shuffled. A column holds one "
            "value for each completion: zip(completions, answer), not answer[0]"
        )
        return
    try:
        if _differ(scores, reward(**_arguments(batch, as_text=True))):
            yield f"{reward.place}: scores completions that are text unlike the same ones as chat messages"
    except InputError as error:
        yield f"{error} (for completions that are text; common.rewards.builtin.text_of takes both)"

    if reward.form or (reward.file and _reads_the_answer(reward, batch, scores)):
        yield from _order_faults(reward, batch, scores)
    elif reward.file and len(set(scores)) == 1 and not may_be_silent:
        yield f"{reward.place}: gives every completion {scores[0]}, the empty one too; nothing can be learnt from it"


def _order_faults(reward: Reward, batch: Batch, scores: Scores) -> Iterator[str]:
    """Right answers must score more than wrong ones and than none, once the score has its weight."""
    sign = -1 if reward.weight < 0 else 1
    scored = {
        (attempt.problem.place, attempt.kind): (attempt, score)
        for attempt, score in zip(batch, scores, strict=True)
        if score is not None
    }
    places = [place for place, kind in scored if kind == "right"]
    if not places:
        if any(attempt.kind == "right" for attempt in batch):
            yield f"{reward.place}: applies to none of the rows that were tried"
        return
    for other in ("wrong", "empty"):
        bad = []
        for place in places:
            (right, most), (attempt, score) = scored[place, "right"], scored.get((place, other), (None, None))
            if score is not None and sign * most <= sign * score:
                said = f"{attempt.answer!r}" if other == "wrong" else "an empty completion"
                bad.append((most != score, f"{place}: {right.answer!r} scores {most:g}, {said} {score:g}"))
        if len(bad) == len(places) and all(less for less, _ in bad):
            weight = f" with its weight {reward.weight:g}" if reward.weight < 0 else ""
            yield f"{reward.place}: the sign is the wrong way round{weight}; {bad[0][1]}"
            return
        if bad:
            rows = f"{len(bad)} of {len(places)} rows"
            yield f"{reward.place}: the gold answer does not score the most in {rows}; {bad[0][1]}"


def _reads_the_answer(reward: Reward, batch: Batch, scores: Scores) -> bool:
    """Do the scores change when every row has the gold answer of another?"""
    arguments = _arguments(batch)
    answers = arguments.get("answer", [])
    if len(set(answers)) < 2:
        return False
    arguments["answer"] = [next(other for other in answers if other != answer) for answer in answers]
    return _differ(scores, reward(**arguments))


def _batch(reward: Reward, problems: Sequence[Prompt], form: str) -> Batch:
    """A few problems, of different answers, and to each a right, a wrong, an empty and a useless completion."""
    different: dict[str, Prompt] = {}
    for problem in problems:
        different.setdefault(problem.answer or problem.place, problem)
    few = list(different.values())[: SLOW_ROWS if reward.slow else ROWS]
    # A program is run as it stands; of an answer worked out in words the end is the answer.
    final = _final if reward.file or "answer" in reward.needs else str
    answers = [final(problem.answer) for problem in few if problem.answer is not None]
    batch = []
    for problem in few:
        if problem.answer is not None:
            right = final(problem.answer)
            wrong = _other_than(right, answers)
            batch.append(Attempt(problem, "right", right, form.replace("{answer}", right)))
            batch.append(Attempt(problem, "wrong", wrong, form.replace("{answer}", wrong)))
        batch.append(Attempt(problem, "empty", "", ""))
        batch.append(Attempt(problem, "prose", "", "I do not know. " * 20))
    return batch


def _final(answer: str) -> str:
    try:
        return gold(answer).text
    except ValueError:  # no answer that math could compare with, but a user's function may
        return answer


def _other_than(answer: str, answers: Sequence[str | None]) -> str:
    """A wrong answer: a number one higher, else another row's, else words that nobody asked for."""
    try:
        right = gold(answer)
    except ValueError:
        return next((other for other in answers if other not in (None, answer)), "none of these")
    if right.number:
        return str(right.number.value + 1)
    return next((other for other in answers if other is not None and not same(right, other)), "none of these")


def _arguments(batch: Batch, as_text: bool = False) -> dict[str, Any]:
    """What a reward function is called with; new lists each time."""
    prompts = [attempt.problem.prompt for attempt in batch]
    return {
        "prompts": [text_of(prompt) for prompt in prompts] if as_text else copy.deepcopy(prompts),
        "completions": [
            attempt.text if as_text else [{"role": "assistant", "content": attempt.text}] for attempt in batch
        ],
        "completion_ids": [list(attempt.text.encode()) for attempt in batch],  # no tokenizer is needed to be tried out
        **copy.deepcopy(columns_of([attempt.problem for attempt in batch])),
    }


def _start(reward: Reward, batch: Batch) -> "Future[Scores]":
    """Call the reward on another thread, one that does not keep the program from ending if it hangs."""
    future: Future[Scores] = Future()

    def call() -> None:
        try:
            future.set_result(reward(**_arguments(batch)))
        except Exception as error:  # noqa: BLE001  whatever it is, it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _differ(scores: Scores, others: Scores) -> bool:
    """Beyond TOLERANCE, or in what the reward applies to."""
    if [score is None for score in scores] != [other is None for other in others]:
        return True
    numbers = [score for score in scores if score is not None]
    allowed = TOLERANCE * (max(numbers) - min(numbers)) if numbers else 0.0
    pairs = zip(scores, others, strict=True)
    return any(score is not None and abs(score - other) > allowed for score, other in pairs)
