"""One turn of a conversation, under the names that the OpenAI API, ShareGPT and other tools give its parts.

What a turn says is kept, honoured as a mark, refused, or noted: no key of it is dropped without a word.
"""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from common.data.json_values import json_problem, parse_json

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CALL_ROLES = ("function_call", "tool_call")  # their text is the call
PLAIN_ROLES = {role: ours for role, ours in ROLES.items() if role not in CALL_ROLES}

# The marks of OpenAI's fine-tuning and of axolotl (weight, train, training) and of ms-swift (loss, loss_scale).
MARKS = ("weight", "train", "training", "loss", "loss_scale")
OTHER_NAMES = {
    "from": "role",
    "value": "content",
    "reasoning": "reasoning_content",
    "thinking": "reasoning_content",
    "function_call": "tool_calls",  # the OpenAI API before it had several calls
    **dict.fromkeys(MARKS, "train"),
}
PARTIAL_MARKS = ("train_detail", "mask", "masked", "loss_mask")  # for a part of a turn, or of unclear sense
MEDIA = ("image", "images", "audio", "audios", "video", "videos")

CALL = 'a function call must hold a name and arguments, like {"name": "add", "arguments": {...}}'


class Strict(BaseModel):
    """Values are of the types that are declared, and not converted."""

    model_config = ConfigDict(strict=True, extra="ignore")


def note(info: ValidationInfo, what: str) -> None:
    """Add to the notes of the row, the set that is the context of its validation."""
    if info.context is not None:
        info.context.add(what)


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, "", [] or {}."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _text_of_parts(content: Any, info: ValidationInfo) -> Any:
    """The text of a content made of typed parts. Raises ValueError for a part that is not text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text":
            what = f"of type {str(kind)[:40]!r}" if kind else "that is no object"
            raise ValueError(f"holds a part {what}; only text is trained")
        if not isinstance(part.get("text"), str):
            raise ValueError("holds a part of type 'text' without its text")
        for key in part.keys() - {"type", "text"}:
            if not is_empty(part[key]):
                note(info, f"the key {key[:60]!r} of a part of a turn is not read")
        texts.append(part["text"])
    return "".join(texts)


def _as_calls(calls: Any, info: ValidationInfo) -> Any:
    """Function calls as the OpenAI API has them, but their arguments as objects; None for no call.

    Raises ValueError for a call without a name, and for arguments that are no object, nor one as JSON text.
    """
    if isinstance(calls, str) and calls:
        calls = parse_json("a function call", calls)
    if is_empty(calls):
        return None
    return [_as_call(call, info) for call in (calls if isinstance(calls, list) else [calls])]


def _as_call(call: Any, info: ValidationInfo) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(CALL)
    name, arguments = function["name"], function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json("the arguments of a function call", arguments)
    if not name or not isinstance(arguments, dict):
        raise ValueError(CALL)
    if problem := json_problem(arguments):
        raise ValueError(f"the arguments of a function call must be JSON: {problem}")
    if call.get("type") not in (None, "function"):
        raise ValueError(f"a call of type {str(call['type'])[:40]!r}; only calls of functions are trained")
    known = {"id", "type", "function", *(() if "function" in call else ("name", "arguments"))}
    for key in [*(call.keys() - known), *(function.keys() - known - {"name", "arguments"})]:
        note(info, f"the key {key[:60]!r} of a function call is not read")
    given = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**given, "type": "function", "function": {"name": name, "arguments": arguments}}


class Message(Strict):
    """A turn: `role` is system, user, assistant or tool. `train` is whether it carries loss, where the row says so."""

    role: str
    content: Annotated[str, BeforeValidator(_text_of_parts)] = ""
    reasoning_content: str | None = None
    tool_calls: Annotated[list[dict[str, Any]] | None, BeforeValidator(_as_calls)] = None
    tool_call_id: str | None = None
    name: str | None = None
    train: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_our_names(cls, turn: Any, info: ValidationInfo) -> Any:
        if not isinstance(turn, dict):
            return turn
        named: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for key, value in turn.items():
            ours = OTHER_NAMES.get(key, key)
            if value is None or (ours != key and is_empty(value)):
                continue
            if ours == "train":
                value = _mark(key, value)
            if ours in named and named[ours] != value:
                raise ValueError(f"{origins[ours]} and {key} contradict each other; remove one")
            named[ours], origins[ours] = value, key
        for key in named.keys() - cls.model_fields.keys():
            if not is_empty(named[key]):
                _refuse_or_note(key, info)
        if named.get("role") in CALL_ROLES:
            if "tool_calls" in named:
                raise ValueError(f"a turn of {named['role']!r} with {origins['tool_calls']} as well; remove one")
            named["tool_calls"] = named.pop("content", None) or None
            if named["tool_calls"] is None:
                raise ValueError(CALL)
        return named

    @field_validator("role")
    @classmethod
    def _our_role(cls, role: str) -> str:
        if role not in ROLES:
            raise ValueError(f"unknown role {role[:40]!r}; expected one of {', '.join(ROLES)}")
        return ROLES[role]

    @model_validator(mode="after")
    def _is_whole(self) -> "Message":
        if not self.content.strip() and not self.tool_calls and self.role != "system":
            raise ValueError(f"the turn of the {self.role} is empty; expected text")
        if self.role != "assistant":
            if self.tool_calls:
                raise ValueError(f"the turn of the {self.role} calls functions; only the assistant can")
            if self.reasoning_content and self.reasoning_content.strip():
                raise ValueError(f"the turn of the {self.role} holds reasoning; only the assistant's is trained")
            if self.train:
                raise ValueError(f"the turn of the {self.role} is marked to carry loss; only the assistant's can")
        return self

    def as_dict(self) -> dict[str, Any]:
        """The turn for chat templates, and `train` where the row says it, which `common.data.turns` takes out."""
        others = ("reasoning_content", "tool_calls", "tool_call_id", "name", "train")
        given = {name: value for name in others if (value := getattr(self, name)) is not None}
        return {"role": self.role, "content": self.content, **given}


def _as_turn(value: Any, validate: ValidatorFunctionWrapHandler) -> dict[str, Any]:
    """A turn as `Message.as_dict` gives it. One of a role and a text alone, as most are, needs no further look."""
    if isinstance(value, dict) and len(value) == 2:
        role, content = value.get("role"), value.get("content")
        ours = PLAIN_ROLES.get(role) if isinstance(role, str) else None
        if ours and isinstance(content, str) and (content.strip() or ours == "system"):
            return {"role": ours, "content": content}
    return validate(value).as_dict()


Turn = dict[str, Any] if TYPE_CHECKING else Annotated[Message, WrapValidator(_as_turn)]


def _mark(key: str, value: Any) -> bool:
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise ValueError(f"{key} is {str(value)[:40]!r}; expected 0 or 1, for a turn carries loss or carries none")
    return bool(value)


def _refuse_or_note(key: str, info: ValidationInfo) -> None:
    if key in MEDIA:
        raise ValueError(f"holds {key}; only text is trained")
    if key in PARTIAL_MARKS:
        raise ValueError(f"{key} is not supported; weight 0 or 1 marks a whole turn, and other rows must do without")
    note(info, f"the key {key[:60]!r} of a turn is not read")
