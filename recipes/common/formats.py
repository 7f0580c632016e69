"""What a row of training data may look like, and how each form becomes one list of chat messages.

Five forms are known: alpaca, sharegpt, messages, prompt-completion and chatml-text. All become `messages` in the
field's usual shape ({"role", "content"}, with "tool_calls" where an assistant calls tools), because the model's own
chat template renders them in the end; so one file serves every model.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from .errors import InputError
from .rows import Faults, Row

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


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training example: its place in the data, chat messages, and the tools offered to the model, if any."""

    place: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; expected text")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]


class Form(BaseModel):
    """A form of row. Columns it does not name are allowed and ignored: ids, sources, licences."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(Form):
    type: Literal["text"]
    text: str


def _text_or_list(value: Any) -> str:
    return "as list" if isinstance(value, list) else "as text"


class Message(Form):
    """A turn in the shape of the OpenAI API and of Hugging Face's chat templates."""

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

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if not self.text().strip() and not self.tool_calls and self.role != "system":
            raise ValueError(f"the turn of the {self.role} is empty; expected text")
        return self

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def as_dict(self) -> dict[str, Any]:
        return {**self.model_dump(exclude_none=True), "content": self.text()}


class Turn(Form):
    """A turn of a ShareGPT conversation, with from/value or role/content."""

    role: str = Field(validation_alias=AliasChoices("from", "role"))
    value: str = Field(validation_alias=AliasChoices("value", "content"))

    @model_validator(mode="after")
    def _says_something(self) -> "Turn":
        if self.role not in SHAREGPT_ROLES:
            raise ValueError(f"unknown role {self.role!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
        if not self.value.strip() and self.role != "system":
            raise ValueError(f"the turn of {self.role!r} is empty; expected text")
        if self.is_call():
            _parse_json("a function call", self.value)
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


class Alpaca(Form):
    instruction: Text
    input: str | None = ""
    output: Text
    system: str | None = None

    def messages(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        return [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": self.output}]


class ShareGPT(Form):
    conversations: list[Turn]
    system: str | None = None
    tools: Any = None

    def messages(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [turn.as_dict() for turn in self.conversations]


class Messages(Form):
    conversation: list[Message] = Field(validation_alias="messages")
    tools: Any = None

    def messages(self) -> list[dict[str, Any]]:
        return [message.as_dict() for message in self.conversation]


TextOrMessages = Annotated[
    Annotated[Text, Tag("as text")] | Annotated[list[Message], Tag("as list")], Discriminator(_text_or_list)
]


class PromptCompletion(Form):
    prompt: TextOrMessages
    completion: TextOrMessages
    tools: Any = None

    def messages(self) -> list[dict[str, Any]]:
        return self._turns("user", self.prompt) + self._turns("assistant", self.completion)

    @staticmethod
    def _turns(role: str, turns: str | list[Message]) -> list[dict[str, Any]]:
        if isinstance(turns, str):
            return [{"role": role, "content": turns}]
        return [turn.as_dict() for turn in turns]


class ChatMLText(Form):
    text: Text

    def messages(self) -> list[dict[str, Any]]:
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\s*", self.text, flags=re.DOTALL)
        rest = re.sub(r"<\|im_start\|>\w+\n.*?<\|im_end\|>\s*", "", self.text, flags=re.DOTALL)
        if rest.strip():
            raise ValueError(f"not ChatML from end to end: {rest.strip()[:40]!r} stands outside its turns")
        return [Message(role=role, content=content).as_dict() for role, content in turns]


FORMATS: dict[str, type[Form]] = {
    "messages": Messages,
    "sharegpt": ShareGPT,
    "prompt-completion": PromptCompletion,
    "alpaca": Alpaca,
    "chatml-text": ChatMLText,
}
# The columns that tell a format. The first that fits wins: a row with `messages` and a stray `text` is messages.
COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "chatml-text": ("text",),
}


def column_map(pairs: Iterable[str]) -> dict[str, str]:
    """`["prompt=question"]` as {"question": "prompt"}: which column of the file stands for which of the format."""
    columns = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise InputError(f"--columns {pair}: expected OURS=THEIRS, for example prompt=question completion=answer")
        columns[theirs] = ours
    return columns


def conversations(
    rows: Iterable[Row], faults: Faults, form: str = "auto", columns: dict[str, str] | None = None
) -> Iterator[Conversation]:
    """Turn rows into conversations. A row that does not fit is added to `faults` and passed over.

    With form "auto" the first row decides the format for all; a row of another format is a fault that names both lines.
    `columns` maps a file's own column names to ours. Raises InputError when the first row fits no known format.
    """
    decided_at = "--format"
    for row in rows:
        fields = {(columns or {}).get(name, name): value for name, value in row.fields.items()}
        own = detect(fields)
        if form == "auto":
            if own is None:
                raise InputError(f"{row.place}: {_unknown_columns(fields)}")
            form, decided_at = own, row.place
        elif own not in (None, form):
            faults.add(row.place, f"this row is {own}, but {decided_at} is {form}; a source holds one format")
            continue
        conversation = _conversation(row.place, FORMATS[form], fields, faults)
        if conversation:
            yield conversation


def detect(fields: dict[str, Any]) -> str | None:
    """The name of the format whose columns `fields` has, or None."""
    return next((name for name, columns in COLUMNS.items() if all(column in fields for column in columns)), None)


def _conversation(place: str, form: type[Form], fields: dict[str, Any], faults: Faults) -> Conversation | None:
    try:
        example = form.model_validate(fields)
        messages = example.messages()
        tools = _tools(getattr(example, "tools", None))
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_context=False):
            faults.add(place, _plain(detail))
        return None
    except ValueError as error:
        faults.add(place, str(error))
        return None
    if not any(message["role"] == "assistant" for message in messages):
        faults.add(place, "no turn of the assistant; there is nothing to learn from this row")
        return None
    return Conversation(place, messages, tools)


def _parse_json(what: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} must be JSON: {error.msg.lower()} at character {error.pos + 1}") from None


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        tools = _parse_json("tools", tools) if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools: expected a list of tool descriptions, or that list as JSON text")
    return tools or None


def _plain(detail: Any) -> str:
    """A pydantic error in the words of this project: the field, what is wrong, what is expected."""
    field = ".".join(str(part) for part in detail["loc"] if part not in ("as text", "as list"))
    if detail["type"] == "missing":
        return f"{field}: missing"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if detail["type"].endswith("_type") or detail["type"] == "literal_error":
        return f"{field}: {message}, found {json.dumps(detail['input'], default=str, ensure_ascii=False)[:60]}"
    return f"{field}: {message}" if field else message


def _unknown_columns(fields: dict[str, Any]) -> str:
    known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in COLUMNS.items())
    hint = ""
    for needed in {column for columns in COLUMNS.values() for column in columns} - set(fields):
        if near := difflib.get_close_matches(needed, [name for name in fields if name], 1, cutoff=0.75):
            hint = f" (did you mean {needed!r} by {near[0]!r}?)"
    found = ", ".join(str(name) for name in fields)
    return (
        f"unknown format: the columns are {found}{hint}. Known: {known}.\n"
        "  Map columns with --columns, for example --columns prompt=question completion=answer"
    )
