"""The record of a run, checked, and the command line that repeats the run."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.environment import ROOT
from common.errors import InputError
from common.lm.cards import card_names
from common.run.files import read_jsonl
from common.run.folder import COSMETIC, IN_NEED
from common.run.record import identity_of, read_record
from launch.commands import COMMANDS
from launch.mounts import REWARD
from launch.repeat import all_words

# Arguments of which the replay has its own: where it writes, what stops it, whom it tells.
OWN = {"output_dir", "report_to", "time_limit", "stop_on_fault", "oom"}
FILES = ("data", "eval_data", "model", "reward_model", "chat_template_path")  # that name a file, a folder or a hub id
ARCHIVED = "files"  # beside run.json in an archive of `make repro`: what the run read
CONTENTS = re.compile(r"[0-9a-f]{64}")  # of something on a disk; what is from a hub has a name


@dataclass(frozen=True)
class Recorded:
    """What a run left of its steps: its `folder`, run.json, the rows of metrics.jsonl and those of samples.jsonl."""

    folder: Path
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def steps(self) -> int:
        """The steps that it took, as far as it has written of them."""
        return max((row["step"] for row in self.metrics if "step" in row), default=0)

    @property
    def arguments(self) -> dict[str, Any]:
        return {name: argument["value"] for name, argument in self.record["arguments"].items()}


def read_recorded(folder: Path) -> Recorded:
    """The run in `folder`. Raises InputError where there is none, or one whose run.json was changed after it."""
    file, record = folder / "run.json", read_record(folder)
    if missing := [name for name in ("recipe", "arguments", "matters", "code") if name not in record]:
        raise InputError(f"{file}: lacks {', '.join(missing)}: this is no record of a run")
    if record["recipe"] not in [name for name, command in COMMANDS.items() if command.recipe]:
        raise InputError(f"{file}: there is no recipe {record['recipe']}")
    metrics, samples = (list(read_jsonl(folder / name)) for name in ("metrics.jsonl", "samples.jsonl"))
    recorded = Recorded(folder, record, metrics, samples)
    if changes := changed(recorded):
        raise InputError(f"{file}: was changed after the run: {'; '.join(changes)}. Put back the file that it wrote.")
    if not recorded.steps:
        raise InputError(f"{folder}: no step of this run is in metrics.jsonl; there is nothing to compare with")
    return recorded


def changed(recorded: Recorded) -> list[str]:
    """What of a run.json is no longer what the run wrote, by the settings and the hash that it also wrote."""
    matters = recorded.record["matters"]
    found = [
        f"--{name.replace('_', '-')} is {value!r}, and was {matters[name]!r}"
        for name, value in recorded.arguments.items()
        if name in matters and name not in (*COSMETIC, *IN_NEED, *FILES) and matters[name] != value
    ]
    identity = identity_of(matters)
    if not found and recorded.record.get("identity", identity) != identity:
        found = ["the settings in `matters` do not have the hash in `identity`"]
    return found


def repeat_words(recorded: Recorded, places: dict[str, str], strict: bool) -> list[str]:
    """The arguments of the run as words for its recipe, without its folder.

    `places` say where files are now, by argument; others are looked for beside an archive's run.json, from here, and
    from the repository. Raises InputError for a file that is nowhere.
    """
    arguments = {name: value for name, value in recorded.arguments.items() if name not in OWN}
    for name in FILES:
        if arguments.get(name) or name in places:
            arguments[name] = places.get(name) or located(recorded, name, arguments[name])
    if arguments.get("rewards"):
        arguments["rewards"] = [_located_reward(recorded, entry) for entry in arguments["rewards"]]
    if arguments.get("fit", "off") != "off" and "fit" not in recorded.record:
        arguments["fit"] = "off"  # it chose nothing, and is not to choose now
    if strict:
        arguments["full_determinism"] = True
    return all_words(COMMANDS[recorded.record["recipe"]].fields(), arguments)


def located(recorded: Recorded, name: str, value: str) -> str:
    """Where the file or folder that an argument names is now; of a card and of what is on a hub the name."""
    if name == "model" and value in card_names():
        return value
    for place in _places(recorded.folder, value):
        if place.exists():
            return str(place)
    identity = recorded.record["matters"].get("base" if name == "model" else name)
    on_disk = name == "chat_template_path" or (isinstance(identity, str) and CONTENTS.fullmatch(identity))
    if on_disk:
        what = f" (sha256 of its contents: {identity})" if identity and name != "chat_template_path" else ""
        flag = name.replace("_", "-")
        raise InputError(
            f"--{flag} {value}: the run read it{what}, and it is not there any more. Put it back, or give the place "
            f"where it is now: --{flag}=..."
        )
    return value


def _located_reward(recorded: Recorded, entry: str) -> str:
    """An entry of --rewards with the place where its file or model is now."""
    if not (found := REWARD.match(entry)):
        return entry
    places = [place for place in _places(recorded.folder, found["path"]) if place.exists()]
    return f"{found['before']}{places[0]}{found['after'] or ''}" if places else entry


def _places(folder: Path, value: str) -> list[Path]:
    """Where a file may be: in an unpacked archive, as it was named from this folder, in the repository."""
    path = Path(os.path.expanduser(value))
    return [path] if path.is_absolute() else [folder / ARCHIVED / path, path, ROOT / path]
