"""The ways to sample that an argument can name, and whether they can be had. Imports no torch: recipes ask early."""

import importlib.util
from typing import Literal

from common.errors import InputError, MachineError
from common.run.ranks import world_size

Backend = Literal["auto", "graph", "vllm", "generate"]
Correction = Literal["off", "token"]


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def check_sampling(rollouts: Backend, correction: Correction = "off", level: str = "token") -> None:
    """Raise where --rollouts and --rollout-correction cannot be had, alone, together, or at the ratio's `level`.

    MachineError for what is not installed, InputError for what does not fit.
    """
    if rollouts == "vllm" and world_size() > 1:
        raise InputError(
            f"--rollouts=vllm samples in one process, and this run has {world_size()}: give --rollouts=graph"
        )
    if rollouts == "vllm" and not has_vllm():
        raise MachineError(
            "--rollouts=vllm: vLLM is not installed. `make setup VARIANT=cuda-vllm` (or `make image "
            "VARIANT=cuda-vllm`) installs it; --rollouts=auto samples without it"
        )
    if correction != "token":
        return
    if rollouts == "generate":
        raise InputError(
            "--rollout-correction=token needs the log-probabilities that --rollouts=generate does not give"
        )
    if level == "sequence":
        raise InputError(
            "--rollout-correction=token weighs tokens one by one, but with --importance-sampling-level=sequence the "
            "ratio is one number for a completion: give --rollout-correction=off"
        )


def corrects(correction: Correction, backend: Backend) -> bool:
    """Whether losses are weighted, now that completions are sampled by `backend`.

    Raises InputError where --rollouts=auto had to take a backend that gives no log-probabilities to weigh by.
    """
    if correction == "token" and backend == "generate":
        raise InputError(
            "--rollout-correction=token needs log-probabilities, and --rollouts=auto had to take transformers' "
            "generate, which gives none (the reason is above): give --rollout-correction=off"
        )
    return correction == "token"
