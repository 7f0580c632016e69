"""Run a command's main() in this process, where it costs no import of its own: one that loads no model."""

import contextlib
import functools
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from common.environment import ROOT
from common.errors import run_command


@functools.cache
def command(file: str | Path) -> ModuleType:
    """A command as a module, by its file in the repository; its `main` runs it."""
    path = ROOT / file
    name = f"command_{path.stem.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


def ended(main: Callable[[], int | None], capsys: pytest.CaptureFixture, *words: object) -> tuple[int, str, str]:
    """The exit code of a command with these arguments, and what it prints, to stdout and to stderr."""
    with pytest.MonkeyPatch.context() as patch, as_it_was():
        patch.setattr(sys, "argv", ["command", *map(str, words)])
        with pytest.raises(SystemExit) as exited:
            run_command(main)
    assert isinstance(exited.value.code, int)
    return exited.value.code, *capsys.readouterr()


def refusal(main: Callable[[], int | None], capsys: pytest.CaptureFixture, *words: object) -> str:
    """The message with which a command refuses these arguments: on stderr, without a traceback, exit code 2."""
    code, stdout, stderr = ended(main, capsys, *words)
    assert code == 2, stdout + stderr
    assert "Loading" not in stdout
    assert "Traceback" not in stderr
    return stderr


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """Put back what a command changes of its process: the environment and the signal handlers."""
    environment = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
