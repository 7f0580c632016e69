"""Ten questions of one's own: the model answers them before and after training, and each answer is judged.

A question with a gold answer that is a number or mathematics is judged by the scorer of training. The others are judged
by a judge, if one is given, which sees the reference answer; else by measures of text: is the answer the reference
(exact), does it contain the reference (contains), and how many words do the two share (F1, as in SQuAD,
arXiv:1606.05250; a Chinese character is a word).
"""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from check_data.texts import TOKEN
from common.data.examples import Prompt
from common.data.formats import PROBLEM_FORMATS
from common.data.read import read_examples
from common.data.rows import Faults, find_source
from common.rewards.answers import Gold, final_answer, gold, same
from comparison.judge import Judge, judge_pairs

if TYPE_CHECKING:
    from rich.table import Table

CLEAR = 0.05  # of a score from 0 to 1: a smaller change is none
SIGNIFICANT = 0.05
SHOWN = 44  # characters of a text in a cell


@dataclass(frozen=True)
class Answered:
    """A question with both answers, a score from 0 to 1 of each, and what gave the scores."""

    question: str
    reference: str
    before: str
    after: str
    scores: tuple[float, float]
    by: tuple[str, str]

    @property
    def verdict(self) -> str:
        change = self.scores[1] - self.scores[0]
        return "same" if abs(change) < CLEAR else "better" if change > 0 else "worse"

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "verdict": self.verdict}


@dataclass(frozen=True)
class Total:
    """How many answers are better, worse and the same; `p` of the two-sided sign test, 1 where all are the same."""

    better: int
    worse: int
    same: int
    p: float

    @property
    def verdict(self) -> str:
        if self.p >= SIGNIFICANT:
            return "no difference"
        return "better" if self.better > self.worse else "worse"

    def in_words(self) -> str:
        counts = f"{self.better} better, {self.worse} worse, {self.same} the same"
        return f"{counts}: {self.verdict} (sign test, p = {self.p:.2g})"


def read(name: str) -> list[Prompt]:
    """Questions with reference answers, one a row. Raises InputError with every row that has none."""
    prompts, faults = read_examples(find_source(name), PROBLEM_FORMATS).examples, Faults()
    for prompt in prompts:
        if not (prompt.answer or "").strip():
            faults.add(prompt.place, "answer: missing; give the answer that you would expect")
    faults.stop()
    return prompts


def judged(
    prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str], judge: Judge | None, seed: int
) -> list[Answered]:
    """Each question with the scores of both answers."""
    golds = [checkable(str(prompt.answer)) for prompt in prompts]
    left = [index for index, one in enumerate(golds) if one is None]
    by_judge: dict[int, tuple[float, float]] = {}
    if judge and left:
        rows = [(with_reference(prompts[index]), before[index], after[index]) for index in left]
        for index, verdict in zip(left, judge_pairs(judge, rows, random.Random(seed))[0], strict=True):
            if verdict:
                by_judge[index] = (rating(verdict["A"]), rating(verdict["B"]))
    found = []
    for index, (prompt, right) in enumerate(zip(prompts, golds, strict=True)):
        texts = before[index], after[index]
        if right is not None:
            scores, by = [float(same(right, final_answer(text))) for text in texts], ["scorer", "scorer"]
        elif index in by_judge:
            scores, by = list(by_judge[index]), ["judge", "judge"]
        else:
            both = [by_text(str(prompt.answer), text) for text in texts]
            scores, by = [score for score, _ in both], [name for _, name in both]
        question = str(prompt.prompt[-1]["content"])
        found.append(Answered(question, str(prompt.answer), *texts, (scores[0], scores[1]), (by[0], by[1])))
    return found


def checkable(reference: str) -> Gold | None:
    """A reference that is a number or mathematics, for the scorer; None for words."""
    try:
        parsed = gold(reference)
    except ValueError:
        return None
    return None if parsed.words else parsed


def by_text(reference: str, text: str) -> tuple[float, str]:
    """How near an answer is to the reference in words, from 0 to 1, and the measure that tells."""
    wanted, given = words(reference), words(answer_part(text))
    if not wanted:  # a reference of signs alone, such as an emoji
        return float(reference.strip() in answer_part(text)), "contains"
    if wanted == given:
        return 1.0, "exact"
    if any(given[start : start + len(wanted)] == wanted for start in range(len(given) - len(wanted) + 1)):
        return 1.0, "contains"
    shared = (Counter(wanted) & Counter(given)).total()
    f1 = 2 * shared / (len(wanted) + len(given)) if shared else 0.0
    return f1, f"F1 {f1:.2f}"


def answer_part(text: str) -> str:
    """A completion without its reasoning, and without the tags around its answer."""
    return re.sub(r"</?answer>", " ", text.rpartition("</think>")[2])


def words(text: str) -> list[str]:
    return [token for token in TOKEN.findall(text.casefold()) if re.match(r"\w", token)]


def with_reference(prompt: Prompt) -> list[dict[str, Any]]:
    return [*prompt.prompt, {"role": "user", "content": f"(A good answer, for you to judge by: {prompt.answer})"}]


def rating(numbers: dict[str, float]) -> float:
    """The mean of a judge's ratings from 1 to 5, from 0 to 1."""
    return (sum(numbers.values()) / len(numbers) - 1) / 4


def total(answers: Sequence[Answered]) -> Total:
    """The counts, and the sign test over the questions that are not the same."""
    from scipy.stats import binomtest

    counts = Counter(one.verdict for one in answers)
    changed = counts["better"] + counts["worse"]
    p = float(binomtest(counts["better"], changed).pvalue) if changed else 1.0
    return Total(counts["better"], counts["worse"], counts["same"], p)


def as_table(answers: Sequence[Answered], title: str) -> "Table":
    """Question, both answers with what judged them, and the verdict; 80 columns."""
    from rich.markup import escape
    from rich.table import Column, Table

    wide = [Column(heading, overflow="fold", ratio=1) for heading in ("question", "before", "after")]
    rows = Table(*wide, Column("verdict", no_wrap=True), title=title, show_lines=True, width=80)
    for one in answers:
        texts = (clipped(text) + f"\n[{by}]" for text, by in zip((one.before, one.after), one.by, strict=True))
        rows.add_row(*map(escape, (clipped(one.question), *texts)), one.verdict)
    return rows


def clipped(text: str) -> str:
    """The answer as one line, from its end where it is long: reasoning comes first."""
    line = " / ".join(text.split("\n")).strip()
    return line if len(line) <= SHOWN else "… " + line[-SHOWN:]
