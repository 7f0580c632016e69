"""README.md of an archive of `make repro`: what it is of, what it needs, and the commands."""

import shlex
from typing import Any

from common.lm.cards import card_names
from launch.commands import COMMANDS
from launch.repeat import all_words

from verification.record import ARCHIVED, CONTENTS


def page(record: dict[str, Any], files: set[str]) -> str:
    """The page for an archive with this run.json and files of these names."""
    recipe, weights = record["recipe"], record.get("weights_sha256", {})
    arguments = {name: argument["value"] for name, argument in record["arguments"].items()}
    needs, places = _needs(record, arguments, files)
    words = all_words(COMMANDS[recipe].fields(), arguments)
    return "\n".join(
        [
            f"# A run of {recipe}, to be taken again",
            "",
            "Written by `make repro`. What it needs:",
            "",
            *needs,
            "",
            "In the repository, its first steps again, compared bit for bit with what is recorded here:",
            "",
            "```sh",
            " ".join(["make verify REPRO=PLACE_OF_THIS_ARCHIVE", *places]),
            "```",
            "",
            f"All of it, with the places that files of `{ARCHIVED}/` have where you unpacked it:",
            "",
            "```sh",
            f"scripts/run {recipe} {shlex.join(words)}",
            "```",
            "",
            "The sha256 of the trained weights (their names, types, shapes and bytes, sorted by name) after its steps:",
            "",
            *[f"- step {step}: {sha256}" for step, sha256 in sorted(weights.items(), key=lambda pair: int(pair[0]))],
            "",
        ]
    )


def _needs(record: dict[str, Any], arguments: dict[str, Any], files: set[str]) -> tuple[list[str], list[str]]:
    """What someone needs besides the archive, a line each, and the variables of make that say where it is."""
    code, matters, machine = record["code"], record["matters"], record["machine"]
    git, lock = code.get("git") or {}, code.get("lock") or {}
    commit = f"- The repository at commit {git.get('commit') or 'unknown'}"
    if "code.patch" in files:
        commit += ", with `git apply code.patch`"
    elif git.get("dirty"):
        commit += ". The run's code had changes that were not committed; they are not here"
    device = f"one {machine['gpu']}" if machine.get("gpu") else machine.get("cpu", "a CPU")
    lines = [
        f"{commit}.",
        f"- The packages of {lock.get('file', 'no lock')}, by `make setup`, and Python {code.get('python')}.",
        f"- A machine like the run's: {device}, {machine.get('threads', 'unknown')} threads.",
    ]
    places = []

    def need(what: str, value: Any, identity: Any, here: str, variable: str) -> None:
        lines.append(f"- {what}: {value}, {identity}{here or '. It is not in this archive'}.")
        if not here:
            places.append(f"{variable}=PLACE")

    for name, what in (("data", "The data"), ("eval_data", "The held-out data")):
        if value := arguments.get(name):
            archived = any(file.startswith(f"{ARCHIVED}/{name}/") for file in files)
            here = ". It is in this archive" if archived else _elsewhere(value, matters[name])
            need(what, value, matters[name], here, name.upper())
    of_card = "" if arguments["model"] not in card_names() else ", by its model card"
    need("The base", arguments["model"], matters["base"], of_card or _elsewhere("", matters["base"]), "MODEL")
    if arguments.get("reward_model"):
        need("The reward model", arguments["reward_model"], matters["reward_model"], "", "REWARD")
    return lines, places


def _elsewhere(value: str, identity: Any) -> str:
    """Where everyone has it from: the repository or a hub; empty where they have it from nowhere."""
    if value.startswith("data_samples/"):
        return ", in the repository"
    return "" if CONTENTS.fullmatch(str(identity)) else ", from the hub"
