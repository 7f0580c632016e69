"""Log-probabilities and entropies of given completions, and estimates made from them. Everything is in nats.

This module imports torch only where a function needs it, so that a recipe can import it before it imports unsloth.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.lm.hidden_states import last_hidden, states_before

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

CHUNK = 128  # tokens whose logits are in memory at once: 78 MB in 32 bit for a vocabulary of 152,000


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probability of each token of one completion, and the entropy of the distribution that it was drawn from."""

    log_probs: "Tensor"  # (C,) float32
    entropies: "Tensor"  # (C,) float32


def score_tokens(
    model: "PreTrainedModel",
    rows: list[tuple[list[int], list[int]]],
    pad_token_id: int,
    batch_size: int = 4,
    temperature: float = 1.0,
) -> list[Scored]:
    """Log-probabilities and entropies of completions at a temperature, without gradient.

    A row is (prompt_ids, completion_ids), neither of them empty. Rows are padded on the right, where no token can
    attend to the padding. This runs the model's own forward, which any causal model has, and holds the logits of a
    whole batch: 4 rows of 1,024 tokens and a vocabulary of 152,000 take 1.2 GB in 16 bit. For training there is
    `completion_log_probs`, which needs less memory.
    """
    import torch

    scored = []
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        longest = max(len(prompt) + len(completion) for prompt, completion in batch)
        ids = torch.full((len(batch), longest), pad_token_id, dtype=torch.long)  # (B, T)
        mask = torch.zeros_like(ids)
        for index, (prompt, completion) in enumerate(batch):
            ids[index, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            mask[index, : len(prompt) + len(completion)] = 1
        with torch.no_grad():
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits  # (B, T, V)
        for index, (prompt, completion) in enumerate(batch):
            before = logits[index, len(prompt) - 1 : len(prompt) + len(completion) - 1].float()  # (C, V)
            tokens = torch.tensor(completion, device=before.device)
            log_probs, entropies = token_log_probs(before, tokens, temperature)
            scored.append(Scored(log_probs.cpu(), entropies.cpu()))
    return scored


def completion_log_probs(
    model: "PeftModel",
    input_ids: "Tensor",
    attention_mask: "Tensor",
    start: "Tensor",
    tokens: "Tensor",
    mask: "Tensor",
    temperature: float,
) -> "tuple[Tensor, Tensor]":
    """Log-probabilities (B, C) of completion tokens under softmax(logits / temperature), and entropies (B, C).

    Zeros at padding; the entropies have no gradient. Only the logits of completions are computed, CHUNK tokens at a
    time, and again in the backward pass: all at once they would take more memory than everything else. On a GPU, under
    a frozen head, `TokenLogProbs` computes them once. There padding is computed too: to leave it out, the computer
    would have to wait for the GPU, and a CUDA graph could not hold the pass.

    Args:
        model: a PEFT model with the adapter to use active.
        input_ids: (B, T) prompts and completions, padded on the right.
        attention_mask: (B, T) 0 at padding.
        start: (B,) the column of `input_ids` where the completion begins.
        tokens: (B, C) the completions, padded on the right.
        mask: (B, C) bool, false at padding.
        temperature: of the sampling that drew the tokens, above 0.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    causal = model.get_base_model()
    to_logits = causal.get_output_embeddings()
    cap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2 has one

    def score(states: "Tensor", chosen: "Tensor") -> "Tensor":
        logits = to_logits(states.to(to_logits.weight.dtype)).float()  # (N, V)
        logits = (logits / cap).tanh() * cap if cap else logits
        return torch.stack(token_log_probs(logits, chosen, temperature))  # (2, N)

    hidden = last_hidden(model, input_ids, attention_mask)  # (B, T, h)
    if hidden.is_cuda and is_frozen(to_logits):
        from common.lm.log_prob_kernels import TokenLogProbs

        states = states_before(hidden, start, mask.shape[1]).flatten(0, 1).to(to_logits.weight.dtype)  # (B C, h)
        scored = TokenLogProbs.apply(states, to_logits.weight, to_logits.bias, tokens.flatten(), temperature, cap)
        log_probs, entropies = (torch.where(mask, values.view_as(mask), 0.0) for values in scored)
        return log_probs, entropies
    states = states_before(hidden, start, mask.shape[1])[mask]  # (N, h)
    chunks = zip(states.split(CHUNK), tokens[mask].split(CHUNK), strict=True)
    log_probs, entropies = torch.cat([checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks], 1)  # (N,)
    zeros = log_probs.new_zeros(mask.shape)
    return zeros.masked_scatter(mask, log_probs), zeros.masked_scatter(mask, entropies.detach())


def is_frozen(head: Any) -> bool:
    """Whether an output layer is not trained, neither itself nor by an adapter."""
    import torch

    return type(head) is torch.nn.Linear and not head.weight.requires_grad


def token_log_probs(logits: "Tensor", tokens: "Tensor", temperature: float) -> "tuple[Tensor, Tensor]":
    """Log-probability of each token (N,) under softmax(logits / temperature), and that distribution's entropy (N,).

    `logits` are (N, V) float32. The entropy has no gradient.
    """
    log_probs = (logits / temperature).log_softmax(-1)  # (N, V)
    without_gradient = log_probs.detach()
    entropies = -(without_gradient.exp() * without_gradient).sum(-1)
    return log_probs.gather(-1, tokens[:, None])[:, 0], entropies


def kl_estimate(log_ratios: "Tensor", kind: str) -> "Tensor":
    """Estimates of KL(p || q) from tokens drawn from p; log_ratios = log p - log q, any shape.

    k1 is unbiased and may be negative, k2 is biased and has less variance, k3 is unbiased and never negative
    (joschu.net/blog/kl-approx.html).
    """
    if kind == "k1":
        return log_ratios
    if kind == "k2":
        return log_ratios**2 / 2
    return (-log_ratios).exp() - 1 + log_ratios


def masked_mean(values: "Tensor", mask: "Tensor") -> "Tensor":
    """Mean of the values (B, C) where the mask is true: a scalar."""
    return (values * mask).sum() / mask.sum()


def masked_sum(values: "Tensor", mask: "Tensor") -> "Tensor":
    """Sum of the values (B, C) where the mask is true: a scalar. A GPU picks none: the computer would wait for it."""
    return (values * mask).sum() if values.is_cuda else values[mask].sum()
