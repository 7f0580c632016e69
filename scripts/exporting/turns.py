"""What a chat template writes between the contents of a conversation, found by rendering conversations with it.

A turn is "system", "user", "assistant", "tool", or "call", an answer that calls tools. The text between two contents
depends on the two turns, on whether the later turn is the last, on tools and on a system turn; a template whose text
depends on more is refused.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIMMED = "The chat template takes blanks from both ends of a text"
START, PROMPT = "start", "prompt"  # before the first turn; where an answer is to begin
LETTERS = {"s": "system", "u": "user", "a": "assistant", "c": "call", "t": "tool"}
# The conversations that are rendered, each to a place where an answer begins.
PROBES = [
    "u",
    "uau",
    "uauau",
    "uctau",
    "ucttau",
    "uctauctau",
    "uct",
    "uctt",
    "uctu",
    "ucu",
    "au",
    "us",
    "usu",
    "uasu",
    "uat",
    "uatau",
    "uatt",
    "uattau",
    "uctct",
]
PROBES += [
    "uctctau",
    "ucttctau",
    "su",
    "suau",
    "suauau",
    "suctau",
    "sucttau",
    "suct",
    "suctt",
    "suctu",
    "suctct",
    "s",
    "sau",
    "suat",
    "suatau",
    "suatt",
]
TOOLS = [
    {"type": "function", "function": {"name": f"tool{n}", "description": f"Tool {n}.", "parameters": PARAMETERS}}
    for n, PARAMETERS in enumerate([{"type": "object", "properties": {"a": {"type": "integer"}}}] * 2)
]
TOOL_LIST, SYSTEM = "\ue000tools\ue001", "\ue000system\ue001"  # in a text, where these stand
Key = tuple[str, str, bool]  # the turn before, the turn, whether it is the last


class Refused(Exception):
    """The chat template refuses a conversation."""


@dataclass
class Turns:
    """The texts between contents: `gaps[system, tools]` has the one before each Key."""

    gaps: dict[tuple[bool, bool], dict[Key, str]]
    raw: dict[str, str]  # how contents are written, of each turn
    name_to_arguments: str | None = None  # between a call's name and its arguments; None where calls are not written
    between_calls: str | None = None  # None where an answer has one call only
    content_to_call: str | None = None  # None where the content of an answer that calls is not written
    between_tools: str | None = None  # None where tools are not written
    system_inside: bool = False  # the content of the system turn is written in a turn of the user
    notes: list[str] = field(default_factory=list)

    def gap(self, before: str, turn: str, last: bool = False, system: bool = False, tools: bool = False) -> str | None:
        """The text before a turn, None where the template refuses it there."""
        table = self.gaps[system, tools]
        return table.get((before, turn, last), table.get((before, turn, not last)))


def message(letter: str, mark: str, content: str | None = None, calls: int = 1) -> dict[str, Any]:
    role = LETTERS[letter]
    if role != "call":
        found = {"role": role, "content": f"{mark}content" if content is None else content}
        return found | ({"name": "tool0"} if role == "tool" else {})
    return {
        "role": "assistant",
        "content": content or "",
        "tool_calls": [
            {"type": "function", "function": {"name": f"{mark}name{n}", "arguments": {f"{mark}key{n}": 1}}}
            for n in range(calls)
        ],
    }


def renderer(tokenizer: "PreTrainedTokenizerBase") -> Callable[..., str]:
    """A function that renders messages, with tools and up to the answer, or raises Refused."""
    import jinja2

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, prompt: bool = True) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise Refused(str(error)) from None

    return render


def find_turns(tokenizer: "PreTrainedTokenizerBase") -> Turns:
    """The texts of a tokenizer's chat template. Raises InputError where one text is not the same everywhere."""
    render = renderer(tokenizer)
    raw = {LETTERS[letter]: _written(render, letter) for letter in "suat"}
    turns = Turns({}, raw, system_inside=_system_inside(render))
    _find_calls(render, turns)
    for system in (False, True):
        for tools in (False, True):
            turns.gaps[system, tools] = _gaps(render, turns, system, tools)
    _note(render, turns)
    return turns


def _gaps(render: Callable[..., str], turns: Turns, system: bool, tools: bool) -> dict[Key, str]:
    table: dict[Key, str] = {}
    for probe in PROBES:
        if probe.startswith("s") != system or ("c" in probe and turns.name_to_arguments is None):
            continue
        messages = [message(letter, f"X{index}q") for index, letter in enumerate(probe)]
        try:
            text = render(messages, TOOLS if tools else None)
        except Refused:
            continue
        if tools:
            text = _mark_tools(text, turns)
        if system and turns.system_inside:
            text, probe, messages = text.replace(messages[0]["content"], SYSTEM), probe[1:], messages[1:]
        pieces = _cut(text, messages, turns)
        names = [LETTERS[letter] for letter in probe]
        for index, piece in enumerate(pieces or []):
            before = START if index == 0 else names[index - 1]
            key = (before, names[index] if index < len(names) else PROMPT, index >= len(names) - 1)
            if table.setdefault(key, piece) != piece:
                raise InputError(
                    f"between {before} and {key[1]} it writes {table[key]!r} in one conversation and {piece!r} in "
                    f"another ({', '.join(names)})"
                )
    return table


def _cut(text: str, messages: list[dict[str, Any]], turns: Turns) -> list[str] | None:
    """The text around the contents, in their order; None where a turn is not written, or not in its place."""
    pieces, at = [], 0
    for one in messages:
        if calls := one.get("tool_calls"):
            first, last = calls[0]["function"]["name"], _arguments(calls[-1])
        else:
            first = last = json.dumps(one["content"]) if turns.raw[one["role"]] == "json" else one["content"]
        start = text.find(first, at)
        stop = text.find(last, start)
        if start < 0 or stop < 0:
            return None
        pieces.append(text[at:start])
        at = stop + len(last)
    return [*pieces, text[at:]]


def _arguments(call: dict[str, Any]) -> str:
    return json.dumps(call["function"]["arguments"])


def _written(render: Callable[..., str], letter: str) -> str:
    """How a template writes the content of a turn: "raw", "trimmed", "json" or "left out"; "raw" if it refuses it."""
    probes = ["su"] if letter == "s" else {"u": ["u"], "a": ["uau", "uaua"], "t": ["uct", "uctau", "uat"]}[letter]
    content = ' \n<x>"y"\n '
    for probe in probes:
        place = probe.index(letter)
        messages = [message(one, f"X{n}q", content if n == place else None) for n, one in enumerate(probe)]
        try:
            text = render(messages)
        except Refused:
            continue
        if content in text:
            return "raw"
        return "json" if json.dumps(content) in text else "trimmed" if content.strip() in text else "left out"
    return "raw"


def _find_calls(render: Callable[..., str], turns: Turns) -> None:
    """What stands in and around the calls of an answer; left at None where the template does not write them."""
    user = message("u", "X0q")
    try:
        text = render([user, message("c", "X1q")], TOOLS, prompt=False)
        one = re.search(r'X1qname0(.*?)\{"X1qkey0": 1\}', text, re.DOTALL)
    except Refused:
        one = None
    if one is None:
        return
    turns.name_to_arguments = one[1]
    try:
        text = render([user, message("c", "X1q", calls=2)], TOOLS, prompt=False)
        two = re.search(r'\{"X1qkey0": 1\}(.*?)X1qname1', text, re.DOTALL)
        turns.between_calls = two[1] if two else None
    except Refused:
        pass
    text = render([user, message("c", "X1q", "X1qcontent")], TOOLS, prompt=False)
    both = re.search(r"X1qcontent(.*?)X1qname0", text, re.DOTALL)
    turns.content_to_call = both[1] if both else None


def _mark_tools(text: str, turns: Turns) -> str:
    """The text with TOOL_LIST in place of the tools; sets what stands between two of them."""
    for indent in (None, 4, 2):
        first, second = (json.dumps(tool, indent=indent) for tool in TOOLS)
        if (start := text.find(first)) >= 0 and (stop := text.find(second)) > start:
            turns.between_tools = text[start + len(first) : stop]
            return text[:start] + TOOL_LIST + text[stop + len(second) :]
    return text


def _system_inside(render: Callable[..., str]) -> bool:
    """Is the system turn written in a later turn of the user, after an earlier one?"""
    try:
        text = render([message(letter, f"X{n}q") for n, letter in enumerate("suau")])
    except Refused:
        return False
    return text.find("X0qcontent") > text.find("X1qcontent")


def _note(render: Callable[..., str], turns: Turns) -> None:
    """Say what a template does with contents that Ollama's templates cannot do."""
    trimmed = [role for role, how in turns.raw.items() if how == "trimmed"]
    if trimmed:
        turns.notes.append(f"{TRIMMED} ({', '.join(trimmed)}); Ollama leaves them.")
    if "json" in turns.raw.values():
        turns.notes.append("Ollama escapes <, > and & in the JSON of a tool's result; the chat template does not.")
    answer = "<think>\nX\n</think>\n\nX1qcontent"
    try:
        text = render([message("u", "X0q"), message("a", "X1q", answer), message("u", "X2q")])
        if "X1qcontent" in text and answer not in text:
            turns.notes.append(
                "The chat template leaves the thoughts of old answers out; Ollama sends them: a client should not."
            )
    except Refused:
        pass
    if turns.between_tools is not None or turns.name_to_arguments is not None:
        turns.notes.append(
            "Ollama writes the JSON of tools and calls without blanks and with sorted keys; the chat template does not."
        )
