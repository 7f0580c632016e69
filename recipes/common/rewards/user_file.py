"""Find a user's reward function in a Python file, and the line of an error in it."""

import asyncio
import functools
import importlib.util
import inspect
import os
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from inspect import isawaitable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NoReturn

from common.errors import InputError, Stopped, did_you_mean, one_line


def find_function(source: str) -> tuple[Callable[..., Any], Path]:
    """The function that FILE.py:FUNCTION names, and its file.

    An async function and an object with `__call__`, which TRL takes too, become a function of the same arguments.
    Raises InputError when there is no such file or function, or the file cannot be imported.
    """
    path, _, name = source.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise InputError(f"--rewards {source}: expected FILE.py:FUNCTION, for example my_rewards.py:shorter")
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"--rewards {source}: there is no file {path} (from {Path.cwd()})")
    module = _import(file.resolve())
    function = getattr(module, name, None)
    code = _code_of(function)
    if code is None or function is None:
        functions = [
            name
            for name, value in inspect.getmembers(module, inspect.isfunction)
            if value.__module__ == module.__name__
        ]
        there = hasattr(module, name)
        what = "is not a function" if there else "is not there"
        if inspect.isclass(function):
            what = f"is a class; give an object of it, made in the file: NAME = {name}()"
        hint = "" if there else did_you_mean(name, functions)
        raise InputError(
            f"--rewards {source}: {name} {what}{hint}. The file has {', '.join(functions) or 'no function'}."
        )
    if inspect.isfunction(function) and not inspect.iscoroutinefunction(function):
        return function, file
    return _as_function(function, code, name), file


def _code_of(function: Any) -> FunctionType | None:
    """The Python function that a call of `function` runs; None where it is no function, or one of C."""
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.isclass(function) or not callable(function):
        return None
    if not inspect.isroutine(function):
        function = type(function).__call__
    function = inspect.unwrap(getattr(function, "__func__", function))  # __func__: of a method
    return function if inspect.isfunction(function) else None


def _as_function(function: Callable[..., Any], code: FunctionType, name: str) -> Callable[..., Any]:
    """A plain function that calls `function` and waits for what it awaits."""
    loop = functools.cache(_start_loop)  # one for all calls: what the function keeps open belongs to it

    @functools.wraps(code)
    def call(**given: Any) -> Any:
        result = function(**given)
        return asyncio.run_coroutine_threadsafe(_awaited(result), loop()).result() if isawaitable(result) else result

    call.__name__ = name
    call.__signature__ = inspect.signature(function)  # pyrefly: ignore[missing-attribute]  as documented by inspect
    return call


def _start_loop() -> asyncio.AbstractEventLoop:
    """A running event loop on a thread of its own, as in TRL: rewards are called on more than one thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def line_of(error: BaseException, file: Path) -> str:
    """file:line of the innermost frame of `error` that is in `file`."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == file.resolve()]
    return f"{file}:{lines[-1]}" if lines else str(file)


def describe(error: BaseException) -> str:
    """The error in a message: its class and its text, cut where it is long."""
    text = f": {one_line(error)}" if str(error) else ""
    return f"{type(error).__name__}{text}"


END = os._exit
RUNNING: dict[int, tuple[int, int]] = {}  # of each thread the blocks of `contained` that it is in, and its process


class Ended(BaseException):
    """The code of a user called os._exit: no Exception, since it may catch those."""


@contextmanager
def contained() -> Iterator[None]:
    """A block that runs code of a user's file, which must not end this process: os._exit raises Ended in it.

    The process would end without a word, and with 0 a batch job would take it for done. A fork may end as it likes.
    What the file imports as a name, `from os import _exit`, stays so for good.
    """
    here = threading.get_ident()  # rewards are called on more than one thread
    depth = RUNNING.get(here, (0, 0))[0]
    RUNNING[here] = depth + 1, os.getpid()
    os._exit = _exit
    try:
        yield
    finally:
        RUNNING[here] = depth, os.getpid()
        if not any(blocks for blocks, _ in RUNNING.values()):
            os._exit = END


def _exit(status: int) -> NoReturn:
    if os.getpid() not in {process for _, process in RUNNING.values()}:  # in a fork
        END(status)
    raise Ended(f"os._exit({status})")


def is_ours(error: BaseException) -> bool:
    """Did this program raise it, to stop, and not the user's file? A real Ctrl-C is one where Python handles it."""
    if isinstance(error, KeyboardInterrupt):
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, Stopped)


BESIDE: dict[Path, list[Path]] = {}  # {a reward file: the files of its folder that importing it imported}


def imported_beside(file: Path) -> list[Path]:
    """The modules in the folder of a reward file that it imports, when it is imported itself and not later."""
    return BESIDE.get(file.resolve(), [])


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
    before = set(sys.modules)
    try:
        with contained():
            spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{error.filename}:{error.lineno}: {error.msg}") from None
    except BaseException as error:
        if is_ours(error):
            raise
        raise InputError(f"{line_of(error, file)}: importing it raised {describe(error)}") from error
    places = [getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before]
    imported = {Path(place) for place in places if place}
    BESIDE[file] = sorted(
        one for one in imported if one.is_relative_to(file.parent) and "site-packages" not in one.parts
    )
    return module
