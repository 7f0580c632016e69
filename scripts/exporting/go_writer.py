"""A chat template's texts as a template of Go, for the data that Ollama gives one."""

import json
import re
from collections.abc import Sequence
from itertools import product

from common.errors import InputError

from exporting.turns import PROMPT, START, SYSTEM, TOOL_LIST, Turns

ROLES = ("system", "user", "call", "assistant", "tool")


def go_template(turns: Turns, stop_texts: Sequence[str]) -> str:
    """The texts of a chat template as a template of Go, for the data that Ollama gives one."""
    after = {role: _after(turns, role, stop_texts) for role in (START, *ROLES)}
    endings = {
        role: _by_flag({(True, *flags): text for flags, text in after[role].items()} or {(True,) * 3: ""}, turns)
        for role in after
    }
    begin = _begin_of_call(turns, after)
    branches = []
    for role in ROLES:
        condition = f'eq .Role "{role}"'
        content = "{{ json .Content }}" if turns.raw.get(role) == "json" else "{{ .Content }}"
        before, ending = _before(turns, role, after, begin if role == "call" else ""), endings[role]
        if role == "system" and turns.system_inside:
            branches.append(f"if {condition} }}}}")  # its text stands in a turn of the user
            continue
        if role == "call":
            if turns.name_to_arguments is None:
                continue
            condition = 'and (eq .Role "assistant") .ToolCalls'
            before, content = _call(turns, before, _before(turns, "assistant", after), begin), ""
        elif role == "assistant" and ending:
            ending = f"{{{{ if not $last }}}}{ending}{{{{ end }}}}"
        branches.append(f'if {condition} }}}}{before}{content}{ending}{{{{ $prev = "{role}" }}}}')
    prompt = _before(turns, PROMPT, after)
    used = endings[START] + prompt + "".join(branches)
    lines = ['{{- $prev := "start" }}']
    lines += ['{{- $system := eq (index .Messages 0).Role "system" }}'] * ("$system" in used)
    lines[-1] += endings[START] + '{{ "" }}' * bool(endings[START])  # else the next line would take a line break off
    lines += ["{{- range $i, $message := .Messages }}"]
    lines += ["{{- $last := eq (len (slice $.Messages $i)) 1 }}"] * ("$last" in used)
    lines += [("{{- else " if number else "{{- ") + branch for number, branch in enumerate(branches)]
    lines += ["{{- end }}", "{{- end }}", f'{{{{- if ne $prev "assistant" }}}}{prompt}{{{{ end }}}}']
    return "\n".join(lines)


def _call(turns: Turns, before: str, before_answer: str, begin: str) -> str:
    """An answer that calls tools. Ollama finds the mark of a call in the first text of the range: it stands there."""
    if turns.content_to_call is not None:
        content = "{{ .Content }}" + _literal(turns.content_to_call.removesuffix(begin))
        if before == before_answer:
            before += f"{{{{ if .Content }}}}{content}{{{{ end }}}}"
        else:
            before = f"{{{{ if .Content }}}}{before_answer}{content}{{{{ else }}}}{before}{{{{ end }}}}"
    more = separator = ""
    if turns.between_calls is None:
        more = "{{ if slice .ToolCalls 1 }}" + _refusal("the chat template has one call in an answer") + "{{ end }}"
    elif text := turns.between_calls.removesuffix(begin):
        separator = f"{{{{ if $j }}}}{{{{ {_string(text)} }}}}{{{{ end }}}}"
    return (
        f"{more}{before}{{{{ range $j, $call := .ToolCalls }}}}{separator}{_literal(begin)}{{{{ .Function.Name }}}}"
        f"{_literal(turns.name_to_arguments or '')}{{{{ .Function.Arguments }}}}{{{{ end }}}}"
    )


def _begin_of_call(turns: Turns, after: dict[str, dict[tuple[bool, bool], str]]) -> str:
    """The text with which every call begins, and which no answer without calls has there."""
    texts = [text for text in (turns.between_calls, turns.content_to_call) if text is not None]
    for flags, table in turns.gaps.items():
        for (before, turn, last), text in table.items():
            if turn == "call":
                answer = turns.gap(before, "assistant", last, *flags) or after[before].get(flags, "")
                texts.append(text.removeprefix(common_prefix([text, answer])))
    return common_prefix([text[::-1] for text in texts])[::-1] if texts else ""


def _after(turns: Turns, role: str, stop_texts: Sequence[str]) -> dict[tuple[bool, bool], str]:
    """What stands after a turn, whatever follows: up to its end token and a line break. "" where that differs."""
    after = {}
    for flags, table in turns.gaps.items():
        found = set()
        for (before, _turn, _), text in table.items():
            if before == role:
                ends = [match.end() for stop in stop_texts if (match := re.search(re.escape(stop) + r"\n*", text))]
                found.add(text[: min(ends)] if ends else "")
        if found:  # else no conversation has it with these flags
            after[flags] = found.pop() if len(found) == 1 else ""
    return after


def _before(turns: Turns, turn: str, after: dict[str, dict[tuple[bool, bool], str]], begin: str = "") -> str:
    """What stands before a turn, by the turn before it; `begin` at its end is left out."""
    refused = _refusal(f"the chat template has no {f'{turn} turn' if turn in ROLES else 'answer'} here")
    texts: dict[str, str] = {}
    for previous in (START, *ROLES):
        same = {previous, turn} <= {"call", "assistant"} or (previous == turn != "tool")
        if same or (turn == PROMPT and previous in (START, "assistant")):
            continue  # which Ollama makes one turn, or which is no place to answer
        if (previous == "call" and turns.name_to_arguments is None) or (previous == "system" and turns.system_inside):
            continue
        variants: dict[tuple[bool, ...], str] = {
            (last, *flags): text.removeprefix(after[previous].get(flags, "")).removesuffix(begin)
            for last, flags in product((True, False), turns.gaps)
            if (text := turns.gap(previous, turn, last, *flags)) is not None
        }
        texts[previous] = _by_flag(variants, turns) if variants else refused
    return _by_previous(texts, refused)


def _by_flag(variants: dict[tuple[bool, ...], str], turns: Turns) -> str:
    """The text for each setting of ($last, $system, .Tools), asking only for those that change it."""
    if len(set(variants.values())) == 1:
        return _literal(next(iter(variants.values())), turns)
    for at, condition in ((2, "$.Tools"), (1, "$system"), (0, "$last")):
        sides = [{flags: text for flags, text in variants.items() if flags[at] is side} for side in (True, False)]
        changes = any(
            sides[1].get((*flags[:at], False, *flags[at + 1 :]), text) != text for flags, text in sides[0].items()
        )
        if changes:
            yes, no = (_by_flag(side, turns) for side in sides)
            if not yes:
                return f"{{{{ if not {condition} }}}}{no}{{{{ end }}}}"
            return f"{{{{ if {condition} }}}}{yes}{f'{{{{ else }}}}{no}' if no else ''}{{{{ end }}}}"
    raise InputError(f"what it writes depends on more than the turns: {sorted(set(variants.values()))[:2]}")


def _by_previous(texts: dict[str, str], refused: str) -> str:
    groups: dict[str, list[str]] = {}
    for previous, text in texts.items():
        groups.setdefault(text, []).append(previous)
    usual = max(groups, key=lambda text: (text != refused, len(groups[text]), text))
    rest = {text: previous for text, previous in groups.items() if text != usual}
    if not rest:
        return usual
    shared = usual if all(text.endswith(usual) for text in rest) and not usual.endswith("}}") else ""
    chain = [
        f"if eq $prev {' '.join(map(_string, previous))} }}}}{text.removesuffix(shared)}"
        for text, previous in rest.items()
    ]
    otherwise = "" if shared else "{{ else }}" + usual
    return "{{ " + "{{ else ".join(chain) + otherwise + "{{ end }}" + shared


def _refusal(text: str) -> str:
    """An action that fails: Ollama shows the action, and with it the text."""
    return f"{{{{ slice {_string(text)} 999 }}}}"


def _literal(text: str, turns: Turns | None = None) -> str:
    """Text for a template in a Modelfile, with what Go or the Modelfile would change written as a string of Go."""
    if turns and TOOL_LIST in text:
        before, _, rest = text.partition(TOOL_LIST)
        separator = f"{{{{ if $j }}}}{{{{ {_string(turns.between_tools or '')} }}}}{{{{ end }}}}"
        loop = f"{{{{ range $j, $tool := $.Tools }}}}{separator}{{{{ $tool }}}}{{{{ end }}}}"
        return _literal(before, turns) + loop + _literal(rest, turns)
    if SYSTEM in text:
        return "{{ $.System }}".join(_literal(part) for part in text.split(SYSTEM))
    special = re.compile(r'\{\{|\}\}|""+|[^\n -\U0010ffff]|[^\n]')
    return special.sub(lambda found: found[0] if _plain(found[0]) else f"{{{{ {_string(found[0])} }}}}", text)


def _plain(text: str) -> bool:
    return len(text) == 1 and (text == "\n" or text.isprintable())


def _string(text: str) -> str:
    """A string of Go in one line, without what would end an action or the Modelfile's quotes."""
    quoted = json.dumps(text, ensure_ascii=False)[1:-1].replace("{", r"\u007b").replace("}", r"\u007d")
    quoted = quoted.replace(r"\"", r"\u0022")
    return '"' + "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in quoted) + '"'


def common_prefix(texts: Sequence[str]) -> str:
    """The text with which all begin."""
    shortest = min(texts, key=len)
    at = next((at for at, one in enumerate(shortest) if any(text[at] != one for text in texts)), len(shortest))
    return shortest[:at]
