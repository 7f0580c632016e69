"""What a chat template drops: every piece of a row is looked for in the text that was rendered of it.

A turn of the assistant whose answer or calls are not there is refused. Any other missing piece has a name here, and
the rows that lose it are counted, named, and above a share refused, as truncated rows are.
"""

import json
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.data.turns import Turns
from common.errors import InputError

# Lost: the row is not trained as it is written.
THOUGHTS = "the thoughts of turns with loss"
BESIDE_CALLS = "the text beside a function call"
SYSTEM = "a system turn"
RESULTS = "results of functions"
TOOLS = "the tools"
HISTORY = "a turn of the assistant without loss"
# Only named: the model sees at inference what it was trained on, or the row says so itself.
OLD_THOUGHTS = "the thoughts of turns without loss are not rendered"
OPENING = "the first turn is the assistant's; with no prompt before it, it carries no loss"
OPENED = "the generation prompt opens answers in a way that they do not have, such as <think>"
SPECIAL = "special tokens stand in their text, and are read as such"
NAMED = (OLD_THOUGHTS, OPENING, OPENED, SPECIAL)

THINK = re.compile("</?think>")
TAKEN = "\0"
PLACES = 5


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, below in value.items():
            yield str(key)
            yield from texts_in(below)
    elif isinstance(value, list):
        for below in value:
            yield from texts_in(below)


def lost_of_answer(span: str, turn: dict[str, Any]) -> set[str]:
    """What the text of a turn of the assistant lacks of it. Raises ValueError when that is its answer or a call."""
    thoughts, answer, calls = _parts(turn, span)
    without_calls, missing = _find(span, thoughts, answer, calls)
    if without_calls:
        raise ValueError(
            "its function call is not in what the chat template renders; take a model whose chat format has calls, or "
            "give another template with --chat-template-path"
        )
    lost = {THOUGHTS} if any(piece in missing for piece in thoughts) else set()
    if lost and not answer and not calls:
        raise ValueError(
            "it is a thought alone, which the chat template drops; add an answer, or give a template that renders "
            "thoughts with --chat-template-path"
        )
    if answer in missing:
        if not calls:
            raise ValueError(
                f"{answer[:60]!r} is not in what the chat template renders as its turn; give another template with "
                "--chat-template-path"
            )
        lost.add(BESIDE_CALLS)
    return lost


def lost_of_context(gaps: Sequence[tuple[str, Turns]], tools: Turns | None) -> set[str]:
    """What the text around the answers lacks of the other turns and of the tools.

    Each gap is the text before an answer, with the turns that should be in it; the last, that after all answers.
    Raises ValueError when a turn of the user is in none.
    """
    lost: set[str] = set()
    everywhere = TAKEN.join(text for text, _ in gaps)  # a template may move a turn, such as the system's
    for text, turns in gaps:
        others = [turn["content"].strip() for turn in turns if turn["role"] != "assistant"]
        missing = [piece for piece in _take(text, others)[1] if _take(everywhere, [piece])[1]]
        for turn in turns:
            if turn["role"] == "assistant":
                lost |= _lost_of_history(everywhere, turn)
            elif turn["content"].strip() not in missing:
                continue
            elif turn["role"] == "user":
                raise ValueError(
                    f"the user's {turn['content'].strip()[:60]!r} is not in what the chat template renders; give "
                    "another template with --chat-template-path"
                )
            else:
                lost.add(RESULTS if turn["role"] == "tool" else SYSTEM)
    if tools and not all(_holds(gaps[0][0], tool) for tool in tools):
        lost.add(TOOLS)
    return lost


def describe(rows: Sequence[tuple[str, tuple[str, ...]]], template: str | None, max_share: float) -> str | None:
    """Lines that count and name the rows that the chat `template` drops a part of, or None.

    `rows` are the places of all rows, each with what is lost of it. Raises InputError when more than the share
    `max_share` of them loses a part.
    """
    lines, lost = [], {place for place, kinds in rows if any(kind not in NAMED for kind in kinds)}
    for kind in sorted({kind for _, kinds in rows for kind in kinds}):
        places = [place for place, kinds in rows if kind in kinds]
        lines.append(
            f"{len(places)} of {len(rows)} rows ({len(places) / len(rows):.1%}): {in_words(kind)}: {some(places)}"
        )
    if lost and len(lost) / len(rows) > max_share:
        way_out = training_template(template) if any(THOUGHTS in kinds for _, kinds in rows) else None
        raise InputError(
            "\n".join(lines) + f"\nThat is more than --max-truncated {max_share:g} allows. Give a template that "
            f"renders them with --chat-template-path{f' {way_out}' if way_out else ''}, take them out of the rows, or "
            "allow it."
        )
    return "\n".join(lines) or None


def in_words(kind: str) -> str:
    """A kind of missing piece in words."""
    return kind if kind in NAMED else f"the chat template drops {kind}"


def some(places: Sequence[str]) -> str:
    return ", ".join(places[:PLACES]) + (", ..." if len(places) > PLACES else "")


def training_template(template: str | None) -> Path | None:
    """The file of TRL's that renders thoughts where this chat template drops them; None where TRL has none."""
    trl = find_spec("trl")  # found and not imported: it is slow
    if template is None or trl is None or trl.origin is None:
        return None
    for training in sorted((Path(trl.origin).parent / "chat_templates").glob("*_training.jinja")):
        original = training.with_name(training.name.replace("_training", ""))
        if original.is_file() and original.read_text(encoding="utf-8").strip() == template.strip():
            return training
    return None


def _parts(turn: dict[str, Any], text: str) -> tuple[list[str], str, list[dict[str, Any]]]:
    """The thoughts of a turn, also those between <think> and </think> in its content; its answer; its calls."""
    reasoning, content = (turn.get("reasoning_content") or "").strip(), turn["content"].strip()
    thoughts = [reasoning] if reasoning else []
    if "think>" in content and content not in text:
        *within, content = (part.strip() for part in THINK.split(content))
        thoughts += [part for part in within if part]
    return thoughts, content, [call.get("function", call) for call in turn.get("tool_calls") or []]


def _find(text: str, thoughts: list[str], answer: str, calls: list[dict[str, Any]]) -> tuple[bool, list[str]]:
    """Is a call not in the text? And which thoughts and answer are not."""
    arguments = [json.dumps(call.get("arguments") or {}, ensure_ascii=False) for call in calls]
    names = [call["name"] for call in calls]
    rest, missing = _take(text, [*arguments, *names, *thoughts, answer])
    without = any(name in missing for name in names)
    for call, piece in zip(calls, arguments, strict=True):
        without |= piece in missing and not _holds(rest, call.get("arguments"))
    return without, missing


def _take(text: str, pieces: Sequence[str]) -> tuple[str, list[str]]:
    """The text without the pieces, each taken from a place of its own; and the pieces that are not in it.

    The longest is first, because a short one could be inside of a longer one.
    """
    missing = []
    for piece in sorted(filter(None, pieces), key=len, reverse=True):
        for form in (piece, json.dumps(piece, ensure_ascii=False)[1:-1]):  # some templates write texts as JSON
            if form in text:
                text = text.replace(form, TAKEN, 1)
                break
        else:
            missing.append(piece)
    return text, missing


def _holds(text: str, value: Any) -> bool:
    """Is a value in the text, as JSON or in another form: all its keys and values?"""
    return (
        any(json.dumps(value, ensure_ascii=False, indent=indent) in text for indent in (None, 4))
        or not (_take(text, list(_leaves(value)))[1])
    )


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield str(key)
            yield from _leaves(below)
    elif isinstance(value, list):
        for below in value:
            yield from _leaves(below)
    elif isinstance(value, str):
        yield value.strip()
    elif value is not None and not isinstance(value, bool):  # null and None, true and True: each template its own
        yield json.dumps(value)


def _lost_of_history(text: str, turn: dict[str, Any]) -> set[str]:
    thoughts, answer, calls = _parts(turn, text)
    without_calls, missing = _find(text, thoughts, answer, calls)
    lost = {OLD_THOUGHTS} if any(piece in missing for piece in thoughts) else set()
    return lost | {HISTORY} if without_calls or answer in missing else lost
