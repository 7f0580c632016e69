"""Decode many prompts at once over a static cache: on a CUDA GPU one CUDA graph a step, on a CPU the same step eagerly.

A step runs the model for one token of every row, draws the next token, and appends it, all on the device; the host
looks at the rows every few steps only. Rows that are done leave the batch (it is compacted to the next smaller size)
or are filled with the prompts that wait. A prompt is computed once for all rows that have it.

The noise of a draw depends on the completion's seed and the token's index alone (`operations.gumbel`): a completion
does not depend on the batch that it is in, and nothing need be stored to resume.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.lm.cuda_graph import own_stream, record
from common.lm.rollout import operations
from common.lm.rollout.architecture import Unsupported, rotary_tables
from common.lm.rollout.rows import Request, Rows
from common.lm.rollout.weights import PolicyWeights

if TYPE_CHECKING:
    from torch import Tensor

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # rows of a step
STEPS = 8  # between two looks at the rows
PREFILL = 16384  # prompt tokens that are computed at once


@dataclass(frozen=True, slots=True)
class Decoded:
    """A completion: its tokens (C,), the end token included, and their log-probabilities where they were drawn."""

    tokens: list[int]
    log_probs: list[float]


class Decoder:
    """Decodes for one policy; holds the cache, and on a GPU the graphs, for `rows` rows of `length` tokens.

    Raises Unsupported when the model's positions do not reach `length`.
    """

    def __init__(self, weights: PolicyWeights, rows: int, length: int) -> None:
        architecture = weights.architecture
        if length > architecture.longest:
            raise Unsupported(f"prompt and completion of {length} tokens exceed its {architecture.longest} positions")
        self.weights = weights
        self.size = size_for(rows)
        self.length = length
        device = weights.device
        self.operations = weights.operations
        shape = (len(weights.layers), 2, self.size, length, architecture.kv_heads, architecture.head_dim)
        self.cache = torch.zeros(shape, dtype=weights.dtype, device=device)
        self.tables = rotary_tables(weights.config, architecture, length, device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> "Tensor":
            return torch.zeros(shape, dtype=dtype, device=device)

        self.state = operations.State(
            ids=zeros(self.size),
            positions=zeros(self.size),
            counts=zeros(self.size),
            limits=zeros(self.size),
            done=torch.ones(self.size, dtype=torch.bool, device=device),
            seeds=zeros(self.size),
            tokens=zeros(self.size, length),
            log_probs=zeros(self.size, length, dtype=torch.float32),
        )
        self.index = torch.arange(self.size, device=device)
        self.temperature, self.greedy = torch.ones((), device=device), torch.zeros((), device=device)
        self.end = zeros()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.stream: torch.cuda.Stream | None = None  # that they are recorded on
        self.steps = 0  # so far; for figures

    def refresh(self) -> None:
        """Merge the adapter as it is now."""
        self.weights.refresh()

    @torch.no_grad()
    def decode(
        self,
        requests: Sequence[Request],
        end: int,
        temperature: float,
        advance: Callable[[int], object] = lambda count: None,
    ) -> list[Decoded]:
        """A completion of each request, up to the token `end` or its limit; greedy at temperature 0.

        `advance` is called with the number of completions that are new since its last call.
        """
        self.temperature.fill_(temperature or 1.0)
        self.greedy.fill_(0.0 if temperature else 1.0)
        self.end.fill_(end)
        rows = Rows.of(self.size, len(requests))
        results: list[Decoded | None] = [None] * len(requests)
        size = size_for(min(self.size, len(requests)))
        self._fill(rows, size, requests)
        while live := rows.live():
            if not rows.waiting and (smaller := size_for(len(live))) < size:
                self._compact(rows, smaller)
                size = smaller
            steps = min(STEPS, max(rows.left[row] for row in live))
            for _ in range(steps):
                self._replay(size)
            self.steps += steps
            for row in rows.live():
                rows.left[row] -= steps
            advance(self._collect(rows, size, results))
            free = size - len(rows.live())
            if rows.waiting and free >= min(len(rows.waiting), max(1, size // 8)):
                self._fill(rows, size, requests)
        return [result for result in results if result is not None]

    def _collect(self, rows: Rows, size: int, results: list[Decoded | None]) -> int:
        """Take the completions of the rows that are done. Returns how many."""
        done = self.state.done[:size].tolist()
        finished = [row for row in rows.live() if done[row]]
        if not finished:
            return 0
        index = torch.tensor(finished, device=self.index.device)
        counts = self.state.counts[index]
        longest = int(counts.max())
        tokens = self.state.tokens[index, :longest].tolist()
        log_probs = self.state.log_probs[index, :longest].tolist()
        for row, count, ids, scores in zip(finished, counts.tolist(), tokens, log_probs, strict=True):
            request = rows.request[row]
            assert request is not None
            results[request] = Decoded(ids[:count], scores[:count])
            rows.request[row] = None
        return len(finished)

    def _fill(self, rows: Rows, size: int, requests: Sequence[Request]) -> None:
        """Put waiting requests into the free rows below `size`, and compute the keys and values of their prompts."""
        filled, new, copies = rows.fill(size, requests)
        self._prefill(new)
        for source in dict.fromkeys(source for source, _, _ in copies):
            targets = [target for other, target, _ in copies if other == source]
            tokens = next(count for other, _, count in copies if other == source)
            self.cache[:, :, targets, :tokens] = self.cache[:, :, source : source + 1, :tokens]
        chosen = [requests[request] for request in filled.values()]

        def column(values: list[int]) -> "Tensor":
            return torch.tensor(values, device=self.index.device)

        index = column(list(filled))
        state = self.state
        state.ids[index] = column([request.prompt[-1] for request in chosen])
        state.positions[index] = column([len(request.prompt) - 1 for request in chosen])
        state.limits[index] = column([request.limit for request in chosen])
        state.seeds[index] = column([request.seed for request in chosen])
        state.counts[index] = 0
        state.done[index] = False

    def _prefill(self, prompts: dict[tuple[int, ...], int]) -> None:
        """Write the keys and values of each prompt but its last token, which a step reads, to its row."""
        batch: list[tuple[tuple[int, ...], int]] = []
        for prompt, row in prompts.items():
            if len(prompt) < 2:
                continue
            if batch and sum(len(other) for other, _ in batch) + len(prompt) > PREFILL:
                self._prefill_batch(batch)
                batch = []
            batch.append((prompt[:-1], row))
        if batch:
            self._prefill_batch(batch)

    def _prefill_batch(self, batch: list[tuple[tuple[int, ...], int]]) -> None:
        device = self.index.device
        lengths = [len(prompt) for prompt, _ in batch]
        ids = torch.tensor([token for prompt, _ in batch for token in prompt], device=device)  # (T,)
        rows = torch.tensor([row for prompt, row in batch for _ in prompt], device=device)
        positions = torch.tensor([index for length in lengths for index in range(length)], device=device)
        self._model(ids, rows, positions, operations.Packed.of(lengths, device))

    def _model(self, ids: "Tensor", rows: "Tensor", positions: "Tensor", packed: operations.Packed | None) -> "Tensor":
        """The normed hidden states (T, h) after the last layer.

        With `packed` the tokens are those of prompts, else one token a row that attends to its whole row.
        """
        ops, weights, a = self.operations, self.weights, self.weights.architecture
        residual = weights.embed(ids)
        x = ops.norm(residual, weights.layers[0].first_norm, a)
        for number, layer in enumerate(weights.layers):
            keys, values = self.cache[number]
            window = a.windows[number]
            table = self.tables[a.rotary_tables[number]]
            qkv = layer.qkv(x)
            q = ops.rotate_and_store(qkv, layer, a, table, rows, positions, keys, values)
            if packed is None:
                y = ops.attend(q, keys, values, positions, a, window)
            else:
                v = qkv.view(len(qkv), -1, a.head_dim)[:, a.heads + a.kv_heads :]
                y = ops.attend_prompts(q, keys[rows, positions], v.contiguous(), packed, a, window)
            y = layer.output(y)
            if a.post_norms:
                y = ops.norm(y, layer.attention_norm, a)
            y = layer.down(ops.gate(layer.gate_up(ops.norm(y, layer.second_norm, a, residual)), a))
            if a.post_norms:
                y = ops.norm(y, layer.mlp_norm, a)
            last = number + 1 == len(weights.layers)
            x = ops.norm(y, weights.norm if last else weights.layers[number + 1].first_norm, a, residual)
        return x

    def _step(self, size: int) -> None:
        """Decode one token of the first `size` rows."""
        state = self.state.first(size)
        hidden = self._model(state.ids, self.index[:size], state.positions, None)
        logits = self.weights.logits(hidden)
        self.operations.choose(logits, state, self.temperature, self.greedy, self.end, self.weights.architecture)

    def _replay(self, size: int) -> None:
        if self.index.device.type != "cuda":
            self._step(size)
            return
        if size not in self.graphs:
            self.graphs[size] = self._capture(size)
        self.graphs[size].replay()

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        """A step of `size` rows as a CUDA graph. The rows stay as they are."""
        if self.stream is None:
            self.stream = own_stream(self)
        pool = next((other.pool() for other in self.graphs.values()), None)
        return record(lambda: self._step(size), self.stream, pool, self.state)

    def _compact(self, rows: Rows, size: int) -> None:
        """Move the live rows at or above `size` to free rows below it."""
        sources, targets = rows.compact(size)
        if sources:
            used = int(self.state.positions[sources].max()) + 1
            self.cache[:, :, targets, :used] = self.cache[:, :, sources, :used]
            for tensor in self.state:
                tensor[targets] = tensor[sources]
        self.state.done[size:] = True


def size_for(rows: int) -> int:
    """The smallest size of a step that holds so many rows."""
    return next((size for size in SIZES if size >= rows), SIZES[-1])


def size_within(rows: int) -> int:
    """The largest size of a step that has no more rows, at least one."""
    return max((size for size in SIZES if size <= rows), default=1)
