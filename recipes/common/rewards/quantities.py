"""Read a number as people write it, with its sign, its per cent and its unit, and compare two of them.

1,080 = 1 080 = 1.080,00 (two separators) = $1,080 = 1080 dollars; 3/4 = 0.75 = 四分之三; 1 1/2 = 1.5; 120万 =
1.2 million = 1.2\\times 10^{6}. A calculation (48/2 for 24) is read as a fraction, 23 + 64 not at all.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from common.rewards import numerals, units
from common.rewards.notation import HAN

LONGEST = 100  # characters

_SEPARATOR = r"(?:,|\\[,!;]| |_|')"
_GROUPED = rf"\d{{1,3}}(?:{_SEPARATOR}\d{{3}})+(?!\d)|\d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?!\d)"
_EUROPEAN = r"\d{1,3}(?:\.\d{3})+,\d+(?!\d)|\d{1,3}(?:\.\d{3}){2,}(?!\d)"
PLAIN = rf"(?:{_EUROPEAN}|(?:{_GROUPED}|\d+)(?:\.\d+)?|\.\d+)"
_REPEATING = r"(?P<start>\d*\.\d*)\\(?:overline|bar|dot) ?\{?(?P<again>\d+)\}?"
_TEN = r"10 ?(?:\^|\*\*) ?(?:\{ ?(?P<NAME>[+-]? ?\d{1,3}) ?\}|\(?(?P<NAME_>-?\d{1,3})\)?)"
_POWER = rf"(?: ?[eE](?P<e>[+-]?\d{{1,3}})(?!\d)| ?(?:\*|x|\\times|\\cdot) ?{_TEN.replace('NAME', 'by')})"
_HAN_DIGIT = rf"(?!千[克米瓦卡]){numerals.NUMERAL}"  # a kilogram is no thousand
_HAN_NUMBER = (
    rf"(?:(?:\d+(?:,\d{{3}})*(?:\.\d+)?|(?=[{HAN}])){_HAN_DIGIT}(?:{_HAN_DIGIT}|\d|[点\.](?=[\d{numerals.DIGITS}]))*)"
)
_HAN = rf"(?P<han>(?:(?:{_HAN_NUMBER}|\d+)又)?(?:{_HAN_NUMBER}|\d+)分之(?:{_HAN_NUMBER}|{PLAIN})|{_HAN_NUMBER})"
_SCALE = rf"(?P<scale>(?: (?:{numerals.SCALE})s?)+(?![a-z]))"
_NUMBER = re.compile(
    rf"(?P<sign>(?:[+-]|负|minus |negative )?) ?(?P<currency>{units.CURRENCY}?) ?(?P<sign_>[+-]?)"
    rf"(?:{_HAN}|(?:(?P<whole>\d+)(?: and | ?又 ?| ))?(?P<top>-?{PLAIN}) ?/ ?(?P<bottom>-?{PLAIN})|{_REPEATING}"
    rf"|{_TEN.replace('NAME', 'ten')}"
    rf"|(?P<plain>{PLAIN})(?:{_POWER}|{_SCALE})?(?P<half> and a half| 1/2)?)"
    r"(?: ?(?P<percent>%|percent(?:age)?(?![a-z])|per cent(?![a-z])|pct(?![a-z])|个百分点"
    r"|成(?![本年立])))?(?P<gap> ?)(?P<unit>.*)",
    re.IGNORECASE,
)
_FRACTION = re.compile(
    rf"\\frac ?(?:\{{ ?(-?(?:{PLAIN})) ?\}} ?\{{ ?(-?(?:{PLAIN})) ?\}}|(\d)(\d)(?!\d)|(\d)\{{(\d+)\}}"
    rf"|\{{(\d+)\}}(\d)(?!\d))"
)

Form = Literal["integer", "decimal", "fraction"]


@dataclass(frozen=True, slots=True)
class Number:
    """A number, whether a per cent sign followed it, how it was written, and its unit if it is one that measures."""

    value: Fraction
    percent: bool
    form: Form
    unit: str


def read(text: str) -> Number | None:
    """The number that all of `text`, in our notation, is; None for anything else."""
    if len(text) > LONGEST:
        return None
    text = _FRACTION.sub(lambda f: f" {f[1] or f[3] or f[5] or f[7]}/{f[2] or f[4] or f[6] or f[8]} ", text)
    text = re.sub(r"\(\\text\{([^{}]*)\}\)|\\text\{([^{}]*)\}", lambda f: " " + units.spelled(f[1] or f[2] or ""), text)
    text = re.sub(r"^百分之(.+)$", r"\1%", text)
    text = re.sub(r"(?<=\d) (?=[万亿])", "", re.sub("^(?:一半|半个?)", "1/2", text))
    text = re.sub(r"^(-?)第(?=.+[个名次位天年组号题项页层排行列步班周]$)", r"\1", " ".join(text.split()))
    while len(text) > 2 and text[0] + text[-1] in ("()", "{}") and not re.search(r"[(){}]", text[1:-1]):
        text = text[1:-1].strip()
    if (half := re.fullmatch("([^个]+)个半(.*)", text)) and (before := read(half[1] + half[2])):
        return replace(before, value=before.value + Fraction(1, 2), form="fraction")
    found = _NUMBER.fullmatch(text)
    if not found:
        return _in_words(text)
    value, form = _value(found)
    unit = units.unit_of(found["unit"], spaced=bool(found["gap"] or found["percent"]))
    if value is None or unit is None or (found["han"] and not units.may_follow_a_numeral(found["unit"], unit)):
        return None
    if found["percent"] == "成":
        value *= 10
    if found["half"]:
        value, form = value + Fraction(1, 2), "fraction"
    if (found["sign"].casefold() not in ("", "+")) != (found["sign_"] == "-"):
        value = -value
    if not unit and found["currency"]:
        unit = units.unit_of(found["currency"].strip().casefold()) or ""
    return Number(value, bool(found["percent"]), form, unit)


def same(gold: Number, answer: Number, left_to_work_out: bool = True) -> bool:
    """Whether two numbers are the same answer: 50% is 0.5 and also 50, 1/3 is 0.333333 but not 0.33.

    With `left_to_work_out` a fraction is no answer to a whole number: 48/2 for 24.
    """
    if units.conflict(
        "%" if gold.percent and answer.unit else gold.unit, "%" if answer.percent and gold.unit else answer.unit
    ):
        return False
    if left_to_work_out and gold.form == "integer" and answer.form == "fraction" and not gold.percent:
        return False
    rounded = {gold.form, answer.form} == {"decimal", "fraction"}
    scale = Fraction(100 if gold.percent else 1, 100 if answer.percent else 1)
    return any(
        candidate == gold.value or (rounded and abs(candidate - gold.value) <= abs(gold.value) / 10**6)
        for candidate in {answer.value, answer.value * scale}
    )


def _value(found: re.Match[str]) -> tuple[Fraction | None, Form]:
    if found["han"]:
        return _han(found["han"])
    if found["top"]:
        bottom = _plain(found["bottom"])
        whole = Fraction(found["whole"] or 0)
        return (_plain(found["top"]) / bottom + whole if bottom else None), "fraction"
    if found["again"]:
        start = found["start"]
        digits = start.partition(".")[2]
        shift = 10 ** len(digits)
        return Fraction(start + "0") + Fraction(
            int(found["again"]), (10 ** len(found["again"]) - 1) * shift
        ), "fraction"
    if power := found["ten"] or found["ten_"]:
        value = Fraction(10) ** int(power.replace(" ", ""))
        return value, "integer" if value.denominator == 1 else "decimal"
    value = _plain(found["plain"])
    value *= Fraction(10) ** int((found["e"] or found["by"] or found["by_"] or "0").replace(" ", ""))
    for word in (found["scale"] or "").casefold().split():
        value *= numerals.SCALES[word.removesuffix("s")]
    return value, "integer" if value.denominator == 1 else "decimal"


def _plain(text: str) -> Fraction:
    if re.fullmatch(_EUROPEAN, text):
        text = text.replace(".", "").replace(",", ".")
    return Fraction(re.sub(r"[^\d.-]", "", text))


def _han(text: str) -> tuple[Fraction | None, Form]:
    whole, mixed, part = text.rpartition("又")
    bottom, is_fraction, top = part.partition("分之")
    if not is_fraction:
        value = numerals.chinese(text)
        return value, "integer" if value is not None and value.denominator == 1 else "decimal"
    before = _numeral(whole) if mixed else Fraction(0)
    above, below = _numeral(top), _numeral(bottom)
    return (above / below + before if above is not None and before is not None and below else None), "fraction"


def _numeral(text: str) -> Fraction | None:
    return _plain(text) if re.fullmatch(PLAIN, text) else numerals.chinese(text)


def _in_words(text: str) -> Number | None:
    """A number in English words, twenty-five or two thirds, with a unit of one or two words."""
    text = re.sub(r"^a ", "", text.casefold())
    words = text.split(" ")
    for end in range(len(words), max(len(words) - 3, 0), -1):
        counted = " ".join(words[:end])
        sign = re.match("minus |negative ", counted)
        percent = re.search(" per ?cent$", counted)
        value = numerals.english(counted[sign.end() if sign else 0 : percent.start() if percent else None])
        unit = units.unit_of(" ".join(words[end:]))
        if value is not None and unit is not None:
            form: Form = "integer" if value.denominator == 1 else "fraction"
            return Number(-value if sign else value, bool(percent), form, unit)
    return None
