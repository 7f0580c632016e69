"""The folder of a run: what it holds, when it may be used again, and its record run.json.

A run never overwrites another. Its identity is the hash of everything that decides its outcome: arguments, data, model
and lock. A folder whose run has the same identity is resumed, or reported as finished; any other folder is refused
with the difference.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.environment import describe_code, is_first_process
from common.errors import InputError, MachineError, Stopped
from common.run.files import PART, write_json

# Arguments that change what is shown or where it is written, never the weights; and the names of data and model, whose
# contents count instead.
COSMETIC = {"output_dir", "report_to", "logging_steps", "sample_tokens", "time_limit", "stop_on_fault", "data", "model"}


class Run:
    """A run. `folder` is its own; `record` is what run.json holds, written whole at every change.

    As a context it makes the folder and opens the record, and ends it: status "done", "stopped" with the reason, or
    "failed" with the error. Before that nothing is written. Raises MachineError where the run failed on a full disk.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self.record = record
        self.seconds_before = record.get("seconds", 0.0)  # of the processes that this one resumes
        self.started = time.time()

    @property
    def seconds(self) -> float:
        """The time that the run took so far, in all its processes; in a killed one, until its last checkpoint."""
        return round(self.seconds_before + time.time() - self.started, 1)

    def update(self, **facts: Any) -> None:
        """Add facts to run.json, and the time taken; of several processes the first one writes it."""
        self.record |= {"seconds": self.seconds, **facts}
        if is_first_process():
            write_json(self.folder / "run.json", self.record)

    def __enter__(self) -> "Run":
        self.folder.mkdir(parents=True, exist_ok=True)
        self.update(status="running", started=_now())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        finished = _now()
        if error is None:
            self.update(status="done", finished=finished)
            self._write_card()
            self._write_report()
        elif isinstance(error, Stopped):
            self.update(status="stopped", reason=error.reason, finished=finished)
            self._write_report()
        elif not _disk_is_full(error, self.folder):
            self.update(status="failed", error=f"{type(error).__name__}: {error}", finished=finished)
            self._write_report()
        else:
            half = self.folder / "checkpoints" / PART
            for file in half.rglob("*"):
                if file.is_file():  # makes room for the record, as deleting does only once no writer has it open
                    os.truncate(file, 0)
            shutil.rmtree(half, ignore_errors=True)
            with suppress(OSError):  # the message below matters more
                self.update(status="failed", error="the disk is full", finished=finished)
            raise MachineError(
                f"{self.folder}: the disk is full. Make room, or keep fewer checkpoints with --save-total-limit; the "
                f"same command resumes after step {self.record.get('step', 0)}, the last that was saved completely."
            ) from error

    def _write_card(self) -> None:
        """Write the README.md of what the run saved, for whoever gets the folder."""
        if is_first_process():
            from common.pages.model_card import write_card  # late, as the report

            write_card(self.folder)

    def _write_report(self) -> None:
        """Write report.html and print where it is; one line says so if that fails, which is no fault of the run."""
        if not is_first_process():
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
    code = describe_code()
    matters = {
        "recipe": recipe,
        **{name: value for name, value in arguments.items() if name not in COSMETIC},
        **inputs,
        "lock": (code["lock"] or {}).get("sha256"),
    }
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        matters["processes"] = processes  # as many batches to a step
    matters = json.loads(json.dumps(matters, default=str))  # as it will be read back
    identity = hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()
    folder = Path(output_dir or f"outputs/{recipe}-{name}-{identity[:8]}").expanduser()
    previous = _read(folder)
    if previous and previous["matters"] != matters:
        raise InputError(_difference(folder, previous["matters"], matters))
    if previous and previous["status"] == "done":
        print(f"This run is finished already: {folder} ({previous['finished']}). Another --output-dir starts it anew.")
        return None
    return Run(
        folder,
        {
            **{name: previous[name] for name in ("step", "seconds", "fit") if previous and name in previous},
            "recipe": recipe,
            "command": sys.argv,
            "arguments": {name: {"value": value, "from": origins[name]} for name, value in arguments.items()},
            "matters": matters,
            "identity": identity,
            "code": code,
        },
    )


@dataclass(frozen=True)
class Parent:
    """The base of an adapter by the record of the run that made it: its name, and its contents."""

    model: str
    base: str  # a sha256 of a directory, or hub id @ revision


def parent_of(adapter: Path) -> Parent | None:
    """The model that `adapter` was trained on, from the run.json beside its folder; None where there is none."""
    record = _read(adapter.resolve().parent) if (adapter.resolve().parent / "run.json").is_file() else None
    if record is None:
        return None
    return Parent(record["arguments"]["model"]["value"], record["matters"]["base"])


def adapter_of(folder: Path) -> Path:
    """The adapter of the run in `folder`. Raises InputError where there is no run in it, or no adapter yet."""
    record = _read(folder) if (folder / "run.json").is_file() else None
    if record is None:
        raise InputError(f"{folder}: holds no run; give the folder of a run, which has a run.json")
    if record["recipe"] == "reward":
        raise InputError(
            f"{folder}: a reward model scores and writes nothing; judge it with `make evaluate REWARD={folder}`"
        )
    adapter = folder / "adapter"
    if not adapter.is_dir():
        step = f" after step {record['step']}" if record.get("step") else ""
        raise InputError(f"{folder}: has no adapter yet; the run is {record['status']}{step}, and its command resumes")
    return adapter


def _disk_is_full(error: BaseException, folder: Path) -> bool:
    """Is a full disk, or a quota, the cause of `error`?

    safetensors raises an error of its own with the system's message, torch.save one without it that leaves no room.
    """
    full = (errno.ENOSPC, errno.EDQUOT)
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in full or any(os.strerror(number) in str(cause) for number in full):
            return True
        cause = cause.__cause__ or cause.__context__
    probe = folder / f"probe.{PART}"
    try:
        probe.write_bytes(bytes(2**20))
    except OSError as failure:
        return failure.errno in full
    finally:
        with suppress(OSError):
            probe.unlink()
    return False


def _read(folder: Path) -> dict[str, Any] | None:
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; give a folder with --output-dir")
    record = folder / "run.json"
    if record.exists():
        return json.loads(record.read_text(encoding="utf-8"))
    # Another process of this run may be about to write it; a batch job brings its script, and perhaps a STOP file.
    if is_first_process() and any(path.name not in ("slurm", "STOP") for path in folder.iterdir()):
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
