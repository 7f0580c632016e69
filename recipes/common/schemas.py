"""The five forms a row of training data may have, as pydantic models, and the chat messages each stands for."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

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
    """JSON inside a text field. Raises ValueError with `what` it was to be and where it breaks."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} must be JSON: {error.msg.lower()} at character {error.pos + 1}") from None


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
            parse_json("a function call", self.value)
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
