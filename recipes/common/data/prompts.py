"""The prompts of a run, made ready to sample from."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import jinja2

from common.data.examples import Pair, Prompt, Rating
from common.data.rows import Faults
from common.errors import InputError

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
    too long, and with every prompt that the chat template refuses.
    """
    faults, texts = Faults(), []
    for prompt in prompts:
        try:
            texts.append(
                tokenizer.apply_chat_template(
                    prompt.prompt, tools=prompt.tools, tokenize=False, add_generation_prompt=True
                )
            )
        except (jinja2.TemplateError, ValueError) as error:
            faults.add(prompt.place, str(error))
    faults.stop()
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    kept = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= max_prompt_length]
    dropped = [prompt.place for prompt, length in zip(prompts, lengths, strict=True) if length > max_prompt_length]
    if not dropped:
        return kept, None
    share = len(dropped) / len(prompts)
    places = ", ".join(dropped[:5]) + (", ..." if len(dropped) > 5 else "")
    line = f"{len(dropped)} of {len(prompts)} prompts ({share:.1%}) are longer than {max_prompt_length} tokens"
    if share > max_truncated:
        raise InputError(
            f"{line}: {places}\nThat is more than --max-truncated {max_truncated:g} allows. The longest has "
            f"{max(lengths)} tokens: raise --max-prompt-length, shorten the prompts, or allow it."
        )
    return kept, f"{line} and were dropped: {places}"
