"""A renderer of the part of Go's text/template that our Modelfiles use, with the functions that Ollama adds.

tests/scripts/test_modelfile.py compares it with Go itself. What it does not know is refused, never skipped.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

ACTION = re.compile(r"\{\{(?P<left>-\s)?\s*(?P<code>(?:\"(?:\\.|[^\"\\])*\"|[^\"])*?)\s*(?P<right>\s-)?\}\}", re.DOTALL)
TOKEN = re.compile(r'\s*(?:(?P<string>"(?:\\.|[^"\\])*")|(?P<word>[$.\w]+)|(?P<sign>\)(?:\.[\w.]+)?|[(:=,]))')


class TemplateError(ValueError):
    """The template cannot be read, or fails while it is rendered, as Go's would."""


@dataclass
class Node:
    """A text, an action or a block; `branches` of a block are (condition, body), its own body first."""

    kind: str
    code: str = ""
    body: list["Node"] = field(default_factory=list)
    branches: list[tuple[str, list["Node"]]] = field(default_factory=list)


def render_template(template: str, data: dict[str, Any]) -> str:
    """What Go's text/template makes of `template` and `data`. Raises TemplateError where it would fail."""
    nodes, rest = _block(_pieces(template))
    if rest:
        raise TemplateError("unexpected {{ end }}")
    out: list[str] = []
    _run(nodes, data, [{"$": data}], out)
    return "".join(out)


def go_json(value: Any) -> str:
    """JSON as Go writes it: without blanks, and with <, > and & escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _pieces(template: str) -> list[Node]:
    found, start, trim = [], 0, False
    for match in ACTION.finditer(template):
        text = template[start : match.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        text = text.rstrip(" \t\r\n") if match["left"] else text
        if text:
            found.append(Node("text", text))
        found.append(Node("action", match["code"]))
        start, trim = match.end(), bool(match["right"])
    text = template[start:]
    found.append(Node("text", text.lstrip(" \t\r\n") if trim else text))
    return found


def _block(pieces: list[Node]) -> tuple[list[Node], list[Node]]:
    """The nodes up to the {{ end }} or {{ else }} of this block, and what is left from there."""
    nodes = []
    while pieces:
        node = pieces[0]
        word = node.code.partition(" ")[0] if node.kind == "action" else ""
        if word in ("end", "else"):
            return nodes, pieces
        pieces = pieces[1:]
        if word not in ("if", "range"):
            nodes.append(node)
            continue
        block, code = Node(word), node.code[len(word) :].strip()
        while True:
            body, pieces = _block(pieces)
            if not pieces:
                raise TemplateError(f"{{{{ {node.code} }}}} has no {{{{ end }}}}")
            block.branches.append((code, body))
            ending, pieces = pieces[0].code, pieces[1:]
            if ending == "end":
                break
            code = ending.removeprefix("else").strip().removeprefix("if").strip()
        nodes.append(block)
    return nodes, []


def _run(nodes: list[Node], dot: Any, scopes: list[dict[str, Any]], out: list[str]) -> None:
    for node in nodes:
        if node.kind == "text":
            out.append(node.code)
        elif node.kind == "if":
            for code, body in node.branches:
                if not code or _true(_value(code, dot, scopes)):
                    _run(body, dot, [*scopes, {}], out)
                    break
        elif node.kind == "range":
            names, _, code = node.branches[0][0].rpartition(":=")
            index, _, item = (name.strip() for name in names.partition(","))
            for number, one in enumerate(_value(code, dot, scopes) or []):
                _run(node.branches[0][1], one, [*scopes, {index: number, item: one}], out)
        elif found := re.match(r"(\$\w+)\s*(:?=)\s*(.*)", node.code, re.DOTALL):
            name, sign, code = found.groups()
            scope = scopes[-1] if sign == ":=" else next(scope for scope in reversed(scopes) if name in scope)
            scope[name] = _value(code, dot, scopes)
        else:
            out.append(_printed(_value(node.code, dot, scopes)))


def _value(code: str, dot: Any, scopes: list[dict[str, Any]]) -> Any:
    tokens, at = [], 0
    while code[at:].strip():
        found = TOKEN.match(code, at)
        if found is None:
            raise TemplateError(f"{code}: is not in the part of Go's templates that is known here")
        tokens.append(found[found.lastgroup or "word"])
        at = found.end()
    value, rest = _call(tokens, dot, scopes)
    if rest:
        raise TemplateError(f"{code}: {' '.join(rest)} is too much")
    return value


def _call(tokens: list[str], dot: Any, scopes: list[dict[str, Any]]) -> tuple[Any, list[str]]:
    if tokens and tokens[0] in FUNCTIONS:
        name, tokens, given = tokens[0], tokens[1:], []
        while tokens and not tokens[0].startswith(")"):
            one, tokens = _term(tokens, dot, scopes)
            given.append(one)
        try:
            return FUNCTIONS[name](*given), tokens
        except (IndexError, TypeError) as error:
            raise TemplateError(f"error calling {name} with {given}: {error}") from None
    return _term(tokens, dot, scopes)


def _term(tokens: list[str], dot: Any, scopes: list[dict[str, Any]]) -> tuple[Any, list[str]]:
    if not tokens:
        raise TemplateError("a value is missing")
    token, rest = tokens[0], tokens[1:]
    if token == "(":
        value, rest = _call(rest, dot, scopes)
        if not rest or not rest[0].startswith(")"):
            raise TemplateError("a ) is missing")
        return _fields(value, rest[0][2:]), rest[1:]
    if token.startswith('"'):
        return json.loads(token), rest
    if token.isdigit():
        return int(token), rest
    if token.startswith("."):
        return _fields(dot, token[1:]), rest
    if token.startswith("$"):
        name, _, path = token.partition(".")
        for scope in reversed(scopes):
            if name in scope:
                return _fields(scope[name], path), rest
    raise TemplateError(f"{token}: is not in the part of Go's templates that is known here")


def _fields(value: Any, path: str) -> Any:
    for name in path.split(".") if path else []:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _true(value: Any) -> bool:
    return bool(value)


def _printed(value: Any) -> str:
    return value if isinstance(value, str) else go_json(value) if isinstance(value, dict | list) else str(value)


def _slice(value: Any, start: int, stop: int | None = None) -> Any:
    if start > len(value):
        raise IndexError(f"index out of range: {start}")
    return value[start:stop]


FUNCTIONS = {
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, second: first != second,
    "and": lambda *values: next((value for value in values if not _true(value)), values[-1]),
    "or": lambda *values: next((value for value in values if _true(value)), values[-1]),
    "not": lambda value: not _true(value),
    "len": len,
    "index": lambda value, number: value[number],
    "slice": _slice,
    "json": go_json,
}
