"""Sample from a model that is saved, with the adapter that is to be on it."""

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from common.data.examples import Prompt
from common.data.prompts import render_prompts
from common.lm.hub import Model
from common.lm.load import load_chat_tokenizer, load_for_inference

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
    import torch

    from common.lm.rollout.rollouts import Rollouts

    tokenizer, end = load_chat_tokenizer(model)
    if lost := render_prompts(tokenizer, prompts)[1]:
        print(lost)
    loaded = load_for_inference(model, adapter, load_in_4bit)
    rollouts = Rollouts(loaded, tokenizer, end, seed=seed, adapter="default" if adapter else None)
    sampled = sample(rollouts)
    del loaded, rollouts
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return sampled
