"""The DPO loss (arXiv:2305.18290, eq. 7) of pairs, each row of each pair run through the model alone and unpadded."""

import torch
import torch.nn.functional as F


def log_prob(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """The log-probability of a completion after its prompt: a scalar."""
    logits = model(input_ids=torch.tensor([prompt + completion], device=model.device)).logits[0].float()
    every = logits[:-1].log_softmax(-1)
    return sum(every[len(prompt) - 1 + index, token] for index, token in enumerate(completion))


def dpo_loss(model, pairs: list[tuple], max_length: int, beta: float) -> torch.Tensor:
    """The mean loss of (prompt, chosen, rejected), truncated at the end; the reference is the PEFT model's base."""
    losses = []
    for prompt, *completions in pairs:
        ratios = []
        for completion in completions:
            kept = completion[: max(max_length - len(prompt), 0)]
            policy = log_prob(model, prompt[:max_length], kept)
            with torch.no_grad(), model.disable_adapter():
                reference = log_prob(model, prompt[:max_length], kept)
            ratios.append(policy - reference)
        losses.append(-F.logsigmoid(beta * (ratios[0] - ratios[1])))
    return torch.stack(losses).mean()
