"""Checkpoints: each one is complete or absent, a run resumes from the newest, and a run that has to stop saves one.

A trainer writes a checkpoint file by file and under its final name. So its output_dir here is checkpoints/part, whose
content counts as half written until CheckpointCallback has synced it to the disk, listed its files and renamed it to
checkpoints/checkpoint-STEP. Only then are older ones deleted. By the list, files.json, later damage is found, also such
as leaves a file its size.
"""

import hashlib
import json
import re
import shutil
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import TrainerCallback
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import rotate_checkpoints

from common.errors import InputError, MachineError, Stopped, one_line
from common.run.bad_numbers import check_alike, check_weights, forget_bad_steps, trained_parameters
from common.run.disk import check_room, size_of
from common.run.files import PART, PICKLES, make_reproducible, put_in_place, read_object, write_json
from common.run.folder import Run
from common.run.ranks import barrier, gather_objects, is_first, of_first, rank, reached
from common.run.replay import REASON
from common.run.stopping import Stop
from common.run.trained import hash_beside, is_hashed, trained_sha256

FILES = "files.json"  # in a checkpoint: its other files, with the bytes and the sha256 of each
ADAM = 8  # bytes that the optimizer keeps for a weight, two numbers; in 8 bit a quarter
SEEN = 120.0  # seconds for another machine to see what rank 0 wrote: an NFS client remembers for 60 what is not there

# Of several processes without GPUs each loads the optimizer onto "cpu:0" (transformers 5.17), which torch.load refuses.
torch.serialization.register_package(
    30, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


def newest_checkpoint(run: Run) -> Path | None:
    """The newest complete checkpoint of a run, or None; newer ones that are broken are renamed to broken-*.

    Rank 0 finds it. Raises MachineError in a rank that does not see it, nor the record of this start, in SEEN seconds.
    """
    found = (_newest_whole(run.folder / "checkpoints"), run.record.get("started")) if is_first() else (None, None)
    checkpoint, started = of_first(found)
    if not is_first():
        _wait_to_see(run.folder, checkpoint, started)
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
        rows: the training data in tokens, each row with its `place`, to name the rows of a bad step.
    """

    # Whether weights are hashed beside the next step, or what is written after the last one: where
    # on_pre_optimizer_step comes before each of their updates, and no CUDA graph is recorded.
    hashes_beside = False

    def __init__(self, run: Run, stop: Stop, save_total_limit: int, every: int = 1, rows: Sequence[Any] = ()) -> None:
        self.run = run
        self.stop = stop
        self.save_total_limit = save_total_limit
        self.every = every
        self.rows = rows
        self.due = False
        self.reason: str | None = None
        self.size = 0  # bytes of a checkpoint: an estimate, then that of the last one
        self.hashed: tuple[int, Future[str]] | None = None  # a step whose weights are being hashed

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._find_best(Path(args.output_dir).parent, state)
        if state.is_world_process_zero:
            forget_bad_steps(self.run.folder, state.global_step)
            if kwargs.get("model") is not None and not self.run.replay:
                self._check_room_for_all(kwargs["model"], args.optim)
        self.stop.begin_steps(self.run.folder, _first_of_all)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.run.lock.check(only_after_sleep=True)
        reached(state.global_step)
        last = state.global_step >= state.max_steps
        if is_hashed(state.global_step, state.max_steps) and (model := kwargs.get("model")) is not None:
            best = last and args.load_best_model_at_end  # then the weights of another step are loaded after this one
            if self.hashes_beside and not best:
                self.hashed = state.global_step, hash_beside(model)
            else:
                self.run.add_weights(state.global_step, trained_sha256(model))
        if self.run.replay:
            control.should_save = False
        if not last:
            self._decide(state, control)
        if (control.should_save or last) and kwargs.get("model") is not None:
            trained = trained_parameters(kwargs["model"])
            check_weights(trained, f"after step {state.global_step}, before they were saved")
            check_alike(trained, f"after step {state.global_step}")
        if control.should_save and state.is_world_process_zero and self.size:
            check_room(self.run.folder, self.size, f"the checkpoint of step {state.global_step} needs")

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.record_hash()

    def record_hash(self) -> None:
        """Record the hash that is being computed, if there is one, once it is done; raises what it raised."""
        if self.hashed:
            (step, sha256), self.hashed = self.hashed, None
            self.run.add_weights(step, sha256.result())

    def _decide(self, state: Any, control: Any) -> None:
        """Whether a checkpoint is due after this step, and whether the run ends with it."""
        if self.run.replay and state.global_step >= self.run.replay.steps:
            self.stop.request(REASON)
        self.due |= control.should_save
        if state.global_step % self.every:
            control.should_save = False
            return
        self.reason = _first_of_all(self.stop.reason(self.run.folder))
        if self.reason:
            control.should_training_stop = True
        control.should_save = (self.due or self.reason is not None) and not self.run.replay
        self.due = False

    def on_save(self, args, state, control, **kwargs) -> None:
        self.record_hash()
        barrier("a checkpoint")
        if state.is_world_process_zero:
            self._complete(Path(args.output_dir), state)
        barrier("a checkpoint")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.record_hash()
        self.stop.phase = "after the steps"
        if state.is_world_process_zero:
            shutil.rmtree(args.output_dir, ignore_errors=True)  # nothing but a README of the trainer's
        if self.reason:
            raise Stopped(self.reason, f"after step {state.global_step} of {state.max_steps}")

    def _complete(self, part: Path, state: Any) -> None:
        self.run.lock.check()
        folder, name = part.parent, f"checkpoint-{state.global_step}"
        self._find_best(folder, state)
        state.save_to_json(str(part / name / "trainer_state.json"))
        make_reproducible(part / name)  # before its files are listed
        write_json(part / name / FILES, _facts(part / name))
        self.size = size_of(part / name)
        put_in_place(part / name, folder / name)
        self.run.update(step=state.global_step)
        rotate_checkpoints(str(folder), self.save_total_limit, state.best_model_checkpoint)

    def _check_room_for_all(self, model: Any, optim: str) -> None:
        """Raise MachineError where the disk has no room for the checkpoints that are kept, one more, and the result."""
        trained = trained_parameters(model)
        weights = sum(one.numel() * one.element_size() for one in trained)
        self.size = weights + sum(one.numel() for one in trained) * (ADAM // 4 if "8bit" in optim else ADAM)
        there = len(_sorted(self.run.folder / "checkpoints"))
        needed = max(self.save_total_limit + 1 - there, 1) * self.size + weights
        check_room(self.run.folder, needed, f"{self.save_total_limit} checkpoints and the result need")

    def _find_best(self, folder: Path, state: Any) -> None:
        """Correct the path of the best checkpoint: the trainer has it in checkpoints/part, or in a folder now moved."""
        if state.best_global_step:
            best = folder / f"checkpoint-{state.best_global_step}"
            exists = best.is_dir() or state.best_global_step == state.global_step
            state.best_model_checkpoint = str(best) if exists else None


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


def _wait_to_see(folder: Path, checkpoint: Path | None, started: str | None) -> None:
    """Return when this rank sees what rank 0 has written, on another machine perhaps: a network disk may take a while.

    A folder of the same name that is on a disk of this machine never has it, and its run would be another one.
    """
    deadline = time.monotonic() + SEEN
    while True:
        with suppress(OSError, InputError):
            list(folder.iterdir())  # asks a network disk again for what was not there before
            there = checkpoint is None or (checkpoint / FILES).is_file()
            if there and read_object(folder / "run.json").get("started") == started:
                return
        if time.monotonic() > deadline:
            raise MachineError(
                f"{folder}: rank {rank()}, on {socket.gethostname()}, does not see what rank 0 writes there. Give an "
                "--output-dir on a disk that all machines of the run share."
            )
        time.sleep(0.5)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _sorted(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step, reverse=True)


def _facts(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """{name: {"bytes": ..., "sha256": ...}} of the files of a checkpoint."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        listed = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
        for name, facts in listed.items():
            file = checkpoint / name
            facts = facts if isinstance(facts, dict) else {"bytes": facts}  # of an earlier version, without a sha256
            if not file.is_file():
                return f"lacks {name}"
            if (size := file.stat().st_size) != facts["bytes"]:
                return f"is damaged: {name} has {size} of {facts['bytes']} bytes"
            if facts.get("sha256") not in (None, _sha256(file)):
                return f"is damaged: {name} has other contents than were written"
    except (OSError, ValueError, AttributeError, KeyError) as error:
        return f"has no list of its files that can be read ({error})"
    return _code_in(checkpoint)


def _code_in(checkpoint: Path) -> str | None:
    """What in the pickles of a checkpoint would run code, or None. Their tensors are not read.

    What loads them (weights_only) would not run it either, but end with a traceback.
    """
    for file in sorted(checkpoint.rglob("*")):
        if file.name == "training_args.bin" or file.suffix not in PICKLES:  # the trainer writes it and never reads it
            continue
        if file.name.startswith(("adapter_model", "pytorch_model")):
            return f"has weights in a pickle, {file.name}, where a run of ours has safetensors"
        try:
            with safe_globals():
                unsafe = get_unsafe_globals_in_checkpoint(str(file))
        except Exception as error:  # noqa: BLE001  whatever torch thinks of a file of somebody else
            return f"is damaged: {file.name} was not written by torch.save ({one_line(error)})"
        if unsafe:
            return f"would run code: {file.name} is a pickle that names {', '.join(sorted(unsafe)[:3])}"
    return None


def _set_aside(checkpoint: Path, folder: Path, fault: str) -> None:
    aside = folder / f"broken-{checkpoint.name}"
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    print(f"{checkpoint} {fault}: renamed to {aside.name}, which may be deleted.")


def _first_of_all(reason: str | None) -> str | None:
    """The reason of the first rank that has one."""
    return next((one for one in gather_objects(reason) if one), None)
