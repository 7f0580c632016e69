"""What llama.cpp makes of a GGUF file: prompts, token ids and completions by its server, logits by its library."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_byte,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_uint32,
    c_void_p,
)
from functools import cache
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
from common.errors import MachineError

from exporting.library import library


class Server:
    """The server that people run, on a port of this machine, without a network."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.opener = build_opener(ProxyHandler({}))  # a proxy of the environment is not for this machine

    def render(self, turns: list[dict], tools: list[dict] | None = None) -> str:
        """The prompt that the template in the file makes. Raises ValueError where it refuses the turns."""
        return self._post("/apply-template", {"messages": turns, **({"tools": tools} if tools else {})})["prompt"]

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The ids of a prompt, as the server reads it; without `special` nothing is put in front of them."""
        return self._post("/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"]

    def complete(self, ids: Sequence[int], tokens: int, forced: int | None = None) -> dict[str, Any]:
        """The greedy completion of a prompt; with `forced` that token comes first."""
        bias = {"logit_bias": [[forced, 1000.0]]} if forced is not None else {}
        body = {"prompt": list(ids), "n_predict": tokens, "temperature": 0, "return_tokens": True, **bias}
        return self._post("/completion", body)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = Request(self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with self.opener.open(request, timeout=600) as answer:
                return json.loads(answer.read())
        except HTTPError as error:
            reason = json.loads(error.read() or b"{}").get("error", {}).get("message", error.reason)
            raise ValueError(" ".join(str(reason).split())[:300]) from None


@contextmanager
def server(file: Path, context: int = 2048) -> Iterator[Server]:
    """llama.cpp's server with `file`, for the length of the block. Raises MachineError where it cannot load that."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()  # pyrefly: ignore[missing-attribute]  it is no Python
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = context, 1, False
    parameters.no_extra_bufts = True  # else it keeps a second copy of quantized weights, arranged for speed
    parameters.use_jinja = True
    with quiet():
        try:
            running = xllamacpp.Server(parameters)  # pyrefly: ignore[missing-attribute]  as above
        except RuntimeError as error:
            raise MachineError(f"{file}: llama.cpp cannot load it: {error}") from None
        try:
            yield Server(running.listening_address)
        finally:
            del running


class Weights:
    """A model as llama.cpp computes it on the CPU, until `close`. Raises MachineError where it cannot be loaded."""

    def __init__(self, file: Path, context: int = 512) -> None:
        lib = self.lib = _bind()
        self.model = lib.llama_model_load_from_file(os.fsencode(file), lib.llama_model_default_params())
        if not self.model:
            raise MachineError(f"{file}: llama.cpp cannot load it")
        self.vocabulary = lib.llama_model_get_vocab(self.model)
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
        parameters.n_threads = parameters.n_threads_batch = len(os.sched_getaffinity(0))
        self.context = lib.llama_init_from_model(self.model, parameters)
        if not self.context or lib.llama_n_batch(self.context) != context:
            raise MachineError(f"{file}: xllamacpp's llama.cpp takes other settings than those here")
        self.size = lib.llama_vocab_n_tokens(self.vocabulary)

    def log_probs(self, ids: Sequence[int], last: int) -> np.ndarray:
        """(T, V) float32: the log-probabilities of every token after each of the `last` ids, T of them."""
        lib, count = self.lib, len(ids)
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        wanted = [int(index >= count - last) for index in range(count)]
        batch = _Batch(count, (c_int32 * count)(*ids), None, None, None, None, (c_int8 * count)(*wanted))
        if failed := lib.llama_decode(self.context, batch):
            raise MachineError(f"llama.cpp cannot compute {count} tokens (error {failed})")
        logits = np.ctypeslib.as_array(lib.llama_get_logits(self.context), (sum(wanted), self.size)).astype(np.float32)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def ends(self, token: int) -> bool:
        """Does llama.cpp stop at this token?"""
        return bool(self.lib.llama_vocab_is_eog(self.vocabulary, token))

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


@contextmanager
def weights(file: Path, context: int = 512) -> Iterator[Weights]:
    """`Weights` of a file for the length of the block."""
    opened = Weights(file, context)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what llama.cpp prints to the standard error, from its own threads, for the length of the block."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class _Opaque(Structure):
    """Settings that stay as llama.cpp has them. Larger than its own struct, of which only its own part is read."""

    _fields_ = (("content", c_byte * 1024),)


class _Context(Structure):
    """The beginning of llama_context_params; the rest stays as it is."""

    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max")),
        *(("n_outputs_max_per_seq", c_uint32), ("n_threads", c_int32), ("n_threads_batch", c_int32)),
        ("rest", c_byte * 988),
    )


class _Batch(Structure):
    _fields_ = (
        *(("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", c_void_p)),
        *(("n_seq_id", c_void_p), ("seq_id", c_void_p), ("logits", POINTER(c_int8))),
    )


@CFUNCTYPE(None, c_int, c_char_p, c_void_p)
def _silent(_level: int, _text: bytes, _data: object) -> None:
    pass


@cache
def _bind():
    """llama.cpp with the types of the functions used here."""
    lib = library()
    lib.llama_log_set(_silent, None)
    signatures = {
        "llama_model_default_params": (_Opaque, []),
        "llama_context_default_params": (_Context, []),
        "llama_model_load_from_file": (c_void_p, [c_char_p, _Opaque]),
        "llama_init_from_model": (c_void_p, [c_void_p, _Context]),
        "llama_model_get_vocab": (c_void_p, [c_void_p]),
        "llama_vocab_n_tokens": (c_int32, [c_void_p]),
        "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
        "llama_n_batch": (c_uint32, [c_void_p]),
        "llama_get_memory": (c_void_p, [c_void_p]),
        "llama_memory_clear": (None, [c_void_p, c_bool]),
        "llama_decode": (c_int32, [c_void_p, _Batch]),
        "llama_get_logits": (POINTER(c_float), [c_void_p]),
        "llama_free": (None, [c_void_p]),
        "llama_model_free": (None, [c_void_p]),
    }
    for name, (returned, taken) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = returned, taken
    return lib
