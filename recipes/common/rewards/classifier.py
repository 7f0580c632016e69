"""A reward model as a reward function: any sequence classifier with one output, such as `make reward` merges."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.data.turns import Turns
from common.errors import InputError
from common.lm.adapter import check_base
from common.lm.hub import fetch, find_model, load_tokenizer
from common.lm.render import render_turns
from common.rewards.builtin import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BATCH = 8


class RewardModel:
    """A sequence classifier as a reward function: its score of the whole dialogue.

    `name` is as for --model. Raises InputError when there is no such model. It is loaded by `prepare`, or else at the
    first call; that imports transformers, so in a command that uses unsloth it comes after `import unsloth`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = find_model(name)
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._lock = threading.Lock()

    def prepare(self) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """Load the model and its tokenizer, if they are not loaded yet.

        Raises InputError when the checkpoint cannot be loaded, is not a reward model, or has no chat template.
        """
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
        return self._loaded

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        tools: Sequence[Turns | None] | None = None,
        **_: Any,
    ) -> Scores:
        """The model's score of each prompt with its completion: any number, higher is better.

        Raises as `prepare`, and InputError for a prompt that the model's chat template refuses.
        """
        import torch

        model, tokenizer = self.prepare()
        tools = tools or [None] * len(prompts)
        try:
            texts = [self._text(tokenizer, *row) for row in zip(prompts, completions, tools, strict=True)]
        except ValueError as error:
            raise InputError(f"model:{self.name}: {error}") from None
        scores: Scores = []
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

        source = fetch(self.model)
        tokenizer = load_tokenizer(source)
        if not tokenizer.chat_template:
            raise InputError(f"model:{self.name}: its tokenizer has no chat template to render a dialogue with")
        on_gpu = torch.cuda.is_available()
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                source.source,
                revision=source.revision,
                dtype=torch.bfloat16 if on_gpu else torch.float32,
                output_loading_info=True,
                trust_remote_code=source.trusted,  # without it transformers asks on the terminal
            )
        except (OSError, ValueError) as error:
            raise InputError(f"model:{self.name}: cannot be loaded as a sequence classifier: {error}") from error
        check_base(model, f"model:{self.name}")
        # A language model loads too, but with a head of random numbers.
        if loading["missing_keys"] or model.config.num_labels != 1:
            raise InputError(
                f"model:{self.name}: not a reward model: it has {model.config.num_labels} outputs, and the weights "
                f"missing from it are {', '.join(sorted(loading['missing_keys'])) or 'none'}; expected a sequence "
                "classifier with one output, trained and merged"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id  # the model finds the last token of a row by it
        return model.to("cuda" if on_gpu else "cpu").eval(), tokenizer

    @staticmethod
    def _text(tokenizer: "PreTrainedTokenizerBase", prompt: Any, completion: Any, tools: Turns | None) -> str:
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return render_turns(tokenizer, [*before, *after], tools)
