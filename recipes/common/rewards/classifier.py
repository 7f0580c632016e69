"""Where a reward model is: an adapter and its head, by `make reward`, or any sequence classifier with one output."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.errors import InputError
from common.lm.hub import fetch, find_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BATCH = 8


class RewardModel:
    """A sequence classifier as a reward function: its score of the whole dialogue. Loaded at the first call.

    `name` is what --model takes too. Raises InputError when there is no such model.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._model = find_model(name)
        self.local = self._model.local
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._lock = threading.Lock()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """The model's score of each prompt with its completion: any number, the higher the better.

        Raises InputError when the checkpoint cannot be loaded, is no reward model, or has no chat template.
        """
        import torch

        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
        model, tokenizer = self._loaded
        texts = [self._text(tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        with torch.inference_mode():
            for first in range(0, len(texts), BATCH):
                batch = texts[first : first + BATCH]
                inputs = tokenizer(
                    batch, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
                ).to(model.device)  # (B, T)
                logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits  # (B, 1)
                scores += logits[:, 0].float().tolist()
        return scores

    def _load(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        import torch
        from transformers import AutoModelForSequenceClassification

        source = fetch(self._model)
        tokenizer = load_tokenizer(source)
        if not tokenizer.chat_template:
            raise InputError(f"model:{self.name}: its tokenizer has no chat template to write a dialogue in")
        on_gpu = torch.cuda.is_available()
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                source.source,
                revision=source.revision,
                dtype=torch.bfloat16 if on_gpu else torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise InputError(f"model:{self.name}: cannot be loaded as a sequence classifier: {error}") from error
        # A language model loads too, with a head of random numbers.
        if loading["missing_keys"] or model.config.num_labels != 1:
            raise InputError(
                f"model:{self.name}: no reward model: it has {model.config.num_labels} outputs and lacks the weights "
                f"{', '.join(sorted(loading['missing_keys'])) or 'of none'}; expected a sequence classifier with one "
                "output, trained and merged"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id  # by it the model finds the last token of a row
        return model.to("cuda" if on_gpu else "cpu").eval(), tokenizer

    @staticmethod
    def _text(tokenizer: "PreTrainedTokenizerBase", prompt: Any, completion: Any) -> str:
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return tokenizer.apply_chat_template([*asked, *said], tokenize=False)
