"""Render chat turns with a model's own chat template, and find the spans of the text that carry loss.

`render_turns` is the only caller of a chat template.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data.examples import Conversation, Prompt
from common.data.rows import Faults
from common.data.turns import Turns
from common.errors import InputError
from common.lm.bounds import bounded
from common.lm.pieces import OPENED, OPENING, SPECIAL, lost_of_answer, lost_of_context, texts_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0  # for one conversation, which takes milliseconds
SENTINEL = "\0"  # an answer that begins as no other does


def set_chat_template(tokenizer: "PreTrainedTokenizerBase", template_file: str | None, model_name: str) -> None:
    """Use the template in `template_file`, if given. Raises InputError when the tokenizer then has none."""
    if template_file:
        if Path(template_file).exists() and not Path(template_file).is_file():
            raise InputError(f"--chat-template-path {template_file}: is no plain file")
        try:
            tokenizer.chat_template = Path(template_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--chat-template-path {template_file}: {error}") from None
    if not tokenizer.chat_template:
        raise InputError(
            f"{model_name} has no chat template, so it cannot read conversations. Take its instruct variant, or "
            "give a template with --chat-template-path FILE.jinja"
        )


def end_token(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The special token that the chat template writes at the end of an assistant's turn, such as <|im_end|>.

    Raises InputError when there is none: a model trained without one never stops.
    """
    answer = "an answer"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
    try:
        text = render_turns(tokenizer, turns)
    except ValueError as error:
        raise InputError(f"a question and its answer, as a test: {error}") from None
    _, found, after = text.rpartition(answer)
    ends = [token for token in special_tokens(tokenizer) if found and after.lstrip().startswith(token)]
    if not ends:
        writes = f"writes {after!r} after an answer" if found else "does not write what the assistant says"
        raise InputError(
            f"the chat template {writes}, which does not begin with a special token, so the model would not learn to "
            "stop; give a template that ends the assistant's turn with --chat-template-path"
        )
    return max(ends, key=len)


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The tokens that no text of a user should hold: those that mark turns, padding and the like."""
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def render_turns(
    tokenizer: "PreTrainedTokenizerBase",
    turns: Turns,
    tools: Turns | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The turns as the model sees them. Raises ValueError, with the way out, for anything that the template raises.

    So it does where the template takes longer than SECONDS, or more memory than `bounded` allows: it is a program of
    somebody else.
    """
    try:
        text: Any = bounded(
            SECONDS,
            lambda: tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            ),
        )
    except Exception as error:  # noqa: BLE001  a template is a program of somebody else: it may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"the chat template refuses it: {reason}; {_way_out(turns, reason)}") from None
    return text


def prompt_texts(tokenizer: "PreTrainedTokenizerBase", prompts: Iterable[Conversation]) -> list[str]:
    """The prompts as the model sees them, up to where it completes them.

    Raises InputError with every prompt that the chat template refuses.
    """
    texts, faults = [], Faults()
    for prompt in prompts:
        try:
            texts.append(render_turns(tokenizer, prompt.messages, prompt.tools, add_generation_prompt=True))
        except ValueError as error:
            faults.add(prompt.place, str(error))
    faults.stop()
    return texts


def as_conversation(prompt: Prompt | Conversation) -> Conversation:
    return prompt if isinstance(prompt, Conversation) else Conversation(prompt.place, prompt.prompt, prompt.tools)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt | Conversation]) -> list[list[int]]:
    """The tokens of each prompt, generation prompt included. Raises InputError as `prompt_texts`."""
    distinct = {id(prompt): as_conversation(prompt) for prompt in prompts}  # a group is the same prompt several times
    texts = prompt_texts(tokenizer, list(distinct.values()))
    ids = dict(zip(distinct, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
    return [ids[id(prompt)] for prompt in prompts]


def _way_out(turns: Turns, reason: str) -> str:
    roles = [turn["role"] for turn in turns]
    other = "give another template with --chat-template-path"
    if "system" in roles and ("system" in reason.lower() or "alternate" in reason):
        return f"put the text of the system turn (or of --system-prompt) at the beginning of the user's, or {other}"
    if "alternate" in reason and "tool" not in roles:
        return f"make one turn of neighbouring ones of the same role, or {other}"
    return f"change the row, or {other}"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text. `spans` are the characters with loss; `lost` names what the text lacks of the row."""

    text: str
    spans: list[tuple[int, int]]
    lost: tuple[str, ...]


class ChatFormat:
    """How a model reads turns: its tokenizer's chat template, and the `end` token of an answer.

    Raises InputError where `end_token` does.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.end = end_token(tokenizer)

    @cached_property
    def special(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in special_tokens(self.tokenizer)))

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation as the model sees it, and the spans of characters that carry loss.

        A span begins where the template's generation prompt ends, which is where generation begins at inference, and
        ends with the end token. Some templates render a prompt differently from the same turns in the whole
        conversation (DeepSeek-R1 opens a thought in the prompt and drops thoughts from the history); there a span
        begins with the first character that the assistant decides.

        Raises ValueError when a text holds the end token itself, when the template refuses the turns, and when an
        answer, a call or a turn of the user is not in the text.
        """
        turns, tools = conversation.messages, conversation.tools
        lost = self._marks(turns, tools)
        text = render_turns(self.tokenizer, turns, tools)
        spans: list[tuple[int, int]] = []
        gaps: list[tuple[str, Turns]] = []  # the text before each span, and the turns that should be in it
        context: Turns = []
        before = 0
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant" or index == 0 or index in conversation.untrained:
                if turn["role"] == "assistant" and index not in conversation.untrained:
                    lost.add(OPENING)
                context.append(turn)
                continue
            start, opened = self._start(text, turns, index, tools, before)
            stop = text.find(self.end, start)
            if stop < 0 or start < before:
                raise ValueError(f"turn {index + 1}, of the assistant, is not in what the chat template renders")
            try:
                lost |= lost_of_answer(text[start:stop], turn) | ({OPENED} if opened else set())
            except ValueError as error:
                raise ValueError(f"turn {index + 1}, of the assistant: {error}") from None
            gaps.append((text[before:start], context))
            before, context = stop + len(self.end), []
            spans.append((start, before))
        lost |= lost_of_context([*gaps, (text[before:], context)], tools)
        return Rendered(text, spans, tuple(sorted(lost)))

    def render_prompt(self, turns: Turns, tools: Turns | None) -> Rendered:
        """The turns up to where their completion begins; no character of it carries loss. Raises as `render`."""
        lost = self._marks(turns, tools)
        text = render_turns(self.tokenizer, turns, tools, add_generation_prompt=True)
        return Rendered(text, [], tuple(sorted(lost | lost_of_context([(text, turns)], tools))))

    def _marks(self, turns: Turns, tools: Turns | None) -> set[str]:
        """SPECIAL where a text holds a special token. Raises ValueError where that is the end token."""
        if not any(self.special.search(text) for text in texts_in([turns, tools])):
            return set()
        for turn in turns:
            if any(self.end in text for text in texts_in(turn)):
                raise ValueError(
                    f"a turn of the {turn['role']} contains {self.end}, which would end it early; remove it"
                )
        if any(self.end in text for text in texts_in(tools)):
            raise ValueError(f"the tools contain {self.end}, which would end their turn early; remove it")
        return {SPECIAL}

    def _start(self, text: str, turns: Turns, index: int, tools: Turns | None, before: int) -> tuple[int, bool]:
        """Where the answer at `index` begins, from `before` on; and whether it lacks the end of a generation prompt."""
        prompt = render_turns(self.tokenizer, turns[:index], tools, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt), False
        # Another answer tells where this one begins: where the two conversations differ, or at a generation prompt
        # before that.
        other = [*turns[:index], {"role": "assistant", "content": SENTINEL}, *turns[index + 1 :]]
        start = _common(render_turns(self.tokenizer, other, tools), text)
        header = prompt[_common(render_turns(self.tokenizer, turns[:index], tools), prompt) :]
        same = _common(prompt, text)
        if same >= start - len(header):  # up to the generation prompt, or a part of it, the prompt is as at inference
            return min(same, start), True
        # The prompt may end after the two begin to differ: it may write the beginning of every answer.
        found = text.rfind(header, before, start + max(len(header) - 1, 0)) + len(header)
        if found < len(header) or self.end in text[found:start]:
            return start, True
        return found, False


def _common(one: str, other: str) -> int:
    """The number of characters that two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
