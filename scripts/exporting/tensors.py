"""What quantizing changed in each tensor of a GGUF file: its weights as llama.cpp reads them, and those before."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int64, c_void_p
from functools import partial
from pathlib import Path

import numpy as np

from exporting.library import library
from exporting.quantize import GgufFile

# How far weights may be from those before, as the norm of the difference over their norm: some times what
# quantizing normal numbers gives, and below what anything else gives. docs/export.md has both.
BOUNDS = {"F32": 0.0, "F16": 0.002, "BF16": 0.01, "Q8_0": 0.02, "Q6_K": 0.05, "Q5_1": 0.1, "Q5_0": 0.1, "Q5_K": 0.1}
BOUNDS |= {"Q4_0": 0.2, "Q4_K": 0.2, "Q3_K": 0.4, "Q2_K": 0.7, "none": 0.0}


def tensor_errors(wide: Path, file: Path) -> Iterator[tuple[str, str, float]]:
    """(name, type in `file`, relative error) of each tensor; the error is infinite where it is not in both."""
    before, after = GgufFile(wide), GgufFile(file)
    for name in sorted(before.shapes.keys() | after.shapes.keys()):
        if before.shapes.get(name) != after.shapes.get(name):
            yield name, after.kinds.get(name, "none"), float("inf")
            continue
        wrong = size = 0.0
        norms = partial(_norms, kinds=(before.kinds[name], after.kinds[name]), columns=before.shapes[name][0])
        with ThreadPoolExecutor() as pool:
            for one, other in pool.map(norms, before.pieces(name), after.pieces(name)):
                wrong, size = wrong + one, size + other
        yield name, after.kinds[name], float(np.sqrt(wrong / size)) if size else float(wrong > 0)


def _norms(one: np.ndarray, other: np.ndarray, kinds: tuple[str, str], columns: int) -> tuple[float, float]:
    """The squared norms of the difference between two pieces of a tensor, and of the first."""
    before, after = to_float32(one, kinds[0], columns), to_float32(other, kinds[1], columns)
    return float(np.square(after - before, dtype=np.float64).sum()), float(np.square(before, dtype=np.float64).sum())


def to_float32(rows: np.ndarray, kind: str, columns: int) -> np.ndarray:
    """Rows of a tensor of type `kind` as float32, (rows, columns)."""
    if kind == "BF16":
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if kind in ("F16", "F32"):
        return rows.astype(np.float32)
    out = np.empty((len(rows), columns), np.float32)
    read = getattr(library(), f"dequantize_row_{kind[0].lower()}{kind[1:]}")
    read.argtypes, read.restype = [c_void_p, c_void_p, c_int64], None
    read(rows.ctypes.data, out.ctypes.data, out.size)
    return out
