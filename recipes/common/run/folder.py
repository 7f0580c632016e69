"""The folder of a run: what it holds, when it may be used again, and its record run.json.

A run never overwrites another. Its identity is the hash of everything that decides its outcome: arguments, data, model
and lock. A folder whose run has the same identity is resumed, or reported as finished; any other folder is refused
with the difference.
"""

import json
import os
import shutil
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.environment import describe_code
from common.errors import (
    FULL,
    InputError,
    MachineError,
    Stopped,
    is_out_of_memory,
    is_unread,
    one_line,
    without_secrets,
)
from common.lm.hub import RESUMED
from common.lm.own_code import RUNS, TRUSTED
from common.run import replay
from common.run.determinism import use_deterministic_algorithms
from common.run.disk import disk_fault, in_words, on_thread_error
from common.run.files import PART, read_object, write_json
from common.run.lock import NAME, Lock, refuse_where_held
from common.run.memory import with_smaller_batch
from common.run.ranks import is_first, peer_lost, rank
from common.run.record import identity_of
from common.run.training_state import forget_overrides

# Arguments that change what is shown or where it is written, never the weights; and the names of data and model, whose
# contents count instead.
COSMETIC = {"output_dir", "report_to", "logging_steps", "sample_tokens", "time_limit", "stop_on_fault", "data", "model"}
COSMETIC |= {"load_pickle", "trust_remote_code"}  # what is read so is in the contents of the base
# What to do where a run would end otherwise: a run that ended so resumes with another choice.
IN_NEED = {"oom", "skip_bad_steps"}
# What a folder may hold before it has a record: a batch job brings its script, and perhaps a STOP file; a process that
# was killed as it began leaves its lock, or half a record.
BEFORE_THE_RECORD = {"slurm", "STOP", NAME, f"run.json.{PART}"}
SINCE = ("identity", "step", "status", "started")  # that change when another process trains
KEPT = (*SINCE[1:], "seconds", *replay.CHOSEN, "ranks", "weights_sha256")  # of the record of a run that is resumed


class Run:
    """A run. `folder` is its own; `record` is what run.json holds, written whole at every change.

    As a context it makes the folder and opens the record, and ends it: status "done", "stopped" with the reason, or
    "failed" with the error. Before that nothing is written. It holds the folder's lock meanwhile. Raises InputError
    where another process trains in the folder, MachineError where the disk failed, and Restart for --oom=retry.
    """

    def __init__(self, folder: Path, record: dict[str, Any], replay: replay.Replay | None = None) -> None:
        self.folder = folder
        self.record = record
        self.replay = replay
        self.seconds_before = record.get("seconds", 0.0)  # of the processes that this one resumes
        self.started = time.time()
        self.lock = Lock(folder)

    @property
    def seconds(self) -> float:
        """The time that the run took so far, in all its processes; in a killed one, until its last checkpoint."""
        return round(self.seconds_before + time.time() - self.started, 1)

    def update(self, **facts: Any) -> None:
        """Add facts to run.json, and the time taken; of several processes the first one writes it."""
        self.record |= {"seconds": self.seconds, **facts}
        if is_first():
            self.lock.check()
            write_json(self.folder / "run.json", self.record)

    def add_weights(self, step: int, sha256: str) -> None:
        """Record what `trained_sha256` is after a step."""
        self.update(weights_sha256={**self.record.get("weights_sha256", {}), str(step): sha256})

    def __enter__(self) -> "Run":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if is_first():
                self.lock.take()
                self._check_unchanged()
            self.update(status="running", started=_now(), **({"own_code": RUNS} if RUNS else {}))
            threading.excepthook = on_thread_error
            use_deterministic_algorithms(self.record)
        except OSError as error:
            self.lock.give_back()
            raise MachineError(f"{error.filename or self.folder}: {in_words(error.errno or 0)}") from error
        except InputError:
            self.lock.give_back()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        try:
            self._end(error)
        finally:
            forget_overrides()
            self.lock.give_back()

    def _end(self, error: BaseException | None) -> None:
        finished = _now()
        if error is None:
            self.update(status="done", finished=finished)
            self._write_card()
            self._write_report()
        elif isinstance(error, Stopped):
            self.update(status="stopped", reason=error.reason, finished=finished)
            self._write_report()
        elif is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold what filled it, and the record needs a little
            if restart := with_smaller_batch(self.record, error):
                self.update()
                raise restart from None
            self.update(status="failed", error=f"out of memory: {one_line(error)}", finished=finished)
            self._write_report()
        elif not isinstance(error, InputError | MachineError) and (fault := disk_fault(error, self.folder)):
            self._end_on_disk(error, *fault)
        elif peer_lost(error):
            self.update(status="failed", error="another rank ended", finished=finished)
            raise MachineError(
                f"Rank {rank()} ended after step {self.record.get('step', 0)} was saved, since another rank did; that "
                "one's error is the reason."
            ) from error
        else:
            reason = without_secrets(f"{type(error).__name__}: {error}")
            reason = "nobody read its output any more" if is_unread(error) else reason
            self.update(status="failed", error=reason, finished=finished)
            self._write_report()

    def _end_on_disk(self, error: BaseException, number: int, place: str) -> None:
        """Record that the disk failed, where it still takes a record. Raises MachineError."""
        half = self.folder / "checkpoints" / PART
        with suppress(OSError):
            for file in half.rglob("*"):
                if number in FULL and file.is_file():  # makes room at once, as deleting does only when no writer has it
                    os.truncate(file, 0)
            shutil.rmtree(half, ignore_errors=True)
            if self.folder.is_dir():
                self.update(status="failed", error=in_words(number), finished=_now())
        cure = "Make room, or keep fewer checkpoints with --save-total-limit" if number in FULL else "See to the disk"
        cure = cure if self.folder.is_dir() else "The folder was deleted while the run wrote it"
        raise MachineError(
            f"{place}: {in_words(number)}. {cure}; the same command resumes after step {self.record.get('step', 0)}, "
            "the last that was saved completely."
        ) from error

    def _check_unchanged(self) -> None:
        """Raise InputError where another process has written the run since `plan_run` read it."""
        record = _read(self.folder)
        if record and [record.get(name) for name in SINCE] != [self.record.get(name) for name in SINCE]:
            raise InputError(f"{self.folder}: another process has trained in it just now; give the command again")

    def _write_card(self) -> None:
        """Write the README.md of what the run saved, for whoever gets the folder."""
        if is_first() and not self.replay:
            from common.pages.model_card import write_card  # late, as the report

            write_card(self.folder)

    def _write_report(self) -> None:
        """Write report.html and print where it is; one line says so if that fails, which is no fault of the run."""
        if not is_first() or self.replay:
            return
        file = self.folder / "report.html"
        try:
            from common.pages.report import write_report  # late: only here a run needs the page and its template

            write_report([self.folder], file)
        except Exception as error:  # noqa: BLE001  whatever is wrong with a page, the weights are saved
            print(f"{file} could not be written: {type(error).__name__}: {error}")
        else:
            print(f"Report in {file}")


def plan_run(
    recipe: str,
    name: str,
    output_dir: str | None,
    arguments: dict[str, Any],
    origins: dict[str, str],
    inputs: dict[str, Any],
) -> Run | None:
    """The run of these settings, new or to be resumed; None, after a line about it, when it is finished already.

    `inputs` identifies data and model by their contents: a sha256, or a hub id with its revision. Without `output_dir`
    the folder is outputs/RECIPE-NAME-IDENTITY, so another setting is another folder. Raises InputError when the folder
    holds something else or a run with another identity.
    """
    code, again = describe_code(), replay.requested()
    if again:
        again.check(arguments, inputs)
    matters = {
        "recipe": recipe,
        **{name: value for name, value in arguments.items() if name not in COSMETIC | IN_NEED},
        **inputs,
        "lock": (code["lock"] or {}).get("sha256"),
    }
    if commits := sorted(commit for commit in TRUSTED.values() if commit):  # of hub models, with their code
        matters["own_code"] = commits
    matters = json.loads(json.dumps(matters, default=str))  # as it will be read back
    identity = identity_of(matters)
    folder = Path(output_dir or f"outputs/{recipe}-{name}-{identity[:8]}").expanduser()
    if is_first():
        refuse_where_held(folder)
    previous = _read(folder)
    if previous and previous["matters"] != matters:
        raise InputError(_difference(folder, previous["matters"], matters))
    if previous and previous.get("revision"):
        RESUMED[str(inputs.get("base")).partition("@")[0]] = previous["revision"]
    if previous and previous["status"] == "done":
        print(f"This run is finished already: {folder} ({previous['finished']}). Another --output-dir starts it anew.")
        return None
    return Run(
        folder,
        {
            **(again.chosen() if again else {}),
            **{name: previous[name] for name in KEPT if previous and name in previous},
            "recipe": recipe,
            "command": [without_secrets(word) for word in sys.argv],
            "arguments": {name: {"value": value, "from": origins[name]} for name, value in arguments.items()},
            "matters": matters,
            "identity": identity,
            "code": code,
        },
        again,
    )


@dataclass(frozen=True)
class Parent:
    """The base of an adapter by the record of the run that made it: its name, and its contents."""

    model: str
    base: str  # a sha256 of a directory, or hub id @ revision
    arguments: dict[str, Any]


def parent_of(adapter: Path) -> Parent | None:
    """The model that `adapter` was trained on, from the run.json beside its folder; None where there is none."""
    record = _read(adapter.resolve().parent) if (adapter.resolve().parent / "run.json").is_file() else None
    if record is None:
        return None
    arguments = {name: argument["value"] for name, argument in record["arguments"].items()}
    return Parent(arguments["model"], record["matters"]["base"], arguments)


def _read(folder: Path) -> dict[str, Any] | None:
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; give a folder with --output-dir")
    record = folder / "run.json"
    if record.exists():
        try:
            return read_object(record)
        except InputError as error:
            raise InputError(
                f"{error}, so what this folder holds cannot be compared with this command. Put back a copy of it, or "
                "give another --output-dir."
            ) from None
    # Another process of this run may be about to write it; a batch job brings its script, and perhaps a STOP file.
    if is_first() and any(path.name not in BEFORE_THE_RECORD for path in folder.iterdir()):
        raise InputError(f"{folder}: is not empty and holds no run; give another folder with --output-dir")
    return None


def _difference(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> str:
    lines = [
        f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    return "\n".join([f"{folder}: holds a run with other settings; give another --output-dir, or the same:", *lines])


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
