"""One model after the other in memory, each completing the same prompts."""

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.data.examples import Conversation, Prompt
from common.data.prompts import render_prompts
from common.lm.hub import Model, fetch
from common.lm.load import load_chat_tokenizer, load_for_inference
from common.run.progress import bar
from common.run.screen import loading

if TYPE_CHECKING:
    from common.lm.generate import Completion


@dataclass(frozen=True)
class Sampling:
    """How to complete prompts: greedily at temperature 0, else sampled."""

    max_new_tokens: int
    temperature: float
    load_in_4bit: bool
    seed: int


def complete(
    who: str, model: Model, adapter: str | None, prompts: list[Conversation], sampling: Sampling
) -> list["Completion"]:
    """One completion of each prompt, by a model that is loaded for it and whose memory is free afterwards.

    `who` names the model on the progress bar.
    """
    loading(model.name)
    import unsloth  # noqa: F401, I001  first: it patches what is imported after it
    import torch
    from common.lm.rollout.rollouts import Rollouts

    model = fetch(model)
    tokenizer, end = load_chat_tokenizer(model)
    if lost := render_prompts(tokenizer, [Prompt(one.place, one.messages, tools=one.tools) for one in prompts])[1]:
        print(lost)
    loaded = load_for_inference(model, adapter, sampling.load_in_4bit)
    rollouts = Rollouts(loaded, tokenizer, end, seed=sampling.seed, adapter="default" if adapter else None)
    with bar(f"completions of {who}", len(prompts)) as advance:
        completions = rollouts.sample(prompts, sampling.max_new_tokens, sampling.temperature, advance=advance)
    del loaded, rollouts
    gc.collect()
    torch.cuda.empty_cache()
    return completions
