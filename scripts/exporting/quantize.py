"""Quantize a 16-bit GGUF file as llama-quantize does, to the byte, by the quantizer in the xllamacpp wheel.

llama.cpp gives each tensor a type of its own: a file q4_k_m has some tensors in Q6_K. `tensor_type` holds those rules,
for the file types in FILE_TYPES, as src/llama-quant.cpp of llama.cpp has them (tests compare whole files with those of
llama-quantize). Tensors are read, quantized and written in pieces: memory holds one piece of one tensor.

Left out: importance matrices, and with them the i-quants; Falcon, GLM-5 and models with 8 experts, of more rules.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
    create_string_buffer,
)
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common.errors import InputError

from exporting.library import library

WIDE = ("f16", "bf16")  # files in 16 bit, as the converter writes them: the others are made of one
# {name: (number of the file type in llama.cpp, type of a tensor that no rule names)}
FILE_TYPES = {
    "q8_0": (7, "Q8_0"),
    "q6_k": (18, "Q6_K"),
    "q5_k_m": (17, "Q5_K"),
    "q5_k_s": (16, "Q5_K"),
    "q4_k_m": (15, "Q4_K"),
    "q4_k_s": (14, "Q4_K"),
    "q3_k_l": (13, "Q3_K"),
    "q3_k_m": (12, "Q3_K"),
    "q3_k_s": (11, "Q3_K"),
    "q2_k": (10, "Q2_K"),
}
TYPES = {"F32": 0, "F16": 1, "BF16": 30, "Q4_0": 2, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8}  # numbers in ggml
TYPES |= {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
NAMES = {number: name for name, number in TYPES.items()}
SHALLOW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # in blocks of 32
BLOCK = {name: 256 if name.endswith("_K") else 32 if name.startswith("Q") else 1 for name in TYPES}
OTHER_RULES = ("falcon", "glm5-next")
# Parts of the names of matrices that stay as they are.
KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *("time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight"),
    *("time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight"),
    *("time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight"),
    *("time_mix_lerp_fused.weight", ".position_embd", "position_embd.weight", "token_types.weight", ".rel_pos"),
)
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
PIECE = 2**24  # weights that are quantized at once
ALIGNMENT = 32


@dataclass(frozen=True)
class Shape:
    """What the rules ask of a model."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def is_70b(self) -> bool:
        """Is it what llama.cpp takes for a 70B, whose values are few beside its queries?"""
        return self.layers == 80 and self.heads != self.kv_heads and self.architecture in ("llama", "qwen2")


def file_order(name: str) -> tuple[int, bytes]:
    """The place of a tensor in the file: by layer, then by name."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name.encode())


def tensor_types(file_type: str, shapes: dict[str, tuple[int, ...]], model: Shape) -> dict[str, str | None]:
    """{tensor: its type in a file of `file_type`, None where it stays as it is}, in the order of the file.

    `shapes` are those of the tensors, the length of a row first. Raises InputError for a model with other rules.
    """
    if model.architecture in OTHER_RULES or model.experts == 8:
        what = f"the architecture {model.architecture}" if model.experts != 8 else "a model with 8 experts"
        raise InputError(f"--quant {file_type}: llama.cpp has rules of its own for {what}; --quant f16 is exported")
    names = sorted(shapes, key=file_order)
    tied, values = "output.weight" not in shapes, [name for name in names if _is_value(name)]
    down = [name for name in names if "ffn_down" in name and _is_quantized(name, shapes[name])]
    found: dict[str, str | None] = {}
    for name in names:
        if not _is_quantized(name, shapes[name]):
            found[name] = None
            continue
        layer = values.index(name) if _is_value(name) else 0
        if "ffn_down" in name:
            layer = file_order(name)[0] if model.experts > 1 else down.index(name)
        found[name] = tensor_type(file_type, name, shapes[name][0], layer, len(values), tied, model)
    return found


def tensor_type(file_type: str, name: str, columns: int, layer: int, values: int, tied: bool, model: Shape) -> str:
    """The type of a matrix with rows of `columns` weights.

    Args:
        layer: how many matrices of this kind come before it.
        values: how many value matrices there are.
        tied: is there no output matrix, so that the embedding is one?
    """
    kind = FILE_TYPES[file_type][1]
    if name == "output.weight" or (tied and name in EMBEDDINGS):
        kind = "Q8_0" if columns % BLOCK[kind] or kind == "Q8_0" else "Q6_K"
    elif name in EMBEDDINGS:
        pass
    elif _is_value(name):
        few = model.heads // model.kv_heads >= 4
        kind = {
            "q2_k": "Q4_K" if few else "Q3_K",
            "q3_k_m": "Q5_K" if layer < 2 else "Q4_K",
            "q3_k_l": "Q5_K",
            "q4_k_s": "Q5_K" if layer < 4 else kind,
            "q4_k_m": "Q6_K" if _needs_more(layer, values) else kind,
            "q5_k_m": "Q6_K" if _needs_more(layer, values) else kind,
        }.get(file_type, kind)
        if model.is_70b and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
    elif "ffn_down" in name:
        kind = {
            "q2_k": "Q3_K",
            "q3_k_m": "Q5_K" if layer < model.layers // 16 else "Q4_K",
            "q3_k_l": "Q5_K",
            "q4_k_s": "Q5_K" if layer < model.layers // 8 else kind,
            "q4_k_m": "Q6_K" if _needs_more(layer, model.layers) else kind,
            "q5_k_m": "Q6_K" if _needs_more(layer, model.layers) else kind,
        }.get(file_type, kind)
    elif "attn_output.weight" in name:
        kind = {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(file_type, kind)
    return fit(kind, columns)


def fit(kind: str, columns: int) -> str:
    """`kind`, or the type that llama.cpp takes for it where rows do not divide into its blocks."""
    if columns % BLOCK[kind] == 0:
        return kind
    kind = SHALLOW.get(kind, kind)
    return kind if columns % BLOCK[kind] == 0 else "F16"


def _is_value(name: str) -> bool:
    return any(part in name for part in ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight"))


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and name.endswith("weight") and not any(part in name for part in KEPT)


def _needs_more(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between them, get more bits."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def quantize(source: Path, target: Path, file_type: str) -> list[str]:
    """Write `source`, a 16-bit GGUF file, as `file_type` to `target`; returns what fell back to another type.

    Raises InputError as `tensor_types`.
    """
    file = GgufFile(source)
    types = tensor_types(file_type, file.shapes, file.model)
    fallen = []
    with target.open("wb") as out, ThreadPoolExecutor() as pool:
        out.write(file.header(FILE_TYPES[file_type][0], types))
        for name, kind in types.items():
            start = out.tell()
            for piece in file.pieces(name):
                out.write(piece.tobytes() if kind is None else _quantize_rows(piece, file.kinds[name], kind, pool))
            out.write(bytes(-(out.tell() - start) % ALIGNMENT))
            if kind and BLOCK[kind] < BLOCK[FILE_TYPES[file_type][1]] and kind != "Q8_0":
                fallen.append(f"{name} is {kind}: its rows of {file.shapes[name][0]} weights are no multiple of 256")
        out.flush()
        os.fsync(out.fileno())
    return fallen


class _Start(Structure):
    """How gguf_init_from_file opens a file."""

    _fields_ = (("no_alloc", c_bool), ("context", POINTER(c_void_p)))


class GgufFile:
    """A GGUF file as llama.cpp reads it: its metadata, and its tensors in pieces."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.lib = _bind(library())
        reader = gguf.GGUFReader(path)
        self.data = {tensor.name: tensor.data for tensor in reader.tensors}  # mapped into memory, not read
        self.shapes = {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors}
        self.kinds = {tensor.name: NAMES[int(tensor.tensor_type)] for tensor in reader.tensors}

        def number(key: str, default: int = 0) -> int:
            field = reader.get_field(f"{architecture}.{key}")
            value = field.contents() if field else default
            return int(value[0] if isinstance(value, list) else value)

        architecture = str(reader.fields["general.architecture"].contents())
        heads = number("attention.head_count", 1)
        self.model = Shape(
            architecture, number("block_count"), heads, number("attention.head_count_kv", heads), number("expert_count")
        )
        self.tensors = c_void_p()
        self.metadata = self.lib.gguf_init_from_file(os.fsencode(path), _Start(True, POINTER(c_void_p)(self.tensors)))

    def header(self, file_type: int, types: dict[str, str | None]) -> bytes:
        """The metadata of this file for one of `file_type`, and the tensors in the order of `types`."""
        lib, out = self.lib, self.lib.gguf_init_empty()
        lib.gguf_set_kv(out, self.metadata)
        lib.gguf_set_val_u32(out, b"general.quantization_version", 2)
        lib.gguf_set_val_u32(out, b"general.file_type", file_type)
        for name, kind in types.items():
            lib.gguf_add_tensor(out, lib.ggml_get_tensor(self.tensors, name.encode()))
            if kind:
                lib.gguf_set_tensor_type(out, name.encode(), TYPES[kind])
        buffer = create_string_buffer(lib.gguf_get_meta_size(out))
        lib.gguf_get_meta_data(out, buffer)
        lib.gguf_free(out)
        return buffer.raw

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The rows of a tensor, some at a time."""
        data = self.data[name]
        rows = data.reshape(-1, data.shape[-1])
        step = max(1, PIECE // self.shapes[name][0])
        for first in range(0, len(rows), step):
            yield np.ascontiguousarray(rows[first : first + step])


def _quantize_rows(rows: np.ndarray, kind: str, wanted: str, pool: ThreadPoolExecutor) -> bytes:
    """Rows of 16 or 32 bits, in type `kind`, as `wanted`."""
    lib = _bind(library())
    if kind == "BF16":
        rows = (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    count, columns = rows.shape
    if wanted in ("F16", "F32"):
        return rows.astype(np.float16 if wanted == "F16" else np.float32).tobytes()
    size = lib.ggml_row_size(TYPES[wanted], columns)
    out = np.empty(count * size, np.uint8)
    step = -(-count // len(os.sched_getaffinity(0)))

    def quantize_some(first: int) -> bool:
        some, target = min(step, count - first), out.ctypes.data + first * size
        source = rows.ctypes.data + first * columns * 4
        lib.ggml_quantize_chunk(TYPES[wanted], source, target, 0, some, columns, None)
        return lib.ggml_validate_row_data(TYPES[wanted], target, some * size)

    if not all(pool.map(quantize_some, range(0, count, step))):
        raise InputError(f"a weight is not finite, or too large for {wanted}")
    return out.tobytes()


def _bind(lib):
    """Tell ctypes the types of the functions used here."""
    lib.gguf_init_from_file.restype, lib.gguf_init_from_file.argtypes = c_void_p, [c_char_p, _Start]
    lib.gguf_init_empty.restype = c_void_p
    lib.gguf_set_kv.argtypes = [c_void_p, c_void_p]
    lib.gguf_set_val_u32.argtypes = [c_void_p, c_char_p, c_uint32]
    lib.gguf_add_tensor.argtypes = [c_void_p, c_void_p]
    lib.gguf_set_tensor_type.argtypes = [c_void_p, c_char_p, c_int]
    lib.gguf_get_meta_size.restype, lib.gguf_get_meta_size.argtypes = c_size_t, [c_void_p]
    lib.gguf_get_meta_data.argtypes = [c_void_p, c_char_p]
    lib.gguf_free.argtypes = [c_void_p]
    lib.ggml_get_tensor.restype, lib.ggml_get_tensor.argtypes = c_void_p, [c_void_p, c_char_p]
    lib.ggml_row_size.restype, lib.ggml_row_size.argtypes = c_size_t, [c_int, c_int64]
    lib.ggml_validate_row_data.restype = c_bool
    lib.ggml_validate_row_data.argtypes = [c_int, c_void_p, c_size_t]
    lib.ggml_quantize_chunk.restype = c_size_t
    lib.ggml_quantize_chunk.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    return lib
