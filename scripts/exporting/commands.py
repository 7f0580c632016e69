"""The command lines that serve an exported model with vLLM, TGI, llama.cpp and Ollama, as lists of words.

vLLM's are read by the argument parser of the pinned vLLM in a test; TGI's and llama.cpp's by the lists of arguments of
their launchers. Sampling is that of training where the server lets one say so: no top-k, no top-p.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes for --max-lora-rank
TGI_IMAGE = "ghcr.io/huggingface/text-generation-inference:3.3.5"


def shell(words: Sequence[str]) -> str:
    """Words as one types them."""
    return shlex.join(words)


def vllm_merged(
    model: str | Path, name: str, context: int | None = None, host: str = "127.0.0.1", port: int = 8000
) -> list[str]:
    """`vllm serve` of a merged model, in a folder or on the hub."""
    return ["vllm", "serve", str(model), "--served-model-name", name, *_vllm(context, host, port)]


def vllm_adapter(
    base: str | Path,
    adapter: str | Path,
    name: str,
    rank: int,
    context: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    chat_template: str | Path | None = None,
) -> list[str]:
    """`vllm serve` of a base with an adapter of that rank beside it; `chat_template` is the one of training.

    Raises ValueError for a rank that vLLM does not take.
    """
    allowed = next((one for one in LORA_RANKS if one >= rank), None)
    if allowed is None:
        raise ValueError(f"vLLM takes adapters up to rank {LORA_RANKS[-1]}, and this one has {rank}: merge it")
    words = ["vllm", "serve", str(base), "--enable-lora", "--lora-modules", f"{name}={adapter}"]
    words += ["--max-lora-rank", str(allowed)]
    if chat_template:  # vLLM reads the template of the base
        words += ["--chat-template", str(chat_template)]
    return [*words, *_vllm(context, host, port)]


def _vllm(context: int | None, host: str, port: int) -> list[str]:
    length = ["--max-model-len", str(context)] if context else []
    # Without it vLLM samples by the base's generation_config.json, with its top-k and top-p.
    return [*length, "--generation-config", "vllm", "--host", host, "--port", str(port)]


def tgi(model: str | Path, context: int = 4096, port: int = 8080) -> list[str]:
    """TGI's container for a merged model: a folder of this machine, or a hub id."""
    words = ["docker", "run", "--gpus", "all", "--shm-size", "1g", "-p", f"127.0.0.1:{port}:80"]
    if isinstance(model, Path):
        words += ["-v", f"{model.resolve()}:/model:ro"]
        model = "/model"
    words += [TGI_IMAGE, "--model-id", model]
    return [*words, "--max-input-tokens", str(context - 1), "--max-total-tokens", str(context)]


def llama_server(
    gguf: str | Path, name: str, context: int | None = None, host: str = "127.0.0.1", port: int = 8080
) -> list[str]:
    """llama.cpp's own server of a GGUF file, with the chat template in it."""
    words = ["llama-server", "--model", str(gguf), "--alias", name, "--jinja"]
    words += ["--ctx-size", str(context)] if context else []
    words += ["--temp", "0.7", "--top-k", "0", "--top-p", "1", "--min-p", "0"]
    return [*words, "--host", host, "--port", str(port)]


def ollama(name: str, modelfile: str | Path) -> list[list[str]]:
    """`ollama create` and `ollama run` of a Modelfile."""
    return [["ollama", "create", name, "-f", str(modelfile)], ["ollama", "run", name]]
