"""The folder of a run: what it holds, when it may be used again, and its record run.json.

A run never overwrites another. Its identity is the hash of everything that decides its outcome: arguments, data, model
and lock. A folder whose run has the same identity is gone on with, or reported as finished; any other is refused with
the difference.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import describe_code
from .errors import InputError

# Arguments that change what is shown or where it lands, never the weights; and the names of data and model, for which
# their contents stand.
COSMETIC = {"output_dir", "report_to", "logging_steps", "sample_tokens", "data", "model"}


class Run:
    """A run. `folder` is its own; `record` is what run.json holds, written whole at every change.

    As a context it makes the folder and opens the record, and ends it: status "done", or "failed" with the error.
    Before that nothing is written.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder = folder
        self.record = record

    def update(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.record |= facts
        write_json(self.folder / "run.json", self.record)

    def __enter__(self) -> "Run":
        self.started = time.time()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.update(status="running", started=_now())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        seconds = round(time.time() - self.started, 1)
        outcome = {"status": "failed", "error": f"{kind.__name__}: {error}"} if kind else {"status": "done"}
        self.update(**outcome, finished=_now(), seconds=seconds)

    def newest_checkpoint(self) -> Path | None:
        """The last checkpoint whose state was written, which the trainer does last; None if there is none."""
        states = (self.folder / "checkpoints").glob("checkpoint-*/trainer_state.json")
        return max((state.parent for state in states), key=lambda path: int(path.name.split("-")[1]), default=None)


def plan_run(
    recipe: str,
    name: str,
    output_dir: str | None,
    arguments: dict[str, Any],
    origins: dict[str, str],
    inputs: dict[str, Any],
) -> Run | None:
    """The run of these settings, new or gone on with; None when it is finished already, which is then said.

    `inputs` says what data and model are by their contents: a sha256, or a hub id with its revision. Without
    `output_dir` the folder is outputs/RECIPE-NAME-IDENTITY, so another setting is another folder. Raises InputError
    when the folder holds something else or a run with another identity.
    """
    code = describe_code()
    matters = {
        "recipe": recipe,
        **{name: value for name, value in arguments.items() if name not in COSMETIC},
        **inputs,
        "lock": (code["lock"] or {}).get("sha256"),
    }
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
    """What the run that made an adapter says of the model under it: its name, and what it was by its contents."""

    model: str
    base: str  # a sha256 of a directory, or hub id @ revision


def parent_of(adapter: Path) -> Parent | None:
    """The model that `adapter` was trained on, from the run.json beside its folder; None where there is none."""
    record = _read(adapter.resolve().parent) if (adapter.resolve().parent / "run.json").is_file() else None
    if record is None:
        return None
    return Parent(record["arguments"]["model"]["value"], record["matters"]["base"])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never a part."""
    _write_whole(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write a JSON Lines file, a line for each row, whole as `write_json` does."""
    _write_whole(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def make_readable(folder: Path) -> None:
    """Give the files of a folder the permissions of the caller's umask; safetensors writes 0600 whatever it is."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)


def _read(folder: Path) -> dict[str, Any] | None:
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; give a folder with --output-dir")
    record = folder / "run.json"
    if record.exists():
        return json.loads(record.read_text(encoding="utf-8"))
    if any(folder.iterdir()):
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
