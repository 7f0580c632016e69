"""FROM, or --from: the arguments of a run again, from its run.json."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

from common.arguments import Field, read_words
from common.errors import InputError

from launch.variables import one_value


def repeat(recipe: str, fields: list[Field], words: list[str]) -> list[str]:
    """`words` after the arguments of the run that --from RUN.JSON in them names, those that `words` give left out.

    All of the run's arguments are repeated but its folder, whatever gave them: a default or a card may have changed
    since. Raises InputError for a file that is no record of a run of this recipe.
    """
    file, words = take_from(words)
    if file is None:
        return words
    arguments = recorded_arguments(recipe, Path(file).expanduser())
    given = {one.field.name for one in read_words(fields, words)}
    known = {field.name for field in fields}
    if gone := [name for name in arguments if name not in known]:
        print(f"{file}: {recipe} no longer takes {', '.join(gone)}; left out.", file=sys.stderr)
    again = {name: value for name, value in arguments.items() if name not in {*given, "output_dir"}}
    return [*all_words(fields, again), *words]


def all_words(fields: list[Field], arguments: dict[str, Any]) -> list[str]:
    """The words of a command line that gives these arguments of a run, but for those that are none of the `fields`.

    The 4 bit that is a recipe's default goes with fp8, but typed the two would contradict each other.
    """
    fp8 = arguments.get("load_in_fp8")
    known = {field.name: field for field in fields if not (fp8 and field.name == "load_in_4bit")}
    known.pop("trust_remote_code", None)  # a run.json may be somebody else's: it trusts nobody
    return [word for name, value in arguments.items() if name in known for word in as_words(known[name], value)]


def take_from(words: list[str]) -> tuple[str | None, list[str]]:
    """The value of --from in the words, None without one, and the other words."""
    file, rest = None, []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag == "--from":
            file = value if equals else ""
        elif file == "" and not word.startswith("-"):
            file = word
        else:
            rest.append(word)
    if file == "":
        raise InputError("--from needs a run.json, for example --from=outputs/try/run.json")
    return file, rest


def recorded_arguments(recipe: str, file: Path) -> dict[str, Any]:
    """The arguments that a run.json, or the one in a folder, has for a run of `recipe`."""
    file = file / "run.json" if file.is_dir() else file
    if file.exists() and not file.is_file():
        raise InputError(f"--from={file}: this is no plain file")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        arguments = {name: argument["value"] for name, argument in record["arguments"].items()}
    except FileNotFoundError:
        raise InputError(f"--from={file}: no such file") from None
    except OSError as error:
        raise InputError(f"--from={file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--from={file}: this is no run.json") from None
    if record.get("recipe") != recipe:
        raise InputError(f"--from={file}: this is a run of {record.get('recipe')}, not of {recipe}")
    return arguments


def as_words(field: Field, value: Any) -> list[str]:
    """An argument as the words of a command line; none where the value is None by default."""
    if field.kind == "bool":
        return [field.flag if value else field.off]
    if value is None and isinstance(field.default, ast.Constant) and field.default.value is None:
        return []
    if not isinstance(value, list):
        return one_value(field, str(value))
    return [*one_value(field, str(value[0])), *map(str, value[1:])] if value else [field.flag]
