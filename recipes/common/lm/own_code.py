"""Code that a model brings along: what it is, and the models for which the user lets it run.

An `auto_map` in a configuration names classes in Python files of the model's folder, which transformers would import.
Nothing of it runs by default. --trust-remote-code names the models whose code may run, each by itself: the base of a
run may, and its reward model may not. Of a hub model the commit is part of the name, so that what runs is what was
read. The code runs with all rights of the user; it is printed by file and sha256 before, and is in run.json.
"""

import atexit
import functools
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ARGUMENTS, InputError
from common.lm.network import snapshot
from common.run.files import read_object
from common.run.ranks import is_first

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from common.lm.hub import Model

FLAG = "--trust-remote-code"
PROCESSOR = "processor_config.json"
CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    PROCESSOR,
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
COMMIT = re.compile("[0-9a-f]{40}")

TRUSTED: dict[str, str | None] = {}  # {source: commit, None of a directory} of the models that the user trusts
UNUSED: set[str] = set()  # of these, until it is known which models the command loads
RUNS: dict[str, dict[str, str]] = {}  # {name of a model: {file: sha256}}: the code that this process runs


def own_code(model: "Model") -> str:
    """What of a model's folder would run with trust_remote_code, in words, "" for nothing: its modules, by auto_map."""
    programs = [
        f"{module.replace('--', ': ')}.py ({', '.join(kinds)}; by {', '.join(dict.fromkeys(kinds.values()))})"
        for module, kinds in _named(model).items()
    ]
    return f"it needs code of its own, {', '.join(programs)[:300]}" if programs else ""


def _named(model: "Model") -> dict[str, dict[str, str]]:
    """{module: {class: the file that names it}} of a model; `owner/name--module` is one of another repository."""
    named: dict[str, dict[str, str]] = {}
    if (folder := snapshot(model)) is None:
        return named
    for file in CONFIGS:
        try:
            config = read_object(folder / file)
        except (InputError, OSError):
            continue
        # The configuration of a processor holds those of its parts.
        parts = [part for part in config.values() if isinstance(part, dict)] if file == PROCESSOR else []
        for entries in [part.get("auto_map") for part in (config, *parts)]:
            for value in (entries if isinstance(entries, dict) else {"": entries}).values():
                for name in value if isinstance(value, list) else [value]:
                    if isinstance(name, str):
                        module, _, kind = name.removeprefix(f"{model.source}--").rpartition(".")
                        named.setdefault(module, {})[kind] = file
    return named


def code_files(folder: Path) -> dict[str, str]:
    """{name: sha256} of the Python files in a model's folder: those that an auto_map names, and what they import."""
    found = sorted(
        file for file in {*folder.rglob("*.py"), *folder.glob("*/*.py")} if file.is_file()
    )  # rglob: no links
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def announce_code(model: "Model") -> None:
    """Print what runs of a trusted model, by file and sha256, and note it for run.json; before anything of it runs.

    Raises InputError where it has no code, where a file is missing, and where the code is of another repository or, as
    an adapter's base, of another model.
    """
    if not model.trusted or (folder := snapshot(model)) is None:
        return
    if (folder / "adapter_config.json").exists():  # of a directory it is refused before
        raise InputError(
            f"{model.source}: is an adapter, and {FLAG} would reach its base, which it names; give a model"
        )
    if not (named := _named(model)):
        raise InputError(f"{FLAG} {model.source}: this model has no code of its own (no auto_map); leave it out")
    if other := next((module for module in named if "--" in module), None):
        raise InputError(
            f"{model.source}: names code of another repository, {other.partition('--')[0]}, which {FLAG} does not "
            "reach; copy its file into the model's folder, and take the name of the repository out of auto_map"
        )
    files = code_files(folder)
    if missing := [f"{module}.py" for module in named if f"{module}.py" not in files]:  # or a path out of the folder
        raise InputError(f"{model.source}: lacks {', '.join(missing)}, which its auto_map names")
    RUNS[model.name] = files
    if is_first():
        listed = ", ".join(f"{name} (sha256 {sha256})" for name, sha256 in RUNS[model.name].items())
        print(f"{model.source}: runs code of its own, as {FLAG} says: {listed}", flush=True)


def run_only_printed() -> None:
    """Have transformers run no code of a model that was not printed, wherever it is from and whoever asks for it.

    Such as a file that was changed since. It looks at the library's own copy, which is what runs.
    """
    from transformers import dynamic_module_utils as library
    from transformers.generation import utils as generation

    run = library.get_class_in_module
    if hasattr(run, "only_printed"):
        return

    @functools.wraps(run)
    def checked(class_name: str, module_path: str, **more: Any) -> type:
        file = Path(library.HF_MODULES_CACHE) / module_path
        printed = {sha256 for files in RUNS.values() for sha256 in files.values()}
        for one in (file, *map(Path, library.get_relative_import_files(file))):
            if (sha256 := hashlib.sha256(one.read_bytes()).hexdigest()) not in printed:
                raise InputError(
                    f"{one.name} (sha256 {sha256}): code of a model that was not printed before would run; it was "
                    f"changed meanwhile, or is of a model that {FLAG} does not name"
                )
        return run(class_name, module_path, **more)

    checked.only_printed = True  # pyrefly: ignore[missing-attribute]  it marks that this was done
    library.get_class_in_module = generation.get_class_in_module = checked


def import_anew() -> None:
    """Have transformers import the code of models from a fresh folder, for this process and those that it starts.

    Its own folder, HF_MODULES_CACHE, keeps files by repository and commit and never compares them with the model's:
    code would run that nobody has read. Call it before transformers is imported, which reads the variable.
    """
    folder, owner = tempfile.mkdtemp(prefix="model-code-"), os.getpid()
    os.environ["HF_MODULES_CACHE"] = folder
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)


def how_to_trust(model: "Model") -> str:
    """What to do about a model whose code would have to run, in this command."""
    if FLAG not in ARGUMENTS:
        return "This command never runs code of a model; take a model whose kind transformers knows."
    folder = snapshot(model)
    commit = "" if model.local else f"@{folder.name if folder else 'COMMIT'}"
    return (
        f"Code of a model is not run unless you name the model. Read those files; if you trust them: {FLAG}="
        f"{model.source}{commit}. Or take a model whose kind transformers knows."
    )


def check_trusted(models: "Iterable[Model]") -> None:
    """Raise InputError where --trust-remote-code names a model that is none of `models`, all that a command loads."""
    if unused := sorted(UNUSED - {model.source for model in models}):
        raise InputError(f"{FLAG} {unused[0]}: this command loads no such model; give it as the model's own argument")
    UNUSED.clear()  # what a part of the command loads, as a comparison in an evaluation does, may be fewer


def check_trust_of(arguments: "Mapping[str, Any]", model: "Model") -> None:
    """Raise InputError where a run with these arguments ran code of its base, `model`, and this command may not yet.

    What a run.json says is no permission: the run may be somebody else's.
    """
    if arguments.get("trust_remote_code") and own_code(model) and not model.trusted:
        raise InputError(f"{model.source}: {own_code(model)}. {how_to_trust(model)}")
