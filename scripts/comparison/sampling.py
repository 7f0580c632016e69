"""One model after the other in memory, each completing the same prompts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.data.examples import Conversation, Prompt
from common.lm.hub import Model, fetch
from common.lm.rollout.saved import sample_saved
from common.run.progress import bar
from common.run.screen import loading

if TYPE_CHECKING:
    from common.lm.generate import Completion
    from common.lm.rollout.rollouts import Rollouts


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
    import unsloth  # noqa: F401  first: it patches what is imported after it

    def draw(rollouts: "Rollouts") -> list["Completion"]:
        with bar(f"completions of {who}", len(prompts)) as advance:
            return rollouts.sample(prompts, sampling.max_new_tokens, sampling.temperature, advance=advance)

    as_prompts = [Prompt(one.place, one.messages, tools=one.tools) for one in prompts]
    return sample_saved(fetch(model), adapter, as_prompts, draw, load_in_4bit=sampling.load_in_4bit, seed=sampling.seed)
