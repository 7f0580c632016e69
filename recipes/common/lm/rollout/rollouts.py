"""Sample completions from a policy while it is trained: one class for every command that samples."""

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from common.data.examples import Conversation, Prompt
from common.lm.generate import Completion, generate
from common.lm.render import prompt_texts
from common.lm.rollout.architecture import Architecture, Unsupported, read_architecture
from common.run.progress import bar
from common.run.screen import console

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.lm.rollout.decoder import Decoder
    from common.lm.rollout.rows import Request
    from common.lm.rollout.weights import PolicyWeights

Backend = Literal["auto", "graph", "generate"]

LENGTH_STEP = 128  # the cache is as long as a multiple of it; when it grows, graphs are recorded anew
RESERVE = 2**30  # bytes left free: a step's activations, logits and graphs
GENERATED = 128  # completions that `generate` makes at once
FEWEST_ROWS = 32  # below it a step is no faster, so that a copy of the weights is given up for more rows


class Rollouts:
    """Samples from one policy: `model` with `adapter`, or its base where that is None.

    The backend `graph` decodes by our own decoder over a copy of the weights with the adapter merged, on a CUDA GPU
    with one CUDA graph a step. The copy is made anew at every call, so it is never of another step. `generate` is
    transformers' own; `auto` takes it, and says so, for models that the decoder cannot run, and where its first call
    ends in a RuntimeError, such as for want of memory.

    Args:
        tokenizer: with a chat template and a pad token.
        end: the token that ends a completion; no other one does.
        seed: of the run. With `key` of each call and the index of a completion it gives the completion's noise.
        max_rows: completions that are decoded at once, at most.

    `figures` has numbers of the last call: seconds, tokens a second, how often the weights were merged.
    """

    def __init__(
        self,
        model: "PeftModel | PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        end: str,
        *,
        seed: int,
        adapter: str | None = "default",
        backend: Backend = "auto",
        max_rows: int = 256,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.end = end
        self.seed = seed
        self.adapter = adapter
        self.backend = backend
        self.max_rows = max_rows
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
        if not prompts:
            return []
        if self.backend != "generate":
            try:
                return self._decode(prompts, max_new_tokens, temperature, key, advance)
            except (Unsupported, RuntimeError) as reason:
                if self.backend == "graph" or (self.figures and not isinstance(reason, Unsupported)):
                    raise  # once it has worked, an error is no reason to sample in another way
                self.backend = "generate"
                self.release()
                why = str(reason).splitlines()[0]
                console().print(f"Sampling with transformers' generate, which is slower: {why}.", soft_wrap=True)
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
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        FastLanguageModel.for_inference(self.model)
        completions: list[Completion] = []
        for first in range(0, len(prompts), GENERATED):
            batch = [as_conversation(prompt) for prompt in prompts[first : first + GENERATED]]
            completions += generate(
                self.model, self.tokenizer, batch, self.end, max_new_tokens, temperature, batch_size=GENERATED
            )
            advance(len(batch))
        if was_training:
            FastLanguageModel.for_training(self.model, use_gradient_checkpointing=checkpointing)
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
        held = self.weights is not None
        self.weights = self.decoder = None
        if held and on_gpu():
            import torch

            torch.cuda.empty_cache()

    def _noise_seed(self, key: str, index: int) -> int:
        digest = hashlib.sha256(f"{self.seed} {key} {index}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)

    def _ready(self, requests: "Sequence[Request]") -> "Decoder":
        """A decoder with room for the requests: as many rows as they are, `max_rows` allows and memory holds."""
        from common.lm.rollout.decoder import Decoder, size_for, size_within
        from common.lm.rollout.weights import PolicyWeights

        needed = max(len(request.prompt) + request.limit for request in requests)
        wanted = size_for(min(self.max_rows, len(requests)))
        if self.decoder is not None:
            if self.decoder.length >= needed and self.decoder.size >= min(wanted, self.rows_that_fit):
                return self.decoder
            needed, wanted = max(needed, self.decoder.length), max(wanted, self.decoder.size)
            self.decoder = None
        if self.weights is None:
            self.weights = PolicyWeights(self.model, self.adapter, copy=self._copies(needed))
        architecture = self.weights.architecture
        length = max(needed, min(needed + -needed % LENGTH_STEP, architecture.longest))
        if self.weights.device.type == "cuda":
            row = row_bytes(architecture, len(self.weights.layers), self.weights.dtype.itemsize, length)
            self.rows_that_fit = size_within(int((free_bytes() - RESERVE) // row))
        self.decoder = Decoder(self.weights, min(wanted, self.rows_that_fit), length)
        return self.decoder

    def _copies(self, length: int) -> bool:
        """Whether a merged copy fits beside the cache. Else a base in 4 bit is read as it is stored in each step.

        Raises Unsupported for a base in 16 bit, of which there is then no room for a second one.
        """
        from common.lm.rollout.weights import in_four_bit, merged_bytes

        if not on_gpu():
            return True
        config = self.model.config.get_text_config()
        row = row_bytes(read_architecture(config), config.num_hidden_layers, 2, length)
        size = merged_bytes(self.model)
        if free_bytes() - RESERVE >= size + FEWEST_ROWS * row:
            return True
        if not in_four_bit(self.model):
            raise Unsupported(f"a merged copy of its weights, {size / 2**30:.1f} GiB, does not fit beside it")
        return False

    def _keeps(self) -> bool:
        """Whether copy, cache and graphs stay until the next call: where they leave half of the memory to training."""
        return not on_gpu() or free_bytes() >= memory_limit() / 2


def sample_completions(
    rollouts: Rollouts,
    prompts: Sequence[Prompt],
    count: int,
    max_new_tokens: int,
    temperature: float,
    what: str = "completions",
) -> list[list[Completion]]:
    """`count` completions of each prompt, with a progress bar that says `what` is made."""
    repeated = [prompt for prompt in prompts for _ in range(count)]
    with bar(what, len(repeated)) as advance:
        completions = rollouts.sample(repeated, max_new_tokens, temperature, advance=advance)
    return [completions[first : first + count] for first in range(0, len(completions), count)]


def as_conversation(prompt: Prompt | Conversation) -> Conversation:
    return prompt if isinstance(prompt, Conversation) else Conversation(prompt.place, prompt.prompt, prompt.tools)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt | Conversation]) -> list[list[int]]:
    """The tokens of each prompt, generation prompt included. Raises InputError as `prompt_texts`."""
    distinct = {id(prompt): as_conversation(prompt) for prompt in prompts}  # a group is the same prompt several times
    texts = prompt_texts(tokenizer, list(distinct.values()))
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


def row_bytes(architecture: Architecture, layers: int, size: int, length: int) -> int:
    """Bytes of one row of a cache of `length` tokens: keys and values of `size` bytes each, and its completion."""
    return length * (2 * layers * architecture.kv_heads * architecture.head_dim * size + 12)


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
