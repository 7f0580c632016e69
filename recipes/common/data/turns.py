"""The parts of the row formats: texts, chat messages, tool calls, and the turns that they become."""

import json
import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

Turns = list[dict[str, Any]]

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


def parse_json(what: str, text: str) -> Any:
    """Parse JSON inside a text field. Raises ValueError that names `what` it should be and where it breaks."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} must be JSON: {error.msg.lower()} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError(f"{what} must be JSON: it is nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{what} must be JSON: {error}") from None


def check_calls(calls: Any) -> list[dict[str, Any]]:
    """Return `calls`. Raises ValueError unless each has a name and arguments, at the top or under "function"."""
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        function = function if isinstance(function, dict) else {}
        if not isinstance(function.get("name"), str) or not isinstance(function.get("arguments"), dict | str):
            raise ValueError('a function call must hold a name and arguments, like {"name": "add", "arguments": {...}}')
    return calls


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; expected text")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]


class RowFormat(BaseModel):
    """A row format; `columns` are those that identify it. Columns that it does not declare are ignored, such as ids."""

    columns: ClassVar[tuple[str, ...]]
    model_config = ConfigDict(strict=True, extra="ignore")

    @classmethod
    def fits(cls, fields: dict[str, Any]) -> bool:
        """Does a row of these fields have this format?"""
        return all(column in fields for column in cls.columns)


class TextPart(RowFormat):
    type: Literal["text"]
    text: str


def _text_or_list(value: Any) -> str:
    return "as list" if isinstance(value, list) else "as text"


class Message(RowFormat):
    """A message as the OpenAI API and Hugging Face's chat templates have it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[
        Annotated[str, Tag("as text")] | Annotated[list[TextPart], Tag("as list")], Discriminator(_text_or_list)
    ] = ""
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _null_is_empty(cls, content: Any) -> Any:
        return "" if content is None else content

    @field_validator("tool_calls")
    @classmethod
    def _calls_functions(cls, calls: Any) -> Any:
        return calls and check_calls(calls)

    @model_validator(mode="after")
    def _is_not_empty(self) -> "Message":
        if not self.text().strip() and not self.tool_calls and self.role != "system":
            raise ValueError(f"the turn of the {self.role} is empty; expected text")
        return self

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def as_dict(self) -> dict[str, Any]:
        others = ("reasoning_content", "tool_calls", "tool_call_id", "name")
        given = {name: value for name in others if (value := getattr(self, name)) is not None}
        return {"role": self.role, "content": self.text(), **given}


class Turn(RowFormat):
    """A turn of a ShareGPT conversation, with from/value or role/content."""

    role: str = Field(validation_alias=AliasChoices("from", "role"))
    value: str = Field(validation_alias=AliasChoices("value", "content"))

    @model_validator(mode="after")
    def _is_not_empty(self) -> "Turn":
        if self.role not in SHAREGPT_ROLES:
            raise ValueError(f"unknown role {self.role!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
        if not self.value.strip() and self.role != "system":
            raise ValueError(f"the turn of {self.role!r} is empty; expected text")
        if self.is_call():
            check_calls(parse_json("a function call", self.value))
        return self

    def is_call(self) -> bool:
        return self.role in ("function_call", "tool_call")

    def as_dict(self) -> dict[str, Any]:
        role = SHAREGPT_ROLES[self.role]
        if not self.is_call():
            return {"role": role, "content": self.value}
        calls = json.loads(self.value)
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": role, "content": "", "tool_calls": [{"type": "function", "function": c} for c in calls]}


class Instruction(RowFormat):
    instruction: Text
    input: str | None = ""
    system: str | None = None

    def turns(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        return [*system, {"role": "user", "content": prompt}]


TextOrMessages = Annotated[
    Annotated[Text, Tag("as text")] | Annotated[list[Message], Tag("as list")], Discriminator(_text_or_list)
]


def as_turns(role: str, turns: str | list[Message]) -> list[dict[str, Any]]:
    """The turns as chat messages; a text is one turn of `role`."""
    if isinstance(turns, str):
        return [{"role": role, "content": turns}]
    return [turn.as_dict() for turn in turns]


def check_prompt(prompt: Turns) -> Turns:
    """Return `prompt`. Raises ValueError unless it ends with a turn of the user or of a tool."""
    last = prompt[-1]["role"] if prompt else None
    if last not in ("user", "tool"):
        ends = f"ends in a turn of the {last}" if last else "is empty"
        raise ValueError(f"prompt: {ends}; expected it to end in a turn of the user or of a tool")
    return prompt


def check_completion(name: str, answer: Turns) -> Turns:
    """Return `answer`. Raises ValueError unless it holds turns of the assistant, with tools' results in between."""
    if not answer:
        raise ValueError(f"{name}: is empty; expected an answer")
    for turn in answer:
        if turn["role"] not in ("assistant", "tool"):
            raise ValueError(f"{name}: holds a turn of the {turn['role']}; expected only what the assistant answers")
    if answer[-1]["role"] != "assistant":
        raise ValueError(f"{name}: ends in a turn of the tool; expected it to end in a turn of the assistant")
    return answer


def _text_of_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"should be text or a finite number, found {value}")
    return str(value)


def _number_of_text(value: Any) -> Any:
    """The number in a text, as CSV files have it."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


GoldAnswer = Annotated[Text, BeforeValidator(_text_of_number)]

LARGEST = 3e38  # about the largest float32; rewards are computed in float32

Score = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False), BeforeValidator(_number_of_text)]
