"""Bounds on a chat template, which is a program of somebody else: its time, its memory, its numbers.

Jinja's sandbox, in which transformers runs it, keeps it from Python's internals, from files and from the network. It
does not keep it from taking all memory, or from one operation that takes hours and that no signal ends.
"""

import ctypes
import functools
import os
import resource
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

MEMORY = 2 * 2**30  # bytes of address space above what the process has
DIGITS = 2**16  # bits of a whole number
LENGTH = 2**26  # characters of a text that an operator makes

T = TypeVar("T")


def bounded(seconds: float, work: Callable[[], T]) -> T:
    """What `work`, which runs templates, returns. TimeoutError ends it when its time is up, MemoryError at too much.

    The limit of memory holds for the whole process meanwhile. This is no context manager: the time may be up in
    contextlib's own code, after the block, which then would not get to lift the limit.
    """
    bound_operators()
    MEMORY_LIMIT.enter()
    try:
        if threading.current_thread() is threading.main_thread():
            return _by_alarm(seconds, work)
        return _in_a_thread(seconds, work)
    finally:
        MEMORY_LIMIT.leave()


class MemoryLimit:
    """The limit on the address space of this process while at least one thread is in `bounded`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def enter(self) -> None:
        with self.lock:
            if not self.inside:
                soft, hard = self.before = resource.getrlimit(resource.RLIMIT_AS)
                top = _address_space() + MEMORY
                lower = top if soft == resource.RLIM_INFINITY else min(soft, top)
                resource.setrlimit(resource.RLIMIT_AS, (lower, hard))
            self.inside += 1

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                resource.setrlimit(resource.RLIMIT_AS, self.before)


MEMORY_LIMIT = MemoryLimit()


def _address_space() -> int:
    """Bytes of address space that this process has."""
    return int(os.pread(_statm(os.getpid()), 64, 0).split()[0]) * resource.getpagesize()


@functools.cache
def _statm(_process: int) -> int:
    """The open file that says how large this process is, one for each fork: to open it takes longer than to render."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


def _by_alarm(seconds: float, work: Callable[[], T]) -> T:
    def stop(*_: object) -> None:
        raise TimeoutError(_message(seconds))

    handler = signal.signal(signal.SIGALRM, stop)
    timer = (0.0, 0.0)
    try:
        timer = signal.setitimer(signal.ITIMER_REAL, seconds)
        return work()
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, *timer)  # the alarm may still come, once, until this has returned
        finally:
            signal.signal(signal.SIGALRM, handler)


def _in_a_thread(seconds: float, work: Callable[[], T]) -> T:
    """The same where no signals arrive: reward models score in threads."""
    thread, lock = threading.get_ident(), threading.Lock()
    inside = late = False

    def stop() -> None:
        nonlocal late
        with lock:
            if inside:
                late = True
                _raise_in(thread, TimeoutError)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    inside = True
    try:
        return work()
    except TimeoutError:
        raise TimeoutError(_message(seconds)) from None
    finally:
        with lock:
            inside = False
        timer.cancel()
        if late:
            _raise_in(thread, None)  # where the work ended as its time did


def _message(seconds: float) -> str:
    return f"it takes more than {seconds:g} s for one conversation"


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind) if kind else None)


@functools.cache
def bound_operators() -> None:
    """Have every sandbox of Jinja in this process, those of transformers among them, refuse numbers without measure.

    10 ** (10 ** 9) is one operation, and so is 5 | round(-10 ** 9).
    """
    from jinja2.filters import FILTERS, do_round
    from jinja2.sandbox import SandboxedEnvironment

    checked: dict[str, Callable[[Any, Any], Any]] = {"*": _times, "**": _power}
    SandboxedEnvironment.intercepted_binops = frozenset(checked)
    table: Any = SandboxedEnvironment.default_binop_table
    SandboxedEnvironment.default_binop_table = {**table, **checked}

    def bounded_round(value: Any, precision: int = 0, method: Any = "common") -> Any:
        if abs(precision) > 100:
            raise OverflowError(f"it rounds to {precision} digits")
        return do_round(value, precision, method)

    filters: dict[str, Any] = FILTERS
    filters["round"] = bounded_round


def _times(one: Any, other: Any) -> Any:
    if isinstance(one, int) and isinstance(other, int):
        _check_digits(one.bit_length() + other.bit_length())
    for text, number in ((one, other), (other, one)):
        if isinstance(text, str | list | tuple) and isinstance(number, int) and len(text) * number > LENGTH:
            raise OverflowError(f"it repeats {len(text)} characters {number} times")
    return one * other


def _power(one: Any, other: Any) -> Any:
    if isinstance(one, int) and isinstance(other, int):
        _check_digits(one.bit_length() * max(other, 0))
    return one**other


def _check_digits(bits: int) -> None:
    if bits > DIGITS:
        raise OverflowError(f"it computes a whole number of {bits} bits")
