"""Properties of one text: its language, its tags, whether it refuses, whether it repeats another."""

import re
from collections.abc import Callable

from check_data.refusals import refuses as refuses

# Tags by which training data gives a completion parts. Others (HTML, code) may stay open for good reasons.
TAG_NAMES = "think|thinking|thought|reasoning|answer|solution|scratchpad|reflection|tool_call|tool_response"
MARK = re.compile(rf"</?(?:{TAG_NAMES})>|\\boxed\{{|^####", re.MULTILINE)
EMPTY_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>\s*</\1>")
HAN, KANA_OR_HANGUL = re.compile(r"[\u3400-\u9fff]"), re.compile(r"[\u3040-\u30ff\uac00-\ud7af]")
_SINGLE = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts that put no spaces between words
TOKEN = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}]+|[^\w\s]")  # a word, a character of those scripts, or a sign
# The commonest words of English, and of the other large languages in Latin letters that are not English words.
ENGLISH = frozenset(
    re.findall(r"\w+", "the of and to in is that for it with as was on are be this by what how you which from or not")
)
NOT_ENGLISH = frozenset(
    re.findall(
        r"\w+",
        "der das und ist nicht ein eine zu mit le les des et est une pour que dans el los las por con il che di non per"
        " um uma não het een van en och att som är jest nie się na w bir ve",
    )
)
LONG_ENOUGH_TO_REPEAT = 20  # characters; a completion may well repeat "Say hello"


def language(text: str) -> str:
    """English, Chinese or other, from the script and the commonest words: right for most rows, not for each."""
    words = text.lower().split()
    if not text.isascii():
        if KANA_OR_HANGUL.search(text):
            return "other"
        if han := len(HAN.findall(text)):
            return "Chinese" if han >= sum(word.isascii() for word in words) else "English"
        if sum(not word.isascii() for word in words) * 5 > len(words):
            return "other"
    if not any(map(str.isalpha, words)):
        return "other"
    return "English" if len(ENGLISH.intersection(words)) >= len(NOT_ENGLISH.intersection(words)) else "other"


def marks(text: str) -> list[str]:
    """The marks that give a text parts, in order: tags, \\boxed{ and #### at the beginning of a line."""
    if "<" in text or "\\boxed{" in text:
        return MARK.findall(text)
    return ["####"] * (text.count("\n####") + text.startswith("####")) if "####" in text else []


def layout(found: list[str]) -> str:
    """How a text is laid out: its marks, each once, in order."""
    return " ".join(dict.fromkeys(found)) or "plain text"


def unbalanced(found: list[str]) -> str | None:
    """The first tag that is closed without being open, or else one that stays open."""
    still_open: list[str] = []
    for mark in found:
        if mark.startswith("</"):
            if not still_open or still_open.pop() != mark[2:-1]:
                return mark
        elif mark.startswith("<"):
            still_open.append(mark[1:-1])
    return f"<{still_open[-1]}>" if still_open else None


def repeats(prompt: str, completion: str) -> bool:
    """Is the completion the prompt, or does it begin with the whole of it?"""
    prompt, completion = prompt.strip(), completion.strip()
    return completion == prompt or (len(prompt) >= LONG_ENOUGH_TO_REPEAT and completion.startswith(prompt))


def normalized(text: str) -> str:
    """A text without differences of spaces and case, for comparing prompts."""
    return " ".join(text.split()).casefold()


def difference(one: str, other: str) -> float:
    """The share of the longer text that lies between what both begin and what both end with."""
    longest, shortest = max(len(one), len(other)), min(len(one), len(other))
    before = _alike(shortest, lambda count: one[:count] == other[:count])
    after = _alike(shortest - before, lambda count: one[len(one) - count :] == other[len(other) - count :])
    return (longest - before - after) / longest if longest else 0.0


def _alike(most: int, same: Callable[[int], bool]) -> int:
    """The largest count up to `most` for which `same` holds; it holds for every smaller one."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if same(middle) else (low, middle - 1)
    return low
