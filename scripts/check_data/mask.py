"""Examples as the model will see them: every token with its id, and whether the loss is on it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from common.data.examples import Document, Feedback, Pair, Prompt
from common.data.rows import Faults
from common.lm.chat import tokenize, tokenize_pairs
from common.lm.documents import tokenize_documents
from common.lm.feedback import tokenize_feedback
from rich.console import Console
from rich.text import Text

from check_data.lengths import Lengths, as_conversation
from check_data.tasks import Example

LOSS, CONTEXT, ID = "bold green", "default", "dim"


@dataclass(frozen=True, slots=True)
class Token:
    """A token: its id, its text, and whether the loss is on it. The text of a character is at its last token."""

    id: int
    text: str
    has_loss: bool


@dataclass(frozen=True, slots=True)
class MaskedRow:
    """A row in tokens, or one completion of a pair, which `label` names; `full_length` is that before truncation."""

    place: str
    label: str
    tokens: list[Token]
    full_length: int

    @property
    def trained(self) -> int:
        """How many tokens the loss is on."""
        return sum(token.has_loss for token in self.tokens)


def masked_rows(lengths: Lengths, examples: Iterable[Example], faults: Faults) -> Iterator[MaskedRow]:
    """The rows of examples, two of a pair. One that the model could learn nothing from is added to `faults`."""
    tokenizer, longest = lengths.tokenizer, lengths.max_length
    for example in examples:
        match example:
            case Prompt():
                if ids := lengths.prompt_ids(example, faults):
                    tokens = read_tokens(tokenizer, ids[:longest], [0] * len(ids[:longest]), longest)
                    yield MaskedRow(example.place, "prompt, for the model to complete", tokens, len(ids))
            case Pair():
                for pair in tokenize_pairs(tokenizer, [example], longest, faults):
                    for label, completion in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
                        mask = [0] * len(pair.prompt_ids) + [1] * len(completion)
                        tokens = read_tokens(tokenizer, pair.prompt_ids + completion, mask, longest)
                        full_length = pair.full_length if len(tokens) == longest else len(tokens)
                        yield MaskedRow(example.place, label, tokens, full_length)
            case Document():  # split, and not truncated
                for row in tokenize_documents(tokenizer, [example], longest, faults):
                    tokens = read_tokens(tokenizer, row.input_ids.tolist(), row.completion_mask.tolist(), longest)
                    yield MaskedRow(example.place, "raw text", tokens, len(tokens))
            case Feedback():
                for row in tokenize_feedback(tokenizer, [example], longest, faults):
                    mask = [0] * len(row.prompt_ids) + [1] * len(row.completion_ids)
                    tokens = read_tokens(tokenizer, row.prompt_ids + row.completion_ids, mask, longest)
                    yield MaskedRow(example.place, "good" if row.label else "bad", tokens, row.full_length)
            case _:
                for row in tokenize(tokenizer, [as_conversation(example)], longest, faults):
                    tokens = read_tokens(tokenizer, row.input_ids.tolist(), row.completion_mask.tolist(), longest)
                    yield MaskedRow(example.place, "", tokens, row.full_length)


def read_tokens(tokenizer: Any, ids: list[int], mask: list[int], most: int) -> list[Token]:
    """The first `most` tokens with their texts; a prompt that fills the length is as long as it is in the data."""
    ids, mask, tokens = ids[:most], mask[:most], []
    waiting: list[int] = []  # of a character that is not complete
    for index, (id, has_loss) in enumerate(zip(ids, mask, strict=True)):
        ends = index + 1 == len(ids) or mask[index + 1] != has_loss
        waiting.append(id)
        text = tokenizer.decode(waiting)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(waiting) < 4 and not ends:
            text = ""
        else:
            waiting = []
        tokens.append(Token(id, text, bool(has_loss)))
    return tokens


def show(console: Console, rows: Iterable[MaskedRow]) -> None:
    """Print rows, those tokens with loss in colour and between ▶ and ◀."""
    console.print(
        Text.assemble("Every token and its ", ("id", ID), "; ", ("▶the loss is on these◀", LOSS), " and on no other.")
    )
    for row in rows:
        truncated = f", truncated by --max-length from {row.full_length}" if row.full_length > len(row.tokens) else ""
        console.rule(f"{row.place} {row.label}", align="left", style="dim")
        console.print(f"{len(row.tokens)} tokens{truncated}, {row.trained} with loss", style="dim", highlight=False)
        console.print(coloured(row.tokens), soft_wrap=False)


def coloured(tokens: list[Token]) -> Text:
    """The tokens one after the other, each followed by its id."""
    text = Text()
    for index, token in enumerate(tokens):
        starts = token.has_loss and (index == 0 or not tokens[index - 1].has_loss)
        ends = token.has_loss and (index + 1 == len(tokens) or not tokens[index + 1].has_loss)
        shown = token.text.replace("\n", "⏎")
        text.append(f"{'▶' if starts else ''}{shown}", LOSS if token.has_loss else CONTEXT)
        text.append(f"·{token.id} ", ID)
        if ends:
            text.append("◀", LOSS)
        if token.text.endswith("\n"):
            text.append("\n")
    return text
