"""The steps of one process, taken by several ranks: the same rows in each step, in the same order, of the same weight.

A trainer of several ranks fills the last step of an epoch up with rows from its beginning, and has each rank average
over its own. Here a rank with nothing left takes one row that counts nothing, and a row counts what it would in one
process. So loss and gradient are those of one process, but for the order in which floats are added.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler
from transformers.trainer_pt_utils import BatchRebalanceSampler

from common.run.ranks import rank, world_size
from common.run.steps import CheckedSteps


class RankBatches(BatchRebalanceSampler):
    """The micro-batches of one rank: of all those of an epoch every n-th, as lists of row numbers.

    The trainer leaves a BatchRebalanceSampler as it is, where it would divide any other among the ranks again; nothing
    else of that class is used.

    Args:
        sampler: the order of the rows in one process.
        rows: of a micro-batch of a rank.
        whole: rows of a micro-batch of one process, a multiple of `rows`.
        accumulation: micro-batches of one process in a step.
        rank, ranks: the number of this rank, and how many there are.
    """

    drop_last = False

    def __init__(self, sampler: Sampler[int], rows: int, whole: int, accumulation: int, rank: int, ranks: int) -> None:
        self.sampler, self.batch_size, self.whole, self.accumulation = sampler, rows, whole, accumulation
        self.rank, self.ranks = rank, ranks
        self.count = len(sampler)  # pyrefly: ignore[bad-argument-type]  those of transformers have a length
        self.steps = accumulation * whole // (rows * ranks)  # micro-batches of a rank in a step

    def __len__(self) -> int:
        return -(-self.count // (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for index in range(len(self)):
            start = (index * self.ranks + self.rank) * self.batch_size
            yield order[start : start + self.batch_size] or order[:1]

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.sampler, SeedableRandomSampler):
            self.sampler.set_epoch(epoch)

    def rows_of(self, index: int, rank: int) -> int:
        """How many rows that count a rank has in its micro-batch `index` of the epoch."""
        return min(max(self.count - (index * self.ranks + rank) * self.batch_size, 0), self.batch_size)

    def weight(self, index: int) -> float:
        """By what to multiply the mean loss of this rank's micro-batch `index` of the epoch, counted from 0.

        In one process a step's loss is the mean over its micro-batches of the mean over their rows. Of several ranks
        each divides by its own number of micro-batches in the step, and DDP averages over the ranks. 0 for the row of a
        rank that has nothing left.
        """
        rows, start = self.rows_of(index, self.rank), (index * self.ranks + self.rank) * self.batch_size
        if rows == 0:
            return 0.0
        step = index // self.steps
        own = min(self.steps, len(self) - step * self.steps)
        batches = min(self.accumulation, -(-self.count // self.whole) - step * self.accumulation)
        beside = min(self.whole, self.count - start // self.whole * self.whole)
        return self.ranks * own / batches * rows / beside


class SharedSteps(CheckedSteps):
    """A mixin of a Trainer with checked steps, whose ranks together take the steps of one process.

    It comes before whatever computes the loss. In one process it changes nothing. The micro-batch and the accumulation
    in the Trainer's arguments are those of a rank, from `fit_to_gpu`.
    """

    rank_batches: RankBatches | None = None  # of several ranks
    coming: Sequence[int] = ()  # the micro-batches of this step that are still to come, by their number in the epoch
    micro_batch: int | None = None  # the one at hand; None outside of training

    @property
    def counts(self) -> bool:
        """Whether the micro-batch at hand has weight: a rank with no rows left takes one that has none."""
        return self.rank_batches is None or self.micro_batch is None or self.rank_batches.weight(self.micro_batch) > 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.checkpoints.hashes_beside = True
        if ddp := self.accelerator.ddp_handler:
            ddp.gradient_as_bucket_view = True  # else each rank holds the gradients twice

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if world_size() == 1:
            return sampler
        if isinstance(sampler, RandomSampler):  # as accelerate makes it in one process
            sampler = SeedableRandomSampler(
                sampler.data_source, generator=sampler.generator, data_seed=self._data_seed()
            )
        rows = self._train_batch_size
        given = self.bad_steps.arguments.get("per_device_train_batch_size", rows)  # --fit=auto may have changed it
        whole = given if given % rows == 0 else rows
        accumulation = rows * self.args.gradient_accumulation_steps * world_size() // whole
        self.rank_batches = RankBatches(sampler, rows, whole, accumulation, rank(), world_size())
        return self.rank_batches

    def _data_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if self.rank_batches is not None:
            loader.batch_sampler.even_batches = False  # else accelerate fills the last one up
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any, **kwargs: Any) -> Any:
        if (batches := self.rank_batches) is None:
            return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)
        steps = -(-len(batches) // batches.steps)  # of an epoch
        first = self.state.global_step % steps * batches.steps
        self.coming = range(first, first + num_batches)
        marked = (
            inputs if batches.weight(index) else _without_labels(inputs)
            for index, inputs in zip(self.coming, epoch_iterator, strict=False)
        )
        return super().get_batch_samples(marked, num_batches, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (batches := self.rank_batches) is None:
            return super().training_step(*args, **kwargs)
        self.micro_batch, *self.coming = self.coming
        rows = [batches.rows_of(self.micro_batch, rank) for rank in range(world_size())]
        gather = self.accelerator.gather
        if (
            min(rows) < batches.batch_size
        ):  # TRL gathers a number of each row; accelerate takes as many of each rank only
            self.accelerator.gather = partial(_gather_rows, gather, rows)
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self.accelerator.gather, self.micro_batch = gather, None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.rank_batches is None or self.micro_batch is None:
            return loss
        weight = self.rank_batches.weight(self.micro_batch)
        if weight and kwargs.get("num_items_in_batch") is not None:  # tokens are counted over all ranks
            return loss
        return loss * weight if weight != 1 else loss


def _gather_rows(gather: Any, rows: Sequence[int], tensor: Any) -> Any:
    """What `gather` returns for a tensor of one number per row, where the ranks have different numbers of rows.

    Args:
        gather: for tensors of one shape on all ranks.
        rows: those that count, of each rank; a rank without any has one that does not.
        tensor: another one, such as a sum over rows, goes to `gather` as it is.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.shape[:1] != (max(rows[rank()], 1),):
        return gather(tensor)
    padded = tensor.new_zeros(max(*rows, 1), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = gather(padded).split(len(padded))
    return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])


def _without_labels(inputs: Any) -> Any:
    """The inputs with no token that carries loss, so that none is counted."""
    labels = {name: torch.full_like(inputs[name], -100) for name in ("labels", "shift_labels") if name in inputs}
    return {**inputs, **labels} if labels else inputs
