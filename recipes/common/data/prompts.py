"""The prompts of a run, made ready to sample from."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from common.data.examples import Pair, Prompt, Rating
from common.data.rows import Faults
from common.errors import InputError
from common.lm.chat import IdCheck
from common.lm.pieces import describe, some
from common.lm.render import ChatFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def as_prompt(example: Prompt | Pair | Rating) -> Prompt:
    """The prompt of an example. That of a pair or a rating has no gold answer."""
    if isinstance(example, Prompt):
        return example
    return Prompt(example.place, example.prompt, tools=example.tools)


def distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts without repetitions; of equal ones, tools included, the first stays."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(repr((prompt.prompt, prompt.tools)), prompt)
    return list(first.values())


def with_system_prompt(prompts: Iterable[Prompt], system_prompt: str | None) -> list[Prompt]:
    """The prompts with a system message in front of each, or unchanged without a `system_prompt`."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [replace(prompt, prompt=[*system, *prompt.prompt]) for prompt in prompts]


def drop_long(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], max_prompt_length: int, max_truncated: float
) -> tuple[list[Prompt], str | None]:
    """The prompts of at most `max_prompt_length` tokens, and a line that counts and names the others, or None.

    Tokens are those that the model reads, tools and generation prompt included. A longer prompt is dropped and not
    truncated: a truncated prompt is a different prompt. Raises InputError when more than the share `max_truncated` is
    too long, and as `render_prompts`.
    """
    texts, lost = render_prompts(tokenizer, prompts, max_truncated)
    faults, check = Faults(), IdCheck(tokenizer)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for prompt, ids in zip(prompts, encoded, strict=True):
        check.passes(prompt.place, ids, faults)
    faults.stop()
    lengths = [len(ids) for ids in encoded]
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= max_prompt_length]
    dropped = [prompt.place for prompt, length in zip(prompts, lengths, strict=True) if length > max_prompt_length]
    if not dropped:
        return kept, lost
    share = len(dropped) / len(prompts)
    line = f"{len(dropped)} of {len(prompts)} prompts ({share:.1%}) are longer than {max_prompt_length} tokens"
    if share > max_truncated or not kept:
        raise InputError(
            f"{line}: {some(dropped)}\nThat is more than --max-truncated {max_truncated:g} allows. The longest has "
            f"{max(lengths)} tokens: raise --max-prompt-length, shorten the prompts, or allow it."
        )
    return kept, "\n".join(filter(None, [f"{line} and were dropped: {some(dropped)}", lost]))


def render_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], max_truncated: float = 1.0
) -> tuple[list[str], str | None]:
    """The prompts as the model reads them, tools and generation prompt included; and lines about what is lost, or None.

    Raises InputError with every prompt that the chat template refuses, and when it drops a part of more than the share
    `max_truncated` of them.
    """
    chat, faults, rendered = ChatFormat(tokenizer), Faults(), []
    for prompt in prompts:
        try:
            rendered.append((prompt.place, chat.render_prompt(prompt.prompt, prompt.tools)))
        except ValueError as error:
            faults.add(prompt.place, str(error))
    faults.stop()
    lost = describe([(place, one.lost) for place, one in rendered], tokenizer.chat_template, max_truncated)
    return [one.text for _, one in rendered], lost
