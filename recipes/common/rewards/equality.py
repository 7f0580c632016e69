"""Compare two answers in our notation: numbers as numbers, structures part by part, the rest by math-verify.

Where both sides are mathematics, mathematics decides; units and wording count where the gold answer has them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from common.rewards import algebra, quantities, structures, wording
from common.rewards.leaves import BASE, RELATION, Budget, ends_in, read, same_base, same_leaves, unit_behind
from common.rewards.structures import Parts

_REGION = re.compile(r"[<>|]|\\(?:le|ge|ne|in|cup|cap|setminus|backslash|mathbb|mid)(?![a-zA-Z])")
_SET_BUILDER = re.compile(r"^\\?\{ ?[a-z](?: ?\\in ?\\mathbb\{R\})? ?(?:\||\\mid|:) ?(.+?) ?\\?\}$")
_NAME = {"y": "f(x)"}


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, taken apart: the names of its values, its parts, and its text without the names."""

    names: tuple[str, ...]
    parts: Parts | None
    value: str


def same(gold: str, answer: str, budget: Budget, whole: bool = True) -> bool:
    """Whether `answer` is `gold`. `whole`: they are no parts of others; then a calculation is no answer to a number."""
    gold, answer = _SET_BUILDER.sub(r"\1", gold), _SET_BUILDER.sub(r"\1", answer)
    if _bare(gold) == _bare(answer):
        return True
    right, other = read(gold), read(answer)
    if right and right.form == "decimal" and not other and re.fullmatch(r"-?\d+,(?:\d{1,2}|\d{4,})", answer):
        other = read(answer.replace(",", "."))
    if right and other:
        return quantities.same(right, other, left_to_work_out=whole)
    letter, text = wording.label(gold)
    if letter and text:
        other, worded = wording.label(answer)
        return (letter == other and (not worded or same(text, worded, budget))) if other else same(text, answer, budget)
    if (clock := structures.clock(gold)) and (time := structures.clock(answer)):
        return clock[:2] == time[:2] and (clock[2] == time[2] or not clock[2] or not time[2])
    if based := BASE.fullmatch(gold):
        return same_base(based, answer)
    if right and (based := BASE.fullmatch(answer)):
        return same_base(based, f"{gold}_{{10}}")
    first, second = take_apart(gold), take_apart(answer)
    if first.names and second.names and not _same_names(first, second):
        return False
    if len(first.names) > 1 or len(second.names) > 1:
        return _same_records(first, second, budget)
    if first.names or (second.names and (first.parts or not RELATION.search(gold))):
        if second.names or second.parts or not RELATION.search(answer):
            return same(first.value, second.value, budget, whole)
        if read(first.value):
            return right is not None and ends_in(gold, answer)  # 2x = 10 is not yet x = 5
    return _same_values(
        Answer((), first.parts if not first.names else None, gold),
        Answer((), second.parts if not second.names else None, answer),
        budget,
        whole,
    )


def _bare(text: str) -> str:
    """`text` without spaces but between digits, and without braces around one sign: x^{2} is x^2."""
    return re.sub(r"([\^_])\{(\w)\}(?!\d)", r"\1\2", re.sub(r"(?<!\d) | (?!\d)", "", text))


def number(text: str) -> quantities.Number | None:
    """The number that an answer is, or that it gives one name: x = 5."""
    return read(text) or (read(answer.value) if (answer := take_apart(text)) and len(answer.names) == 1 else None)


@lru_cache(maxsize=1 << 14)
def take_apart(text: str) -> Answer:
    """The names, parts and value of an answer; words are not taken apart."""
    found = structures.parts(text)
    if found and found.kind == "list":
        if any(
            read(item) is None and wording.is_words(item) and not re.fullmatch(r"\\emptyset|.*=.*", item)
            for item in found.items
        ):
            return Answer((), None, text)
        named = [structures.name_and_value(item) for item in found.items]
        names = [name for name, _ in named]
        values = tuple(value for _, value in named)
        if all(names):
            bare = {re.sub(r"_\w+$", "", name) for name in names}
            if len(bare) == 1:
                return Answer((bare.pop(),), Parts("list", values), ", ".join(values))
            if len(set(names)) == len(names):
                return Answer(tuple(names), Parts("tuple", values), ", ".join(values))
        elif names[0] and not any(RELATION.search(item) for item in found.items[1:]):
            return Answer((names[0],), Parts("list", values), ", ".join(values))
        return Answer((), found, text)
    name, value = structures.name_and_value(text)
    if not name:
        return Answer((), found, text)
    found = structures.parts(value)
    several = structures.split(name[1:-1], ",") if re.fullmatch(r"\([^()]*,.*\)", name) else []
    if found and found.kind == "tuple" and len(several) == len(found.items):
        return Answer(tuple(several), found, value)
    return Answer((name,), found, value)


def parses(text: str, seconds: float = 10.0) -> bool:
    """Whether an answer in `text` can be compared with another: each part is a number, words, or can be parsed."""
    if read(text) or structures.clock(text) or BASE.fullmatch(text):
        return True
    letter, worded = wording.label(text)
    if letter and worded:
        return parses(worded, seconds)
    answer = take_apart(_SET_BUILDER.sub(r"\1", text))
    if answer.parts:
        items = [piece for item in answer.parts.items for piece in item.split(" ; ")]
        return all(item and (item in ("\\infty", "-\\infty", "+\\infty") or parses(item, seconds)) for item in items)
    value = answer.value
    formula = unit_behind(value)[0]
    return bool(read(value)) or wording.is_words(formula) or algebra.equal(formula, formula, seconds)


def _same_names(gold: Answer, answer: Answer) -> bool:
    if len(gold.names) > 1 or len(answer.names) > 1:
        return True  # by _same_records
    mine, other = gold.names[0], answer.names[0]
    return _NAME.get(mine, mine) == _NAME.get(other, other) or structures.is_prose(mine) or structures.is_prose(other)


def _same_records(gold: Answer, answer: Answer, budget: Budget) -> bool:
    """Values with a name each: by name where both have names, else in order."""
    if not (gold.parts and answer.parts) or len(gold.parts.items) != len(answer.parts.items):
        return False
    if len(gold.names) > 1 and len(answer.names) > 1:
        values = dict(zip(answer.names, answer.parts.items, strict=True))
        return gold.names == tuple(name for name in gold.names if name in values) and all(
            same(value, values[name], budget, False) for name, value in zip(gold.names, gold.parts.items, strict=True)
        )
    if gold.parts.kind not in ("tuple", "list") or answer.parts.kind not in ("tuple", "list"):
        return False
    return _in_order(gold.parts, answer.parts, budget)


def _same_values(gold: Answer, answer: Answer, budget: Budget, whole: bool) -> bool:
    first, second = gold.parts, answer.parts
    if first and second:
        if first.kind == "set" != second.kind and len(first.items) == 1:
            return same(first.items[0], answer.value, budget, False)
        if second.kind == "set" != first.kind and len(second.items) == 1:
            return same(gold.value, second.items[0], budget, False)
        if first.kind == second.kind == "list" and _joined(gold.value) != _joined(answer.value):
            return False
        return _same_parts(first, second, budget) or (
            "\\cup" in gold.value + answer.value and budget.equal(gold.value, answer.value)
        )
    if first or second:
        return _part_and_whole(gold, answer, budget)
    letter, text = wording.label(answer.value)
    if letter and text and not wording.label(gold.value)[0] and not wording.is_words(gold.value):
        return same(gold.value, text, budget, whole)
    return same_leaves(gold.value, answer.value, budget, whole)


def _joined(text: str) -> bool:
    """Whether inequalities hold together (and), not one or the other."""
    return bool(re.search(r"[<>]|\\[lg]e(?![a-zA-Z])", text) and re.search(r"\band\b|且|\\(?:land|wedge)", text))


def _same_parts(gold: Parts, answer: Parts, budget: Budget) -> bool:
    kinds = {gold.kind, answer.kind}
    if kinds == {"options"}:
        return sorted(gold.items) == sorted(answer.items)
    if kinds <= {"list", "set"}:
        return _in_any_order(gold, answer, budget)
    if kinds == {"cases"}:
        return _in_any_order(gold, answer, budget, _same_case)
    if kinds == {"ratio"}:
        return len(gold.items) == len(answer.items) and _same_ratio(gold.items, answer.items, budget)
    if kinds == {"matrix"} and gold.shape != answer.shape:
        return False
    if kinds == {"matrix", "tuple"} and 1 not in tuple(gold.shape or answer.shape):
        return False
    if "interval" in kinds:
        (variable, brackets), (other, others) = _ends(gold), _ends(answer)
        if kinds - {"interval", "tuple"} or brackets != others or (variable and other and variable != other):
            return False
    elif not kinds <= {"matrix", "tuple", "list"} or kinds == {"matrix", "list"}:
        return False
    return _in_order(gold, answer, budget)


def _ends(parts: Parts) -> tuple[str, str]:
    """The variable and the brackets of an interval; a tuple of two may be an open one."""
    return ("", "()") if parts.kind == "tuple" else (str(parts.shape)[:-2], str(parts.shape)[-2:])


def _in_order(gold: Parts, answer: Parts, budget: Budget) -> bool:
    return len(gold.items) == len(answer.items) and all(
        same(mine, other, budget, False) for mine, other in zip(gold.items, answer.items, strict=True)
    )


def _in_any_order(gold: Parts, answer: Parts, budget: Budget, compare: Callable[..., bool] | None = None) -> bool:
    compare = compare or same
    if gold.kind == answer.kind == "list" and len(gold.items) != len(answer.items):
        return False
    left = list(answer.items)
    for mine in gold.items:
        found = next((index for index, other in enumerate(left) if compare(mine, other, budget, False)), None)
        if found is None:
            if gold.kind == "set" and any(compare(mine, other, budget, False) for other in answer.items):
                continue  # named twice in a set
            return False
        left.pop(found)
    return not left or (
        "set" in (gold.kind, answer.kind)
        and all(any(compare(mine, other, budget, False) for mine in gold.items) for other in left)
    )


def _same_case(gold: str, answer: str, budget: Budget, whole: bool) -> bool:
    mine, other = gold.split(" ; "), answer.split(" ; ")
    return len(mine) == len(other) and all(same(*cells, budget, whole) for cells in zip(mine, other, strict=True))


def _same_ratio(gold: tuple[str, ...], answer: tuple[str, ...], budget: Budget) -> bool:
    pairs = [(read(mine), read(other)) for mine, other in zip(gold, answer, strict=True)]
    values = [(mine.value, other.value) for mine, other in pairs if mine and other]
    if len(values) == len(pairs):
        first, its = values[0]
        return bool(first and its) and all(mine * its == first * other for mine, other in values)
    return all(same(*items, budget, False) for items in zip(gold, answer, strict=True))


def _part_and_whole(gold: Answer, answer: Answer, budget: Budget) -> bool:
    """A structure on one side only: a ratio for a fraction, a set of one value, a region as an inequality."""
    parts, one = (gold.parts, answer.value) if gold.parts else (answer.parts, gold.value)
    assert parts is not None
    number = read(one)
    if parts.kind == "ratio" and len(parts.items) == 2 and re.search(r"/|\\frac", one) and not number:
        return budget.equal(f"\\frac{{{parts.items[0]}}}{{{parts.items[1]}}}", one)
    if parts.kind == "ratio":
        values = [item.value for item in map(read, parts.items) if item]
        if len(values) != 2 or len(parts.items) != 2 or not number or number.form == "integer" or number.percent:
            return False
        return bool(values[1]) and values[0] / values[1] == number.value
    if parts.kind == "set" and len(parts.items) == 1:
        return same(parts.items[0], one, budget, False) if gold.parts else same(one, parts.items[0], budget)
    if parts.kind == "options" and re.fullmatch("[A-H]+", one):
        return sorted(one) == sorted(parts.items)
    if parts.kind == "options" or number or wording.is_words(one):
        return wording.same(gold.value, answer.value)
    if parts.kind == "matrix" or _REGION.search(one) or _REGION.search(gold.value + answer.value):
        return budget.equal(gold.value, answer.value)
    return False


def is_words(text: str) -> bool:
    """Whether an answer is compared by its wording: it is no number, and neither it nor its parts are mathematics."""
    if read(text) or structures.clock(text) or BASE.fullmatch(text):
        return False
    answer = take_apart(text)
    return not answer.parts and wording.is_words(unit_behind(answer.value)[0])
