"""Sample completions from a policy while it is trained: one class for every command that samples."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from common.data.examples import Conversation, Prompt
from common.errors import MachineError
from common.lm.generate import Completion, generate
from common.lm.log_probs import score_tokens
from common.lm.render import as_conversation, prompt_ids
from common.lm.rollout.architecture import Architecture, Unsupported, read_architecture
from common.lm.rollout.backends import Backend, has_vllm
from common.lm.rollout.correction import check_agreement
from common.lm.rollout.gpu import free_bytes, memory_limit, on_gpu
from common.run.progress import bar
from common.run.ranks import world_size
from common.run.screen import console

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.lm.rollout.decoder import Decoder
    from common.lm.rollout.rows import Request
    from common.lm.rollout.vllm_engine import VllmEngine
    from common.lm.rollout.weights import PolicyWeights

LENGTH_STEP = 128  # the cache is as long as a multiple of it; when it grows, graphs are recorded anew
RESERVE = 2**30  # bytes left free: a step's activations, logits and graphs
GENERATED = 128  # completions that `generate` makes at once
FEWEST_ROWS = 32  # below it a step is no faster, so that a copy of the weights is given up for more rows


class Rollouts:
    """Samples from one policy: `model` with `adapter`, or its base where that is None.

    The backend `graph` decodes by our own decoder over a copy of the weights with the adapter merged, on a CUDA GPU
    with one CUDA graph a step. The copy is made anew at every call, so it is never of another step. `vllm` does the
    same by an engine of vLLM in this process, and `generate` is transformers' own. `auto` takes the decoder; for models
    that it cannot run vLLM where it is installed, else generate; and generate where the first call ends in a
    RuntimeError, such as for want of memory. It prints which and why.

    Args:
        tokenizer: with a chat template and a pad token.
        end: the token that ends a completion; no other one does.
        seed: of the run. With `key` of each call and the index of a completion it gives the completion's noise.
        max_rows: completions that are decoded at once, at most.

    `figures` has numbers of the last call: seconds, tokens a second, seconds to merge the weights. `backend` is the
    way that is in use.
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
        self.requested = backend
        self.backend: Backend = "graph" if backend == "auto" else backend
        self.max_rows = max_rows
        self.weights: PolicyWeights | None = None
        self.decoder: Decoder | None = None
        self.engine: VllmEngine | None = None
        self.rows_that_fit = max_rows
        self.reads_four_bit = False  # instead of a merged copy, since that did not fit
        self.figures: dict[str, float] = {}

    def sample(
        self,
        prompts: Sequence[Prompt | Conversation],
        max_new_tokens: int,
        temperature: float,
        key: str = "",
        advance: Callable[[int], object] = lambda count: None,
        first: int = 0,
    ) -> list[Completion]:
        """One completion of each prompt: greedy at temperature 0, else sampled without top-k and top-p.

        The same prompt may be there several times: it is computed once. Two calls of a run with the same `key` draw
        the same completions from the same policy. `advance` is called with the number of completions that are new
        since its last call. Where these prompts are a part of all, `first` is the index of the first one among those.
        """
        if not prompts:
            return []
        while self.backend != "generate":
            try:
                return self._decode(prompts, max_new_tokens, temperature, key, advance, first)
            except (Unsupported, RuntimeError) as reason:
                unsupported = isinstance(reason, Unsupported)
                if self.requested != "auto" and unsupported:
                    raise MachineError(
                        f"--rollouts={self.requested} cannot sample from this model: {reason}"
                    ) from reason
                if self.requested != "auto" or (self.figures and not unsupported):
                    raise  # once it has worked, an error is no reason to sample in another way
                self._fall_back(reason)
        return self._generate(prompts, max_new_tokens, temperature, advance)

    def _fall_back(self, reason: Exception) -> None:
        """Take the next way to sample: vLLM where the decoder does not know the model, else generate."""
        to_vllm = self.backend == "graph" and isinstance(reason, Unsupported) and on_gpu() and has_vllm()
        to_vllm &= world_size() == 1  # its engine has a process group of its own
        self.release()
        self.engine = None
        self.backend = "vllm" if to_vllm else "generate"
        how = "vLLM, whose start takes a minute" if to_vllm else "transformers' generate, which is slower"
        console().print(f"Sampling with {how}: {str(reason).splitlines()[0]}.", soft_wrap=True)

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
        first: int,
    ) -> list[Completion]:
        from common.lm.rollout.rows import Request

        started = time.perf_counter()
        ids = prompt_ids(self.tokenizer, prompts)
        requests = [
            Request(tuple(prompt), self.noise_seed(key, index), max_new_tokens)
            for index, prompt in enumerate(ids, first)
        ]
        decoder = self._ready_engine(requests) if self.backend == "vllm" else self._ready(requests)
        decoder.refresh()
        merged = time.perf_counter()
        end = self.tokenizer.convert_tokens_to_ids(self.end)
        decoded = decoder.decode(requests, end, temperature, advance)
        tokens = sum(len(one.tokens) for one in decoded)
        if not self._keeps():
            self.release()
        seconds = time.perf_counter() - started
        to_compare, self.figures = (
            (not self.figures),
            {
                "rollout/seconds": seconds,
                "rollout/refresh_seconds": merged - started,
                "rollout/tokens_per_second": tokens / seconds,
            },
        )
        completions = [
            Completion(
                self.tokenizer.decode(one.tokens, skip_special_tokens=True),
                one.tokens[-1] == end,
                prompt,
                one.tokens,
                one.log_probs,
            )
            for prompt, one in zip(ids, decoded, strict=True)
        ]
        if to_compare and self.backend == "vllm":
            self._compare(completions[:4], temperature)
        return completions

    def _compare(self, completions: list[Completion], temperature: float) -> None:
        """Raise MachineError unless the model itself gives the completions the probabilities that vLLM gave them."""
        spans = [(one.prompt_ids, one.completion_ids) for one in completions]
        as_base = self.adapter is None and hasattr(self.model, "disable_adapter")
        with self.model.disable_adapter() if as_base else contextlib.nullcontext():
            scored = score_tokens(self.model, spans, self.tokenizer.pad_token_id, temperature=temperature or 1.0)
        check_agreement(completions, [one.log_probs for one in scored], "vLLM")

    def release(self) -> None:
        """Free the copy of the weights, the cache and the graphs. An engine of vLLM stays: it takes a minute."""
        held = self.weights is not None
        self.weights = self.decoder = None
        if held and on_gpu():
            import torch

            torch.cuda.empty_cache()

    def noise_seed(self, key: str, index: int) -> int:
        """The seed, of 64 bits, of the noise of one completion."""
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

    def _ready_engine(self, requests: "Sequence[Request]") -> "VllmEngine":
        """vLLM's engine, beside which half of the memory is left to training."""
        if not on_gpu():
            raise Unsupported("vLLM needs an NVIDIA GPU")
        from common.lm.rollout.vllm_engine import VllmEngine, engine_length

        if self.engine is None:
            if self.requested == "vllm":
                console().print("Starting vLLM's engine, which takes a minute.")
            room = free_bytes() - max(RESERVE, memory_limit() // 2)
            length = engine_length(self.model, requests)
            self.engine = VllmEngine(self.model, self.adapter, rows=self.max_rows, length=length, room=room)
        return self.engine

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
        why = f"a merged copy of its weights, {size / 2**30:.1f} GiB, does not fit beside it"
        if not in_four_bit(self.model):
            raise Unsupported(why)
        if not self.reads_four_bit:
            self.reads_four_bit = True
            console().print(f"Sampling reads the base in 4 bit at each step, which is slower: {why}.", soft_wrap=True)
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
) -> list[list[Completion]]:
    """`count` completions of each prompt, with a progress bar."""
    repeated = [prompt for prompt in prompts for _ in range(count)]
    with bar("completions", len(repeated)) as advance:
        completions = rollouts.sample(repeated, max_new_tokens, temperature, advance=advance)
    return [completions[first : first + count] for first in range(0, len(completions), count)]


def row_bytes(architecture: Architecture, layers: int, size: int, length: int) -> int:
    """Bytes of one row of a cache of `length` tokens: keys and values of `size` bytes each, and its completion."""
    return length * (2 * layers * architecture.kv_heads * architecture.head_dim * size + 12)
