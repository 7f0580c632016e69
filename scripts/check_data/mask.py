"""Print examples as the model will see them: every token with its id, those that carry loss in colour and in ▶ ◀."""

from collections.abc import Iterable, Iterator

from common.data.examples import Pair, Prompt
from common.lm.chat import tokenize, tokenize_pairs
from rich.console import Console
from rich.text import Text

from .lengths import Lengths, as_conversation
from .tasks import Example

LOSS, CONTEXT, ID = "bold green", "default", "dim"


def show(console: Console, lengths: Lengths, examples: Iterable[Example]) -> None:
    """Print examples. One that the model could learn nothing from is a fault, added to those of `lengths`."""
    console.print(
        Text.assemble("Every token and its ", ("id", ID), "; ", ("▶the loss is on these◀", LOSS), " and on no other.")
    )
    for example in examples:
        for label, ids, mask, full_length in _sides(lengths, example):
            trained = sum(mask)
            cut = f", cut off at --max-length of up to {full_length}" if full_length > len(ids) else ""
            console.rule(f"{example.place} {label}", align="left", style="dim")
            console.print(f"{len(ids)} tokens{cut}, {trained} with loss", style="dim", highlight=False)
            console.print(coloured(lengths.tokenizer, ids, mask), soft_wrap=False)


def _sides(lengths: Lengths, example: Example) -> Iterator[tuple[str, list[int], list[int], int]]:
    """Label, tokens, mask and whole length: of a pair for both answers; a problem is a prompt, without loss."""
    tokenizer, longest, faults = lengths.tokenizer, lengths.max_length, lengths.faults
    match example:
        case Prompt():
            if ids := lengths.prompt_ids(example):
                yield "from here on the model answers", ids[:longest], [0] * len(ids[:longest]), len(ids)
        case Pair():
            for pair in tokenize_pairs(tokenizer, [example], longest, faults):
                for label, answer in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
                    ids, mask = pair.prompt_ids + answer, [0] * len(pair.prompt_ids) + [1] * len(answer)
                    yield label, ids, mask, max(len(ids), pair.full_length if len(ids) == longest else 0)
        case _:
            for tokens in tokenize(tokenizer, [as_conversation(example)], longest, faults):
                yield "", tokens.input_ids.tolist(), tokens.completion_mask.tolist(), tokens.full_length


def coloured(tokenizer: object, ids: list[int], mask: list[int]) -> Text:
    """The tokens one after the other, each followed by its id. A character of several tokens stands at its last."""
    text = Text()
    waiting: list[int] = []
    for index, (token, has_loss) in enumerate(zip(ids, mask, strict=True)):
        starts = has_loss and (index == 0 or not mask[index - 1])
        ends = has_loss and (index + 1 == len(ids) or not mask[index + 1])
        waiting.append(token)
        piece = tokenizer.decode(waiting)
        if piece.endswith("\N{REPLACEMENT CHARACTER}") and len(waiting) < 4 and not ends:
            piece = ""
        else:
            waiting = []
        style = LOSS if has_loss else CONTEXT
        text.append(f"{'▶' if starts else ''}{piece.replace(chr(10), '⏎')}", style)
        text.append(f"·{token} ", ID)
        if ends:
            text.append("◀", LOSS)
        if piece.endswith("\n"):
            text.append("\n")
    return text
