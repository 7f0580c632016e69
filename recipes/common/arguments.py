"""Arguments of a command, read from the `class Args` in its file without importing it.

Standard library only: the launcher checks a command line before there is a .venv, and commands that run on a login node
parse theirs here. Recipes and the other commands parse with tyro (common/cli.py), whose grammar this follows.
"""

import ast
import functools
import inspect
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from common.aliases import ELSEWHERE, ours
from common.errors import ARGUMENTS, InputError, did_you_mean, secret_values

Args = TypeVar("Args")

KINDS = {"bool": bool, "int": int, "float": float, "str": str, "Path": Path}
EXPECTED = {"int": "a whole number", "float": "a number"}
SHORT = {"output_dir": "OUT", "output": "OUT", "reward_model": "REWARD"}
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # not tab and ends of lines, which a prompt may have
NUMBER = re.compile(r"-(\d|\.\d|inf)")


def variable(name: str) -> str:
    """An argument as a variable of make: MAX_LENGTH; OUT and REWARD are short ones."""
    return SHORT.get(name, name.upper())


@dataclass(frozen=True)
class Field:
    """An argument: a field of `class Args`, with its type, default and help as the source has them."""

    name: str
    kind: str  # a key of KINDS
    many: bool = False  # a tuple: any number of values
    optional: bool = False  # None is a value, written None
    literal: bool = False  # one of a few words,
    choices: tuple[str, ...] = ()  # these; () where only the import could tell
    default: ast.expr | None = None  # None: it is required
    shown: str = ""  # the default, for a reader
    help: str = ""
    group: str = ""  # the comment above it and its neighbours
    aliases: tuple[str, ...] = ()  # "-k"

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def off(self) -> str:
        """The flag that turns a switch off."""
        return "--no" + self.flag[1:]

    @property
    def variable(self) -> str:
        """Its name in make, such as MAX_LENGTH; OUT and REWARD are short ones."""
        return variable(self.name)

    @property
    def required(self) -> bool:
        return self.default is None


@dataclass(frozen=True)
class Given:
    """An argument as a command line gives it: the flag as typed, and its values."""

    field: Field
    flag: str
    values: list[str]


@functools.cache
def read_fields(file: Path) -> list[Field] | None:
    """The fields of `class Args` in a Python file, in their order; None where it has no such class."""
    source = file.read_text(encoding="utf-8")
    module = ast.parse(source)
    constants = {
        target.id: node.value
        for node in module.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            return list(_fields(node, source.splitlines(), constants))
    return None


def _fields(node: ast.ClassDef, lines: list[str], constants: dict[str, ast.expr]):
    group = ""
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        group = _comment_above(statement.lineno - 1, lines) or group
        text = following.value if isinstance(following, ast.Expr) else None
        yield Field(
            name=statement.target.id,
            **_type(statement.annotation, constants),
            default=statement.value,
            shown=_shown(statement.value, constants, lines),
            help=inspect.cleandoc(str(text.value)) if isinstance(text, ast.Constant) else "",
            group=group,
        )


def _comment_above(index: int, lines: list[str]) -> str:
    comment = []
    while index > 0 and lines[index - 1].strip().startswith("#"):
        index -= 1
        comment.insert(0, lines[index].strip("# "))
    return " ".join(comment)


def _type(node: ast.expr, constants: dict[str, ast.expr]) -> dict[str, Any]:
    """What Field says of a type."""
    match node:
        case ast.BinOp(left=inner, op=ast.BitOr(), right=ast.Constant(value=None)):
            return {**_type(inner, constants), "optional": True}
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[inner, *notes])):
            words = [word.value for note in notes for word in ast.walk(note) if isinstance(word, ast.Constant)]
            short = tuple(word for word in words if isinstance(word, str) and re.fullmatch(r"-\w", word))
            return {**_type(inner, constants), "aliases": short}
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[inner, *_])):
            return {**_type(inner, constants), "many": True}
        case ast.Subscript(value=ast.Name(id="Literal"), slice=options):
            options = options.elts if isinstance(options, ast.Tuple) else [options]
            words = tuple(option.value for option in options if isinstance(option, ast.Constant))
            return {"kind": "str", "literal": True, "choices": words if len(words) == len(options) else ()}
        case ast.Name(id=name) if name in KINDS:
            return {"kind": name}
        case ast.Name(id=name) if name in constants:
            return _type(constants[name], constants)
    return {"kind": "str", "literal": True}  # its name is of another file


def _shown(node: ast.expr | None, constants: dict[str, ast.expr], lines: list[str]) -> str:
    """A default as one would type it; of an expression its constants, as data_samples/sft.jsonl."""

    def shown(*nodes: ast.expr) -> list[str]:
        return [text for node in nodes if (text := _shown(node, constants, lines))]

    match node:
        case ast.Constant(value=bool(value)):
            return "yes" if value else "no"
        case ast.Constant(value=int() | float()):
            return lines[node.lineno - 1][node.col_offset : node.end_col_offset].replace("_", "")  # 2e-4, not 0.0002
        case ast.Constant(value=str(value)):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=number):
            return "-" + "".join(shown(number))
        case ast.BinOp(op=ast.Div(), left=left, right=right):
            return "/".join(shown(left, right))
        case ast.Tuple(elts=parts):
            return " ".join(shown(*parts))
        case ast.Starred(value=inner) | ast.Call(args=[inner]):
            return "".join(shown(inner))
        case ast.Name(id=name) if name in constants:
            return "".join(shown(constants[name]))
    return ""


def read_words(fields: Sequence[Field], words: Sequence[str]) -> list[Given]:
    """The arguments that `words` give, as tyro reads them. Raises InputError for a flag that is none of the fields'."""
    by_flag = {flag: field for field in fields for flag in (field.flag, *field.aliases)}
    by_flag |= {field.off: field for field in fields if field.kind == "bool"}
    given: list[Given] = []
    for word in words:
        if not word.startswith("-") or word == "-" or NUMBER.match(word):
            if not given:
                raise InputError(f"{word!r} belongs to no argument; a flag comes first, as in `--model tiny`.")
            given[-1].values.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")  # tyro takes TRL's spelling, too
        if flag not in by_flag:
            raise InputError(_unknown(flag, fields))
        given.append(Given(by_flag[flag], flag, [value] if equals else []))
    return given


def _unknown(flag: str, fields: Sequence[Field]) -> str:
    known = {field.name: field for field in fields}
    if name := ours(flag.lstrip("-"), known):
        return f"{flag} is {known[name].flag} here"
    if reason := ELSEWHERE.get(flag.lstrip("-").replace("-", "_")):
        return f"there is no {flag} here: {reason}."
    return f"there is no {flag}{did_you_mean(flag, [field.flag for field in fields])}."


def name_arguments(fields: Sequence[Field]) -> None:
    """Have messages name these arguments as the user does."""
    for field in fields:
        ARGUMENTS[field.flag] = field.variable
        if field.kind == "bool":
            ARGUMENTS[field.off] = f"{field.variable}=no"


def check(fields: Sequence[Field], words: Sequence[str], command: str = "this command") -> list[Given]:
    """The arguments that `words` give. Raises InputError for an unknown or missing one, and for a value that is none of
    its type; what only an import could tell is left to tyro."""
    name_arguments(fields)
    given = read_words(fields, words)
    secrets = secret_values()
    for one in given:
        for value in one.values:
            _check_text(one.flag, value, secrets)
        values(one)
    for field in fields:
        if field.required and not any(one.field is field for one in given):
            raise InputError(f"{command} needs {field.flag}=..., for example {field.flag}={example(field)}")
    return given


def _check_text(flag: str, value: str, secrets: Mapping[str, str]) -> None:
    """Raise InputError for a value that is no text, or that every user of this machine would see and must not."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{flag}={value}: is not UTF-8; rename it") from None
    if control := CONTROLS.search(value):
        raise InputError(f"{flag}={value}: has a control character, {control[0]!r}; take it out")
    if name := next((name for name, secret in secrets.items() if secret in value), None):
        raise InputError(
            f"{flag}: the value of {name} is on the command line, which every process of this machine can read and "
            "run.json keeps; leave it out, it is read from the environment"
        )


def values(given: Given) -> list[Any]:
    """The values of an argument in its type. Raises InputError."""
    field, flag, values = given.field, given.flag, given.values
    if field.kind == "bool":
        if values:
            raise InputError(f"`{flag} {values[0]}`: a switch takes no value; {field.off} turns it off.")
        return [flag != field.off]
    if not field.many and len(values) != 1:
        raise InputError(f"{flag} takes one value, not {len(values)}" + (f": {' '.join(values)}" if values else "."))
    return [_convert(field, flag, value) for value in values]


def _convert(field: Field, flag: str, value: str) -> Any:
    if field.optional and value == "None":
        return None
    if field.choices and value not in field.choices:
        raise InputError(
            f"{flag}={value}: unknown{did_you_mean(value, field.choices)}. There are {', '.join(field.choices)}."
        )
    try:
        return KINDS[field.kind](value)
    except ValueError:
        raise InputError(f"{flag}={value}: expected {EXPECTED[field.kind]}.") from None


def shell_words(name: str, text: str) -> list[str]:
    """The words of a command line that is the value of one argument. Raises InputError where a quotation is open."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"{name}: {error}.") from None


def example(field: Field) -> str:
    """A value to show for an argument that is required."""
    return {"model": "qwen2.5-7b", "time": "4:00:00", "run": "outputs/try"}.get(field.name, "outputs/try/adapter")


def parse(cls: type[Args], words: Sequence[str], command: str) -> Args:
    """An instance of `cls`, a dataclass called Args, from the words of a command line. Raises InputError."""
    if any(word in ("-h", "--help") for word in words):
        print(f"`scripts/run {command} --help` shows the arguments.")
        raise SystemExit
    fields = read_fields(Path(inspect.getfile(cls))) or []
    chosen = {}
    for one in check(fields, words, command):
        found = values(one)
        chosen[one.field.name] = tuple(found) if one.field.many else found[0]
    return cls(**chosen)
