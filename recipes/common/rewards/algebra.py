"""Compare two mathematical expressions with math-verify, in a process of its own.

In a process of its own, because what a model writes may take forever (9**9**9**9) or all memory, inside code that no
exception can interrupt; and because math-verify's own time limit is an alarm signal, which works on the main thread
only, while rewards run on others. Here the alarm is set in the other process, without a handler: the kernel ends that
process when the time is up, whatever it is doing, and the next comparison starts a new one. The time is that of the
processor, so that a busy machine does not make a right answer wrong.

Run as a file, this module is that other process.
"""

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import IO, Any

LONGEST = 1000  # characters; no answer to a question that can be graded is longer
MEMORY_BYTES = 1 << 30  # of address space; math-verify itself takes a tenth of it

_process: subprocess.Popen[str] | None = None
_lock = threading.Lock()


def equal(gold: str, answer: str, seconds: float) -> bool:
    """Is `answer` the same mathematics as `gold`, both LaTeX or plain (3/4, 2x+1, \\frac34, (0, 1], 5\\%)?

    False when either cannot be parsed or is longer than 1000 characters, or when `seconds` of the processor or 1 GiB
    were not enough. Safe on any thread. The first call starts the other process, which takes about 2 seconds.

    Raises RuntimeError if that process cannot be started.
    """
    return compare(gold, answer, seconds)[0]


@lru_cache(maxsize=1 << 16)
def compare(gold: str, answer: str, seconds: float) -> tuple[bool, float]:
    """`equal`, and the seconds of the processor that it took; all of `seconds` if they were not enough."""
    if max(len(gold), len(answer)) > LONGEST:
        return False, 0.0
    request = json.dumps({"gold": gold, "answer": answer, "seconds": seconds})
    reply = None
    with _lock:
        try:
            reply = _ask(request)
        finally:
            # It is over its limits and gone, or we were interrupted and would take its reply for that to the next.
            if reply is None:
                _stop()
    if reply is None:
        return False, seconds
    same, spent = json.loads(reply)
    return same, spent


def _ask(request: str) -> str | None:
    """The other process's reply, or None if it ended instead. Starts it if there is none."""
    global _process
    if _process is None or _process.poll() is not None:
        _stop()
        from common.run.stopping import shielded  # here, as the other process runs this file alone

        # -P: the modules beside this one must not hide others of the same name.
        command = [sys.executable, "-P", __file__]
        with shielded():
            _process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
        if _pipes(_process)[1].readline() != "ready\n":
            raise RuntimeError(f"the process that compares answers does not start (exit code {_process.wait()})")
    requests, replies = _pipes(_process)
    try:
        requests.write(request + "\n")
        requests.flush()
    except BrokenPipeError:
        return None
    return replies.readline().strip() or None


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    """Its pipe for requests and its pipe for replies."""
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


@atexit.register
def _stop() -> None:
    global _process
    if _process is not None:
        _process.kill()
        _process.wait()
        requests, replies = _pipes(_process)
        replies.close()
        with suppress(BrokenPipeError):  # a request that was never read
            requests.close()
    _process = None


def _forget() -> None:
    """After a fork the other process belongs to the parent; the child starts its own."""
    global _process, _lock
    _process, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _differ(gold: Any, answer: Any) -> bool:
    """Whether two expressions have plainly different values at two points; cheap where simplifying is slow."""
    import sympy

    if not all(isinstance(side, sympy.Expr) for side in (gold, answer)):
        return False
    if (gold - answer).has(sympy.Float, sympy.UnevaluatedExpr):
        return False
    symbols = sorted((gold - answer).free_symbols, key=str)
    for start in (13, -31):
        point = {symbol: sympy.Rational(start * (3 * index + 2), 7) for index, symbol in enumerate(symbols)}
        values = [complex(side.subs(point).doit().evalf(12)) for side in (gold, answer)]
        if not abs(values[0] - values[1]) > 1e-6 * max(map(abs, values)):
            return False  # equal, or no number
    return True


def main() -> None:
    # The parent may ignore or block the alarm, and a new process inherits that.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # math-verify warns of the time limit that is set here
    # Its removal of units is off: it takes 5t for 5 tonnes, and so for 5.
    normalization = replace(LatexExtractionConfig().normalization_config, units=False)
    configuration = [LatexExtractionConfig(normalization_config=normalization)]

    @lru_cache(maxsize=1 << 12)
    def parsed(text: str) -> list:
        # In a box the whole text is the expression; without one math-verify looks for an expression in it, and would
        # take the 7 out of "7:30".
        return parse(f"\\boxed{{{text}}}", configuration, fallback_mode="no_fallback", parsing_timeout=None)

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        started = time.process_time()
        gold, answer = parsed(request["gold"]), parsed(request["answer"])
        same = bool(gold and answer)
        with suppress(Exception):  # no value there: math-verify decides
            same = same and not _differ(gold[0], answer[0])
        same = same and verify(gold, answer, allow_set_relation_comp=True, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps((same, time.process_time() - started)), flush=True)


if __name__ == "__main__":
    main()
