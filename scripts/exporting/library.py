"""llama.cpp as a library: the one in the xllamacpp wheel, whose shared object exports its C functions."""

import ctypes
import functools
from importlib.util import find_spec
from pathlib import Path

from common.errors import MachineError


@functools.cache
def library() -> ctypes.CDLL:
    """Raises MachineError where xllamacpp is not installed."""
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise MachineError("xllamacpp is not installed, which has llama.cpp: `make setup` installs what the lock has")
    lib = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    lib.llama_backend_init()
    return lib
