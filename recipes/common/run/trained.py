"""The sha256 of the weights that a run trains, at a few of its steps: what `make verify` compares.

They are hashed where they are, in memory: no file has to be kept, and no checkpoint made. The first step, the fifth and
the hundredth tell where two runs part; the twentieth is where `make verify` ends by default; the last is the result.
So a run hashes five times, however long it is: 0.2 s each for an adapter of a 7B, rank 16, and about 1 s for each
1.4 GB where more is trained. Of several ranks the first one hashes.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from common.run.ranks import is_first

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

STEPS = (1, 5, 20, 100)  # and the last


def is_hashed(step: int, last: int) -> bool:
    """Whether the weights after this step of a run of `last` steps are hashed."""
    return step in STEPS or step == last


def weights_sha256(named: "Iterable[tuple[str, Tensor]]") -> str:
    """One sha256 over the name, type, shape and bytes of each of these weights, sorted by name."""
    import torch

    total = hashlib.sha256()
    for name, weight in sorted(named, key=lambda pair: pair[0]):
        values = weight.detach()
        if hasattr(values, "full_tensor"):  # a part of it is in each of several processes
            values = values.full_tensor()  # takes all of them
        if not is_first():
            continue
        total.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        content: Any = values.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        total.update(content)
    return total.hexdigest()


def trained_sha256(model: "Module") -> str:
    """`weights_sha256` of what training changes in `model`."""
    from common.run.bad_numbers import named_trained_parameters

    return weights_sha256(named_trained_parameters(model))


def hash_beside(model: "Module") -> Future[str]:
    """`trained_sha256` by a thread: nothing may change the weights, or record a CUDA graph, until it has its result.

    On a GPU they are copied on a stream of their own, beside what the main thread computes. Weights in parts, which all
    ranks put together, are hashed before this returns; a rank that hashes nothing has no thread.
    """
    import torch

    from common.run.bad_numbers import named_trained_parameters

    named = list(named_trained_parameters(model))
    if not is_first() or any(hasattr(weight, "full_tensor") for _, weight in named):
        done: Future[str] = Future()
        done.set_result(weights_sha256(named))
        return done
    stream = None
    if named and named[0][1].is_cuda:
        stream = torch.cuda.Stream(named[0][1].device)
        stream.wait_stream(torch.cuda.current_stream(stream.device))  # the update that made them

    def hashed() -> str:
        if stream is not None:
            torch.cuda.set_device(stream.device)  # a thread begins with the first GPU, and would open a context there
        with torch.cuda.stream(stream):  # pyrefly: ignore[bad-argument-type]  with None it does nothing
            return weights_sha256(named)

    pool = ThreadPoolExecutor(1)
    result = pool.submit(hashed)
    pool.shutdown(wait=False)
    return result
