"""Sample completions from a policy while it is trained: one class for every command that samples."""

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from common.data.examples import Conversation, Prompt
from common.lm.generate import Completion, generate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.lm.rollout.decoder import Decoder
    from common.lm.rollout.rows import Request
    from common.lm.rollout.weights import PolicyWeights

Backend = Literal["auto", "graph", "generate"]

KEPT_FROM = 40 * 2**30  # bytes of a GPU's memory from which copy, cache and graphs are kept between calls
LENGTH_STEP = 64  # the cache is as long as a multiple of it
RESERVE = 2**30  # bytes left free: a step's activations, logits and graphs
GENERATED = 128  # completions that `generate` makes at once
FEWEST_ROWS = 32  # below it a step is no faster, so that a copy of the weights is given up for more rows


class Rollouts:
    """Samples from one policy: `model` with `adapter`, or its base where that is None.

    The backend `graph` decodes by our own decoder over a copy of the weights with the adapter merged, on a CUDA GPU
    with one CUDA graph a step. The copy is made anew at every call, so it is never of another step. `generate` is
    transformers' own; `auto` takes it, and says so, for models that the decoder cannot run.

    Args:
        tokenizer: with a chat template and a pad token.
        end: the token that ends a completion; no other one does.
        seed: of the run. With `key` of each call and the index of a completion it gives the completion's noise.
        max_length: tokens of a prompt and a completion together, at most, as far as known; the cache has this length.
        max_rows: completions that are decoded at once, at most.
        gradient_checkpointing: as the model is trained; `generate` switches it off and on again.
        console: where a line goes when `auto` takes `generate`.

    `figures` has numbers of the last call: seconds, tokens a second, how often the weights were merged.
    """

    def __init__(
        self,
        model: "PeftModel | PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        end: str,
        *,
        seed: int,
        max_length: int = 0,
        adapter: str | None = "default",
        backend: Backend = "auto",
        max_rows: int = 256,
        gradient_checkpointing: bool = True,
        console: Any = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.end = end
        self.seed = seed
        self.adapter = adapter
        self.backend = backend
        self.max_length = max_length
        self.max_rows = max_rows
        self.gradient_checkpointing = gradient_checkpointing
        self.console = console
        self.weights: PolicyWeights | None = None
        self.decoder: Decoder | None = None
        self.rows_that_fit = max_rows
        self.figures: dict[str, float] = {}

    def sample(
        self,
        prompts: Sequence[Prompt | Conversation],
        max_new_tokens: int,
        temperature: float,
        key: str = "",
        advance: Callable[[int], object] = lambda count: None,
    ) -> list[Completion]:
        """One completion of each prompt: greedy at temperature 0, else sampled without top-k and top-p.

        The same prompt may be there several times: it is computed once. Two calls of a run with the same `key` draw
        the same completions from the same policy. `advance` is called with the number of completions that are new
        since its last call.
        """
        from common.lm.rollout.architecture import Unsupported

        if self.backend != "generate":
            try:
                return self._decode(prompts, max_new_tokens, temperature, key, advance)
            except Unsupported as reason:
                if self.backend == "graph":
                    raise
                self.backend = "generate"
                self.release()
                if self.console is not None:
                    self.console.print(f"Sampling with transformers' generate, which is slower: {reason}.")
        return self._generate(prompts, max_new_tokens, temperature, advance)

    def _generate(
        self,
        prompts: Sequence[Prompt | Conversation],
        max_new_tokens: int,
        temperature: float,
        advance: Callable[[int], object],
    ) -> list[Completion]:
        from unsloth import FastLanguageModel

        was_training = self.model.training
        FastLanguageModel.for_inference(self.model)
        completions: list[Completion] = []
        for first in range(0, len(prompts), GENERATED):
            batch = [as_conversation(prompt) for prompt in prompts[first : first + GENERATED]]
            completions += generate(
                self.model, self.tokenizer, batch, self.end, max_new_tokens, temperature, batch_size=GENERATED
            )
            advance(len(batch))
        if was_training:
            FastLanguageModel.for_training(self.model, use_gradient_checkpointing=self.gradient_checkpointing)
        return completions

    def _decode(
        self,
        prompts: Sequence[Prompt | Conversation],
        max_new_tokens: int,
        temperature: float,
        key: str,
        advance: Callable[[int], object],
    ) -> list[Completion]:
        from common.lm.rollout.rows import Request

        started = time.perf_counter()
        ids = prompt_ids(self.tokenizer, prompts)
        requests = [
            Request(tuple(prompt), self._noise_seed(key, index), max_new_tokens) for index, prompt in enumerate(ids)
        ]
        decoder = self._ready(requests)
        decoder.weights.refresh()
        merged = time.perf_counter()
        end = self.tokenizer.convert_tokens_to_ids(self.end)
        decoded = decoder.decode(requests, end, temperature, advance)
        tokens = sum(len(one.tokens) for one in decoded)
        if not self._keeps():
            self.release()
        seconds = time.perf_counter() - started
        self.figures = {
            "rollout/seconds": seconds,
            "rollout/refresh_seconds": merged - started,
            "rollout/tokens_per_second": tokens / seconds,
        }
        return [
            Completion(
                self.tokenizer.decode(one.tokens, skip_special_tokens=True),
                one.tokens[-1] == end,
                prompt,
                one.tokens,
                one.log_probs,
            )
            for prompt, one in zip(ids, decoded, strict=True)
        ]

    def release(self) -> None:
        """Free the copy of the weights, the cache and the graphs."""
        import torch

        held = self.weights is not None
        self.weights = self.decoder = None
        if held and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _noise_seed(self, key: str, index: int) -> int:
        digest = hashlib.sha256(f"{self.seed} {key} {index}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    def _ready(self, requests: "Sequence[Request]") -> "Decoder":
        """A decoder with room for the requests: as many rows as they are, `max_rows` allows and memory holds."""
        from common.lm.rollout.decoder import Decoder, size_for, size_within
        from common.lm.rollout.weights import PolicyWeights, merged_bytes

        longest = max(self.max_length, *(len(request.prompt) + request.limit for request in requests))
        length = longest + -longest % LENGTH_STEP
        wanted = size_for(min(self.max_rows, len(requests)))
        ready = self.decoder
        if ready is not None and ready.length >= length and ready.size >= min(wanted, self.rows_that_fit):
            return ready
        if ready is not None and ready.length >= length:
            wanted = max(wanted, ready.size)
        self.decoder = ready = None
        rows = wanted
        if self.weights is None:
            self.weights = PolicyWeights(self.model, self.adapter, copy=self._copies(merged_bytes(self.model), length))
        if self.weights.device.type == "cuda":
            rows = min(wanted, size_within(int((free_bytes() - RESERVE) // row_bytes(self.weights, length))))
        self.rows_that_fit = rows
        self.decoder = Decoder(self.weights, rows, length)
        return self.decoder

    def _copies(self, size: int, length: int) -> bool:
        """Whether a merged copy of `size` bytes fits beside the cache; else a 4-bit base is dequantized in a step."""
        import torch

        if not torch.cuda.is_available() or not getattr(self.model, "is_loaded_in_4bit", False):
            return True
        from common.lm.rollout.architecture import read_architecture

        config = self.model.config.get_text_config()
        a = read_architecture(config)
        row = 2 * config.num_hidden_layers * a.kv_heads * a.head_dim * length * 2
        return free_bytes() - RESERVE >= size + FEWEST_ROWS * row

    def _keeps(self) -> bool:
        import torch

        return not torch.cuda.is_available() or memory_limit() >= KEPT_FROM


def sample_completions(
    rollouts: Rollouts,
    prompts: Sequence[Prompt],
    count: int,
    max_new_tokens: int,
    temperature: float,
    what: str = "completions",
) -> list[list[Completion]]:
    """`count` completions of each prompt, with a progress bar that says `what` is made."""
    from common.run.progress import bar

    repeated = [prompt for prompt in prompts for _ in range(count)]
    with bar(what, len(repeated)) as advance:
        completions = rollouts.sample(repeated, max_new_tokens, temperature, advance=advance)
    return [completions[first : first + count] for first in range(0, len(completions), count)]


def as_conversation(prompt: Prompt | Conversation) -> Conversation:
    return prompt if isinstance(prompt, Conversation) else Conversation(prompt.place, prompt.prompt, prompt.tools)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt | Conversation]) -> list[list[int]]:
    """The tokens of each prompt, generation prompt included."""
    distinct = {id(prompt): as_conversation(prompt) for prompt in prompts}  # a group is the same prompt several times
    texts = [
        tokenizer.apply_chat_template(one.messages, tools=one.tools, tokenize=False, add_generation_prompt=True)
        for one in distinct.values()
    ]
    ids = dict(zip(distinct, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
    return [ids[id(prompt)] for prompt in prompts]


def memory_limit() -> int:
    """Bytes of the current GPU that this process may have."""
    import torch

    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction())


def free_bytes() -> int:
    """Bytes of the current GPU that this process can still allocate."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return min(free + reserved - allocated, memory_limit() - allocated)


def row_bytes(weights: "PolicyWeights", length: int) -> int:
    """Bytes of one row of a cache of `length` tokens: its keys and values, completion and log-probabilities."""
    a = weights.architecture
    return length * (2 * len(weights.layers) * a.kv_heads * a.head_dim * weights.dtype.itemsize + 12)
