"""Compare two answers that have no parts: a number, a formula with its unit, digits in a base, or words."""

import re
from dataclasses import dataclass
from functools import lru_cache

from common.rewards import algebra, quantities, structures, units, wording
from common.rewards.notation import HAN

# Left to work out: an operator after an operand, or a LaTeX command that is not just a way to write a number.
_TO_WORK_OUT = re.compile(r"[\w)}\]%] ?[-+*/^!]|\\(?!(?:frac|text|circ)\b)[a-z]+|\) ?\(")
RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|in|notin|subset|approx)(?![a-zA-Z])")
BASE = re.compile(
    r"\(?([0-9A-Fa-f]*\d[0-9A-Fa-f]*(?:\.[0-9A-Fa-f]+)?)\)? ?(?:_ ?\{? ?(?:\\text\{ ?)?(\w+) ?\}{0,2}"
    r"|\(?(?:\\text\{)? ?\(?base (\w+)\)?\}?\)?)"
)
_BASES = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "twelve": "12",
    "sixteen": "16",
}
_UNIT_BEHIND = re.compile(
    rf"(?P<formula>.*?[\w)}}\]|!'])(?: ?(?P<styled>\(?\\text\{{[^{{}}]*\}}\)?(?: ?\^ ?\{{?-?\d\}}?)?)"
    rf"| (?P<plain>(?<!\\sin )(?<!\\cos )(?<!\\tan )(?<!\\log )(?<!\\ln )[a-zA-Z]{{2,}}(?:[ /^][a-zA-Z\d]+)*)"
    rf"| ?(?P<han>\(?[{HAN}][{HAN}/]*\)?)| ?(?P<degree>\^\\circ ?[CF]?))"
)


@dataclass(slots=True)
class Budget:
    """The seconds of the processor that the algebra of one verdict may take; then every comparison is False."""

    seconds: float
    spent: float = 0.0

    def equal(self, gold: str, answer: str) -> bool:
        if self.spent >= self.seconds:
            return False
        same, spent = algebra.compare(gold, answer, self.seconds)
        self.spent += spent
        return same


@lru_cache(maxsize=1 << 14)
def read(text: str) -> quantities.Number | None:
    return quantities.read(text)


def same_leaves(gold: str, answer: str, budget: Budget, whole: bool) -> bool:
    mine, unit = unit_behind(gold)
    other, other_unit = unit_behind(answer)
    if wording.is_words(mine) or wording.is_words(other):
        return wording.same(gold, answer)
    if read(gold) is not None and whole:
        if ends_in(gold, answer):
            return True
        if _TO_WORK_OUT.search(other):
            return False
    if units.conflict(unit, other_unit) or mine.count("'") != other.count("'"):
        return False
    if RELATION.search(mine) and not RELATION.search(other):
        return False  # math-verify takes 5 for x + y = 5
    if not RELATION.search(mine) and RELATION.search(other) and not _ends_with_value(other):
        return False
    return budget.equal(_for_algebra(mine), _for_algebra(other))


def ends_in(gold: str, answer: str) -> bool:
    """Whether a calculation ends in the number: 23 + 64 = 87."""
    *before, last = structures.split(answer, "=")
    right, found = read(gold), read(last)
    return bool(before and right and found and quantities.same(right, found))


def _ends_with_value(text: str) -> bool:
    return not re.search(r"[<>]|\\(?:le|ge|ne|in|notin|subset|approx)(?![a-zA-Z])", text)


def _for_algebra(text: str) -> str:
    """`text` as math-verify reads it."""
    text = re.sub(r"(?<=[\d)}])i(?![a-zA-Z])", " i", text)  # math-verify sees the imaginary unit as a word
    return re.sub(r"\*\*", "^", re.sub(r"\^ ?\\circ", "^{\\\\circ}", text)).strip()


@lru_cache(maxsize=1 << 14)
def unit_behind(text: str) -> tuple[str, str]:
    """A formula and the unit behind it, both as they are where there is none."""
    found = _UNIT_BEHIND.fullmatch(text)
    if not found:
        return text, ""
    behind = found["styled"] or found["plain"] or found["han"] or found["degree"]
    unit = units.unit_of(re.sub(r"\\text\{([^{}]*)\}", lambda f: units.spelled(f[1]), behind))
    if found["plain"] and not unit and len(found["plain"]) < 3:
        return text, ""
    return (
        (text, "")
        if unit is None or (not re.search(r"\d|\\", found["formula"]) and not found["styled"])
        else (found["formula"].strip(), unit)
    )


def same_base(gold: re.Match[str], answer: str) -> bool:
    """Digits in a base: the same digits, in the same base where the answer names one."""
    other = BASE.fullmatch(answer)
    digits, base = gold[1], gold[2] or gold[3]
    if not other:
        return re.sub(r"[ ,]", "", answer) == digits
    return digits.casefold() == other[1].casefold() and _BASES.get(base, base) == _BASES.get(
        other[2] or other[3], other[2] or other[3]
    )
