"""The Modelfile of Ollama for a trained model: its TEMPLATE says in Go what the model's chat template says in jinja.

The texts are found by rendering conversations (exporting/turns.py), written as a Go template, and compared with the
chat template on other conversations; a template that Ollama cannot express is refused with the first difference.

How Ollama renders, by its template/template.go, server/prompt.go and parser/parser.go: turns of one role that follow
each other become one, with an empty line between them, tools' results excepted; the tokenizer then puts its beginning
token in front, so that the TEMPLATE must not have it; JSON has no blanks; characters that Go does not print are lost
from a Modelfile, so that they are written as escapes.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError

from exporting.go_template import TemplateError, render_template
from exporting.go_writer import common_prefix, go_template
from exporting.turns import LETTERS, START, TRIMMED, Refused, Turns, find_turns, message, renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# As in training and in `make chat`: no top-k, no top-p, no penalty, which Ollama would have on.
PARAMETERS = {"temperature": 0.7, "top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 1}
BEGIN = "comes first; the tokenizer in the GGUF file adds it."
CHECKED = ["u", "su", "uau", "suau", "suauau", "uauauau", "uct", "suct", "uctau", "uctt", "sucttau"]
TEXTS = ["你好，今天天气怎么样？", "What is 3 + 4?", "line 1\nline 2", 'é 🙂 "quoted"', "{{ .Content }} <b> & \\n"]


def modelfile(
    tokenizer: "PreTrainedTokenizerBase",
    gguf_name: str,
    stop_texts: Sequence[str],
    parameters: Mapping[str, Any],
) -> str:
    """The Modelfile beside a GGUF file of that name.

    `stop_texts` are the end tokens that the model was trained with; `parameters`, such as num_ctx, are added to
    PARAMETERS. Raises InputError where Ollama cannot express the tokenizer's chat template.
    """
    try:
        turns = find_turns(tokenizer)
        begin = _beginning(tokenizer, turns)
        template = go_template(turns, stop_texts)
    except InputError as error:
        raise InputError(f"the chat template of {_name(tokenizer)} cannot be written for Ollama: {error}") from None
    lines = ["# Written by make export: what the chat template of the model writes, in Go."]
    lines += [f"# {note}" for note in turns.notes]
    if begin:
        lines.append(f"# {begin} {BEGIN}")
    lines += [f"FROM ./{gguf_name}", "", f'TEMPLATE """{template}"""', ""]
    lines += [f'PARAMETER stop "{stop}"' for stop in stop_texts]
    lines += [f"PARAMETER {name} {value}" for name, value in {**PARAMETERS, **parameters}.items()]
    text = "\n".join(lines) + "\n"
    if difference := first_difference(tokenizer, text, begin):
        raise InputError(f"the chat template of {_name(tokenizer)} cannot be written for Ollama: {difference}")
    return text


def render(modelfile_text: str, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    """The text that Ollama makes of a conversation, before the tokenizer adds its beginning token, if it adds one.

    Raises InputError where the TEMPLATE refuses the conversation.
    """
    collated = collate(messages)
    data = {
        "Messages": collated,
        "System": "\n\n".join(one["Content"] for one in collated if one["Role"] == "system"),
        "Tools": [_go_tool(tool) for tool in tools or []],
        "Response": "",
    }
    try:
        return render_template(template_of(modelfile_text), data)
    except TemplateError as error:
        raise InputError(f"Ollama: {error}") from None


def comparable(
    modelfile_text: str, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> str | None:
    """The text whose tokens Ollama sends to the model, its beginning token included, or None where Ollama is known to
    write another text than the chat template: JSON without blanks, texts with blanks at their ends.

    Raises InputError where the TEMPLATE refuses the conversation.
    """
    trimmed = TRIMMED in modelfile_text and any(
        (one.get("content") or "") != (one.get("content") or "").strip() for one in messages
    )
    if trimmed or other_json(messages, tools):
        return None
    begin = re.search(rf"^# (\S+) {BEGIN}$", modelfile_text, re.MULTILINE)
    return (begin[1] if begin else "") + render(modelfile_text, messages, tools)


def other_json(messages: Iterable[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> bool:
    """Has a conversation JSON, which Ollama writes without blanks? Then its tokens differ from the chat template's."""
    return bool(tools) or any(
        call["function"]["arguments"] not in ({}, "{}") for one in messages for call in one.get("tool_calls") or []
    )


def template_of(modelfile_text: str) -> str:
    """The TEMPLATE of a Modelfile."""
    found = re.search(r'^TEMPLATE """(.*?)"""$', modelfile_text, re.DOTALL | re.MULTILINE)
    if found is None:
        raise InputError("the Modelfile has no TEMPLATE")
    return found[1]


def stops_of(file: Path) -> list[str]:
    """The stop texts of a Modelfile; none where there is no such file."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)


def collate(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as Ollama hands them to a template: neighbours of one role are one, except results of tools."""
    collated: list[dict[str, Any]] = []
    for one in messages:
        calls = [{"Function": _go_call(call["function"])} for call in one.get("tool_calls") or []]
        content = one.get("content") or ""
        if collated and collated[-1]["Role"] == one["role"] != "tool":
            collated[-1]["Content"] += "\n\n" + content
        else:
            collated.append({"Role": one["role"], "Content": content, "ToolCalls": calls})
    return collated


def first_difference(tokenizer: "PreTrainedTokenizerBase", modelfile_text: str, begin: str) -> str | None:
    """Where a Modelfile writes another text than the chat template, in words; None where it never does."""
    jinja = renderer(tokenizer)
    for number, letters in enumerate(CHECKED):
        messages = [
            message(letter, "", "" if letter == "c" else TEXTS[(number + at) % (len(TEXTS) - (letter == "t"))])
            for at, letter in enumerate(letters)
        ]
        for one in messages:
            for call in one.get("tool_calls", []):
                call["function"]["arguments"] = {}
        try:
            expected = jinja(messages)
        except Refused as refusal:
            expected = refusal
        try:
            found = begin + render(modelfile_text, messages)
        except InputError as refusal:
            found = refusal
        if isinstance(expected, Refused) or isinstance(found, InputError):
            if isinstance(expected, str) and "c" not in letters and "t" not in letters:
                return f"{_roles(letters)}: Ollama refuses them ({found}), the chat template does not"
            if isinstance(found, str) and isinstance(expected, Refused) and "c" not in letters:
                return f"{_roles(letters)}: the chat template refuses them ({expected}), Ollama does not"
        elif expected != found:
            at = len(common_prefix([expected, found]))
            return (
                f"{_roles(letters)}: after {expected[max(0, at - 40) : at]!r} the chat template writes "
                f"{expected[at : at + 60]!r}, Ollama {found[at : at + 60]!r}"
            )
    return None


# --- small things ---------------------------------------------------------------------------------------------------


def _beginning(tokenizer: "PreTrainedTokenizerBase", turns: Turns) -> str:
    """The beginning token where the tokenizer adds it, which then is taken out of the texts; "" where it does not."""
    ids = tokenizer("a")["input_ids"]
    begin = tokenizer.bos_token
    if not begin or not ids or ids[0] != tokenizer.bos_token_id:
        return ""
    for table in turns.gaps.values():
        for key, text in table.items():
            if key[0] == START:
                if not text.startswith(begin):
                    raise InputError(f"the tokenizer adds {begin}, and the chat template does not begin with it")
                table[key] = text.removeprefix(begin)
    return begin


def _go_call(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {"Name": function["name"], "Arguments": _sorted(arguments)}


def _go_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as Ollama hands it to a template: the keys of its types in their order, those of its maps sorted."""
    function = tool.get("function", {})
    described = {name: function[name] for name in ("name", "description") if name in function}
    parameters = _schema(function.get("parameters", {}), ("type", "$defs", "items", "required", "properties"))
    return {"type": tool.get("type", "function"), "function": {**described, "parameters": parameters}}


def _schema(schema: dict[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """The part of a JSON schema that Ollama's types have."""
    found = {name: _sorted(schema[name]) for name in order if name in schema}
    if isinstance(schema.get("properties"), dict):
        properties = sorted(schema["properties"].items())
        own = ("anyOf", "type", "items", "description", "enum", "properties", "required")
        found["properties"] = {name: _schema(value, own) for name, value in properties}
    return found


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(one) for key, one in sorted(value.items())}
    return [_sorted(one) for one in value] if isinstance(value, list) else value


def _roles(letters: str) -> str:
    return ", ".join(LETTERS[letter] for letter in letters)


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return os.path.basename(str(tokenizer.name_or_path)) or "this model"
