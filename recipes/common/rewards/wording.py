"""Compare answers in words: by wording, but for case, spaces, punctuation and style; options by their letter."""

import re
import unicodedata

from common.rewards.notation import HAN, STYLE

_FUNCTIONS = (
    r"(?:a?(?:rc)?(?:sin|cos|tan)h?|cot|sec|csc|log|exp|sqrt|lim|sup|inf|min|max|gcd|lcm|det|mod|and|or|if|otherwise"
    r"|bmod|pmod|binom)"
)
_SAME = (
    ("yes", "是", "是的"), ("no", "否", "不是"), ("true", "真", "正确", "对", "对的"),
    ("false", "假", "错误", "错", "错的", "不正确", "不对"),
    ("no solution", "no solutions", "no real solution", "no real solutions", "无解", "方程无解", "\\emptyset",
    "empty set", "the empty set", "空集"),
    ("does not exist", "dne", "不存在"), ("undefined", "not defined", "无意义"),
    ("infinity", "\\infty", "+\\infty", "infinite", "infty", "inf", "positive infinity", "无穷", "无穷大", "正无穷",
    "正无穷大"),
    ("negative infinity", "-\\infty", "-inf", "负无穷", "负无穷大"),
    ("all real numbers", "\\mathbb{r}", "全体实数", "任意实数", "实数集", "(-\\infty,\\infty)", "(-\\infty,+\\infty)"),
    ("infinitely many", "infinitely many solutions", "无穷多", "无数", "无数个", "无穷多个", "无穷多解"),
)  # fmt: skip
_CANONICAL = {word: words[0] for words in _SAME for word in words}
_NO_PRODUCT = frozenset(
    "no on is it if of or in to so do go up us we he me my be by am pm an as at ok hi oh ox id tv pi kg cm mm km ml mg"  # noqa: SIM905  as a list they are 40 lines
    " lb ft oz hr".split()
)
LABEL = re.compile(
    r"(?:\((?P<bracket>[A-H])\)|(?P<letter>[A-H]) ?[.):,]) ?(?P<text>.+)|(?:选项?|[Oo]ption "
    r"|[Cc]hoice )(?P<bare>[A-H])|(?P<behind>[A-H])(?:选项|项)"
)
_OTHER_LABEL = re.compile(
    r"\([A-H]\)|^\(?[A-H]\)?\.?$|(?<![\w'])\(?[A-H]\)?[.):](?: |$)|(?:\b(?:or|and|is|be|not|option)|或|和|选"
    r"|是) ?\(?[A-H]\)?(?![\w'])"
)


def is_words(text: str) -> bool:
    """Words and not mathematics: math-verify would take them for products of letters, and "stop" for "pots"."""
    outside = re.sub(r"\\(?:begin|end)\{[a-z]*\}(?:\{[lcr| ]*\})?|\\[a-zA-Z]+", " ", STYLE.sub(" ", text))
    outside = re.sub(rf"(?<![a-zA-Z]){_FUNCTIONS}(?![a-zA-Z])", " ", outside)
    if re.search(rf"[^\W\d_]{{3}}|[{HAN}]", outside):
        return True
    return re.search(r"[\d\\^+*/=<>_|]", STYLE.sub(r"\1", text)) is None and not is_product(text)


def is_product(text: str) -> bool:
    """Whether two to four letters are a product of variables: xy, abc; not a word or a unit."""
    if re.fullmatch("[a-z](?: [a-z]){1,3}", text):
        return True
    if not re.fullmatch("[a-z]{2,4}", text) or text in _NO_PRODUCT:
        return False
    return len(text) == 2 or (
        not re.search("[eiou]", text)
        and ("a" not in text or (set(text) <= set("abcdxyz") and text not in ("bad", "dad", "dab", "day", "bay")))
    )


def same(gold: str, answer: str) -> bool:
    """Whether `answer` is worded as `gold` is; or is its option, with or without the option's text."""
    if plain(gold) == plain(answer):
        return True
    if (first := _CANONICAL.get(plain(gold))) and first == _CANONICAL.get(plain(answer)):
        return True
    if is_product(gold) and is_product(answer):
        return sorted(gold.replace(" ", "")) == sorted(answer.replace(" ", ""))
    if first in ("yes", "no", "true", "false"):
        return _answers_first(first, answer)
    letter, text = label(gold)
    other, wording = label(answer)
    if letter and other:
        return letter == other and (not text or not wording or same(text, wording))
    if letter and text:
        return plain(text) == plain(answer)
    return bool(other and wording) and not re.fullmatch(r"\(?[A-Ha-h]\)?", gold) and same(gold, wording)


def label(text: str) -> tuple[str, str]:
    """The letter of an option and its text: A. Paris, (A) Paris, 选A, A; nothing where several are named."""
    if bare := re.fullmatch(r"\(?([A-H])\)?\.?", STYLE.sub(r"\1", text)):
        return bare[1], ""
    found = LABEL.fullmatch(STYLE.sub(r"\1", text))
    if not found or _OTHER_LABEL.search(found["text"] or ""):
        return "", text
    return found["bracket"] or found["letter"] or found["bare"] or found["behind"], found["text"] or ""


def plain(text: str) -> str:
    """`text` as it is compared with other text."""
    text = unicodedata.normalize("NFC", STYLE.sub(r"\1", text)).casefold()
    text = re.sub(r" *([^\w\s]) *", r"\1", text).strip(' .,;:?"')
    text = re.sub(r"^'(.*)'$", r"\1", re.sub(r"(?<=\w\w)!+$", "", text))  # x' and n! are not x and n
    return text[1:-1] if re.fullmatch(r"\(\w\)", text) else text


def _answers_first(word: str, answer: str) -> bool:
    """Whether an answer opens with the word and its explanation does not take it back: Yes, because ..."""
    opening, *rest = re.split(r"[,.;:!] ?", answer, maxsplit=1)
    opposite = {"yes": "no", "no": "yes", "true": "false", "false": "true"}[word]
    taken_back = re.search(
        rf"\b(?:{opposite}|but|however|actually|wait)\b|但|不过|{'不是|否' if word == 'yes' else '是的'}",
        " ".join(rest).casefold(),
    )
    return bool(rest) and _CANONICAL.get(plain(opening)) == word and not taken_back
