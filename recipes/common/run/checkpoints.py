"""Checkpoints: each one is complete or absent, a run resumes from the newest, and a run that has to stop saves one.

A trainer writes a checkpoint file by file and under its final name. So its output_dir here is checkpoints/part, whose
content counts as half written until CheckpointCallback has synced it to the disk, listed its files and renamed it to
checkpoints/checkpoint-STEP. Only then are older ones deleted. By the list, files.json, later damage is found.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from common.environment import is_first_process
from common.errors import Stopped
from common.run.files import PART, make_reproducible, put_in_place, write_json
from common.run.folder import Run
from common.run.stopping import Stop

FILES = "files.json"  # in a checkpoint: its other files, and the bytes of each

# Of several processes without GPUs each loads the optimizer onto "cpu:0" (transformers 5.17), which torch.load refuses.
torch.serialization.register_package(
    30, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


def newest_checkpoint(run: Run) -> Path | None:
    """The newest complete checkpoint of a run, or None; newer ones that are broken are renamed to broken-*."""
    checkpoint = _of_first(_newest_whole(run.folder / "checkpoints") if is_first_process() else None)
    run.update(step=_step(checkpoint) if checkpoint else 0)
    return checkpoint


class CheckpointCallback(TrainerCallback):
    """Completes each checkpoint, and ends training with one when the run has to stop.

    It comes after the other callbacks, because on_train_end raises Stopped when steps are left. In a run of several
    processes all stop after the same step: the first one in which one of them has a reason to.

    Args:
        run: its record gets `step`, that of the newest complete checkpoint.
        stop: whether the run has to stop.
        save_total_limit: how many to keep, besides the best one where there is one.
        every: checkpoints only at multiples of this many steps: GRPO takes several steps with one batch of
            completions, which no checkpoint holds.
    """

    def __init__(self, run: Run, stop: Stop, save_total_limit: int, every: int = 1) -> None:
        self.run = run
        self.stop = stop
        self.save_total_limit = save_total_limit
        self.every = every
        self.due = False
        self.reason: str | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._find_best(Path(args.output_dir).parent, state)
        self.stop.begin_steps(self.run.folder, _first_of_all)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            return
        self.due |= control.should_save
        if state.global_step % self.every:
            control.should_save = False
            return
        self.reason = _first_of_all(self.stop.reason(self.run.folder))
        if self.reason:
            control.should_log = control.should_training_stop = True  # or the losses since the last log are lost
        control.should_save = self.due or self.reason is not None
        self.due = False

    def on_save(self, args, state, control, **kwargs) -> None:
        _wait_for_all()
        if state.is_world_process_zero:
            self._complete(Path(args.output_dir), state)
        _wait_for_all()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stop.phase = "after the steps"
        if state.is_world_process_zero:
            shutil.rmtree(args.output_dir, ignore_errors=True)  # nothing but a README of the trainer's
        if self.reason:
            raise Stopped(self.reason, f"after step {state.global_step} of {state.max_steps}")

    def _complete(self, part: Path, state: Any) -> None:
        folder, name = part.parent, f"checkpoint-{state.global_step}"
        self._find_best(folder, state)
        state.save_to_json(str(part / name / "trainer_state.json"))
        make_reproducible(part / name)  # before its files are listed
        write_json(part / name / FILES, _sizes(part / name))
        put_in_place(part / name, folder / name)
        self.run.update(step=state.global_step)
        rotate_checkpoints(str(folder), self.save_total_limit, state.best_model_checkpoint)

    def _find_best(self, folder: Path, state: Any) -> None:
        """Correct the path of the best checkpoint: the trainer has it in checkpoints/part, or in a folder now moved."""
        if state.best_global_step:
            best = folder / f"checkpoint-{state.best_global_step}"
            exists = best.is_dir() or state.best_global_step == state.global_step
            state.best_model_checkpoint = str(best) if exists else None


class NoStepTooMany(Trainer):
    """A mixin of a Trainer: a run that was killed between its last step and its end takes no further step on resuming.

    transformers 5.17 checks whether all steps are done only after a step, unless they end with an epoch.
    """

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True


def _newest_whole(folder: Path) -> Path | None:
    for checkpoint in _sorted(folder / PART):
        _set_aside(checkpoint, folder, "was half written when the run ended")
    for checkpoint in _sorted(folder):
        if fault := _fault(checkpoint):
            _set_aside(checkpoint, folder, fault)
            continue
        print(f"Resuming after step {_step(checkpoint)}, from {checkpoint}")
        return checkpoint
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _sorted(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step, reverse=True)


def _sizes(checkpoint: Path) -> dict[str, int]:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        listed = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"has no list of its files ({error})"
    found = _sizes(checkpoint)
    for name, size in listed.items():
        if name not in found:
            return f"lacks {name}"
        if found[name] != size:
            return f"is damaged: {name} has {found[name]} of {size} bytes"
    return None


def _set_aside(checkpoint: Path, folder: Path, fault: str) -> None:
    aside = folder / f"broken-{checkpoint.name}"
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    print(f"{checkpoint} {fault}: renamed to {aside.name}, which may be deleted.")


def _distributed() -> Any:
    """torch.distributed if this is one of several processes, else None."""
    import torch.distributed

    return torch.distributed if torch.distributed.is_available() and torch.distributed.is_initialized() else None


def _first_of_all(reason: str | None) -> str | None:
    """The reason of the first process that has one."""
    if (distributed := _distributed()) is None:
        return reason
    reasons = [None] * distributed.get_world_size()
    distributed.all_gather_object(reasons, reason)
    return next((one for one in reasons if one), None)


def _of_first(value: Any) -> Any:
    """The value of the first process, in all of them."""
    if (distributed := _distributed()) is None:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def _wait_for_all() -> None:
    if (distributed := _distributed()) is not None:
        distributed.barrier()
