"""Run a command's main() in this process: for input that it refuses, which then costs no import of its own."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

import pytest
from common.errors import run_command


def refusal(main: Callable[[], object], capsys: pytest.CaptureFixture, *words: object) -> str:
    """The message with which a command refuses these arguments: on stderr, without a traceback, exit code 2."""
    with pytest.MonkeyPatch.context() as patch, as_it_was():
        patch.setattr(sys, "argv", ["command", *map(str, words)])
        with pytest.raises(SystemExit) as exited:
            run_command(main)
    printed = capsys.readouterr()
    assert exited.value.code == 2, printed
    assert "Loading" not in printed.out
    assert "Traceback" not in printed.err
    return printed.err


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
