"""The chat format of every model card in plain Python: its text, which of it carries loss, and what it drops of a row.

Written by what the formats do, without jinja and without looking for anything in a text: every piece is written, or
named as dropped, where its turn is written. The templates themselves are TRL's, from the installed package; those of
Qwen2 and Phi-4, which TRL does not ship, are minimal ones by their published format.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Turns = list[dict[str, Any]]

QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI4 = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
CALLS = """

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
LLAMA_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
)


class RefusedError(Exception):
    """The format cannot express the row."""


@dataclass
class Text:
    """A conversation as it is written: parts of text, each with loss or without, and what was dropped."""

    turns: Turns
    untrained: frozenset[int]
    parts: list[tuple[str, bool]] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)

    def say(self, text: str) -> None:
        self.parts.append((text, False))

    def trains(self, index: int) -> bool:
        return index > 0 and index not in self.untrained

    def answer(self, index: int, text: str, *, wrote: tuple[str, ...], opened: bool = False) -> None:
        """The turn of the assistant at `index`, in whose text are those of thoughts, content and calls that it has."""
        turn, loss = self.turns[index], self.trains(index)
        self.parts.append((text, loss))
        has = {
            "thoughts": bool(thoughts_of(turn)),
            "content": bool(answer_of(turn)),
            "calls": bool(turn.get("tool_calls")),
        }
        dropped = {name for name, there in has.items() if there and name not in wrote}
        if index == 0 and 0 not in self.untrained:
            self.lost.add("opening")
        if opened and loss:
            self.lost.add("opened")
        if not loss:
            self.lost |= {"old thoughts"} if "thoughts" in dropped else set()
            self.lost |= {"history"} if dropped & {"content", "calls"} else set()
            return
        if "calls" in dropped or ("content" in dropped and not has["calls"]):
            raise RefusedError(f"turn {index}: no {' and '.join(sorted(dropped))}")
        if "thoughts" in dropped and not has["content"] and not has["calls"]:
            raise RefusedError(f"turn {index}: a thought alone")
        self.lost |= {"thoughts"} if "thoughts" in dropped else set()
        self.lost |= {"beside"} if "content" in dropped else set()


def thoughts_of(turn: dict[str, Any]) -> list[str]:
    """The thoughts of a turn: its own field's, and those that its content has before the last </think>."""
    before, tag, _ = turn["content"].rpartition("</think>")
    pieces = [
        turn.get("reasoning_content") or "",
        *(before.replace("</think>", "<think>").split("<think>") if tag else []),
    ]
    return [piece.strip() for piece in pieces if piece.strip()]


def answer_of(turn: dict[str, Any]) -> str:
    return turn["content"].rpartition("</think>")[2].strip()


def dumped(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def function_of(call: dict[str, Any]) -> dict[str, Any]:
    return call.get("function", call)


def hermes_calls(turn: dict[str, Any]) -> list[str]:
    return [
        f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {dumped(function["arguments"])}}}\n</tool_call>'
        for function in map(function_of, turn.get("tool_calls") or [])
    ]


def hermes_results(text: Text, index: int) -> None:
    """A result of a tool, in a turn of the user with those beside it."""
    turns = text.turns
    if index == 0 or turns[index - 1]["role"] != "tool":
        text.say("<|im_start|>user")
    text.say(f"\n<tool_response>\n{turns[index]['content']}\n</tool_response>")
    if index + 1 == len(turns) or turns[index + 1]["role"] != "tool":
        text.say("<|im_end|>\n")


def qwen2(text: Text, tools: Turns | None) -> None:
    if tools:
        text.lost.add("tools")
    if text.turns[0]["role"] != "system":
        text.say("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    for index, turn in enumerate(text.turns):
        text.say(f"<|im_start|>{turn['role']}\n")
        if turn["role"] == "assistant":
            text.answer(index, turn["content"] + "<|im_end|>", wrote=raw(turn))
            text.say("\n")
        else:
            text.say(turn["content"] + "<|im_end|>\n")


def raw(turn: dict[str, Any]) -> tuple[str, ...]:
    """What a format writes that writes the content as it is: thoughts, too, where the content has them."""
    return (
        ("content",)
        if turn.get("reasoning_content", "") and turn["reasoning_content"].strip()
        else ("content", "thoughts")
    )


def qwen2_5(text: Text, tools: Turns | None) -> None:
    first = text.turns[0]
    system = (
        first["content"]
        if first["role"] == "system"
        else ("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
    )
    block = CALLS.format(tools="".join("\n" + dumped(tool) for tool in tools)) if tools else ""
    text.say(f"<|im_start|>system\n{system}{block}<|im_end|>\n")
    for index, turn in enumerate(text.turns):
        if turn["role"] == "assistant":
            text.say("<|im_start|>assistant\n")
            pieces = [turn["content"]] if turn["content"] or not turn.get("tool_calls") else []
            text.answer(index, "\n".join([*pieces, *hermes_calls(turn)]) + "<|im_end|>", wrote=("calls", *raw(turn)))
            text.say("\n")
        elif turn["role"] == "tool":
            hermes_results(text, index)
        elif index or turn["role"] == "user":
            text.say(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n")


def qwen3(text: Text, tools: Turns | None, always_thinks: bool = False) -> None:
    first = text.turns[0]
    system = first["content"] if first["role"] == "system" else None
    if tools:
        block = CALLS.format(tools="".join("\n" + dumped(tool) for tool in tools))
        text.say(
            "<|im_start|>system\n" + (block.removeprefix("\n\n") if system is None else system + block) + "<|im_end|>\n"
        )
    elif system is not None:
        text.say(f"<|im_start|>system\n{system}<|im_end|>\n")
    questions = [
        index
        for index, turn in enumerate(text.turns)
        if turn["role"] == "user"
        and not (turn["content"].startswith("<tool_response>") and turn["content"].endswith("</tool_response>"))
    ]
    last = questions[-1] if questions else len(text.turns) - 1
    for index, turn in enumerate(text.turns):
        if turn["role"] == "user" or (turn["role"] == "system" and index):
            text.say(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n")
        elif turn["role"] == "tool":
            hermes_results(text, index)
        elif turn["role"] == "assistant":
            thought, content, inner = turn.get("reasoning_content"), turn["content"], []
            if thought is None and "</think>" in content:
                pieces = content.split("</think>")
                before, _, opened = pieces[0].rstrip("\n").rpartition("<think>")
                thought, inner = opened.lstrip("\n"), [before.replace("<think>", ""), *pieces[1:-1]]
                content = pieces[-1].lstrip("\n")
            thought = thought or ""
            thinks = always_thinks or (index > last and (index + 1 == len(text.turns) or bool(thought)))
            stripped = content.lstrip("\n") if thinks else content
            head = f"<think>\n{thought.strip(chr(10))}\n</think>\n\n" if thinks else ""
            calls = hermes_calls(turn)
            # The break before the first call is there if the content is not empty, also where it is nothing but breaks.
            tail = ("\n" if content and calls else "") + "\n".join(calls)
            wrote = ("content", "calls", "thoughts") if thinks or not thought.strip() else ("content", "calls")
            if any(piece.strip() for piece in inner):
                wrote = tuple(name for name in wrote if name != "thoughts")
            text.say("<|im_start|>assistant\n")
            text.answer(index, head + stripped + tail + "<|im_end|>", wrote=wrote)
            text.say("\n")


def qwen3_training(text: Text, tools: Turns | None) -> None:
    qwen3(text, tools, always_thinks=True)


def tiny(text: Text, tools: Turns | None) -> None:
    turns = text.turns
    opened = turns[0]["role"] == "system"
    text.say(
        "<|im_start|>system\n" + (turns[0]["content"] if opened else "Answer briefly, in the language of the question.")
    )
    if tools:
        text.say("\n\nThese functions may be called, one a line:\n<tools>")
        text.say("".join("\n" + dumped(tool) for tool in tools))
        text.say("\n</tools>\nTo call one, write its name and its arguments as JSON:\n<tool_call>\n")
        text.say('{"name": <name>, "arguments": <arguments>}\n</tool_call>')
    text.say("<|im_end|>\n")
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            text.say("<|im_start|>assistant\n")
            pieces = [turn["content"]] if turn["content"] else []
            text.answer(index, "\n".join([*pieces, *hermes_calls(turn)]) + "<|im_end|>", wrote=("calls", *raw(turn)))
            text.say("\n")
        elif turn["role"] == "tool":
            hermes_results(text, index)
        elif index or not opened:
            text.say(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n")


def llama(text: Text, tools: Turns | None, date: str) -> None:
    turns = list(enumerate(text.turns))
    system = ""
    if text.turns[0]["role"] == "system":
        system, turns = text.turns[0]["content"].strip(), turns[1:]
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    text.say("<|endoftext|>" + head.format("system") + ("Environment: ipython\n" if tools else ""))
    text.say(f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n{system}<|eot_id|>")
    if tools:
        (index, first), *turns = turns
        if first["role"] == "assistant" and index not in text.untrained:
            if index:
                raise RefusedError("no turn for the tools before an answer")
            text.lost.add("opening")
        text.say(head.format("user") + LLAMA_TOOLS + "".join(dumped(tool, 4) + "\n\n" for tool in tools))
        text.say(first["content"].strip() + "<|eot_id|>")
    for index, turn in turns:
        calls = turn.get("tool_calls")
        if calls is not None:
            if len(calls) != 1:
                raise RefusedError("one call a turn")
            function = function_of(calls[0])
            text.say(head.format("assistant"))
            written = f'{{"name": "{function["name"]}", "parameters": {dumped(function["arguments"])}}}'
            text.answer(index, written + "<|eot_id|>", wrote=("calls",))
        elif turn["role"] == "tool":
            text.say(head.format("ipython") + dumped(turn["content"]) + "<|eot_id|>")
        else:
            text.say(head.format(turn["role"]))
            content = turn["content"].strip() + "<|eot_id|>"
            text.answer(index, content, wrote=raw(turn)) if turn["role"] == "assistant" else text.say(content)


def llama3_1(text: Text, tools: Turns | None) -> None:
    llama(text, tools, "26 Jul 2024")


def llama3_2(text: Text, tools: Turns | None) -> None:
    llama(text, tools, datetime.now().strftime("%d %b %Y"))


def gemma(text: Text, tools: Turns | None, system_turns: bool = False) -> None:
    if tools:
        text.lost.add("tools")
    turns, prefix = list(enumerate(text.turns)), ""
    if text.turns[0]["role"] == "system":
        if not system_turns:
            raise RefusedError("no system turn")
        prefix, turns = text.turns[0]["content"] + "\n\n", turns[1:]
    text.say("<|endoftext|>")
    for number, (index, turn) in enumerate(turns):
        if (turn["role"] == "user") != (number % 2 == 0):
            raise RefusedError("not in turn")
        role = "model" if turn["role"] == "assistant" else turn["role"]
        text.say(f"<start_of_turn>{role}\n" + (prefix if number == 0 else ""))
        content = turn["content"].strip() + "<end_of_turn>"
        text.answer(index, content, wrote=raw(turn)) if turn["role"] == "assistant" else text.say(content)
        text.say("\n")


def gemma3(text: Text, tools: Turns | None) -> None:
    gemma(text, tools, system_turns=True)


def phi3_5(text: Text, tools: Turns | None) -> None:
    if tools:
        text.lost.add("tools")
    for index, turn in enumerate(text.turns):
        if turn["role"] == "assistant":
            text.say("<|assistant|>\n")
            text.answer(index, turn["content"] + "<|end|>", wrote=raw(turn))
            text.say("\n")
        elif turn["role"] == "tool":
            text.lost |= {"results"} if turn["content"].strip() else set()
        elif turn["content"] or turn["role"] == "user":
            text.say(f"<|{turn['role']}|>\n{turn['content']}<|end|>\n")
    text.say("<|im_end|>")  # the tokenizer's end of a text


def phi4(text: Text, tools: Turns | None) -> None:
    if tools:
        text.lost.add("tools")
    for index, turn in enumerate(text.turns):
        text.say(f"<|im_start|>{turn['role']}<|im_sep|>")
        content = turn["content"] + "<|im_end|>"
        text.answer(index, content, wrote=raw(turn)) if turn["role"] == "assistant" else text.say(content)


def deepseek_r1(text: Text, tools: Turns | None, keeps_thoughts: bool = False) -> None:
    if tools:
        text.lost.add("tools")
    systems = [turn["content"] for turn in text.turns if turn["role"] == "system"]
    if any(system.strip() and system.strip() not in systems[-1] for system in systems):
        text.lost.add("system")
    text.say("<|endoftext|>" + (systems[-1] if systems else ""))
    after_result, results = False, 0
    for index, turn in enumerate(text.turns):
        if turn["role"] == "user":
            text.say("<｜User｜>" + turn["content"])
            after_result = False
        elif turn["role"] == "tool":
            text.say("\n" if results else "<｜tool▁outputs▁begin｜>")
            text.say(f"<｜tool▁output▁begin｜>{turn['content']}<｜tool▁output▁end｜>")
            after_result, results = True, results + 1
        elif turn["role"] == "assistant" and after_result:
            text.say("<｜tool▁outputs▁end｜>")
            text.answer(index, turn["content"] + "<｜end▁of▁sentence｜>", wrote=raw(turn))
            after_result = False
        elif turn["role"] == "assistant":
            content = turn["content"] if keeps_thoughts else turn["content"].split("</think>")[-1]
            dropped = content != turn["content"] and bool(thoughts_of(turn))
            opens = content.startswith("<think>\n")
            text.say("<｜Assistant｜>" + ("<think>\n" if opens else ""))
            wrote = ("content",) if dropped else raw(turn)
            content = content.removeprefix("<think>\n") if opens else content
            text.answer(index, content + "<｜end▁of▁sentence｜>", wrote=wrote, opened=not opens)
    if after_result:
        text.say("<｜tool▁outputs▁end｜>")


def deepseek_r1_training(text: Text, tools: Turns | None) -> None:
    deepseek_r1(text, tools, keeps_thoughts=True)


@dataclass(frozen=True)
class Family:
    """A chat format: its template, end token, the special tokens it writes, and its writer in plain Python."""

    template: str  # a template, or the name of TRL's file
    end: str
    special: tuple[str, ...]
    write: Callable[[Text, Turns | None], None]

    def chat_template(self) -> str:
        if "{" in self.template:
            return self.template
        if self.template == "tiny":
            return (ROOT / "data_samples" / "tiny" / "chat_template.jinja").read_text(encoding="utf-8")
        origin = find_spec("trl").origin  # TRL itself is slow to import
        return (Path(origin).parent / "chat_templates" / f"{self.template}.jinja").read_text(encoding="utf-8")

    def tokenizer(self, tiny: Any) -> Any:
        """A copy of the tiny tokenizer that knows this format."""
        import copy

        tokenizer = copy.deepcopy(tiny)
        tokenizer.add_special_tokens({"additional_special_tokens": list(self.special)})
        tokenizer.bos_token = "<|endoftext|>"
        tokenizer.chat_template = self.chat_template()
        return tokenizer


CHATML = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURN = ("<start_of_turn>", "<end_of_turn>")
R1 = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
FAMILIES = {
    "tiny": Family("tiny", "<|im_end|>", CHATML, tiny),
    "qwen2": Family(QWEN2, "<|im_end|>", CHATML, qwen2),
    "qwen2.5": Family("qwen2_5", "<|im_end|>", CHATML, qwen2_5),
    "qwen3": Family("qwen3", "<|im_end|>", CHATML, qwen3),
    "qwen3-training": Family("qwen3_training", "<|im_end|>", CHATML, qwen3_training),
    "llama-3.1": Family("llama3_1", "<|eot_id|>", HEADERS, llama3_1),
    "llama-3.2": Family("llama3_2", "<|eot_id|>", HEADERS, llama3_2),
    "gemma-2": Family("gemma", "<end_of_turn>", TURN, gemma),
    "gemma-3": Family("gemma3", "<end_of_turn>", TURN, gemma3),
    "phi-3.5": Family("phi3_5", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), phi3_5),
    "phi-4": Family(PHI4, "<|im_end|>", (*CHATML, "<|im_sep|>"), phi4),
    "deepseek-r1": Family("deepseek_r1_distill", "<｜end▁of▁sentence｜>", R1, deepseek_r1),
    "deepseek-r1-training": Family("deepseek_r1_distill_training", "<｜end▁of▁sentence｜>", R1, deepseek_r1_training),
}


def family_of(card: str) -> str:
    """The format of a model card, by its name: the longest that the card's name begins with."""
    name = card.removesuffix("-distill-qwen-7b")
    return max((family for family in FAMILIES if name.startswith(family)), key=len)
