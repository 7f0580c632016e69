"""GGUF files of small random models, the same to the byte everywhere: what the quantizer is compared on."""

from pathlib import Path

import gguf
import numpy as np


def write(
    file: Path,
    architecture: str,
    layers: int,
    hidden: int,
    inner: int,
    kv_heads: int,
    tied: bool,
    whole: bool = False,
    wide: bool = False,
) -> None:
    """A model of 4 heads and 64 tokens; with `whole` its attention is one matrix, with `wide` it is in bfloat16."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(hidden // 4)
    writer.add_file_type(1)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(64)

    def matrix(name: str, rows: int, columns: int) -> None:
        seed = sum(name.encode())
        numbers = (np.arange(rows * columns, dtype=np.uint64) * 2654435761 + seed * 40503) % 65521
        values = ((numbers.astype(np.float32) / 65521 - 0.5) / 16).reshape(rows, columns)
        if wide:
            halves = (values.view(np.uint32) >> 16).astype(np.uint16)
            writer.add_tensor(name, halves.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, values.astype(np.float16))

    def vector(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, np.float32))

    matrix("token_embd.weight", 64, hidden)
    vector("output_norm.weight")
    if not tied:
        matrix("output.weight", 64, hidden)
    kv = hidden // 4 * kv_heads
    for layer in range(layers):
        if whole:
            matrix(f"blk.{layer}.attn_qkv.weight", hidden + 2 * kv, hidden)
        else:
            for name, rows in (("attn_q", hidden), ("attn_k", kv), ("attn_v", kv)):
                matrix(f"blk.{layer}.{name}.weight", rows, hidden)
        matrix(f"blk.{layer}.attn_output.weight", hidden, hidden)
        vector(f"blk.{layer}.attn_norm.weight")
        matrix(f"blk.{layer}.ffn_gate.weight", inner, hidden)
        matrix(f"blk.{layer}.ffn_up.weight", inner, hidden)
        matrix(f"blk.{layer}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# {name: what `write` is given}: models that meet every rule.
MODELS = {
    "few layers": {"architecture": "qwen2", "layers": 9, "hidden": 256, "inner": 256, "kv_heads": 2, "tied": True},
    "few values": {"architecture": "llama", "layers": 17, "hidden": 256, "inner": 256, "kv_heads": 1, "tied": False},
    "no 256": {"architecture": "qwen2", "layers": 3, "hidden": 192, "inner": 320, "kv_heads": 2, "tied": True},
    "no 32": {"architecture": "qwen2", "layers": 2, "hidden": 104, "inner": 72, "kv_heads": 2, "tied": False},
    "one matrix": {
        "architecture": "phi3",
        "layers": 9,
        "hidden": 256,
        "inner": 256,
        "kv_heads": 4,
        "tied": False,
        "whole": True,
        "wide": True,
    },
}
