"""Token ids of conversations and preference pairs, and the mask of the tokens that carry loss.

A token carries loss when it belongs to a turn of the assistant. The end token does too: it teaches the model to stop.
Everything else is context: system and user turns, tool results, the template's headers. The loss mask is made from the
rendered text alone, so it works with every template, with or without generation markers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from common.data.examples import Conversation, Pair
from common.data.rows import Faults
from common.errors import InputError
from common.lm.pieces import describe, some
from common.lm.render import ChatFormat, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1000  # conversations tokenized at once; a fast tokenizer then uses all cores


class Tokenized(Protocol):
    """What `trainable` needs to know of a row in tokens."""

    @property
    def place(self) -> str: ...
    @property
    def full_length(self) -> int: ...
    @property
    def lost(self) -> tuple[str, ...]: ...
    @property
    def teaches(self) -> bool: ...


T = TypeVar("T", bound=Tokenized)


@dataclass(frozen=True, slots=True)
class Example:
    """A tokenized conversation; `completion_mask` is 1 where a token carries loss."""

    place: str
    input_ids: np.ndarray  # (T,) int32
    completion_mask: np.ndarray  # (T,) int8
    full_length: int  # T before truncation
    lost: tuple[str, ...] = ()  # what the chat template drops of the row

    @property
    def teaches(self) -> bool:
        """Is a token with loss left after truncation?"""
        return bool(self.completion_mask.any())


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A tokenized preference pair. The prompt is context; both completions carry loss, end token included."""

    place: str
    prompt_ids: list[int]  # (P,)
    chosen_ids: list[int]  # (C,)
    rejected_ids: list[int]  # (R,)
    full_length: int  # P + max(C, R) before truncation
    lost: tuple[str, ...] = ()  # what the chat template drops of the row

    @property
    def teaches(self) -> bool:
        """Is a token of the completions left after truncation?"""
        return bool(self.chosen_ids)


def set_pad_token(
    tokenizer: "PreTrainedTokenizerBase", wanted: str | None, end: str, embedding_rows: int | None = None
) -> None:
    """Set a pad token that is not the end token; otherwise the end would count as padding and not be learned.

    Takes `wanted`, else the tokenizer's own, else a token of its vocabulary made for padding, or the unknown token; of
    those that the embedding has a row for. Raises InputError when there is none.
    """
    vocabulary = tokenizer.get_vocab()
    if wanted is not None and wanted not in vocabulary:
        raise InputError(f"--pad-token {wanted}: not in this model's vocabulary")
    if wanted is not None and embedding_rows and vocabulary[wanted] >= embedding_rows:
        raise InputError(
            f"--pad-token {wanted}: its id is {vocabulary[wanted]}, and the model's embedding has {embedding_rows} "
            "rows: the token was added without resizing the model; give another one"
        )
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    spare = [token for token in added if "pad" in token.lower()] + ["<|endoftext|>", tokenizer.unk_token]
    for token in [wanted] if wanted else [tokenizer.pad_token, *spare]:
        if token in vocabulary and token != end and vocabulary[token] < (embedding_rows or len(tokenizer)):
            tokenizer.pad_token = token
            return
    raise InputError(f"no pad token: the model has only {end}, its end token; give another one with --pad-token")


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", conversations: Iterable[Conversation], max_length: int, faults: Faults
) -> Iterator[Example]:
    """Render, tokenize and mask conversations, truncated to the first `max_length` tokens.

    A conversation that the template refuses, or that has no turn with loss, is a fault. One that has none within
    `max_length` has an empty mask: `trainable` counts it.
    """
    chat, check = ChatFormat(tokenizer), IdCheck(tokenizer)
    rendered_rows = _rendered(chat, conversations, faults)
    while batch := list(islice(rendered_rows, BATCH)):
        ids = _encode(tokenizer, [_parts(rendered) for _, rendered in batch])
        for (place, rendered), parts in zip(batch, ids, strict=True):
            input_ids = np.concatenate([np.array(part, dtype=np.int32) for part in parts])
            carries_loss = [np.full(len(part), index % 2, dtype=np.int8) for index, part in enumerate(parts)]
            mask = np.concatenate(carries_loss)
            if not mask.any():
                faults.add(place, "no trainable token: no answer carries loss, so the row would teach nothing")
            elif check.passes(place, input_ids, faults):
                length = len(input_ids)
                yield Example(place, input_ids[:max_length], mask[:max_length], length, rendered.lost)


def tokenize_pairs(
    tokenizer: "PreTrainedTokenizerBase", pairs: Iterable[Pair], max_length: int, faults: Faults
) -> Iterator[TokenPair]:
    """Render and tokenize preference pairs, both sides truncated to the first `max_length` tokens.

    A pair is a fault when the template refuses it or renders its prompt in two ways, and when both completions are the
    same in tokens. One whose prompt fills `max_length` has empty completions: `trainable` counts it.
    """
    chat, check = ChatFormat(tokenizer), IdCheck(tokenizer)
    for pair in pairs:
        if len(pair.chosen) > 1 or len(pair.rejected) > 1:
            faults.add(
                pair.place, "chosen and rejected differ before their last turn; move what they share to the prompt"
            )
            continue
        context = frozenset(range(len(pair.prompt)))
        answers = [
            Conversation(pair.place, [*pair.prompt, *answer], pair.tools, context)
            for answer in (pair.chosen, pair.rejected)
        ]
        sides = [rendered for _, rendered in _rendered(chat, answers, faults)]
        if len(sides) < 2:
            continue
        if not pair.prompt:
            faults.add(pair.place, "the pair has no prompt")
            continue
        (prompt, chosen), (other, rejected) = _encode(tokenizer, [_parts(side)[:2] for side in sides])
        if prompt != other:
            faults.add(pair.place, "the chat template renders the prompt of chosen and that of rejected differently")
            continue
        room, longest = max(0, max_length - len(prompt)), len(prompt) + max(len(chosen), len(rejected))
        if room and chosen[:room] == rejected[:room]:
            within = f"in the first {max_length} tokens" if chosen != rejected else "in tokens"
            faults.add(pair.place, f"chosen and rejected are the same {within}: the pair would teach nothing")
        elif check.passes(pair.place, [*prompt, *chosen, *rejected], faults):
            lost = tuple(sorted({*sides[0].lost, *sides[1].lost}))
            yield TokenPair(pair.place, prompt, chosen[:room], rejected[:room], longest, lost)


def trainable(
    examples: Sequence[T], max_length: int, max_share: float, template: str | None
) -> tuple[list[T], str | None]:
    """The examples that teach something, and lines that count and name those that are not trained as they are; or None.

    Those are truncated to `max_length`, have no token with loss left then, and are dropped, or lose a part in the chat
    `template`. Raises InputError where more than `max_share` of the rows is truncated, or loses a part.
    """
    kept, lines = [example for example in examples if example.teaches], []
    if truncated := [example for example in examples if example.full_length > max_length]:
        share, places = len(truncated) / len(examples), some([example.place for example in truncated])
        lines.append(
            f"{len(truncated)} of {len(examples)} rows ({share:.1%}) are longer than {max_length} tokens and "
            f"truncated: {places}"
        )
        if dropped := [example.place for example in examples if not example.teaches]:
            lines.append(f"{len(dropped)} of them have no token with loss in those, and are dropped: {some(dropped)}")
        if share > max_share or not kept:
            longest = max(example.full_length for example in truncated)
            raise InputError(
                "\n".join(lines) + f"\nThat is more than --max-truncated {max_share:g} allows. The longest has "
                f"{longest} tokens: raise --max-length, shorten the rows, or allow it."
            )
    if lost := describe([(example.place, example.lost) for example in examples], template, max_share):
        lines.append(lost)
    return kept, "\n".join(lines) or None


class IdCheck:
    """Refuses token ids that the embedding has no row for; all pass where `load_chat_tokenizer` did not learn them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.rows: int | None = getattr(tokenizer, "embedding_rows", None)

    def passes(self, place: str, ids: Sequence[int] | np.ndarray, faults: Faults) -> bool:
        """Have all ids a row? A fault if not."""
        largest = int(np.max(ids, initial=0))
        if self.rows is None or largest < self.rows:
            return True
        faults.add(
            place,
            f"{self.tokenizer.convert_ids_to_tokens(largest)} has the id {largest}, and the model's embedding has "
            f"{self.rows} rows: the token was added without resizing the model; take it out of the row",
        )
        return False


def _rendered(
    chat: ChatFormat, conversations: Iterable[Conversation], faults: Faults
) -> Iterator[tuple[str, Rendered]]:
    for conversation in conversations:
        try:
            yield conversation.place, chat.render(conversation)
        except ValueError as error:
            faults.add(conversation.place, str(error))


def _parts(rendered: Rendered) -> list[str]:
    """The text cut at its spans: context, completion, context, ..., completion, context."""
    cuts = [0, *(cut for span in rendered.spans for cut in span), len(rendered.text)]
    return [rendered.text[start:stop] for start, stop in pairwise(cuts)]


def _encode(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[list[str]]) -> list[list[list[int]]]:
    """The token ids of each part of each row.

    Prompt and completion are tokenized separately, as at inference: together, the end of one and the beginning of the
    other could be one token. The template has written all special tokens already, the one at the beginning too.
    """
    if _marks_beginnings(tokenizer):
        return _encode_whole(tokenizer, rows)
    flat = iter(tokenizer([part for parts in rows for part in parts], add_special_tokens=False)["input_ids"])
    return [[next(flat) for _ in parts] for parts in rows]


def _marks_beginnings(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Does the tokenizer write a mark, that of a space, where a text begins? SentencePiece's may."""
    alone, after = tokenizer(["a", "\na"], add_special_tokens=False)["input_ids"]
    return after[-len(alone) :] != alone


def _encode_whole(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[list[str]]) -> list[list[list[int]]]:
    """The same, of texts tokenized whole: a part would begin with a mark that it does not have in the text.

    A token belongs to the part in which it begins. One that began in the prompt is context, whatever it ends with.
    """
    encoded = tokenizer(["".join(parts) for parts in rows], add_special_tokens=False, return_offsets_mapping=True)
    found = []
    for parts, ids, offsets in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        stops, token, own = np.cumsum([len(part) for part in parts]).tolist(), 0, []
        for stop in stops:
            first = token
            while token < len(ids) and offsets[token][0] < stop:
                token += 1
            own.append(ids[first:token])
        found.append(own)
    return found
