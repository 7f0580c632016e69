"""8-bit Adam for an adapter's hundreds of small matrices in a few kernels, with the numbers of one kernel for each.

bitsandbytes starts a kernel for each matrix, 392 for the adapter of a 7B model. On an H200 each takes 7 us, and the
processor longer than that to start it.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit states: whole blocks can lie one behind another
TOGETHER = 2**22  # elements of one update: copies of their weights and gradients take 32 MiB in 32 bit
STATES = ("state1", "state2", "absmax1", "absmax2")


class BatchedUpdates(Optimizer8bit):
    """A mixin of an 8-bit optimizer of bitsandbytes: matrices of one group and dtype are updated together.

    Weights and gradients are copied into one tensor for the update and the weights back. The states of each matrix
    become parts of one tensor and stay that, so a checkpoint has the states that it has without this. What has a state
    in 32 bit, is divided among ranks, has settings of its own, or would not end with a block is updated alone.
    """

    waiting: "dict[Any, list[tuple[torch.Tensor, int]]]"  # of each (group, step, dtype, device)
    elements: "dict[Any, int]"  # of what waits
    joined: "dict[torch.Tensor, tuple[list[torch.Tensor], dict[str, torch.Tensor]]]"

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.waiting, self.elements = defaultdict(list), defaultdict(int)
        loss = Optimizer8bit.step(self, closure)  # that of the class between has hooks, which would see no update yet
        for (gindex, *_), waiting in self.waiting.items():
            self._update_together(gindex, waiting)
        return loss

    def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
        """Called by `step` for each matrix that has a gradient."""
        state = self.state[p]
        own_settings = (gindex, pindex) in self.mng.index2config or id(p) in self.mng.pid2config
        if (
            state["state1"].dtype != torch.uint8
            or state["state1"].shape != p.shape  # AdEMAMix has two in one
            or not state["state1"].is_contiguous()
            or not p.is_contiguous()
            or p.numel() % BLOCK
            or p.numel() > TOGETHER
            or own_settings
            or type(p.data) is not torch.Tensor  # DTensor of FSDP2
        ):
            super().update_step(group, p, gindex, pindex)
            return
        key = gindex, state["step"], p.dtype, p.device
        waiting = self.waiting[key]
        if self.elements[key] + p.numel() > TOGETHER:
            # At once, also since the states that the first step makes one by one leave their memory to the next ones.
            self._update_together(gindex, waiting)
            waiting.clear()
            self.elements[key] = 0
        waiting.append((p, pindex))
        self.elements[key] += p.numel()

    def _update_together(self, gindex: int, waiting: Sequence[tuple[torch.Tensor, int]]) -> None:
        parameters = [p for p, _ in waiting]
        states = [self.state[p] for p in parameters]
        whole = torch.cat([p.detach().view(-1) for p in parameters])
        whole.grad = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        self.state[whole] = {**states[0], **self._join(parameters[0], states)}
        super().update_step(self.param_groups[gindex], whole, gindex, waiting[0][1])
        step = self.state.pop(whole)["step"]
        for state in states:
            state["step"] = step
        torch._foreach_copy_(
            [p.detach().view(-1) for p in parameters], list(whole.split([p.numel() for p in parameters]))
        )

    def _join(self, first: torch.Tensor, states: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The states of several matrices as one tensor of each name, of which theirs become parts.

        Args:
            first: the first of the matrices, by which they are found again in the next step.
            states: of each; those of a checkpoint are tensors of their own.
        """
        names = [name for name in STATES if name in states[0]]
        parts = [state[name] for name in names for state in states]
        known, whole = self.joined.get(first, ([], {}))
        if len(known) == len(parts) and all(a is b for a, b in zip(known, parts, strict=True)):
            return whole
        whole = {name: torch.cat([state[name].view(-1) for state in states]) for name in names}
        for name in names:
            sizes = [state[name].numel() for state in states]
            for state, part in zip(states, whole[name].split(sizes), strict=True):
                state[name] = part.view(state[name].shape)
        self.joined[first] = [state[name] for name in names for state in states], whole
        return whole


def batch_updates(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer of bitsandbytes update many matrices at a time, unless its state is paged."""
    if isinstance(optimizer, Optimizer8bit) and not optimizer.is_paged and not isinstance(optimizer, BatchedUpdates):
        # Not its class from the start: the trainer looks for "bitsandbytes" in the name of that.
        kind = type(optimizer)
        optimizer.__class__ = type(kind.__name__, (BatchedUpdates, kind), {})
        optimizer.joined = {}  # pyrefly: ignore[missing-attribute]  it is a BatchedUpdates now
        optimizer._patch_step_function()  # the hooks of torch, for this class too
