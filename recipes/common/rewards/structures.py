"""Take an answer apart: list, set, tuple, interval, matrix, cases, ratio, a name and its value, a time of day.

Each part is text again, to be compared by itself. Nothing here knows numbers or algebra.
"""

import re
from dataclasses import dataclass
from typing import Literal

from common.rewards.notation import HAN

Kind = Literal["list", "set", "tuple", "interval", "matrix", "cases", "ratio", "options"]

_TOKEN = re.compile(r"\\begin\{[a-z]*\*?\}|\\end\{[a-z]*\*?\}|\\(?:langle|rangle|[a-zA-Z]+|.)|[()\[\]{}]|.", re.DOTALL)
_OPEN = {"(", "[", "{", "\\{", "\\langle"}
_CLOSE = {")", "]", "}", "\\}", "\\rangle"}
_AND = re.compile(
    r"\\text\{ ?,? ?(?:and|or|和|或|且) ?\} ?|\\(?:lor|vee|land|wedge)(?![a-zA-Z])|(?<![a-zA-Z\\])(?:and"
    r"|or)(?![a-zA-Z])|或者?|以及|和|与"
)
_MATRIX = re.compile(
    r"[(\[]? ?\\begin\{(?:[pbB]|small)?(?:matrix|array)\} ?(?:\{[lcr| ]*\})?(.*?)\\end\{(?:[pbB]"
    r"|small)?(?:matrix|array)\} ?[)\]]?"
)
_CASES = re.compile(
    r"\\?\{? ?\\begin\{(?:cases|array|aligned)\} ?(?:\{[lcr| ]*\})?(.*?)\\end\{(?:cases|array|aligned)\} ?"
)
_RELATION = r"(<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z]))"
_CLOCK = re.compile(
    r"(?P<before>上午|早上|凌晨|下午|晚上|中午|am |pm )? ?(?P<hour>\d{1,2})(?:(?::|[点时])(?P<minute>\d{2}"
    r"|(?<=[点时])\d)分?(?::\d{2})?"
    r"|(?P<half>[点时]半)|(?P<full>[点时]整?|(?= ?[ap]\.?m)| o'clock))(?: ?(?P<after>[ap])\.?m\.?)?(?: o'clock)?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of an answer. `shape`: a matrix has its rows and columns, an interval its variable and brackets."""

    kind: Kind
    items: tuple[str, ...]
    shape: tuple[int, ...] | str = ()


def split(text: str, separators: str, words: bool = False) -> list[str]:
    """`text` at each separator that is in no brackets; with `words` at "and", "or" and 或, too."""
    pieces, depth, start = [], 0, 0
    tokens = list(_TOKEN.finditer(text))
    skip = 0
    for token in tokens:
        if token.start() < skip:
            continue
        sign = token[0]
        if sign in _OPEN or sign.startswith("\\begin"):
            depth += 1
        elif sign in _CLOSE or sign.startswith("\\end"):
            depth = max(depth - 1, 0)
        elif depth == 0 and sign in separators:
            pieces.append(text[start : token.start()])
            start = token.end()
            continue
        if (
            words
            and depth in (0, 1)
            and (found := _AND.match(text, token.start()))
            and not (depth and sign != "\\text")
        ):
            pieces.append(text[start : found.start()])
            start = skip = found.end()
            depth = 0
    pieces.append(text[start:])
    return [piece.strip() for piece in pieces]


def name_and_value(text: str) -> tuple[str, str]:
    """What `text` calls its value, and the value: x = 5, f(x) = 2x, (p, q) = (3, 2), S = a^2 = 25."""
    sides = split(re.sub(r"\\(?:equiv|coloneqq)(?![a-zA-Z])|:=", "=", text), "=")
    if len(sides) > 2 and len(split(text, ",;")) > 1:
        return "", text
    if len(sides) < 2:
        inside = re.fullmatch(r"([a-zA-Z]|\\[a-z]+) ?\\in(?![a-zA-Z]) ?(.+)", text)
        inside = inside or re.fullmatch(r"([A-Z]) ?(\([^()]*,[^()]*\))", text)  # a point
        return (inside[1], inside[2]) if inside else ("", text)
    outside = re.sub(r"\\begin\{.*\\end\{[a-z]*\}", "", text)
    if not all(sides) or re.search(r"[<>]|\\(?:le|ge|ne)(?![a-zA-Z])", outside):
        return "", text
    if len(sides) == 2 and _is_name(sides[1]) and not _is_name(sides[0]):
        sides.reverse()
    return (_name(sides[0]), sides[-1]) if _is_name(sides[0]) else ("", text)


def is_prose(name: str) -> bool:
    """Whether a name is words, which tell nothing: area, 面积."""
    return re.search(rf"[{HAN}]|[a-z]{{3}}", re.sub(r"\\[a-zA-Z]+", "", name)) is not None


def parts(text: str) -> Parts | None:
    """What `text` consists of, None for one expression or words."""
    if options := _options(text):
        return options
    if found := _MATRIX.fullmatch(text):
        rows = _rows(found[1])
        if len({len(row) for row in rows}) == 1:
            return Parts("matrix", tuple(cell for row in rows for cell in row), (len(rows), len(rows[0])))
    if found := _CASES.fullmatch(text):
        rows = _rows(found[1])
        if all(len(row) == 1 for row in rows):
            return Parts("list", tuple(row[0].rstrip(",;") for row in rows))
        return Parts(
            "cases",
            tuple(
                "".join(_condition(cell) if index else f"{cell.rstrip(', ')} ; " for index, cell in enumerate(row))
                for row in rows
            ),
        )
    if bracketed := _bracketed(text):
        return bracketed
    items = _listed(text)
    if len(items) > 1 and all(items):
        return Parts("list", tuple(items))
    ratio = split(re.sub(r" ?比 ?|(?<=\d) to (?=\d)", ":", text), ":")
    if (
        len(ratio) > 1
        and all(ratio)
        and not re.search(rf"[{HAN}=<>]|[a-z]{{3}}", re.sub(r"\\[a-z]+", "", text).replace("比", ""))
    ):
        return Parts("ratio", tuple(ratio))
    return interval(text)


def interval(text: str) -> Parts | None:
    """The interval that an inequality in one variable describes, its variable first: 2 < x \\le 5, x > 3, x < 1."""
    sides = re.split(_RELATION, text)
    sides = [side.strip() for side in sides]
    if len(sides) == 3:
        left, sign, right = sides
        if _is_variable(right) and not _is_variable(left):
            left, sign, right = right, {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}[sign], left
        if not _is_variable(left) or not right or left in right:
            return None
        if sign in ("<", "\\le"):
            return Parts("interval", ("-\\infty", right), left + "(" + (")" if sign == "<" else "]"))
        return Parts("interval", (right, "\\infty"), left + ("(" if sign == ">" else "[") + ")")
    if len(sides) == 5:
        low, first, variable, second, high = sides
        if first in (">", "\\ge") and second in (">", "\\ge"):
            low, first, second, high = (
                high,
                second.replace(">", "<").replace("ge", "le"),
                first.replace(">", "<").replace("ge", "le"),
                low,
            )
        if first in ("<", "\\le") and second in ("<", "\\le") and _is_variable(variable) and low and high:
            return Parts(
                "interval", (low, high), variable + ("(" if first == "<" else "[") + (")" if second == "<" else "]")
            )
    return None


def clock(text: str) -> tuple[int, int, str] | None:
    """Hour, minute and half of the day ("am", "pm" or "" if not given) of a time of day; None for anything else."""
    found = _CLOCK.fullmatch(text)
    if not found:
        return None
    hour, minute = int(found["hour"]), 30 if found["half"] else int(found["minute"] or 0)
    before = (found["before"] or "").strip().casefold()
    half = (
        f"{found['after'].casefold()}m"
        if found["after"]
        else {"上午": "am", "早上": "am", "凌晨": "am", "下午": "pm", "晚上": "pm", "中午": "pm"}.get(before, before)
    )
    if hour > 24 or minute > 59:
        return None
    if hour > 12:
        hour, half = hour - 12, "pm"
    return hour, minute, half


def plus_minus(text: str) -> list[str]:
    """The two expressions that one sign of plus or minus stands for; `text` alone without one or with several."""
    if len(re.findall(r"\\pm(?![a-zA-Z])", text)) != 1 or "\\mp" in text:
        return [text]
    before, after = re.split(r"\\pm(?![a-zA-Z]) ?", text)
    return [f"{before}+{after}" if before.strip() else after, f"{before}-{after}"]


def _listed(text: str) -> list[str]:
    items = re.split(r" ?\\cup ?", text)
    if len(items) > 1 and all(item[:1] in ("(", "[", "\\") for item in items):
        return items
    weak = split(text, ";")
    items = weak if len(weak) > 1 and len(split(text, ",")) > 1 else split(text, ",;", words=True)
    while items and not items[-1]:
        items.pop()
    items = [item for index, item in enumerate(items) if item or index == 0]  # a comma before "and"
    return [one for item in items for one in plus_minus(item)]


def _bracketed(text: str) -> Parts | None:
    text = re.sub(r" ?\^ ?\{? ?(?:T|\\top|\\text\{T\}) ?\}?$", "", text)
    tokens = [token[0] for token in _TOKEN.finditer(text)]
    if len(tokens) < 3:
        return None
    opening, closing = tokens[0], tokens[-1]
    if (opening, closing) in ((")", "("), ("]", "["), ("]", "]"), ("[", "[")) and text.count(",") + text.count(
        ";"
    ) == 1:
        inner = text[1:-1]  # ]0, 1[, an open interval where a bracket may look away
        items = split(inner, ",;")
        return Parts("interval", tuple(items), ("(" if opening == "]" else "[") + (")" if closing == "[" else "]"))
    if opening not in _OPEN or closing not in _CLOSE or not _wraps(tokens):
        return None
    inside = text[len(opening) : -len(closing)].strip()
    if opening in ("\\{", "{"):
        if re.search(r"\||\\mid|:", inside):
            return None
        items = _listed(inside)
        return Parts("set", tuple(items)) if all(items) and (len(items) > 1 or opening == "\\{") else None
    items = split(inside, ",;")
    if len(items) < 2 or not all(items):
        return None
    if (
        opening == "["
        and closing == "]"
        and len(rows := [_bracketed(item) for item in items])
        and all(row is not None and row.kind in ("tuple", "interval") for row in rows)
    ):
        return Parts(
            "matrix",
            tuple(cell for row in rows if row for cell in row.items),
            (len(rows), len(rows[0].items if rows[0] else ())),
        )
    if len(items) == 2 and (opening, closing) in (("[", "]"), ("[", ")"), ("(", "]")):
        return Parts("interval", tuple(items), opening + closing)
    return (
        Parts("tuple", tuple(items))
        if (opening, closing) in (("(", ")"), ("[", "]"), ("\\langle", "\\rangle"))
        else None
    )


def _wraps(tokens: list[str]) -> bool:
    """Whether the first bracket closes at the end and not before."""
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth == 0:
            return index == len(tokens) - 1
    return False


def _rows(body: str) -> list[list[str]]:
    rows = [
        row for row in re.split(r"\\\\(?: ?\[[^\]]*\])?|\\cr(?![a-zA-Z])", re.sub(r"\\hline", "", body)) if row.strip()
    ]
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def _condition(cell: str) -> str:
    cell = re.sub(r"\\text\{([^{}]*)\}", r"\1", cell)
    return re.sub(r"^ ?,? ?(?:if|when|for|当|若)? ?|[,;.]? ?$", "", cell).strip()


def _options(text: str) -> Parts | None:
    """Several letters or numbers of options: ABD, A, B, D, (1)(3)."""
    if re.fullmatch("[A-H]{2,8}", text) and list(text) == sorted(set(text)):
        return Parts("options", tuple(text))
    if re.fullmatch(r"(?:\((?:[A-H]|\d{1,2})\)[,; ]*){2,}", text):
        return Parts("options", tuple(re.findall(r"\w+", text)))
    letters = _listed(text)
    if len(letters) > 1 and all(re.fullmatch(r"\(?[A-H]\)?", letter) for letter in letters):
        return Parts("options", tuple(letter.strip("()") for letter in letters))
    return None


def _is_variable(text: str) -> bool:
    return re.fullmatch(r"(?:[a-zA-Z]|\\(?!infty|pi)[a-z]+)(?:_\{?\w+\}?)?(?:\(\w\))?|\|[a-zA-Z]\|", text) is not None


def _is_name(text: str) -> bool:
    if len(text) > 60 or re.fullmatch(r"[\d.,/ ]+", text):
        return False
    if re.fullmatch(r"\(.*\)", text):
        return all(_is_name(part) for part in split(text[1:-1], ",;"))
    text = re.sub(r"\\frac\{ ?[A-Z]{1,2} ?\} ?\{ ?[A-Z]{1,2} ?\}", "G", text)
    bare = re.sub(
        r"_ ?(?:\{[^{}]*\}|\w)|\^ ?\{? ?-1 ?\}?|\([^()]*\)|\\(?:text|overline|vec|hat|bar|angle|triangle|left|right) ?",
        "",
        text,
    )
    bare = re.sub(r"\\[a-zA-Z]+ ?", "G", bare).strip("{} ")
    return not re.search(r"[+*/^<>!-]|\d", bare) and (
        re.fullmatch(r"[a-zA-Z]'*|[A-Z]{2,3}|G+[A-Z]*|[a-zA-Z]?:[a-zA-Z]?|\|\w+\|", bare) is not None or is_prose(text)
    )


def _name(text: str) -> str:
    return re.sub(r"\\text\{([^{}]*)\}|[{} ]|\\(?:left|right)", r"\1", text)
