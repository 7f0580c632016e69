"""Write an answer in one notation: its signs in LaTeX or ASCII, without spacing, styles and the dress around it.

Nothing here compares. What people and models write for the same thing (√12, \\sqrt {12}, sqrt(12); 5㎝²,
5\\,\\text{cm}^{2}) becomes the same text, so that the rest of the scorer reads one notation.
"""

# ruff: noqa: RUF001  signs that look like others are what this module is for

import re
import unicodedata

HAN = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # inside of [...]

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ⁽⁾", "0123456789+-n()")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ₍₎", "0123456789+-n()")
# Before Unicode's compatibility decomposition, which would make 12 of 1² and 13 of ①③.
_SIGNS = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "⁄": "/", "∕": "/", "∶": ":", "。": ".", "、": ",", "•": "\\cdot ",
    "×": "\\times ", "✕": "\\times ", "⋅": "\\cdot ", "·": "\\cdot ", "∙": "\\cdot ", "÷": "\\div ", "±": "\\pm ",
    "∓": "\\mp ",
    "≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∪": "\\cup ",
    "∩": "\\cap ",
    "∈": "\\in ", "∞": "\\infty ", "∅": "\\emptyset ", "Ø": "\\emptyset ", "⌀": "\\emptyset ", "°": "^\\circ ",
    "º": "^\\circ ", "˚": "^\\circ ",
    "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}",
    "⟨": "\\langle ", "⟩": "\\rangle ", "〈": "\\langle ", "〉": "\\rangle ", "π": "\\pi ", "′": "'",
    "“": '"', "”": '"', "‘": "'", "’": "'", "℃": "^\\circ C", "℉": "^\\circ F", "…": "...", "【": "[", "】": "]",
    "\u200b": "", "\ufeff": "", "\u2060": "", "│": "|", "∣": "|", "→": "\\to ",
} | {chr(0x2460 + index): f"({index + 1})" for index in range(20)}  # fmt: skip
_GREEK = {
    letter: f"\\{unicodedata.name(letter).split()[-1].lower()} ".replace("lamda", "lambda")
    for letter in "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΦΨΩ"
}
_GREEK |= {letter: command.title() for letter, command in _GREEK.items() if letter.isupper()}
_TRANSLATED = str.maketrans(_SIGNS | _GREEK)

_RADICAL = re.compile(r"([√∛∜]) ?(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+(?:\.\d+)?|\\[a-z]+ ?|[a-zA-Z]))")
_PLAIN_ROOT = re.compile(r"(?<![\\a-zA-Z])sqrt ?(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+))")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?%?", re.ASCII)  # most answers: nothing to do
_MARKS = {mark: word for marks, word in (("√✓✔☑", "true"), ("×✗✘╳❌", "false")) for mark in marks}  # of a teacher
_ROOTS = {"√": "\\sqrt", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]"}
_STYLES = "text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|operatorname|rm|bf|it"
STYLE = re.compile(r"\\(?:text|mathrm)\{([^{}]*)\}")
_SPACES = re.compile(r"(?<!\\)((?:\\\\)*)(?:\\[,;: ]|\\(?:quad|qquad|thinspace|medspace|enspace)(?![a-zA-Z])|~)")
_BOX = re.compile(r"^\\(?:boxed|fbox) ?\{(.*)\}$")
# What is written before an answer in a sentence; the answer begins after it.
_LEAD_IN = re.compile(
    r"^(?:(?:so|thus|therefore|hence)[, ]+)?(?:the )?(?:final |correct |right )?(?:answer|result|solution)(?: is"
    r"| ?=| ?:)+[: ]*(?=\S)"
    r"|^(?:it|there|this) (?:is|are)[: ]+(?=\S)"
    r"|^(?:所以|因此|故)?,?(?:最终|正确|最后)?的?(?:答案|结果|答)(?:应该|应)?(?:是|为|等于|:|=)+ ?(?=\S)"
    r"|^(?:(?:一共|总共|合计)有?|共有?)(?:是|为|:|=)? ?(?=[\d一二两三四五六七八九十百])"
    r"|^(?:故|应|所以|因此)?,?选择?[: ]*(?=[A-H(])|^[a-zA-Z\\]+ ?的值(?:是|为|等于|=) ?"
    r"|^(?:是|为|等于|等於)(?=[\d\\-])|^= ?(?=\S)",
    re.IGNORECASE,
)
# An explanation behind the answer, in words alone.
_EXPLANATION = re.compile(
    r"(?: ?[,;.] ?| ?\(|  ?)(?:because|since|so (?=we|the)|as we|which is|which are|that is the|being the|as required"
    r"|in total|altogether|in all|因为|由于|即为所求|理由)"
    r"[^\d=]*$",
    re.IGNORECASE,
)


def normal(text: str) -> str:
    """`text` on one line in one notation; a formula stays a formula and words stay words."""
    if _NUMBER.fullmatch(text):
        return text
    if mark := _MARKS.get(text.strip()):
        return mark
    text = _RADICAL.sub(_root, text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ⁽⁾]+", lambda found: f"^{{{found[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ₍₎]+", lambda found: f"_{{{found[0].translate(_SUBSCRIPTS)}}}", text)
    text = re.sub(
        "[¼-¾⅐-⅞]", lambda found: f" {unicodedata.normalize('NFKC', found[0]).replace(chr(0x2044), '/')} ", text
    )
    text = unicodedata.normalize("NFKC", text.translate(_TRANSLATED)).translate(_TRANSLATED)
    text = " ".join(text.split())
    text = _latex(text)
    before = None
    while before != text:
        before, text = text, _undress(text)
    return text


def _root(found: re.Match[str]) -> str:
    return f"{_ROOTS[found[1]]}{{{(found[2] or found[3] or found[4] or '').strip()}}}"


def _latex(text: str) -> str:
    text = re.sub(r"\\textcircled ?\{(\w+)\}", r"(\1)", text.replace("\\!", ""))
    text = _SPACES.sub(r"\1 ", text)
    text = re.sub(r"\\h?space\*?\{[^{}]*\}|\\(?:displaystyle|textstyle|limits)(?![a-zA-Z])", " ", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", "", text)
    text = re.sub(r"\\[lr]brace(?![a-zA-Z])", lambda found: "\\{" if found[0][1] == "l" else "\\}", text)
    text = re.sub(r"\{ ?\\(rm|bf|it) ([^{}]*)\}", r"\\mathrm{\2}", text)
    text = re.sub(r"\\(mathrm|text|rm) ([a-zA-Z])(?![a-zA-Z])", r"\\\1{\2}", text)
    text = re.sub(rf"\\(?:{_STYLES})\*? ?\{{", r"\\text{", text)
    # The imaginary unit and Euler's number are set upright in many books; they are no units.
    text = re.sub(r"\\text\{ ?(\\?[a-zA-Z]+) ?\}", lambda f: f[1] if f[1] in ("i", "e", "\\pi", "\\i") else f[0], text)
    text = re.sub(
        r"\\(?:imath|uppi|varnothing|oslash|infin|degree|leqslant|geqslant|leq|geq|neq)(?![a-zA-Z])", _synonym, text
    )
    text = re.sub(r"\^ ?\{? ?\\circ ?\}?", r"^\\circ ", text)
    text = text.replace("\\%", "%").replace("\\$", "$").replace("{,}", ",")
    text = re.sub(r"(?<![a-zA-Z\\])(ln|log|sin|cos|tan|cot|exp)(?=[ (\d\\{_^])(?! [a-zA-Z]{2})", r"\\\1", text)
    text = re.sub(r"\\([lg])t(?![a-zA-Z])", lambda found: "<" if found[1] == "l" else ">", text)
    text = re.sub(r"<=|=<", r"\\le ", text)
    text = re.sub(r">=", r"\\ge ", text)
    text = re.sub(r"!=(?!=)", r"\\ne ", text)
    text = _PLAIN_ROOT.sub(lambda found: f"\\sqrt{{{found[1] or found[2] or found[3]}}}", text)
    text = re.sub(r"\\lg(?![a-zA-Z])", r"\\log_{10}", text)
    text = re.sub(
        r"\| ?\\begin\{array\} ?\{[lcr ]*\}(.*?)\\end\{array\} ?\|", r"\\begin{vmatrix}\1\\end{vmatrix}", text
    )
    text = re.sub(r"\\in ?([ZRNQC])(?![a-zA-Z])", r"\\in \\mathbb{\1}", text)
    text = re.sub(
        r" ?\((?=[a-z\d-])([^()]*(?:\\in(?![a-zA-Z])|<|>|\\[lg]e(?![a-zA-Z])|\\ne(?![a-zA-Z]))[^()]+)\)$", r", \1", text
    )
    text = re.sub(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi ", text)
    return " ".join(text.split())


def _synonym(found: re.Match[str]) -> str:
    return {
        "\\imath": "i", "\\uppi": "\\pi", "\\varnothing": "\\emptyset", "\\oslash": "\\emptyset", "\\infin": "\\infty",
        "\\degree": "^\\circ", "\\leqslant": "\\le", "\\geqslant": "\\ge", "\\leq": "\\le", "\\geq": "\\ge",
        "\\neq": "\\ne",
    }[found[0]]  # fmt: skip


def _undress(text: str) -> str:
    """Without one layer of emphasis, signs of mathematics, a box, a lead-in, an explanation and a full stop."""
    text = (
        text.strip("*` ").rstrip(" ").removesuffix(".").rstrip(" ") if not text.endswith("...") else text.strip("*` ")
    )
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$")):
        if text.count(opening) == text.count(closing) >= 1 and len(text) > len(opening) + len(closing):
            inside = text[len(opening) : -len(closing)]
            if text.startswith(opening) and text.endswith(closing) and opening not in inside:
                return inside.strip()
    if text.count("$") % 2 == 0 and re.search(r"\$[^$]+\$", text) and not re.search(r"\$ ?\d[\d,.]*(?=[ ,;]|$)", text):
        return text.replace("$", "")
    if "\\(" in text and text.count("\\(") == text.count("\\)"):
        return text.replace("\\(", "").replace("\\)", "")
    if (
        (found := _BOX.match(text))
        and found[1].count("{") == found[1].count("}")
        and "}" not in found[1].partition("{")[0]
    ):
        return found[1].strip()
    text = _LEAD_IN.sub("", text)
    return _EXPLANATION.sub("", text) or text
