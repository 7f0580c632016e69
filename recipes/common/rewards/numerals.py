"""Read numerals in Chinese and English words: 三十五, 3万5千, 1.2亿, 三分之二; twenty-five, two thirds."""

import re
from fractions import Fraction

DIGITS = "零〇一二两三四五六七八九"
_VALUES: dict[str, int] = dict(
    zip(
        "零〇一二两三四五六七八九壹贰叁肆伍陆柒捌玖貳參陸",
        (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 6),
        strict=True,
    )
)
_SMALL = {"十": 10, "百": 100, "千": 1000, "拾": 10, "佰": 100, "仟": 1000}
_LARGE = {"万": 10**4, "亿": 10**8, "萬": 10**4, "億": 10**8, "兆": 10**12}
NUMERAL = f"[{''.join(_VALUES)}{''.join(_SMALL)}{''.join(_LARGE)}]"

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: value for value, word in enumerate(f"{_ONES} eighteen nineteen".split())}
_WORDS |= {word: 20 + 10 * index for index, word in enumerate(_TENS.split())}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALE = "hundred|thousand|million|billion|trillion|dozen"
SCALES = _SCALES | {"hundred": 100, "dozen": 12}
_PARTS = {"half": 2, "third": 3, "quarter": 4} | {
    f"{word}th": value for word, value in (("four", 4), ("fif", 5), ("six", 6), ("seven", 7), ("eigh", 8),
    ("nin", 9), ("ten", 10), ("twelf", 12), ("hundred", 100))
}  # fmt: skip
_ENGLISH = re.compile(
    rf"(?:{'|'.join((*_WORDS, *SCALES, 'a', 'and'))})(?:[ -]+(?:{'|'.join((*_WORDS, *SCALES, 'and'))}))*"
)
_ENGLISH_PART = re.compile(rf"(?:(.*)[ -])?({'|'.join(_PARTS)}|halve)s?")


def chinese(text: str) -> Fraction | None:
    """The value of a Chinese numeral, its digits in characters or in ASCII, with 十百千万亿 and 点; else None."""
    whole, point, decimals = text.partition("点")
    if point:
        if not decimals or any(sign not in _VALUES for sign in decimals):
            return None
        value = chinese(whole)
        digits = "".join(str(_VALUES[sign]) for sign in decimals)
        return None if value is None else value + Fraction(int(digits), 10 ** len(digits))
    if re.fullmatch(f"[{''.join(_VALUES)}]+", text):
        if len(text) > 1 and not re.match("[零〇二三四五六七八九一]{2,}$", text):
            return None
        return Fraction(int("".join(str(_VALUES[sign]) for sign in text)))
    return _places(text)


def _places(text: str) -> Fraction | None:
    """The value of digits with their places, 三百零五 or 3万5千, in the order that Chinese writes them."""
    for sign, scale in sorted(_LARGE.items(), key=lambda item: -item[1]):
        if sign in text:
            before, _, after = text.rpartition(sign)
            high = chinese(before) if not _arabic(before) else _arabic(before)
            if high is None or not high:
                return None
            if not after:
                return high * scale
            low = _arabic(after) if _arabic(after) is not None else chinese(after.lstrip("零〇"))
            if low is None or low >= scale:
                return None
            # 一万五 is 15000: a digit behind a large place counts tenths of it
            return high * scale + (low * scale / 10 if len(after) == 1 and after in _VALUES and _VALUES[after] else low)
    value, place = Fraction(0), 10**4
    for part in re.finditer(
        rf"([{''.join(_VALUES)}]|\d+(?:\.\d+)?)?([{''.join(_SMALL)}])|[零〇]?([{''.join(_VALUES)}]|\d)$|[零〇]|(.)",
        text,
    ):
        digit, small, last, other = part.groups()
        if other:
            return None
        if small:
            if _SMALL[small] >= place or (not digit and (_SMALL[small] != 10)):
                return None
            place = _SMALL[small]
            value += (_arabic(digit) or Fraction(_VALUES.get(digit or "一", 1))) * place
        elif last:
            unit = Fraction(_VALUES[last] if last in _VALUES else int(last))
            # 三百五 is 350
            tenths = part[0] == last and place in (100, 1000)
            value += unit * place / 10 if tenths else unit
    return value if place < 10**4 else None


def _arabic(text: str | None) -> Fraction | None:
    return Fraction(text.replace(",", "")) if text and re.fullmatch(r"\d+(?:,\d{3})*(?:\.\d+)?", text) else None


def english(text: str) -> Fraction | None:
    """The value of an English numeral in words: twenty-five, one hundred and five, two thirds, half; else None."""
    text = text.strip().casefold()
    part = _ENGLISH_PART.fullmatch(text)
    if part and (part[1] is not None or part[2] == "half"):
        count = Fraction(1) if part[1] in (None, "a", "one") else english(part[1])
        return None if count is None else count / _PARTS.get(part[2], 2)
    if not _ENGLISH.fullmatch(text):
        return None
    total, current, last = 0, None, None
    words = [word for word in re.split(r"[ -]+", text) if word != "and"]
    if text.endswith("and") or words in ([], ["a"]) or (words[0] == "and"):
        return None
    for word in words:
        if word == "a":
            current = 1
        elif word in ("hundred", "dozen"):
            if last in SCALES or (current or 1) > 99:
                return None
            current = (current or 1) * SCALES[word]
        elif word in _SCALES:
            total, current = total + (current or 1) * _SCALES[word], None
        else:
            value = _WORDS[word]
            if last in _WORDS and not (value < 10 and _WORDS[last] >= 20):
                return None  # two numbers: one two
            current = (current or 0) + value
        last = word
    return Fraction(total + (current or 0))
