"""Bad numbers: a step whose loss or gradient is not finite stops the run, before anything of it is saved.

With --skip-bad-steps K up to K such steps of a run are left out instead. Either way the step is in bad-steps.jsonl,
with the rows that were in it. Nothing that is not finite is ever saved: `check_weights` looks at the weights before.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import InputError
from common.run.files import keep_rows, read_jsonl
from common.run.ranks import gather_objects, is_first, rank, world_size
from common.run.samples import append

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from common.run.folder import Run
    from common.run.training_state import Learner

FILE = "bad-steps.jsonl"
SHOWN = 3  # rows in the message
IDS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "answers")  # of a row in tokens


class BadSteps:
    """The bad steps of a run: left out, up to --skip-bad-steps of them, or the end of it.

    Args:
        run: where bad-steps.jsonl is, and the arguments that the message names.
    """

    def __init__(self, run: "Run") -> None:
        self.run = run
        # Of several ranks each has rows of its own.
        self.file = run.folder / (FILE if is_first() else f"bad-steps-{rank()}.jsonl")
        self.arguments = {name: one["value"] for name, one in run.record.get("arguments", {}).items()}
        self.limit = int(self.arguments.get("skip_bad_steps", 0))

    def check(self, step: int, metrics: Mapping[str, float], rows: Sequence[Any], *learners: "Learner") -> None:
        """`found`, where a loss or the norm of a gradient among the metrics of `step` is not finite.

        Raises InputError there unless the step may be left out, and where weights are not finite: with such the next
        step could not sample.

        Args:
            rows: what was in the step, each with its `place`.
            learners: what was trained; of those with `leaves_out_bad` the bad gradients changed nothing.
        """
        numbers = {name: float(value) for name, value in metrics.items() if "loss" in name or "grad_norm" in name}
        bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        if any(learner.scaler.is_enabled() and learner.scaler.get_scale() > 1 for learner in learners):
            # In float16 a gradient that is too large is left out by the scaler, which then scales less.
            bad = {name: value for name, value in bad.items() if "loss" in name}
        if bad:
            what = "the loss" if any("loss" in name for name in bad) else "the gradient"
            self.found(step, what, bad, [row.place for row in rows])
        for learner in learners:
            check_weights(learner.parameters, f"after step {step}")

    def found(self, step: int, what: str, numbers: Mapping[str, float], places: Iterable[str]) -> None:
        """Write down that `step`, counted from 1, was bad. Raises InputError unless it may be left out.

        Args:
            what: what is not finite, such as "the gradient".
            numbers: the loss, the gradient's norm and the like, by name.
            places: file:line of the rows in it.
        """
        rows = list(dict.fromkeys(places))
        skipped = sum(1 for _ in read_jsonl(self.file))
        shown = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
        append(self.file, [{"step": step, "what": what, **shown, "rows": rows}])
        if skipped < self.limit:
            print(f"Step {step} is left out: {what} is not finite ({_listed(shown)}); {self.file} names its rows.")
            return
        raise InputError(self._message(step, what, shown, rows, skipped))

    def _message(self, step: int, what: str, numbers: Mapping[str, Any], rows: Sequence[str], skipped: int) -> str:
        first = f"Step {step}: {what} is not finite ({_listed(numbers)}); nothing of it was saved."
        if skipped:
            first += f" It is bad step number {skipped + 1}, and --skip-bad-steps {self.limit} allows {self.limit}."
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        where = f"Its rows: {', '.join(rows[:SHOWN])}{more}, all in {self.file}." if rows else f"It is in {self.file}."
        saved = self.run.record.get("step", 0)
        kept = f" The checkpoint of step {saved} is whole." if saved else ""
        return f"{first}\n{where}\n{self._cure(step)}{kept} Or leave out up to 5 such steps with --skip-bad-steps 5."

    def _cure(self, step: int) -> str:
        settings = ("learning_rate", "critic_learning_rate", "embedding_learning_rate", "max_grad_norm", "temperature")
        lower = [f"--{name.replace('_', '-')} ({value:g})" for name in settings if (value := self.arguments.get(name))]
        cure = f"Lower {' or '.join(lower)} and give another --output-dir" if lower else "Lower the learning rate"
        if "float16" in str(self.run.record.get("dtype")) and "bfloat16" not in str(self.run.record.get("dtype")):
            cure += ", or compute in a type of wider range with --dtype float32"
        if step == 1:
            cure += (
                "; at the first step no rate has had an effect yet: look at these rows, and at the base's own weights"
            )
        return f"{cure}."


def forget_bad_steps(folder: Path, step: int) -> None:
    """Forget the bad steps that the run in `folder`, resumed after `step` steps, takes again."""
    for file in folder.glob("bad-steps*.jsonl"):
        keep_rows(file, lambda entry: entry.get("step", 0) <= step)


def _listed(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in numbers.items())


def check_weights(parameters: "Iterable[Tensor]", found: str) -> None:
    """Raise InputError where trained weights are not finite, or too large to square; `found` says when it was seen.

    Of a sharded weight each rank looks at its own part, so that a rank may look alone.
    """
    import torch
    from torch.distributed.tensor import DTensor

    trained = [one.to_local() if isinstance(one, DTensor) else one for one in (each.detach() for each in parameters)]
    if trained and not math.isfinite(float(torch.nn.utils.get_total_norm(trained))):
        raise InputError(
            f"The trained weights are no longer finite, seen {found}. Lower --learning-rate and give another "
            "--output-dir; checkpoints from before are whole."
        )


def check_alike(parameters: "Iterable[Tensor]", found: str) -> None:
    """Raise RuntimeError where two ranks that each have all weights have other ones, which is a bug: a gradient was
    not added up over the ranks."""
    if world_size() == 1:
        return
    from torch.distributed.tensor import DTensor

    weights = [one.detach() for one in parameters if not isinstance(one, DTensor)]  # of a sharded one each has a part
    sums = [
        float(sum(one.double().square().sum() for one in weights)),
        float(sum(one.double().sum() for one in weights)),
    ]
    of_ranks = gather_objects(sums)
    if other := [number for number, one in enumerate(of_ranks) if one != of_ranks[0]]:
        raise RuntimeError(f"The weights of rank {other[0]} are not those of rank 0, seen {found}: {of_ranks}")


def trained_parameters(model: "Module") -> "list[Tensor]":
    """The weights that training changes: PEFT takes requires_grad away from adapters that are not active."""
    return [parameter for _, parameter in named_trained_parameters(model)]


def named_trained_parameters(model: "Module") -> "list[tuple[str, Tensor]]":
    """As `trained_parameters`, each with its name in `model`."""
    named = model.named_parameters()
    return [(name, parameter) for name, parameter in named if parameter.requires_grad or "lora_" in name]


def places_in(batches: Sequence[Mapping[str, Any]], rows: Sequence[Any]) -> list[str]:
    """The places of those rows in tokens whose ids are all in one of the batches, be they padded, joined or packed.

    A batch is what a trainer computes with, and says no more of its rows than their ids. `rows` have a `place`.
    """
    lines = [
        np.ascontiguousarray(line, dtype=np.int32).tobytes()
        for batch in batches
        for value in batch.values()
        if hasattr(value, "dim") and value.dim() > 0 and not value.is_floating_point()
        for line in value.detach().cpu().reshape(-1, value.shape[-1]).numpy()
    ]
    return [row.place for row in rows if all(any(_holds(line, ids) for line in lines) for ids in _ids_of(row))]


def _ids_of(row: Any) -> list[bytes]:
    found: list[bytes] = []
    for name in IDS:
        value = getattr(row, name, ())
        for ids in value if name == "answers" else [value]:
            if len(ids):
                found.append(np.asarray(ids, dtype=np.int32).tobytes())
    return found


def _holds(line: bytes, ids: bytes) -> bool:
    at = line.find(ids)
    while at >= 0 and at % 4:  # between two numbers
        at = line.find(ids, at + 1)
    return at >= 0
