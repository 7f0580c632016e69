"""Render chat turns with a model's own chat template, and find the spans of the text that carry loss."""

from pathlib import Path
from typing import TYPE_CHECKING

from common.data.examples import Conversation
from common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def set_chat_template(tokenizer: "PreTrainedTokenizerBase", template_file: str | None, model_name: str) -> None:
    """Use the template in `template_file`, if given. Raises InputError when the tokenizer then has none."""
    if template_file:
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
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}], tokenize=False
    )
    after = text[text.rindex(answer) + len(answer) :]
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [token for token in special if after.lstrip().startswith(token)]
    if not ends:
        raise InputError(
            f"the chat template writes {after!r} after an answer, which does not begin with a special token, so the "
            "model would not learn to stop; give a template that ends the assistant's turn with --chat-template-path"
        )
    return max(ends, key=len)


def render(
    tokenizer: "PreTrainedTokenizerBase", conversation: Conversation, end: str
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the model sees it, and the (start, stop) spans of characters that carry loss.

    A span begins where the template's generation prompt ends, which is where generation begins at inference, and ends
    with the end token. Some templates render a prompt differently from the same turns in the whole conversation
    (DeepSeek-R1 opens a thought in the prompt and drops thoughts from the history); there a span begins at the first
    character that differs.

    Raises ValueError when a turn holds the end token itself or cannot be found, jinja2.TemplateError when the template
    refuses the turns.
    """
    messages, tools = conversation.messages, conversation.tools
    for message in messages:
        if end in message["content"]:
            raise ValueError(f"a turn of the {message['role']} contains {end}, which would end it early; remove it")

    def rendered(turns: int, generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:turns], tools=tools, tokenize=False, add_generation_prompt=generation_prompt
        )

    text = rendered(len(messages), False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        start = _common_prefix(rendered(index, True), text)
        stop = text.find(end, start)
        if stop < 0 or start < (spans[-1][1] if spans else 0):
            raise ValueError(f"turn {index + 1}, of the assistant, cannot be found in what the chat template renders")
        spans.append((start, stop + len(end)))
    return text, spans


def _common_prefix(one: str, other: str) -> int:
    if other.startswith(one):
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
