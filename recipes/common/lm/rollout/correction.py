"""How far the policy that samples is from the policy that is trained, token by token, and what to do about it.

Both have the same weights, but not the same kernels: in 16 bit their log-probabilities differ by rounding.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.errors import MachineError

if TYPE_CHECKING:
    from torch import Tensor

    from common.lm.generate import Completion

LARGEST_SPREAD = 0.5  # nats, the standard deviation of differences; rounding to 16 bit makes 0.02 to 0.1
LARGEST = 2.0  # of the weights of truncated importance sampling (arXiv:2510.11370 and others clip at 2)


def differences(completions: Sequence["Completion"], trained: Sequence["Tensor"]) -> "list[Tensor]":
    """Of each completion the log-probabilities in training minus those where its tokens were drawn, (C,) in nats.

    `trained` are those in training, (C,) each, at the temperature of sampling; of the first completions at least.
    """
    import torch

    pairs = zip(completions, trained, strict=False)
    return [log_probs.cpu() - torch.tensor(completion.log_probs) for completion, log_probs in pairs]


def rollout_mismatch(completions: Sequence["Completion"], trained: Sequence["Tensor"]) -> dict[str, float]:
    """Mean and standard deviation of the differences, and the share of ratios outside [0.5, 2].

    Empty for completions that come without log-probabilities, as those of transformers' generate do.
    """
    import torch

    if completions[0].log_probs is None:
        return {}
    all_differences = torch.cat(differences(completions, trained))
    ratios = all_differences.exp()
    return {
        "rollout/log_prob_diff_mean": float(all_differences.mean()),
        "rollout/log_prob_diff_std": float(all_differences.std(correction=0)),
        "rollout/ratio_outside": float(((ratios < 0.5) | (ratios > 2)).float().mean()),
    }


def check_agreement(completions: Sequence["Completion"], trained: Sequence["Tensor"], sampler: str) -> None:
    """Raise MachineError where the log-probabilities of `sampler` differ from those in training by more than rounding.

    Then it computes another model: weights in the wrong place, another attention or other positions.
    """
    spread = rollout_mismatch(completions, trained)["rollout/log_prob_diff_std"]
    if not spread < LARGEST_SPREAD:
        raise MachineError(
            f"{sampler}'s log-probabilities differ from the model's by {spread:.2f} nats (standard deviation; rounding "
            f"explains no more than {LARGEST_SPREAD}): it computes this model in another way. Give --rollouts=graph "
            "or --rollouts=generate"
        )


def correction(completions: Sequence["Completion"], trained: Sequence["Tensor"], width: int) -> "Tensor":
    """Weights (B, `width`) of the tokens' losses: truncated importance sampling, min(ratio, 2); 1 where no token is."""
    import torch

    weights = torch.ones(len(completions), width)
    for row, difference in enumerate(differences(completions, trained)):
        weights[row, : len(difference)] = difference.exp().clamp(max=LARGEST)
    return weights
