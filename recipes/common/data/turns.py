"""The parts of the row formats: texts, lists of turns, and the chat messages that they become."""

import math
import re
from decimal import Decimal
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, ValidationInfo

from common.data.json_values import parse_json
from common.data.messages import ROLES, Strict, Turn, note

Turns = list[dict[str, Any]]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; expected text")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]


def list_of_json(value: Any) -> Any:
    """A list, which CSV files and some Parquet files have as JSON text; an empty text is null."""
    if not isinstance(value, str):
        return value
    return parse_json("a list as text", value) if value.strip() else None


def _pairs(history: list[list[str]] | None) -> list[list[str]] | None:
    if any(len(pair) != 2 for pair in history or ()):
        raise ValueError("expected pairs of a prompt and an answer")
    return history


MessageList = Annotated[list[Turn], BeforeValidator(list_of_json)]

# Messages as the text of a list: as JSON, and as Python and pandas write them.
JSON_MESSAGES = re.compile(r'\s*\[\s*\{\s*"')
PYTHON_MESSAGES = re.compile(rf"\s*\[\s*\{{\s*'(role|from)':\s*'({'|'.join(ROLES)})'")


def _messages_of_text(value: Any, info: ValidationInfo) -> Any:
    """The messages in a text that is a list of messages as JSON, and any other value as it is."""
    if not isinstance(value, str):
        return value
    if PYTHON_MESSAGES.match(value):
        raise ValueError("is a list of messages as Python writes it; write the list, or that list as JSON text")
    if not JSON_MESSAGES.match(value):
        return value
    try:
        found = parse_json("messages", value)
    except ValueError:
        return value
    if not all(isinstance(turn, dict) and _is_message(turn) for turn in found):
        return value
    note(info, f"{info.field_name}: JSON text is read as the messages that it holds")
    return found


def _is_message(turn: dict[str, Any]) -> bool:
    """Whether an object can hardly be anything else than a turn."""
    role = turn.get("role", turn.get("from"))
    return isinstance(role, str) and role in ROLES and not turn.keys().isdisjoint(("content", "value", "tool_calls"))


TextOrMessages = Annotated[
    Annotated[
        Annotated[Text, Tag("as text")] | Annotated[list[Turn], Tag("as list")],
        Discriminator(lambda value: "as list" if isinstance(value, list) else "as text"),
    ],
    BeforeValidator(_messages_of_text),
]


class RowFormat(Strict):
    """A row format; `columns` are those that identify it. Columns that no format declares are noted, such as ids."""

    columns: ClassVar[tuple[str, ...]]
    system: str | None = None
    tools: Any = None

    @classmethod
    def fits(cls, fields: dict[str, Any]) -> bool:
        """Whether a row of these fields is of this format: all its columns are there."""
        return all(map(fields.__contains__, cls.columns))

    @classmethod
    def own_columns(cls) -> frozenset[str]:
        """The names of all columns that the format reads."""
        return _columns_of(cls)

    def with_system(self, turns: Turns) -> Turns:
        """The turns after the row's system prompt. Raises ValueError when they begin with another one."""
        if not self.system or not self.system.strip():
            return turns
        if turns and turns[0]["role"] == "system":
            if turns[0]["content"] != self.system:
                raise ValueError("system: the column and the first turn are two different system prompts; remove one")
            return turns
        return [{"role": "system", "content": self.system}, *turns]


@cache
def _columns_of(row_format: type[RowFormat]) -> frozenset[str]:
    return frozenset(str(field.validation_alias or name) for name, field in row_format.model_fields.items())


class Instruction(RowFormat):
    """An instruction with its input, after the turns of `history`, pairs of a prompt and an answer."""

    instruction: Text
    input: str | None = ""
    history: Annotated[list[list[Text]] | None, AfterValidator(_pairs), BeforeValidator(list_of_json)] = None

    def turns(self) -> Turns:
        roles = ("user", "assistant")
        before = [
            {"role": role, "content": text}
            for pair in self.history or ()
            for role, text in zip(roles, pair, strict=True)
        ]
        prompt = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        return [*before, {"role": "user", "content": prompt}]


def as_turns(role: str, turns: str | Turns) -> Turns:
    """The turns as chat messages; a text is one turn of `role`."""
    return [{"role": role, "content": turns}] if isinstance(turns, str) else turns


def take_marks(turns: Turns) -> tuple[Turns, frozenset[int]]:
    """The turns without their marks, and the indices of the assistant's turns that are marked to carry no loss."""
    if not any("train" in turn for turn in turns):
        return turns, frozenset()
    untrained = frozenset(
        index for index, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("train") is False
    )
    return [{key: value for key, value in turn.items() if key != "train"} for turn in turns], untrained


def without_prompt(prompt: Turns, completion: Turns) -> Turns:
    """The completion without the prompt, which some data repeat as its first turns."""
    repeated = len(completion) > len(prompt) and take_marks(completion[: len(prompt)])[0] == take_marks(prompt)[0]
    return completion[len(prompt) :] if repeated else completion


def check_prompt(prompt: Turns) -> Turns:
    """Return `prompt` without marks: none of it carries loss. Raises ValueError unless a user or a tool has the end."""
    last = prompt[-1]["role"] if prompt else None
    if last not in ("user", "tool"):
        ends = f"ends in a turn of the {last}" if last else "is empty"
        raise ValueError(f"prompt: {ends}; expected it to end in a turn of the user or of a tool")
    return take_marks(prompt)[0]


def check_completion(name: str, answer: Turns) -> Turns:
    """Return `answer`. Raises ValueError unless it holds turns of the assistant, with tools' results in between."""
    if not answer:
        raise ValueError(f"{name}: is empty; expected an answer")
    for turn in answer:
        if turn["role"] not in ("assistant", "tool"):
            raise ValueError(f"{name}: holds a turn of the {turn['role']}; expected only what the assistant answers")
    if answer[-1]["role"] != "assistant":
        raise ValueError(f"{name}: ends in a turn of the tool; expected it to end in a turn of the assistant")
    turns, untrained = take_marks(answer)
    if untrained:
        raise ValueError(f"{name}: a turn is marked to carry no loss, which only SFT can do; remove mark or row")
    return turns


def _text_of_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return value
    if not math.isfinite(value):
        raise ValueError(f"should be text or a finite number, found {value}")
    return str(value)


def _number_of_text(value: Any) -> Any:
    """The number in a text, as CSV files have it, or in a decimal of Parquet."""
    try:
        return float(value) if isinstance(value, str | Decimal) else value
    except ValueError:
        return value


GoldAnswer = Annotated[Text, BeforeValidator(_text_of_number)]

LARGEST = 3e38  # about the largest float32; rewards are computed in float32

Score = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False), BeforeValidator(_number_of_text)]
