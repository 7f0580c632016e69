"""Record work on a CUDA GPU once, to be replayed."""

from collections.abc import Callable
from typing import Any

import torch


def record(work: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """What `work` does on the GPU, as a CUDA graph; `pool` is memory shared with graphs that never run beside it.

    `work` has run before, so that kernels are compiled and libraries have allocated. Raises RuntimeError where it waits
    for the GPU, or there is no memory left.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    random_state = generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool):
            work()
    except RuntimeError:
        generator.graphsafe_set_state(random_state)  # the old state still waits for the end of the recording
        raise
    return graph
