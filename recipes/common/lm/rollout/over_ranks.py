"""Sample and score tokens on every rank of a run, a share of the completions on each: together those of one process.

This module imports torch only where a function needs it, so that a recipe can import it before it imports unsloth.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from common.run.ranks import gather_objects, rank, share, world_size

if TYPE_CHECKING:
    from common.data.examples import Conversation, Prompt
    from common.lm.generate import Completion
    from common.lm.log_probs import Scored
    from common.lm.rollout.rollouts import Rollouts

T = TypeVar("T")


def of_rank(rows: Sequence[T]) -> list[T]:
    """The contiguous share of these rows, which all ranks have alike, that this rank samples, scores or trains on."""
    return share(rows, rank(), world_size())


def sample_over_ranks(
    rollouts: "Rollouts",
    prompts: "Sequence[Prompt | Conversation]",
    max_new_tokens: int,
    temperature: float,
    key: str = "",
) -> "list[Completion]":
    """One completion of each of `prompts`, which every rank gives alike; all completions, on every rank.

    A rank samples a contiguous share, as many completions as the others or one fewer, so that it ends when they do, but
    for the longest completion. The noise belongs to the index of a completion among all of them: however many ranks
    there are, the completions are the same, apart from those of --rollouts=generate. `rollouts.figures` become those
    of all ranks.
    """
    if world_size() == 1:
        return rollouts.sample(prompts, max_new_tokens, temperature, key)
    drawn, figures = [], None
    if own := of_rank(prompts):
        first = of_rank(range(len(prompts)))[0]
        with own_random_numbers(rollouts.noise_seed(key, first)):  # of `generate`, which has no other noise
            drawn = rollouts.sample(own, max_new_tokens, temperature, key, first=first)
        figures = rollouts.figures
    parts = gather_objects((drawn, figures, rollouts.backend))
    rollouts.figures = together([figures for _, figures, _ in parts if figures])
    completions = [completion for drawn, _, _ in parts for completion in drawn]
    if any(backend == "generate" for _, _, backend in parts):  # where one rank had to take it, so do the others
        rollouts.release()
        rollouts.backend = "generate"
        completions = [replace(completion, log_probs=None) for completion in completions]
    return completions


def score_tokens_over_ranks(
    model: Any, completions: "Sequence[Completion]", pad_token_id: int, temperature: float = 1.0
) -> "list[Scored]":
    """`score_tokens` of these completions, of which each rank scores its share; of all, on every rank."""
    from common.lm.log_probs import score_tokens

    spans = [(completion.prompt_ids, completion.completion_ids) for completion in of_rank(completions)]
    parts = gather_objects(score_tokens(model, spans, pad_token_id, temperature=temperature))
    return [scored for part in parts for scored in part]


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Random numbers from `seed` within the block; after it those before it, which all ranks draw alike."""
    import torch

    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        yield


def together(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of ranks that sampled at the same time as those of one: tokens of all, in the time of the slowest."""
    if not figures:
        return {}
    seconds = max(one["rollout/seconds"] for one in figures)
    tokens = sum(one["rollout/tokens_per_second"] * one["rollout/seconds"] for one in figures)
    return {
        "rollout/seconds": seconds,
        "rollout/refresh_seconds": max(one["rollout/refresh_seconds"] for one in figures),
        "rollout/tokens_per_second": tokens / seconds,
    }
