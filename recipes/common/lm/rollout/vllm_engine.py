"""vLLM inside this process as one more way to sample: an engine over merged weights, without LoRA, for one policy.

It is made once a run, which takes a minute, and holds a copy of all weights and a cache of keys and values. What vLLM
changes in its process is put back: the random states, and the current CUDA stream.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.environment import compiled_code
from common.lm.rollout.architecture import Unsupported
from common.lm.rollout.decoder import Decoded
from common.lm.rollout.rows import Request
from common.lm.rollout.vllm_weights import connect, weight_bytes
from common.run.files import write_bytes

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)  # rows of a step that CUDA graphs are recorded for
BLOCK = 16  # tokens of a block of the cache
WORKING = 2**30  # bytes for activations, logits and graphs, beside weights and cache
TEMPERATURES = (0.01, 2.0)  # vLLM silently raises lower ones, and refuses higher ones


class VllmEngine:
    """Decodes for one policy as `Decoder` does: `model` with `adapter` merged, or its base where that is None.

    Args:
        rows: completions that are decoded at once, at most.
        length: tokens of a prompt with its completion, at most.
        room: bytes of the GPU that weights and cache may take.

    Raises Unsupported, naming why, where vLLM cannot run the model or the room is too small.
    """

    def __init__(self, model: Any, adapter: str | None, *, rows: int, length: int, room: int) -> None:
        config = model.config.get_text_config()
        if length > config.max_position_embeddings:
            raise Unsupported(
                f"prompt and completion of {length} tokens exceed its {config.max_position_embeddings} positions"
            )
        self.length = length
        dtype = model.get_input_embeddings().weight.dtype
        cache = cache_bytes(config, dtype.itemsize, rows, length, room - weight_bytes(model, dtype.itemsize) - WORKING)
        set_variables()
        import vllm  # outside of the stream: from its import on it follows which stream is set

        check_class(vllm, architecture_of(config))
        self.stream = torch.cuda.Stream()
        folder = write_config(config, Path(os.environ["VLLM_CACHE_ROOT"], "configs"))
        with self._on_stream(), random_states_kept():
            try:
                self.llm: LLM = vllm.LLM(
                    str(folder),
                    **settings(rows, length, cache),
                    dtype=str(dtype).removeprefix("torch."),
                )
            except (ValueError, ImportError, AssertionError, NotImplementedError) as error:
                raise Unsupported(f"vLLM's engine does not start: {str(error).splitlines()[0]}") from error
        (engine_model,) = self.llm.apply_model(lambda module: module)
        self.write = connect(model, adapter, engine_model)

    def refresh(self) -> None:
        """Write the policy's weights as they are now, and forget all keys and values, which are of the old ones.

        Raises RuntimeError where vLLM keeps them: completions would be of a mixture of policies.
        """
        self.write()
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM keeps its prefix cache after a change of the weights: a request still runs")

    def decode(
        self,
        requests: Sequence[Request],
        end: int,
        temperature: float,
        advance: Callable[[int], object] = lambda count: None,
    ) -> list[Decoded]:
        """A completion of each request, up to the token `end` or its limit; greedy at temperature 0.

        `advance` is called with the number of completions that are new since its last call.
        """
        longest = max(len(request.prompt) + request.limit for request in requests)
        if longest > self.length:
            raise Unsupported(f"prompt and completion of {longest} tokens: vLLM's engine was started for {self.length}")
        if temperature and not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
            raise Unsupported(f"vLLM samples at temperatures from {TEMPERATURES[0]} to {TEMPERATURES[1]:g}")
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        parameters = [sampling(request, end, temperature) for request in requests]
        finished = []
        with self._on_stream():
            self.llm.enqueue(prompts, parameters, use_tqdm=False)
            engine = self.llm.llm_engine
            while engine.has_unfinished_requests():
                new = [output for output in engine.step() if output.finished]
                finished += new
                if new:
                    advance(len(new))
        finished.sort(key=lambda output: int(output.request_id))  # vLLM counts requests as they come
        return [as_decoded(output.outputs[0]) for output in finished]

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Work on the engine's stream, after what was begun on the current one and before what follows."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)


def check_class(vllm: Any, architecture: str) -> None:
    """Raise Unsupported unless vLLM has a class of its own for the architecture.

    For others it takes transformers' class and patches it in the whole process, so that the model in training breaks.
    """
    found = vllm.ModelRegistry.models.get(architecture)
    if found is None or getattr(found, "module_name", "").rpartition(".")[2] == "transformers":
        raise Unsupported(f"vLLM has no class of its own for {architecture}")


def engine_length(model: Any, requests: Sequence[Request]) -> int:
    """Tokens of a prompt with its completion that an engine is to be started for: those that the model was loaded for,
    since later calls may have longer ones than the first."""
    needed = max(len(request.prompt) + request.limit for request in requests)
    positions = model.config.get_text_config().max_position_embeddings
    return max(needed, min(positions, getattr(model, "max_seq_length", needed)))


def settings(rows: int, length: int, cache: int) -> dict[str, Any]:
    """The arguments of vLLM's LLM that decide what is sampled and what memory it takes."""
    graphs = sorted({*(size for size in GRAPHS if size < rows), rows})
    return {
        "load_format": "dummy",  # weights are written into its parameters, from no file
        "skip_tokenizer_init": True,  # tokens in, tokens out
        "generation_config": "vllm",  # none of the model's own
        "enable_lora": False,
        "max_model_len": length,
        "max_num_seqs": rows,
        "kv_cache_memory_bytes": cache,
        "gpu_memory_utilization": 0.01,  # has no effect beside the bytes, but more than is free would be refused
        "logprobs_mode": "processed_logprobs",  # after the temperature
        "model_impl": "vllm",  # see check_class
        "enable_flashinfer_autotune": False,  # nothing here uses flashinfer
        "use_tqdm_on_load": False,
        "enable_prefix_caching": True,  # the prompt of a group is computed once
        "enforce_eager": False,
        "compilation_config": {"cudagraph_capture_sizes": graphs},
    }


def sampling(request: Request, end: int, temperature: float) -> "SamplingParams":
    """Sampling from the policy itself: no truncation of its distribution, no penalty, one token that ends."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=temperature,
        top_k=-1,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        seed=request.seed % 2**62,  # to vLLM -1 is no seed
        max_tokens=request.limit,
        stop_token_ids=[end] if end >= 0 else [],
        ignore_eos=True,  # those of the model's configuration
        logprobs=0,  # of the chosen token only
        flat_logprobs=True,
        detokenize=False,
        skip_clone=True,
    )


def as_decoded(output: Any) -> Decoded:
    """vLLM's completion as ours."""
    return Decoded(list(output.token_ids), list(output.logprobs.logprobs))


def cache_bytes(config: Any, size: int, rows: int, length: int, room: int) -> int:
    """Bytes of keys and values for `rows` completions of `length` tokens, or as much of it as there is room for.

    Raises Unsupported where not even one of them fits.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    row = (length + -length % BLOCK + BLOCK) * 2 * config.num_hidden_layers * heads * head_dim * size
    if room < 2 * row:
        lacking = (2 * row - room) / 2**30
        raise Unsupported(f"vLLM's copy of its weights and a cache need {lacking:.1f} GiB more than it may take here")
    return min(room, (rows + 1) * row)


def set_variables() -> None:
    """Set what vLLM reads from the environment."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs here, where the weights are
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # else vLLM imports flashinfer, which compiles at run time
    os.environ.setdefault("VLLM_CACHE_ROOT", str(compiled_code() / "vllm"))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns with tracebacks of what is meant to be so


def write_config(config: Any, parent: Path) -> Path:
    """Write config.json of the text model in 16 or 32 bit, all that vLLM reads, to a folder named by its contents.

    vLLM takes what it has compiled from its cache only for the same path.
    """
    config = type(config).from_dict(config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the base in training; vLLM gets merged weights
    config.architectures = [architecture_of(config)]
    text = config.to_json_string()
    folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "config.json", text.encode())
    return folder


def architecture_of(config: Any) -> str:
    """The name of the class that is a causal language model of this configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Put the states of Python's, NumPy's and torch's generators back as they were: vLLM seeds them all."""
    import numpy

    python, arrays, tensors, gpus = (
        random.getstate(),
        numpy.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all(),
    )
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        torch.set_rng_state(tensors)
        torch.cuda.set_rng_state_all(gpus)
