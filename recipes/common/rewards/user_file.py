"""Find a user's reward function in a Python file, and the line of an error in it."""

import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import InputError, did_you_mean


def find_function(source: str) -> tuple[Callable[..., Any], Path]:
    """The function that FILE.py:FUNCTION names, and its file.

    Raises InputError when there is no such file or plain function, or the file cannot be imported.
    """
    path, _, name = source.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise InputError(f"--rewards {source}: expected FILE.py:FUNCTION, for example my_rewards.py:shorter")
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"--rewards {source}: there is no file {path} (from {Path.cwd()})")
    module = _import(file.resolve())
    function = getattr(module, name, None)
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        functions = [
            name
            for name, value in inspect.getmembers(module, inspect.isfunction)
            if value.__module__ == module.__name__
        ]
        there = hasattr(module, name)
        what = "is not a plain function" if there else "is not there"
        hint = "" if there else did_you_mean(name, functions)
        raise InputError(
            f"--rewards {source}: {name} {what}{hint}. The file has {', '.join(functions) or 'no function'}."
        )
    return function, file


def line_of(error: BaseException, file: Path) -> str:
    """file:line of the innermost frame of `error` that is in `file`."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == file.resolve()]
    return f"{file}:{lines[-1]}" if lines else str(file)


def describe(error: BaseException) -> str:
    """The error in a message: its class and its text."""
    return f"{type(error).__name__}: {error}"


@functools.cache
def _import(file: Path) -> ModuleType:
    """The file as a module. It can import modules in its own folder."""
    spec = importlib.util.spec_from_file_location(f"rewards_in_{file.stem}", file)
    assert spec is not None  # it is a .py file
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{error.filename}:{error.lineno}: {error.msg}") from None
    except Exception as error:
        raise InputError(f"{line_of(error, file)}: importing it raised {describe(error)}") from error
    return module
