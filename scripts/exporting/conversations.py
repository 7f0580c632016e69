"""The texts whose tokens the gate compares: what a chat template, a tokenizer or a rewritten template may get wrong."""

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
            "required": ["a", "b"],
        },
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


# {name: (turns, tools)}
CONVERSATIONS: dict[str, tuple[list[dict], list[dict] | None]] = {
    "one turn": ([_user("What is 2 + 3?")], None),
    "several turns": (
        [_user("Name a colour."), _assistant("Blue."), _user("Another one."), _assistant("Red."), _user("Why?")],
        None,
    ),
    "a system turn": ([{"role": "system", "content": "Answer in one sentence."}, _user("What is water?")], None),
    "Chinese": ([_user("“二加三”等于多少？\n请用中文回答。"), _assistant("等于五。"), _user("谢谢！再见👋")], None),
    "spaces, digits and code": (
        [_user("  1234567 == 0x12D687\n\n\tif a:\n        return  b  # it's\r\n<b>&amp;</b> ")],
        None,
    ),
    "a tool": (
        [
            _user("What is 2 + 3?"),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "5", "tool_call_id": "call00001", "name": "add"},
            _assistant("5."),
            _user("And then?"),
        ],
        [ADD],
    ),
    "an empty turn": ([_user("")], None),
}
# For a model without a chat template.
PLAIN = {name: "\n".join(str(turn["content"]) for turn in turns) for name, (turns, _) in CONVERSATIONS.items()}
