"""Find the final answer in a completion, and compare it with the gold answer.

Numbers are compared as numbers, structures part by part, other mathematics by math-verify, the rest as text. The rules:

- 1,080 = 1 080 = 1080.00 = $1,080 = 1080 dollars; 3/4 = 0.75 = 四分之三; 1 1/2 = 1.5; 120万 = 1.2 million; x = 5 is 5,
  not y = 5. A decimal may stand for a fraction when it is right to six digits (0.333333 for 1/3).
- 50% = 0.5 and also = 50, because questions that ask for a percentage are answered both ways.
- A unit may be left out, but km is not m, m^2 not m, and $ not €. Units are not converted. What is counted (apples, 个)
  is not compared.
- Where the gold answer is a number, a calculation is not an answer: neither 23 + 64 for 87 nor 48/2 for 24. Otherwise
  a model would learn to repeat the question.
- A list and a set have no order, tuples, matrices and ratios do; an interval has its brackets. 3:4 is 6:8; 7:30 a time.
- Text is the same but for case, spaces, surrounding punctuation and LaTeX's \\text: "(B)." = "b" = "B. Paris".
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from common.rewards import algebra, equality, notation
from common.rewards.leaves import Budget
from common.rewards.quantities import Number

LONGEST_TEXT = 100  # characters of a gold answer in words; longer is an explanation, which no answer equals

_SEPARATOR = r"(?:,\\!|,|\{,\}|\\[,!;]| |_|')"
_PLAIN = rf"(?:(?:\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_CURRENCY = r"(?:\\?\$|[€£¥₹]|US\$|USD ?|RMB ?)"
_LAST_NUMBER = re.compile(
    rf"(?:(?<![\w.)\]}}])[+-])?(?:\\[dt]?frac\{{\d+\}}\{{\d+\}}|{_CURRENCY}?(?:\d+ ?/ ?\d+|{_PLAIN})(?:\\?%)?)"
)
_BRACES = re.compile(r"\\(?:boxed|fbox) ?\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Gold:
    """A gold answer: its text, and the number it is, or whether it is words; mathematics if neither."""

    text: str
    number: Number | None
    words: bool


def final_answer(text: str) -> str | None:
    """The answer that `text` ends in: what the last <answer></answer> holds, else the last \\boxed{}, else what follows
    `####` on the last line, else the last number. None if there is none.

    Reasoning is not an answer: with </think> in the text only what follows counts, with <think> alone nothing does.
    """
    _, closed, after = text.rpartition("</think>")
    if not closed and "<think>" in text:
        return None
    marked = _marked(after)
    return _last_number(after) if marked is None else marked


@lru_cache(maxsize=1 << 16)
def gold(text: str) -> Gold:
    """The gold answer in a row's `answer`: what the marks of final_answer hold (GSM8K's `#### 42`), else all of it.

    Raises ValueError when no answer could be compared with it: it is empty or punctuation, mathematics that cannot be
    parsed, or words without a mark that are longer than 100 characters or a line.
    """
    marked = _marked(text)
    given = (text if marked is None else marked).strip()
    several_lines = "\n" in given and "\\begin" not in given
    if len(given) > algebra.LONGEST:
        raise ValueError(_too_long(given))
    answer = notation.normal(given)
    if not re.search(r"\w|\\infty|\\emptyset", answer):
        raise ValueError(f"{_shown(given or text)} holds nothing to compare an answer with")
    if (number := equality.number(answer)) is not None:
        return Gold(answer, number, words=False)
    if equality.is_words(answer):
        if several_lines or len(answer) > LONGEST_TEXT:
            raise ValueError(_too_long(given))
        return Gold(answer, None, words=True)
    if not equality.parses(answer):
        raise ValueError(f"{_shown(given)} looks like mathematics and cannot be parsed; correct its LaTeX")
    return Gold(answer, None, words=False)


def same(gold: Gold, answer: str | None, seconds: float = 2.0) -> bool:
    """Whether `answer`, as final_answer found it, is the gold answer, by the rules at the top of this module.

    An answer that takes the processor longer than `seconds` to compare is wrong. Safe on any thread.
    """
    if answer is None or len(answer) > algebra.LONGEST:
        return False
    answer = notation.normal(answer)
    return bool(answer) and equality.same(gold.text, answer, Budget(seconds))


def _marked(text: str) -> str | None:
    """What the answer's marks hold, where need be one inside another; None without a mark."""
    found = None
    for find in (_tagged, _boxed, _after_hashes, _boxed):
        inside = find(text)
        if inside is not None:
            text = found = inside.strip()
    return found


def _tagged(text: str) -> str | None:
    before, closed, _ = text.rpartition("</answer>")
    _, opened, inside = before.rpartition("<answer>")
    return inside if closed and opened else None


def _boxed(text: str) -> str | None:
    """What the last closed \\boxed{} holds, the innermost of several; one pass however deep the braces are."""
    opened, best = [], (-1, -1)
    for token in _BRACES.finditer(text):
        if token[0] == "{" or len(token[0]) > 2:
            opened.append((token.end(), token[0] != "{"))
        elif token[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box:
                best = max(best, (start, token.start()))
    return text[slice(*best)] if best[0] >= 0 else None


def _after_hashes(text: str) -> str | None:
    # On the last line only: elsewhere #### begins a heading in Markdown.
    _, hashes, answer = text.rstrip().rpartition("\n")[2].rpartition("####")
    return answer if hashes else None


def _last_number(text: str) -> str | None:
    found = None
    for found in _LAST_NUMBER.finditer(text):  # noqa: B007  the last one is wanted
        pass
    return found[0].strip() if found else None


def _too_long(text: str) -> str:
    return (
        f"{_shown(text)} is {len(text)} characters of text; expected the answer alone, or a mark: #### before it on "
        "the last line, or \\boxed{} or <answer></answer> around it"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
