"""Render conversations with a model's own chat template, and mark the tokens that carry loss.

A token carries loss when it belongs to a turn of the assistant. The end token does too: it teaches the model to stop.
Everything else is context: system and user turns, tool results, the template's headers. The loss mask is made from the
rendered text alone, so it works with every template, with or without generation markers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from common.data.examples import Conversation, Pair
from common.data.rows import Faults
from common.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.lm.feedback import TokenFeedback

BATCH = 1000  # conversations tokenized at once; a fast tokenizer then uses all cores


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized conversation; `completion_mask` is 1 where a token carries loss."""

    place: str
    input_ids: np.ndarray  # (T,) int32
    completion_mask: np.ndarray  # (T,) int8
    full_length: int  # T before truncation


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A tokenized preference pair. The prompt is context; both completions carry loss, end token included."""

    place: str
    prompt_ids: list[int]  # (P,)
    chosen_ids: list[int]  # (C,)
    rejected_ids: list[int]  # (R,)
    full_length: int  # P + max(C, R) before truncation


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


def set_pad_token(tokenizer: "PreTrainedTokenizerBase", wanted: str | None, end: str) -> None:
    """Set a pad token that is not the end token; otherwise the end would count as padding and not be learned.

    Takes `wanted`, else the tokenizer's own, else a token of its vocabulary made for padding, or the unknown token.
    Raises InputError when there is none.
    """
    vocabulary = tokenizer.get_vocab()
    if wanted is not None and wanted not in vocabulary:
        raise InputError(f"--pad-token {wanted}: not in this model's vocabulary")
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    spare = [token for token in added if "pad" in token.lower()] + ["<|endoftext|>", tokenizer.unk_token]
    for token in [wanted] if wanted else [tokenizer.pad_token, *spare]:
        if token in vocabulary and token != end:
            tokenizer.pad_token = token
            return
    raise InputError(f"no pad token: the model has only {end}, its end token; give another one with --pad-token")


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", conversations: Iterable[Conversation], max_length: int, faults: Faults
) -> Iterator[Example]:
    """Render, tokenize and mask conversations, truncated to the first `max_length` tokens.

    A conversation that the template refuses, or that has no token with loss within `max_length`, is a fault.
    """
    end = end_token(tokenizer)
    batch: list[tuple[str, str, list[tuple[int, int]]]] = []
    for conversation in conversations:
        try:
            text, spans = render(tokenizer, conversation, end)
        except (jinja2.TemplateError, ValueError) as error:
            faults.add(conversation.place, str(error))
            continue
        batch.append((conversation.place, text, spans))
        if len(batch) == BATCH:
            yield from _tokenize_batch(tokenizer, batch, max_length, faults)
            batch = []
    if batch:
        yield from _tokenize_batch(tokenizer, batch, max_length, faults)


def tokenize_pairs(
    tokenizer: "PreTrainedTokenizerBase", pairs: Iterable[Pair], max_length: int, faults: Faults
) -> Iterator[TokenPair]:
    """Render and tokenize preference pairs, both sides truncated to the first `max_length` tokens.

    A pair is a fault when the template refuses it or renders its prompt in two ways, and when its prompt fills
    `max_length`.
    """
    end = end_token(tokenizer)
    for pair in pairs:
        if len(pair.chosen) > 1 or len(pair.rejected) > 1:
            faults.add(
                pair.place, "chosen and rejected differ before their last turn; move what they share to the prompt"
            )
            continue
        try:
            texts, starts = [], []
            for answer in (pair.chosen, pair.rejected):
                text, spans = render(tokenizer, Conversation(pair.place, [*pair.prompt, *answer], pair.tools), end)
                texts.append(text[: spans[-1][1]])
                starts.append(spans[-1][0])
        except (jinja2.TemplateError, ValueError) as error:
            faults.add(pair.place, str(error))
            continue
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        prompts, completions = [], []
        for input_ids, offsets, start in zip(encoded["input_ids"], encoded["offset_mapping"], starts, strict=True):
            first = next(index for index, (begin, _) in enumerate(offsets) if begin >= start)
            prompts.append(input_ids[:first])
            completions.append(input_ids[first:])
        if prompts[0] != prompts[1]:
            faults.add(pair.place, "the chat template renders the prompt of chosen and that of rejected differently")
            continue
        prompt, (chosen, rejected) = prompts[0], completions
        if len(prompt) >= max_length:
            faults.add(
                pair.place,
                f"the prompt alone has {len(prompt)} tokens, so no completion is within {max_length}: the row would "
                "teach nothing; shorten it or raise --max-length",
            )
            continue
        room = max_length - len(prompt)
        longest = len(prompt) + max(len(chosen), len(rejected))
        yield TokenPair(pair.place, prompt, chosen[:room], rejected[:room], longest)


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


def _tokenize_batch(
    tokenizer: "PreTrainedTokenizerBase",
    batch: list[tuple[str, str, list[tuple[int, int]]]],
    max_length: int,
    faults: Faults,
) -> Iterator[Example]:
    # The template has written all special tokens already, the one at the beginning of the text too.
    encoded = tokenizer([text for _, text, _ in batch], add_special_tokens=False, return_offsets_mapping=True)
    for (place, _, spans), input_ids, offsets in zip(
        batch, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        # A token belongs to a span if it begins in it. A token that begins before it, because the last character of
        # the prompt and the first of the completion were merged, is context: at inference the prompt ends before it.
        mask = np.zeros(len(input_ids), dtype=np.int8)
        token = 0
        for start, stop in spans:
            while token < len(offsets) and offsets[token][0] < start:
                token += 1
            while token < len(offsets) and offsets[token][0] < stop:
                mask[token] = 1
                token += 1
        mask = mask[:max_length]
        if not mask.any():
            within = f" in the first {max_length} of its {len(input_ids)}" if len(input_ids) > max_length else ""
            faults.add(
                place, f"no trainable token{within}: the row would teach nothing; shorten it or raise --max-length"
            )
            continue
        yield Example(place, np.array(input_ids[:max_length], dtype=np.int32), mask, len(input_ids))


def check_truncation(
    examples: "Sequence[Example | TokenPair | TokenFeedback]", max_length: int, max_share: float
) -> str | None:
    """A line that counts and names the truncated rows, or None. Raises InputError above `max_share` of the rows."""
    truncated = [example for example in examples if example.full_length > max_length]
    if not truncated:
        return None
    longest = max(example.full_length for example in truncated)
    places = ", ".join(example.place for example in truncated[:5]) + (", ..." if len(truncated) > 5 else "")
    share = len(truncated) / len(examples)
    line = (
        f"{len(truncated)} of {len(examples)} rows ({share:.1%}) are longer than {max_length} tokens and truncated: "
        f"{places}"
    )
    if share > max_share:
        raise InputError(
            f"{line}\nThat is more than --max-truncated {max_share:g} allows. The longest has {longest} tokens: raise "
            "--max-length, shorten the rows, or allow it."
        )
    return line
