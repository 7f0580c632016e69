"""Generate completions for chat prompts, and continuations of documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.data.examples import Conversation, Document
from common.lm.documents import document_prompt
from common.lm.render import prompt_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion: its text without special tokens, and whether it has an end token (`ended`) or is truncated."""

    text: str
    ended: bool
    prompt_ids: list[int]  # (P,)
    completion_ids: list[int]  # (C,), the end token included where it ended
    log_probs: list[float] | None = None  # (C,), where they were drawn, at the temperature; None from `generate`


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Conversation | Document],
    end: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 64,
) -> list[Completion]:
    """One completion of each prompt: greedy at temperature 0, else sampled without top-k and top-p.

    `end` is the end token. Prompts are padded on the left, so that the completions of a batch begin in one column.
    Raises InputError with every prompt that the chat template refuses.
    """
    documents = [document_prompt(tokenizer, prompt) for prompt in prompts if isinstance(prompt, Document)]
    conversations = [prompt for prompt in prompts if isinstance(prompt, Conversation)]
    texts = documents or prompt_texts(tokenizer, conversations)  # all of one kind
    end_id = tokenizer.convert_tokens_to_ids(end)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    completions = []
    for first in range(0, len(prompts), batch_size):
        batch = texts[first : first + batch_size]
        inputs = tokenizer(batch, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt").to(
            model.device
        )  # (B, P)
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            eos_token_id=end_id,
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
            repetition_penalty=1.0,  # some models' own settings have another value, which changes the probabilities
            **sampling,
        )[:, inputs["input_ids"].shape[1] :]  # (B, C)
        for prompt, mask, row in zip(
            inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), tokens.tolist(), strict=True
        ):
            ended = end_id in row
            row = row[: row.index(end_id) + 1] if ended else row
            text = tokenizer.decode(row, skip_special_tokens=True)
            completions.append(Completion(text, ended, prompt[mask.count(0) :], row))
    return completions
