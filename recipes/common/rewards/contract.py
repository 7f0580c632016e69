"""The reward contract: what every reward must do, checked on a few rows before a run spends hours on its scores.

Right answers score highest; scores stay with their rows when the batch is shuffled, which the widely copied
`answer[0]` breaks; chat messages and text score the same; the same input scores the same, on any thread; nothing is
printed, no argument is changed, and no call takes too long. The first rule is only for rewards that read the gold
answer. Scores cannot show whether a reward measures what its author wants.
"""

import contextlib
import copy
import io
import sys
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
from common.rewards.reward import Reward
from common.rewards.specification import ANSWER_TEMPLATE, columns_of

ROWS, SLOW_ROWS = 16, 2
TOLERANCE = 0.02  # of the range of the scores: a model's scores depend a little on the rest of the batch


@dataclass(frozen=True, slots=True)
class Attempt:
    """A completion to try; `kind` is right, wrong, empty or prose, `answer` the answer in it."""

    prompt: Prompt
    kind: str
    answer: str
    text: str


Batch = list[Attempt]


def check_functions(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], seed: int = 0, may_be_silent: bool = False
) -> None:
    """Raise InputError with everything that `contract` finds wrong with the rewards that are functions."""
    _check([reward for reward in rewards if not reward.is_model], prompts, seed, may_be_silent)


def check_models(
    rewards: Sequence[Reward], prompts: Sequence[Prompt], seed: int = 0, may_be_silent: bool = False
) -> None:
    """The same for the rewards that are models, which are loaded for it. Call it after `import unsloth`."""
    _check([reward for reward in rewards if reward.is_model], prompts, seed, may_be_silent)


def _check(rewards: list[Reward], prompts: Sequence[Prompt], seed: int, may_be_silent: bool) -> None:
    faults = [fault for reward in rewards for fault in contract(reward, prompts, seed, may_be_silent=may_be_silent)]
    if faults:
        raise InputError("\n".join(faults))


def contract(
    reward: Reward,
    prompts: Sequence[Prompt],
    seed: int = 0,
    answer_template: str | None = None,
    seconds: float = 60.0,
    may_be_silent: bool = False,
) -> list[str]:
    """What is wrong with `reward`, in words; an empty list if nothing is.

    Args:
        reward: the reward. A reward model is loaded first, which `seconds` does not count.
        prompts: the prompts of the run; `seed` draws the few that are tried.
        answer_template: a completion with {answer} in the place of the answer; by default the reward's own, else
            ANSWER_TEMPLATE.
        seconds: the longest that a call may take.
        may_be_silent: whether one score for everything that is tried is fine, as of a function that looks for
            something that none of it holds.

    Raises MachineError if the reward does.
    """
    try:
        reward.prepare()
    except InputError as error:
        return [str(error)]
    drawn = Random(seed).sample(list(prompts), len(prompts))
    batch = _batch(reward, drawn, answer_template or reward.answer_template or ANSWER_TEMPLATE)
    printed = _Printed()
    faults = []
    with contextlib.redirect_stdout(printed):
        try:
            faults += _faults(reward, batch, seconds, may_be_silent)
        except InputError as error:
            faults.append(str(error))
    if printed.getvalue():
        faults.append(f"{reward.place}: prints {printed.getvalue()[:40]!r}; that would break the display of the run")
    return faults


class _Printed(io.StringIO):
    """Standard output while rewards are tried. Threads that ran before, such as the spinner's, print past it."""

    def __init__(self) -> None:
        super().__init__()
        self.stdout = sys.stdout
        self.others = set(threading.enumerate()) - {threading.current_thread()}

    def write(self, text: str) -> int:
        return self.stdout.write(text) if self._is_other() else super().write(text)

    def flush(self) -> None:
        if self._is_other():
            self.stdout.flush()

    def isatty(self) -> bool:
        return self._is_other() and self.stdout.isatty()

    def _is_other(self) -> bool:
        return threading.current_thread() in self.others


def _faults(reward: Reward, batch: Batch, seconds: float, may_be_silent: bool) -> Iterator[str]:
    # Off the main thread first: a call that does not return can be abandoned there.
    refused, on_thread = None, []
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
        yield f"{refused} (off the main thread, where rewards run; there is no error on the main thread)"
    if changed := [name for name, value in _arguments(batch).items() if given[name] != value]:
        yield f"{reward.place}: changes its arguments ({', '.join(changed)}), which other rewards get too"
    if _differ(scores, reward(**_arguments(batch))):
        yield f"{reward.place}: gives the same completions other scores the second time"
        return
    if on_thread is not None and _differ(scores, on_thread):
        yield f"{reward.place}: gives other scores off the main thread, where rewards run"

    order = list(range(len(batch)))
    Random(0).shuffle(order)
    if _differ([scores[index] for index in order], reward(**_arguments([batch[index] for index in order]))):
        yield (
            f"{reward.place}: its scores do not move with their rows when the batch is shuffled. A column holds one "
            "value for each completion: zip(completions, answer), not answer[0]"
        )
        return
    try:
        if _differ(scores, reward(**_arguments(batch, as_text=True))):
            yield f"{reward.place}: scores completions that are text unlike the same ones as chat messages"
    except InputError as error:
        yield f"{error} (for completions that are text; an argument `texts` is the text of both kinds)"

    if reward.answer_template or (reward.file and _reads_the_answer(reward, batch, scores)):
        yield from _order_faults(reward, batch, scores)
    elif reward.file and len(set(scores)) == 1 and not may_be_silent:
        yield f"{reward.place}: gives every completion {scores[0]}, the empty one too; nothing can be learned from it"


def _order_faults(reward: Reward, batch: Batch, scores: Scores) -> Iterator[str]:
    """Weighted, right answers must score more than wrong ones and than empty completions."""
    sign = -1 if reward.weight < 0 else 1
    scored = {
        (attempt.prompt.place, attempt.kind): (attempt, score)
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
            if (place, other) not in scored:
                continue
            (right, most), (attempt, score) = scored[place, "right"], scored[place, other]
            if sign * most <= sign * score:
                what = f"{attempt.answer!r}" if other == "wrong" else "an empty completion"
                bad.append((most != score, f"{place}: {right.answer!r} scores {most:g}, {what} {score:g}"))
        if len(bad) == len(places) and all(less for less, _ in bad):
            weight = f" with its weight {reward.weight:g}" if reward.weight < 0 else ""
            yield f"{reward.place}: the sign is the wrong way round{weight}; {bad[0][1]}"
            return
        if bad:
            rows = f"{len(bad)} of {len(places)} rows"
            yield f"{reward.place}: the gold answer does not score the most in {rows}; {bad[0][1]}"


def _reads_the_answer(reward: Reward, batch: Batch, scores: Scores) -> bool:
    """Whether the scores change when every row gets the gold answer of another row."""
    arguments = _arguments(batch)
    answers = arguments.get("answer", [])
    if len(set(answers)) < 2:
        return False
    arguments["answer"] = [next(other for other in answers if other != answer) for answer in answers]
    return _differ(scores, reward(**arguments))


def _batch(reward: Reward, prompts: Sequence[Prompt], answer_template: str) -> Batch:
    """A few prompts with different gold answers, each with a right, a wrong, an empty and a useless completion."""
    different: dict[str, Prompt] = {}
    for prompt in prompts:
        different.setdefault(prompt.answer or prompt.place, prompt)
    few = list(different.values())[: SLOW_ROWS if reward.slow else ROWS]
    # A program runs as it is; of an answer worked out in words only the end is the answer.
    final = _final if reward.file or "answer" in reward.needs else str
    answers = [final(prompt.answer) for prompt in few if prompt.answer is not None]
    batch = []
    for prompt in few:
        if prompt.answer is not None:
            right = final(prompt.answer)
            wrong = _other_than(right, answers)
            batch.append(Attempt(prompt, "right", right, answer_template.replace("{answer}", right)))
            batch.append(Attempt(prompt, "wrong", wrong, answer_template.replace("{answer}", wrong)))
        batch.append(Attempt(prompt, "empty", "", ""))
        batch.append(Attempt(prompt, "prose", "", "I do not know. " * 20))
    return batch


def _final(answer: str) -> str:
    try:
        return gold(answer).text
    except ValueError:  # `math` cannot compare with it, but a user's function may
        return answer


def _other_than(answer: str, answers: Sequence[str]) -> str:
    """A wrong answer: a number one higher, else another row's answer, else "none of these"."""
    try:
        right = gold(answer)
    except ValueError:
        return next((other for other in answers if other != answer), "none of these")
    if right.number:
        return str(right.number.value + 1)
    return next((other for other in answers if not same(right, other)), "none of these")


def _arguments(batch: Batch, as_text: bool = False) -> dict[str, Any]:
    """The arguments for a reward function; new lists each time."""
    prompts = [attempt.prompt.prompt for attempt in batch]
    return {
        "prompts": [text_of(prompt) for prompt in prompts] if as_text else copy.deepcopy(prompts),
        "completions": [
            attempt.text if as_text else [{"role": "assistant", "content": attempt.text}] for attempt in batch
        ],
        "completion_ids": [list(attempt.text.encode()) for attempt in batch],  # bytes: there is no tokenizer here
        **copy.deepcopy(columns_of([attempt.prompt for attempt in batch])),
    }


def _start(reward: Reward, batch: Batch) -> "Future[Scores]":
    """Call the reward on another thread, which does not keep the program alive if the call hangs."""
    future: Future[Scores] = Future()

    def call() -> None:
        try:
            future.set_result(reward(**_arguments(batch)))
        except BaseException as error:  # noqa: BLE001  every error is raised again by result()
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _differ(scores: Scores, others: Scores) -> bool:
    """Whether scores differ by more than TOLERANCE, or in the rows that the reward applies to."""
    if [score is None for score in scores] != [other is None for other in others]:
        return True
    numbers = [score for score in scores if score is not None]
    allowed = TOLERANCE * (max(numbers) - min(numbers)) if numbers else 0.0
    pairs = zip(scores, others, strict=True)
    return any(a is not None and b is not None and abs(a - b) > allowed for a, b in pairs)
