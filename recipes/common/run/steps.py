"""What the recipes add to the steps of a Trainer: bad numbers are found, and a resumed run continues its logs too."""

import math
import os
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from common.errors import InputError, MachineError, is_out_of_memory, one_line
from common.run.bad_numbers import BadSteps, check_weights, places_in, trained_parameters
from common.run.batched_updates import batch_updates
from common.run.checkpoints import CheckpointCallback
from common.run.files import read_object, write_json
from common.run.ranks import gather_objects, is_first, sum_over_ranks, world_size

LOGS = "logs.json"  # in a checkpoint: what has not been logged yet, which trainer_state.json does not hold


class Numbers:
    """The sum of losses and the gradient's norm of step `number`, on their way from the GPU, and its micro-batches."""

    def __init__(self, number: int, loss: torch.Tensor, norm: Any, batches: list[Any]) -> None:
        self.number, self.batches = number, batches
        both = torch.stack([loss.float(), torch.as_tensor(norm, device=loss.device).float()])
        self.both, self.copied = both, None
        if both.is_cuda:
            self.both = torch.empty(2, pin_memory=True).copy_(both, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> tuple[float, float]:
        """Loss and norm; waits until they are here, and for nothing that the GPU has to do after them."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, norm = self.both.tolist()
        return loss, norm


def queue_updates(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer of bitsandbytes not wait for the GPU after each matrix: an adapter of a 7B model has 392.

    One with paged state has to wait, and does, also after a run of this process whose optimizer did not.
    """
    if hasattr(optimizer, "is_paged"):
        import bitsandbytes.optim.optimizer as of_bitsandbytes
        from bitsandbytes.utils import sync_gpu

        of_bitsandbytes.sync_gpu = sync_gpu if optimizer.is_paged else lambda t: None


class CheckedSteps(Trainer):
    """A mixin of a Trainer whose steps are checked, and whose resumed runs log as one that was never stopped.

    - A loss or a gradient that is not finite ends the run before anything of it is saved, or is left out: `BadSteps`.
    - A checkpoint holds the sums behind the next line of the log.
    - A run that was killed between its last step and its end takes no further step on resuming. (transformers 5.17
      checks whether all steps are done only after a step, unless they end with an epoch.)
    - With --oom=retry there is a checkpoint of the step before the memory was full.
    - With --dtype float32 a GPU computes in float32.
    - The update of the weights does not wait for the GPU, and takes a few kernels: `batch_updates`.
    - DDP does not look for parameters that a step leaves unused, nor send buffers: all are used, and no buffer changes.

    A CheckpointCallback must be among the callbacks: it has the run and its rows.
    """

    metrics_of_rank = False  # whether the metrics between two logs are those of this rank's own rows

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs["args"]
        self.in_32_bit = not (given.bf16 or given.fp16)
        super().__init__(*args, **kwargs)
        self.args.logging_nan_inf_filter = False  # it waits for the GPU at every micro-batch, and logs a NaN as a 0
        if ddp := self.accelerator.ddp_handler:  # the arguments were read before; accelerate wraps the model later
            ddp.find_unused_parameters = ddp.broadcast_buffers = False
        callbacks = self.callback_handler.callbacks
        self.checkpoints = next(one for one in callbacks if isinstance(one, CheckpointCallback))
        self.bad_steps = BadSteps(self.checkpoints.run)
        self.batches: list[Any] = []  # the micro-batches of this step
        self.unchecked: Numbers | None = None  # of the step before
        self.good: tuple[torch.Tensor, dict[str, list[float]]] | None = None  # loss and metrics before a bad step
        self.updating = False  # between the gradient and the weights
        self.nothing_to_log = False  # after a step that was left out, where every step is logged
        self.restored = False

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers has it, without autocast in 32 bit: on a GPU, Unsloth's trainers turn it on before this."""
        if self.in_32_bit:
            for name in ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"):
                setattr(self.args, name, False)
            self.args.mixed_precision = os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # either is read
        super().create_accelerator_and_postprocess()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        queue_updates(optimizer)
        batch_updates(optimizer)
        return optimizer

    def places(self, batches: Sequence[Mapping[str, Any]]) -> list[str]:
        """file:line of the rows in these micro-batches."""
        return places_in(batches, self.checkpoints.rows)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As transformers has it; where it fails since the weights are not finite, that is the reason given."""
        self.batches.append(inputs)
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except Exception as error:
            if not is_out_of_memory(error) and not isinstance(error, InputError | MachineError):
                failed = f"when step {self.state.global_step + 1} failed ({one_line(error)})"
                check_weights(trained_parameters(self.model), failed)
            raise

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        now = Numbers(self.state.global_step + 1, self._tr_loss, norm, self.batches)
        self.batches = []
        # Reading a number of the step at hand would wait for the GPU; those of the step before are here already. A step
        # that may be left out has to be known before it is taken.
        self.unchecked, due = now, self.unchecked
        if self.bad_steps.limit or not self._tr_loss.is_cuda:
            due, self.unchecked = now, None
        if due is not None and not self._is_good(due):
            self._leave_out(model)
            norm = 0.0  # of what is left
        self.updating = True
        return norm

    def _is_good(self, step: "Numbers") -> bool:
        loss, norm = step.read()
        places = self.places(step.batches) if world_size() > 1 and not math.isfinite(loss + norm) else []
        if self.bad_steps.limit or not math.isfinite(norm):  # all ranks have the same norm, each its own loss
            of_ranks = gather_objects((loss, places))
            loss, places = (
                sum(one for one, _ in of_ranks) / world_size(),
                [place for _, more in of_ranks for place in more],
            )
        numbers = {"loss": loss / max(step.number - self._globalstep_last_logged, 1), "gradient norm": norm}
        if all(map(math.isfinite, numbers.values())):
            return True
        scaler = self.accelerator.scaler
        if scaler is not None and math.isfinite(numbers["loss"]) and scaler.get_scale() > 1:
            return True  # in float16 a gradient that is too large is left out by the scaler, which then scales less
        what = "the gradient" if math.isfinite(numbers["loss"]) else "the loss"
        numbers["learning rate"] = self._get_learning_rate()
        self.bad_steps.found(step.number, what, numbers, places or self.places(step.batches))
        return False

    def _leave_out(self, model: Any) -> None:
        """Take the step without a gradient, and out of what is logged."""
        for parameter in model.parameters():
            parameter.grad = None
        since = self.state.global_step - self._globalstep_last_logged  # good steps since the last line of the log
        self.nothing_to_log = since == 0
        loss, metrics = self.good if self.good and since else (torch.zeros_like(self._tr_loss), {})
        self._tr_loss.copy_(loss * (since + 1) / max(since, 1))  # the mean stays what it was
        if hasattr(self, "_metrics"):
            self._metrics["train"].clear()
            self._metrics["train"].update({name: list(values) for name, values in metrics.items()})

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.updating = False
        control = self.control
        control.should_log &= not self.nothing_to_log
        self.nothing_to_log = False
        if self.unchecked and (control.should_log or control.should_save or control.should_evaluate):
            due, self.unchecked = self.unchecked, None
            self._is_good(due)
        if self.bad_steps.limit:
            metrics = getattr(self, "_metrics", {}).get("train", {})
            self.good = self._tr_loss.clone(), {name: list(values) for name, values in metrics.items()}
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if checkpoint := kwargs["resume_from_checkpoint"]:
            self._restore_logs(Path(checkpoint))
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        try:
            super()._run_epoch(*args, **kwargs)
        except Exception as error:
            with suppress(Exception):  # the error at hand is the one to show
                self.checkpoints.record_hash()
            # Of several ranks one alone is here, and saving takes all; --oom=retry says why it does not retry then.
            if world_size() == 1 and is_out_of_memory(error) and self.bad_steps.arguments.get("oom") == "retry":
                traceback.clear_frames(error.__traceback__)  # they hold the activations that filled the memory
                self._save_before_retry(kwargs["model"], kwargs["trial"])
            raise

    def _save_before_retry(self, model: Any, trial: Any) -> None:
        """A checkpoint of the step before, if it has none and its weights are still those."""
        step = self.state.global_step
        if self.updating or step <= self.checkpoints.run.record.get("step", 0) or step % self.checkpoints.every:
            return
        model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._save_checkpoint(model, trial)
        self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        loss = float(sum_over_ranks(self._tr_loss)) / world_size()
        metrics = getattr(self, "_metrics", {})
        if self.metrics_of_rank:
            of_ranks = gather_objects({"train": {k: list(map(float, v)) for k, v in metrics["train"].items()}})
            metrics = {"train": {k: [x for one in of_ranks for x in one["train"].get(k, ())] for k in metrics["train"]}}
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            logs = {
                "loss": loss,
                "losses": self._total_loss_scalar,
                "last_logged": self._globalstep_last_logged,
                "tokens": getattr(self, "_total_train_tokens", 0),
                "metrics": {mode: {k: list(map(float, v)) for k, v in of.items()} for mode, of in metrics.items()},
            }
            write_json(folder / LOGS, logs)

    def _restore_logs(self, checkpoint: Path) -> None:
        if self.restored:
            return
        self.restored = True
        if not (checkpoint / LOGS).is_file():  # of an earlier version
            return
        logs = read_object(checkpoint / LOGS)
        self._tr_loss.fill_(logs["loss"])
        self._total_loss_scalar = logs["losses"]
        self._globalstep_last_logged = logs["last_logged"]
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = logs["tokens"]
        if self.metrics_of_rank and not is_first():  # the first one has those of all
            return
        for mode, metrics in logs["metrics"].items():
            self._metrics[mode].update(metrics)
