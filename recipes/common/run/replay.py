"""A replay: the first steps of an earlier run once more, for `make verify` to compare. It saves no checkpoint.

scripts/verify.py starts the run's recipe with the run's arguments, another --output-dir, and the variable
RECIPES_REPLAY=STEPS:FILE, where FILE is the run's run.json. What that run chose while it ran is taken from there.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.run.files import read_object

VARIABLE = "RECIPES_REPLAY"
REASON = "make verify"  # why it stops
CHOSEN = ("fit", "micro_batch")  # by --fit=auto and --oom=retry
# What was read by the run: what it is called, and the argument that says where it is.
READ = {
    "data": ("the data", "data"),
    "eval_data": ("the held-out data", "eval_data"),
    "base": ("the base model", "model"),
    "reward_model": ("the reward model", "reward_model"),
    "reward_files": ("what --rewards reads", "rewards"),
    "chat_template_path": ("the chat template", "chat_template_path"),
    "generation_config": ("generation_config.json of the base model", "model"),
}


@dataclass(frozen=True)
class Replay:
    """The `steps` that are to be taken once more, of the run with this run.json."""

    steps: int
    record: dict[str, Any]

    def chosen(self) -> dict[str, Any]:
        """What the run had chosen, for the record of the replay."""
        return {name: self.record[name] for name in CHOSEN if name in self.record}

    def check(self, arguments: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        """Raise InputError unless the replay reads what the run read; `arguments` say where, `inputs` what it is."""
        faults = []
        for name, now in json.loads(json.dumps(inputs, default=str)).items():
            if (then := self.record["matters"].get(name)) != now:
                what, argument = READ.get(name, (name, name))
                faults.append(
                    f"{what} ({arguments.get(argument)}) is not what the run read: {_short(then)} then, {_short(now)} "
                    "now (sha256 of the contents, or id@revision)"
                )
        if faults:
            cure = "Put back what the run read, or give the place where it is now, as with --data."
            raise InputError("\n".join([*faults, cure]))


def requested() -> Replay | None:
    """The replay that this process is to be; None for every other run."""
    steps, _, file = os.environ.get(VARIABLE, "").partition(":")
    return Replay(int(steps), read_object(Path(file))) if steps else None


def _short(identity: Any) -> str:
    return ", ".join(map(_short, identity)) if isinstance(identity, list) else str(identity)[:60]
