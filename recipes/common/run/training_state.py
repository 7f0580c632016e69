"""State that a training loop keeps between steps besides the weights: optimizers, learning rates, random numbers.

This module imports torch only where a function needs it, so that a recipe can import it before it imports unsloth.
"""

import random
import sys
from typing import TYPE_CHECKING, Any

from common.run.ranks import is_first, sum_over_ranks, world_size

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainingArguments


class Learner:
    """Parameters that are trained together: their optimizer, learning-rate schedule and gradient clipping.

    They take gradients from then on. The list is made once: PEFT switches requires_grad with the active adapter, so
    that flag does not tell which parameters these are.

    On a GPU, where they are of one dtype, they become parts of one tensor, and so do their gradients: clipping and an
    update are then a few kernels in place of some for each parameter, and gradients stay where a CUDA graph adds to
    them.

    Args:
        parameters: what to train.
        settings: optim, lr_scheduler_type, warmup_steps, weight_decay, max_grad_norm and fp16 are used; Adam's betas
            and eps are those of transformers, 0.9, 0.999 and 1e-8, unless `settings` has others.
        learning_rate: its peak.
        steps: how often `schedule` will be stepped.
    """

    def __init__(
        self, parameters: "list[Tensor]", settings: "TrainingArguments", learning_rate: float, steps: int
    ) -> None:
        import torch
        from transformers import Trainer, get_scheduler

        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(settings)
        self.parameters = parameters
        for parameter in parameters:
            parameter.requires_grad_(True)
        alike = len({parameter.dtype for parameter in parameters}) == 1
        self.trained = [one_tensor(parameters)] if alike and parameters[0].is_cuda else parameters
        self.optimizer = optimizer(
            self.trained, **{**options, "lr": learning_rate, "weight_decay": settings.weight_decay}
        )
        self.schedule = get_scheduler(
            settings.lr_scheduler_type, self.optimizer, settings.get_warmup_steps(steps), steps
        )
        self.scaler = torch.amp.GradScaler(enabled=settings.fp16)  # in float16 small gradients would vanish
        self.max_grad_norm = settings.max_grad_norm
        self._begin_alike()
        self.leaves_out_bad = False  # whether a gradient that is not finite changes nothing; looking waits for the GPU

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def backward(self, loss: "Tensor") -> None:
        """Add the gradient of `loss` to what the parameters have."""
        self.scaler.scale(loss).backward()

    def step(self) -> "Tensor":
        """Clip the gradient, update the parameters, clear the gradient. Returns its norm before clipping, a scalar.

        Of several ranks the gradients are added up first, in one exchange: a loss is the part of its rank.
        """
        import torch

        self._sum_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
        left_out = self.leaves_out_bad and not self.scaler.is_enabled() and not bool(norm.isfinite())
        if not left_out:  # the scaler leaves out such a step by itself
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self._clear()
        return norm

    def _begin_alike(self) -> None:
        """Give the parameters of the first rank to all."""
        if world_size() > 1:
            for parameter in self.trained:
                parameter.data.copy_(sum_over_ranks(parameter.data * float(is_first())))

    def _sum_gradients(self) -> None:
        """Make the gradient of every rank the sum of those of all, in place where a CUDA graph adds to it.

        DDP would sum them by hooks in the backward pass, which do not run where that is the replay of a CUDA graph.
        """
        import torch

        if world_size() == 1:
            return
        for parameter in self.trained:  # a rank without rows has no gradient yet
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        total = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, values in zip(gradients, total.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(values.view_as(gradient))

    def discard(self) -> float:
        """Clear the gradient without an update. Returns 0, the norm of no step."""
        self._clear()
        return 0.0

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.trained is self.parameters)

    def gradients(self) -> "list[Tensor]":
        """What `backward` adds to in place; empty where it makes new tensors."""
        return (
            [] if self.trained is self.parameters else [whole.grad for whole in self.trained if whole.grad is not None]
        )

    def state(self) -> dict[str, Any]:
        """What `restore` takes; torch.save can write it."""
        parts = {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def restore(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


def one_tensor(parameters: "list[Tensor]") -> "Tensor":
    """A parameter whose parts, and those of its gradient, `parameters` and their gradients become; all of one dtype."""
    import torch

    whole = torch.nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    whole.grad = torch.zeros_like(whole)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, values, gradient in zip(parameters, whole.data.split(sizes), whole.grad.split(sizes), strict=True):
        shape = parameter.shape
        parameter.data, parameter.grad = values.view(shape), gradient.view(shape)
    return whole


def forget_overrides() -> None:
    """Have bitsandbytes forget which embeddings a trainer registered for an optimizer state of 32 bit.

    It would hold their modules until the process ends, and give the parameters that have their place in the next
    optimizer of the process 32 bit too.
    """
    if "bitsandbytes" in sys.modules:
        sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance().initialize()


def random_state() -> dict[str, Any]:
    """The state of all random number generators: Python's, numpy's and torch's, on the CPU and on this rank's GPU.

    It holds plain values and tensors only, so torch.load reads it with weights_only.
    """
    import numpy as np
    import torch

    of_numpy = np.random.get_state(legacy=False)
    of_numpy["state"]["key"] = of_numpy["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": of_numpy,
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set all random number generators to a `random_state`. Call it last: loading other state may draw numbers."""
    import numpy as np
    import torch

    of_numpy = state["numpy"]
    key = np.array(of_numpy["state"]["key"], dtype=np.uint32)
    random.setstate(state["python"])
    np.random.set_state({**of_numpy, "state": {**of_numpy["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
