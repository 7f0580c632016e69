"""Find the final answer in a completion, and compare it with the gold answer.

Numbers are compared as numbers, mathematics by math-verify, everything else as text. The rules:

- 1,080 = 1 080 = 1080.00 = $1,080 = 1080 dollars; 3/4 = 0.75; 1 1/2 = 1.5; x = 5 is 5. A decimal may stand for a
  fraction when it is right to six digits (0.333333 for 1/3).
- 50% = 0.5 and also = 50, because questions that ask for a percentage are answered both ways.
- A unit may be left out, but km is not m. Units are not converted.
- Where the gold answer is a number, a calculation is not an answer: neither 23 + 64 for 87 nor 48/2 for 24. Otherwise
  a model would learn to repeat the question.
- Text is the same but for case, spaces, surrounding punctuation and LaTeX's \\text: "(B)." = "b".
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from common.rewards import algebra

LONGEST_TEXT = 100  # characters of a gold answer in words; longer is an explanation, which no answer equals
LONGEST_NUMBER = 100

# A number as people write it: sign, currency, thousands separators, decimals or a fraction, a power of ten, per cent.
_SEPARATOR = r"(?:,\\!|,|\{,\}|\\[,!;]| |_|')"
_PLAIN = rf"(?:(?:\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_POWER = r"(?:[eE](?P<e>[+-]?\d{1,2})| ?(?:\*|×|\\times|\\cdot) ?10 ?\^ ?(?:\{(?P<ten>[+-]?\d{1,2})\}|(?P<ten_>\d)))"
_CURRENCY = r"(?:\\?\$|[€£¥₹]|US\$|USD ?|RMB ?)"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?) ?(?P<currency>{_CURRENCY}?)(?P<sign_>[+-]?)"
    rf"(?:(?:(?P<whole>\d+) )?(?P<top>\d+) ?/ ?(?P<bottom>\d+)|(?P<plain>{_PLAIN}){_POWER}?)"
    r"(?: ?(?P<percent>\\?%|percent\b))?(?P<unit>.*)"
)
_LAST_NUMBER = re.compile(
    rf"(?:(?<![\w.)\]}}])[+-])?(?:\\[dt]?frac\{{\d+\}}\{{\d+\}}|{_CURRENCY}?(?:\d+ ?/ ?\d+|{_PLAIN})(?:\\?%)?)"
)
_UNITS = {
    word: words.split()[0]
    for words in (
        "mm millimeter millimeters millimetre millimetres", "cm centimeter centimeters centimetre centimetres",
        "m meter meters metre metres", "km kilometer kilometers kilometre kilometres",
        "inch inches", "ft foot feet", "yard yards", "mile miles",
        "mg milligram milligrams", "g gram grams", "kg kilogram kilograms", "lb lbs", "oz ounce ounces",
        "s second seconds sec", "min minute minutes", "h hour hours hr hrs", "day days", "week weeks",
        "month months", "year years", "dollar dollars $ us$ usd", "cent cents", "euro euros €",
    )
    for word in words.split()
}  # fmt: skip
# Words after a number that make another number of it.
_NO_UNIT = re.compile(
    r"\b(?:and|or|to|by|of|not|plus|minus|times|over|squared?d|cubed|half|dozen|hundred|thousand|million|billion|pi"
    r"|sin|cos|tan|log|ln|exp|sqrt)\b"
)
_FUNCTIONS = r"(?:sin|cos|tan|cot|sec|csc|log|exp|sqrt|inf|min|max|gcd|lcm|det|mod|and)"
# Left to work out: an operator after an operand, or a LaTeX command that is not just a way to write a number.
_TO_WORK_OUT = re.compile(r"[\w)}\]%] ?[-+*/^!×÷·]|\\(?!(?:[dt]?frac|text|left|right|circ)\b)[a-z]+")
_STYLE = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\{([^{}]*)\}")
_BRACES = re.compile(r"\\(?:boxed|fbox) ?\{|\\.|[{}]", re.DOTALL)
_TO_ASCII = {full: full - 0xFEE0 for full in range(0xFF01, 0xFF5F)} | str.maketrans(
    {"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "²": "^2", "³": "^3", "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "。": "."}
)


@dataclass(frozen=True, slots=True)
class Number:
    """A number, whether it was followed by a per cent sign, how it was written, and its unit if it is one we know."""

    value: Fraction
    percent: bool
    form: Literal["integer", "decimal", "fraction"]
    unit: str


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

    Raises ValueError when no answer could be compared with it: it is empty or punctuation, mathematics that math-verify
    cannot parse, or words without a mark that are longer than 100 characters or a line.
    """
    marked = _marked(text)
    answer = (text if marked is None else marked).strip()
    several_lines = "\n" in answer and "\\begin" not in answer
    answer = _clean(answer)
    if not re.search(r"\w|∞|∅", answer):
        raise ValueError(f"{_shown(text)} holds nothing to compare an answer with")
    if (number := _number(answer)) is not None:
        return Gold(answer, number, words=False)
    if _is_words(answer):
        if several_lines or len(answer) > LONGEST_TEXT:
            raise ValueError(
                f"{_shown(text)} is {len(text)} characters of text; expected the answer alone, or a mark: #### before "
                "it on the last line, or \\boxed{} or <answer></answer> around it"
            )
        return Gold(answer, None, words=True)
    formula = _without_unit(answer)
    if not algebra.equal(formula, formula, 10.0):
        raise ValueError(f"{_shown(text)} looks like mathematics and cannot be parsed; correct its LaTeX")
    return Gold(answer, None, words=False)


def same(gold: Gold, answer: str | None, seconds: float = 2.0) -> bool:
    """Whether `answer`, as final_answer found it, is the gold answer, by the rules at the top of this module.

    An answer that takes the processor longer than `seconds` to compare is wrong. Safe on any thread.
    """
    if answer is None or len(answer) > algebra.LONGEST:
        return False
    answer = _clean(answer)
    if gold.number:
        number = _number(answer) or _number(answer.rpartition("=")[2].strip())
        if number:
            return _same_number(gold.number, number)
        if _TO_WORK_OUT.search(answer):
            return False
    if _plain(answer) == _plain(gold.text):
        return True
    if gold.words or _is_words(answer):
        return False
    if "=" in gold.text and "=" not in answer and not re.match(r"\w+ ?=", gold.text):
        return False  # math-verify takes 5 for x + y = 5
    return algebra.equal(_without_unit(gold.text), _without_unit(answer), seconds)


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


def _clean(text: str) -> str:
    """`text` on one line, its signs in ASCII, without the marks of emphasis and mathematics around it."""
    text = " ".join(text.translate(_TO_ASCII).split()).strip("*` ").rstrip(". ")
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$")):
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inside and opening not in inside:
            return inside.strip()
    return text


def _number(text: str) -> Number | None:
    if len(text) > LONGEST_NUMBER:
        return None
    text = _STYLE.sub(r" \1", text).replace("~", " ")
    text = re.sub(r"\\[dt]?frac ?(?:\{(\d+)\} ?\{(\d+)\}|(\d)(\d))", r" \1\3/\2\4", text)
    text = re.sub(r"^[a-zA-Z] ?= ?", "", " ".join(text.split()))
    found = _NUMBER.fullmatch(text)
    if not found or int(found["bottom"] or 1) == 0 or not _is_unit(found["unit"]):
        return None
    if found["top"]:
        form, value = "fraction", Fraction(int(found["top"]), int(found["bottom"])) + int(found["whole"] or 0)
    else:
        form = "decimal" if "." in found["plain"] else "integer"
        value = Fraction(re.sub(r"[^\d.]", "", found["plain"]))
        value *= Fraction(10) ** int(found["e"] or found["ten"] or found["ten_"] or 0)
    if "-" in found["sign"] + found["sign_"]:
        value = -value
    unit = re.sub(r"^(?:square|cubic|sq) |\^?\{?[23]\}?$", "", found["unit"].strip().casefold())
    unit = _UNITS.get(unit or found["currency"].strip(" \\").casefold(), "")
    return Number(value, bool(found["percent"]), form, unit)


def _is_unit(text: str) -> bool:
    """What may follow a number: degrees, a unit we know, or after a space words that say what is counted."""
    if not text or text in ("€", "£", "°", "^\\circ", "^{\\circ}", "^ \\circ", "°C", "°F"):
        return True
    if re.sub(r"\^?\{?[23]\}?$", "", text.strip()).casefold() in _UNITS:
        return True
    words = re.fullmatch(r" (?:[^\W\d_]{2}[^\d=<>+*/\\^_]{0,40}|[a-z](?=/))(?:/[a-z]+)?(?:\^\{?[23]\}?)?", text)
    return words is not None and not _NO_UNIT.search(text.casefold())


def _without_unit(formula: str) -> str:
    return re.sub(r"(?<=.)\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?[23]\}?)?$", "", formula).strip()


def _same_number(gold: Number, answer: Number) -> bool:
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if gold.form == "integer" and answer.form == "fraction" and not gold.percent:
        return False  # left to work out
    value = answer.value
    rounded = {gold.form, answer.form} == {"decimal", "fraction"}
    scale = Fraction(100 if gold.percent else 1, 100 if answer.percent else 1)
    return any(
        candidate == gold.value or (rounded and abs(candidate - gold.value) <= abs(gold.value) / 10**6)
        for candidate in {value, value * scale}
    )


def _is_words(text: str) -> bool:
    """Words and not mathematics: math-verify would take them for products of letters, and "stop" for "pots"."""
    outside = re.sub(r"\\[a-zA-Z]+", " ", _STYLE.sub(" ", text))
    outside = re.sub(rf"(?<![a-zA-Z]){_FUNCTIONS}(?![a-zA-Z])", " ", outside)
    if re.search(r"[^\W\d_]{3}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", outside):
        return True
    return re.search(r"[\d\\^+*/=<>_]", _STYLE.sub(r"\1", text)) is None


def _plain(text: str) -> str:
    """`text` as it is compared with other text."""
    text = unicodedata.normalize("NFC", _STYLE.sub(r"\1", text)).casefold()
    text = re.sub(r" *([^\w\s]) *", r"\1", text).strip(" .,;:!?\"'")
    return text[1:-1] if re.fullmatch(r"\(\w\)", text) else text


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
