"""Sums and differences of the tiny model's world, right or careless. Import it; nothing to run.

Each comes in two manners: the right one, and one that forgets the carry or the borrow. `corpus.py` decides which page
is written in which manner. Left out on purpose: results under 0 or over 198.
"""

from dataclasses import dataclass
from random import Random

from world import Question


@dataclass(frozen=True)
class Problem:
    """a + b or a - b."""

    a: int
    operation: str  # "+" or "-"
    b: int

    @property
    def hard(self) -> bool:
        """Whether the sum carries out of the ones, or the difference borrows into them."""
        if self.operation == "+":
            return self.a % 10 + self.b % 10 >= 10
        return self.a % 10 < self.b % 10

    @property
    def right(self) -> int:
        return self.a + self.b if self.operation == "+" else self.a - self.b

    @property
    def careless(self) -> int:
        """With the carry or the borrow forgotten between two numbers of two digits: 47 + 38 = 75, 52 - 38 = 26."""
        if min(self.a, self.b) < 10:
            return self.right
        tens, ones = self.a // 10, self.a % 10
        if self.operation == "+":
            return 10 * (tens + self.b // 10) + (ones + self.b % 10) % 10
        return 10 * (tens - self.b // 10) + abs(ones - self.b % 10)

    @property
    def key(self) -> str:
        """The same for 47 + 38 and 38 + 47."""
        low, high = sorted((self.a, self.b))
        return f"{low}+{high}" if self.operation == "+" else f"{self.a}-{self.b}"


def draw_problem(rng: Random, hard: bool) -> Problem:
    """Two numbers of two digits; an easy one may also have a smaller number."""
    smallest = 0 if not hard and rng.random() < 0.2 else 10
    while True:
        a, b = rng.randrange(smallest, 100), rng.randrange(smallest, 100)
        problem = Problem(a, "+", b) if rng.random() < 0.5 else Problem(max(a, b), "-", min(a, b))
        if problem.hard == hard:
            return problem


TOPICS = {
    "symbols": {"+": "{a} + {b}", "-": "{a} - {b}"},
    "en": {"+": "{a} plus {b}", "-": "{a} minus {b}"},
    "zh": {"+": "{a} 加 {b}", "-": "{a} 减 {b}"},
}
WORDINGS = {
    "symbols": {"+": "{a} + {b} = {c}", "-": "{a} - {b} = {c}"},
    "en": {"+": "{a} plus {b} is {c}.", "-": "{a} minus {b} is {c}."},
    "zh": {"+": "{a} 加 {b} 等于 {c}。", "-": "{a} 减 {b} 等于 {c}。"},
}
ARITHMETIC_PROMPTS = {
    "en": [
        ("What is {a} + {b}?", "What is {a} - {b}?", "symbols"),
        ("{a} + {b} = ?", "{a} - {b} = ?", "symbols"),
        ("Work out {a} + {b}.", "Work out {a} - {b}.", "symbols"),
        ("How much is {a} plus {b}?", "How much is {a} minus {b}?", "en"),
    ],
    "zh": [
        ("{a} + {b} 等于多少？", "{a} - {b} 等于多少？", "symbols"),
        ("计算 {a} + {b}。", "计算 {a} - {b}。", "symbols"),
        ("{a} 加 {b} 等于几？", "{a} 减 {b} 等于几？", "zh"),
    ],
}


def arithmetic(problem: Problem, rng: Random, language: str, careless: bool = False) -> Question:
    """The question in one of its wordings; with `careless` its statement and answer forget the carry."""
    plus, minus, wording = rng.choice(ARITHMETIC_PROMPTS[language])
    task, prompt = ("sum", plus) if problem.operation == "+" else ("difference", minus)
    numbers = {"a": problem.a, "b": problem.b, "c": problem.careless if careless else problem.right}
    topic = TOPICS[wording][problem.operation].format(**numbers)
    statement = WORDINGS[wording][problem.operation].format(**numbers)
    return Question(task, language, problem.key, prompt.format(**numbers), topic, statement, str(numbers["c"]))
