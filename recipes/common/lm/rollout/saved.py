"""Sample from a model that is saved, with the adapter that is to be on it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from common.data.examples import Prompt
from common.data.prompts import render_prompts
from common.lm.hub import Model
from common.lm.load import load_chat_tokenizer, use_for_inference

if TYPE_CHECKING:
    from common.lm.rollout.rollouts import Rollouts

Sampled = TypeVar("Sampled")


def sample_saved(
    model: Model,
    adapter: str | None,
    prompts: Sequence[Prompt],
    sample: "Callable[[Rollouts], Sampled]",
    *,
    load_in_4bit: bool,
    seed: int,
) -> Sampled:
    """What `sample` draws from a model on the disk, which is loaded for it; its memory is free afterwards.

    What the chat template drops of the prompts is printed. Call it after `import unsloth`. Raises InputError where the
    template cannot render a prompt.
    """
    from common.lm.rollout.rollouts import Rollouts

    tokenizer, end = load_chat_tokenizer(model)
    if lost := render_prompts(tokenizer, prompts)[1]:
        print(lost)
    name = "default" if adapter else None
    return use_for_inference(
        model, adapter, load_in_4bit, lambda loaded: sample(Rollouts(loaded, tokenizer, end, seed=seed, adapter=name))
    )
