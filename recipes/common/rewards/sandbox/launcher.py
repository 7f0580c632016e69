"""Run a program and its tests, confined, one process for each test: started by __init__.py alone.

Reads a job from stdin (marshal, from its own parent), confines itself, and forks for each test a child that confines
itself further, runs the program and then the test. Writes one line of JSON for each test to stdout. It runs no line of
the program itself, and a test's child holds no other test's pipe.

A child's answer is one byte before the program's first line, confined or not; then, once the test has ended, a token
and the result as JSON. The token is made after the fork and waits in a pipe, so it is in no memory while the program
runs, and what the program writes into the pipe for the answer only spoils it.
"""

import builtins
import json
import marshal
import os
import select
import signal
import sys
import time
from typing import Any, TextIO

import kernel

CONFINED, UNCONFINED = b"\x01", b"\x00"
TOKEN_BYTES = 16
MAX_ANSWER = 2**20  # bytes
MAX_FILES = 1000
LOOK = 0.05  # seconds between two looks at the folder
DEVICES = ["/dev/null", "/dev/urandom"]
READABLE = [
    *(os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib")),
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"),
]


def main() -> None:
    job = marshal.load(sys.stdin.buffer)
    results = os.fdopen(os.dup(1), "w", encoding="ascii")
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
    sys.dont_write_bytecode = True
    os.environ.clear()
    kernel.die_with_parent()
    os.nice(5)
    try:
        confine(job)
        send(results, {"confined": True})
        end = time.monotonic() + job["seconds"]
        for index, (test, has_value) in enumerate(job["tests"]):
            # At most half of the time left, so that a test that hangs does not take the time of the others.
            share = 1 if index == len(job["tests"]) - 1 else 0.5
            send(results, judge(job, test, has_value, max(end - time.monotonic(), 0) * share))
            for entry in os.scandir("."):
                os.unlink(entry)
    except Unconfined as error:
        send(results, {"unconfined": str(error)})


class Unconfined(Exception):
    """This machine does not do what the layers take; nothing that a program did."""


def send(results: TextIO, line: dict[str, Any]) -> None:
    print(json.dumps(line), file=results, flush=True)


def confine(job: dict[str, Any]) -> None:
    """What binds this process and all its children; the working directory is the fresh folder afterwards."""
    readable = [path for path in dict.fromkeys(READABLE) if os.path.isdir(path)]
    try:
        if "namespaces" in job["layers"]:
            kernel.new_namespaces(job["folder"], readable, DEVICES, job["disk"])
        else:
            os.chdir(job["folder"])
        if "user" in job["layers"]:
            os.chown(".", kernel.NOBODY, kernel.NOBODY)
        if "landlock" in job["layers"]:
            kernel.restrict_files(".", readable, DEVICES)
    except OSError as error:
        raise Unconfined(error) from None


def judge(job: dict[str, Any], test: str, has_value: bool, seconds: float) -> dict[str, str]:
    """Run a test in a child for `seconds`: {"answer": JSON} of what it sent, or {"reason": why it sent none}.

    Raises Unconfined when there can be no child, or it could not be confined.
    """
    token_out, token_in = os.pipe()
    answer_out, answer_in = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        raise Unconfined(error) from None
    if child == 0:
        low, high = sorted((token_out, answer_in))
        for start, stop in ((3, low), (low + 1, high), (high + 1, 256)):
            os.closerange(start, stop)
        # Processor time is the second bound: a second above, so that the first one, by the clock, gives the reason.
        run_child(job, test, has_value, int(seconds) + 2, token_out, answer_in)
    token = os.urandom(TOKEN_BYTES)
    os.write(token_in, token)
    for descriptor in (token_out, token_in, answer_in):
        os.close(descriptor)
    answer, fault = receive(answer_out, seconds, job["disk"])
    os.close(answer_out)
    os.kill(child, signal.SIGKILL)  # it has no children; one that has ended already keeps its own status
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answer[:1] == UNCONFINED:
        raise Unconfined(answer[1:].decode())
    if fault:
        return {"reason": fault}
    if answer[: 1 + TOKEN_BYTES] == CONFINED + token:
        return {"answer": answer[1 + TOKEN_BYTES :].decode("ascii", "replace")}
    return {"reason": f"died of {signal.Signals(-status).name}" if status < 0 else "ended before its test did"}


def receive(descriptor: int, seconds: float, disk: int) -> tuple[bytes, str | None]:
    """All that comes until the other end is closed, or what was wrong until then."""
    end = time.monotonic() + seconds
    answer = b""
    ready = select.poll()
    ready.register(descriptor, select.POLLIN)
    while (left := end - time.monotonic()) > 0:
        if ready.poll(min(left, LOOK) * 1000):
            part = os.read(descriptor, 2**16)
            answer += part
            if not part:
                return answer, None
            if len(answer) > MAX_ANSWER:
                return answer, f"answered with more than {MAX_ANSWER} bytes"
        elif fault := folder_fault(disk):
            return answer, fault
    return answer, f"took longer than {seconds:.1f} s"


def folder_fault(disk: int) -> str | None:
    """The kernel bounds one file, not the sum of them."""
    size = 0
    for count, entry in enumerate(os.scandir("."), start=1):
        try:
            size += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:  # removed since
            continue
        if count > MAX_FILES or size > disk:
            return f"wrote more than {MAX_FILES} files" if count > MAX_FILES else f"wrote more than {disk} bytes"
    return None


def run_child(job: dict[str, Any], test: str, has_value: bool, seconds: int, token: int, answer: int) -> None:
    """In the child: give up everything, run the program and the test, answer, and end this process."""
    try:
        try:
            kernel.limit_resources(seconds, job["memory"], job["disk"] // 4)
            if "user" in job["layers"]:
                kernel.become_nobody()
            kernel.drop_privileges()
            kernel.die_with_parent()
            if "seccomp" in job["layers"]:
                kernel.filter_system_calls()
        except OSError as error:
            os.write(answer, UNCONFINED + str(error).encode())
            os._exit(1)
        os.write(answer, CONFINED)
        result = run(job["code"], test, has_value)
        os.write(answer, os.read(token, TOKEN_BYTES) + result.encode())
    finally:
        os._exit(0)  # whatever happened: the launcher's own frames are below


def run(code: str, test: str, has_value: bool) -> str:
    """Run the program, then the test in its namespace: {"value": ...} or {"reason": what was raised}, as JSON."""
    names = dict(vars(builtins))  # as they were before the program could change them
    module = type(sys)("program")  # not __main__: what stands under that guard is no part of the answer
    sys.modules["program"] = module
    stage = "the program"
    try:
        exec(compile(code, "program", "exec", dont_inherit=True), vars(module))
        stage = "the test"
        vars(module)["__builtins__"] = names
        if has_value:
            value = eval(compile(test, "test", "eval", dont_inherit=True), vars(module))
            return json.dumps({"value": encode(value)})
        exec(compile(test, "test", "exec", dont_inherit=True), vars(module))
    except BaseException as error:  # noqa: BLE001  a program may raise anything, SystemExit too
        return json.dumps({"reason": f"{stage}: {type(error).__name__}: {error}"[:200]})
    return json.dumps({"value": None})


def encode(value: Any) -> Any:
    """A value as JSON can carry it; `decode` in __init__.py is the way back.

    A subclass counts as the plain type below it. Raises TypeError for any other type.
    """
    if value is None or isinstance(value, int | float | str):
        return value
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in dict.items(value)]]
    for name, types in (
        ("list", list),
        ("tuple", tuple),
        ("set", (set, frozenset, type({}.keys()), type({}.items()))),
    ):
        if isinstance(value, types):
            return [name, [encode(item) for item in value]]
    raise TypeError(f"a value of type {type(value).__name__} cannot be compared with a literal")


if __name__ == "__main__":
    main()
