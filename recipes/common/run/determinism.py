"""--full-determinism: PyTorch's deterministic algorithms only, so that two runs on one kind of machine have equal bits.

The name is that of transformers' TrainingArguments, which set the same; theirs comes after CUDA has started, and a
variable of cuBLAS too late. Torch then takes another kernel where one adds in an order that changes, as by atomics, and
raises a RuntimeError that names the kernel where there is no other. Inductor no longer chooses a kernel by measuring:
the shape of a sum decides its last bits. Left out: CUDA_LAUNCH_BLOCKING, which changes when kernels run, not what they
compute.

This module imports torch only where a function needs it.
"""

import os
from typing import Any

VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # a workspace for each stream; torch refuses products without it
    "TORCHINDUCTOR_DETERMINISTIC": "1",
    "FLASH_ATTENTION_DETERMINISTIC": "1",  # read by transformers for flash-attn, where that is installed
}


def set_variables(args: Any) -> None:
    """Set what cuBLAS and Inductor read when they start; a value of the user's own stays."""
    if getattr(args, "full_determinism", False):
        for name, value in VARIABLES.items():
            os.environ.setdefault(name, value)


def use_deterministic_algorithms(record: dict[str, Any]) -> None:
    """Have torch do so from here on, where a run's `record` says it; call it before a model is loaded."""
    if not record.get("arguments", {}).get("full_determinism", {}).get("value"):
        return
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
