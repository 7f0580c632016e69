"""Run a model's code answer against unit tests, so that a hostile one costs its own score and nothing else.

What holds, by the kernel's own means and without root (kernel.py has the details):
- seccomp: no process and no thread beside its own, no signal to anyone, no socket, no exec.
- landlock: it reads Python's installation and the system's libraries, and writes plain files in a fresh folder.
- namespaces, where the machine permits them: a root that holds nothing else, no network, its own process tree.
- user: as root, the program runs as nobody, where Python can be reached by nobody.
- always: no capability, no environment, stdin and output to /dev/null, every file closed but two, limits on time,
  memory, file size, number and sum of files; SIGKILL to all of it when its time is over or the trainer dies.
seccomp and one of landlock and namespaces are the least; a machine that has less is refused, never run on unconfined.

What a score is worth:
- Every test runs in a process of its own, on a program run afresh, so none harms another.
- A test `assert EXPRESSION == LITERAL` (or `is`) is judged outside: the program's process evaluates EXPRESSION and
  sends the value as plain data. It never holds LITERAL, and no `__eq__` of its own is called, so the value must be
  known to be right. What is not plain data (a Fraction, an object with an `__eq__`) fails there.
- Any other test is run as it stands beside the program. To exit, to print, to change builtins, to write to every open
  file does not pass it. But code in one interpreter can reach all of it: an object that says it equals anything, a
  patched `math.isclose`, or a program that reads the token as the launcher does, passes such a test.

Left out: threads, subprocesses, folders within the folder, packages outside the standard library, stdin and stdout as
a way to test. The memory limit is one of address space. Whether a file outside exists can be found out, not what it
holds, where there are no namespaces.
"""

import ast
import contextlib
import functools
import json
import marshal
import operator
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InputError, MachineError
from common.run.stopping import shielded

LAYERS = ("seccomp", "landlock", "namespaces", "user")
GRACE = 30.0  # seconds above a program's own, for a busy machine to start it; the launcher itself holds the limit
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {ast.Eq: operator.eq, ast.Is: operator.is_}
LAUNCHER = Path(__file__).with_name("launcher.py")

# Reads a part of Python that is not loaded yet, and writes by the folder's full name.
PROBE = "import fractions, os\nwith open(os.path.abspath('probe'), 'w') as stream:\n    stream.write('x')"
PROBE_TEST = "assert os.path.getsize('probe') == 1"


@dataclass(frozen=True, slots=True)
class Result:
    """How many of the tests passed, and why the first that did not did not."""

    passed: int
    total: int
    reason: str | None = None

    @property
    def share(self) -> float:
        """Of the tests, 0 to 1."""
        return self.passed / self.total


@dataclass(frozen=True, slots=True)
class UnitTest:
    """A test, and what of it is run: for `assert EXPRESSION == LITERAL` the expression, whose value is then judged."""

    text: str
    source: str
    compare: Callable[[Any, Any], bool] | None = None
    expected: Any = None


def extract_code(text: str) -> str | None:
    """The last ```python block of an answer, else its last ``` block; within <answer> if it has one. Else None.

    A block that is not closed does not count: the completion is truncated.
    """
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    blocks = re.findall(
        r"^[ \t]*```[ \t]*([\w+-]*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$",
        (answers[-1] if answers else text).replace("\r\n", "\n"),
        re.DOTALL | re.MULTILINE,
    )
    for labels in (("python", "py", "python3"), ("",)):
        found = [code for label, code in blocks if label.lower() in labels]
        if found:
            return textwrap.dedent(found[-1])
    return None


def parse_tests(tests: Sequence[str]) -> list[UnitTest]:
    """Each test as the sandbox runs it. Raises InputError for a text, for no test, and for one that is not Python."""
    if isinstance(tests, str):
        raise InputError('expected a list of tests, found text; write ["assert add(1, 2) == 3"]')
    if not tests:
        raise InputError("a program without a test cannot be scored; give at least one")
    return [_parse_test(number, test) for number, test in enumerate(tests, start=1)]


def run_tests(
    code: str,
    tests: Sequence[str],
    *,
    seconds: float = 6.0,
    memory_mib: int = 512,
    disk_mib: int = 64,
    _layers: frozenset[str] | None = None,
) -> Result:
    """Run each test, a snippet such as "assert add(1, 2) == 3", on the program `code`.

    `seconds` is wall time for all of them; a test takes at most half of what is left, the last all. Raises InputError
    for a test that is not Python, MachineError when this machine cannot confine a program. `_layers` is for tests.
    """
    parsed = parse_tests(tests)
    layers = available_layers()[0] if _layers is None else _layers
    job = {
        "code": code,
        "tests": [(test.source, test.compare is not None) for test in parsed],
        "seconds": seconds,
        "memory": memory_mib * 2**20,
        "disk": disk_mib * 2**20,
        "layers": sorted(layers),
    }
    lines = _launch(job)
    passed, reason = 0, None
    for number, test in enumerate(parsed, start=1):
        fault = _fault(test, lines[number - 1]) if number <= len(lines) else "not reached, the sandbox was ended"
        passed += fault is None
        if fault and reason is None:
            reason = f"test {number}: {fault}"
    return Result(passed, len(parsed), reason)


def run_many(
    programs: Sequence[tuple[str, Sequence[str]]], *, workers: int | None = None, **limits: Any
) -> list[Result]:
    """`run_tests` on each (code, tests), `workers` at a time (else one for each processor), in their order.

    Safe in a process that holds threads and a GPU: it starts new programs, it never forks itself.
    """
    available_layers()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: run_tests(*program, **limits), programs))


def confinement() -> str:
    """The layers that confine a program on this machine, in words. Raises MachineError when they are too few."""
    layers, missing = available_layers()
    words = [name for name in LAYERS if name in layers]
    words += [f"without {name} ({why})" for name, why in missing.items()]
    return ", ".join(words)


@functools.cache
def available_layers() -> tuple[frozenset[str], dict[str, str]]:
    """The layers this machine can enforce, found by running a program under each, and why not the others.

    Raises MachineError when it cannot enforce the least.
    """
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        raise MachineError(f"code can be confined on Linux on x86_64 and aarch64, not on {system} on {machine}")
    layers, missing = frozenset(), {}
    for layer in LAYERS:
        if layer == "user" and os.geteuid() != 0:
            continue  # it is not root to begin with
        try:
            result = run_tests(PROBE, [PROBE_TEST], seconds=20, _layers=layers | {layer})
            why = result.reason
        except MachineError as error:
            why = str(error)
        if why is None:
            layers |= {layer}
        else:
            missing[layer] = why
    if "seccomp" not in layers or not layers & {"landlock", "namespaces"}:
        reasons = "; ".join(f"{name}: {why}" for name, why in missing.items())
        raise MachineError(
            f"this machine cannot confine a model's code ({reasons}). It takes seccomp and either Landlock (Linux 5.13 "
            "or newer, `landlock` in /sys/kernel/security/lsm) or user namespaces. Run on such a machine, or train "
            "without the reward that runs code."
        )
    return layers, missing


def _parse_test(number: int, test: str) -> UnitTest:
    source = textwrap.dedent(test).strip()
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        raise InputError(f"test {number} is not Python: {error}: {test[:100]!r}") from None
    if not body:
        raise InputError(f"test {number} is empty")
    if len(body) == 1 and isinstance(body[0], ast.Assert) and isinstance(body[0].test, ast.Compare):
        question = body[0].test
        compare = COMPARISONS.get(type(question.ops[0])) if len(question.ops) == 1 else None
        sides = [question.left, question.comparators[0]]
        for expression, literal in (sides, sides[::-1]):
            with contextlib.suppress(ValueError):
                expected = ast.literal_eval(literal)
                # Of other objects than these the one that is sent out is not the one that was there.
                if compare is operator.eq or (compare and any(expected is one for one in (None, True, False))):
                    return UnitTest(source, ast.unparse(expression), compare, expected)
    return UnitTest(source, source)


def _launch(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the launcher on a job; what became of each test it reached. No process and no file of it is left."""
    folder = tempfile.mkdtemp(prefix="sandbox-")
    try:
        with shielded():
            launcher = subprocess.Popen(
                [sys.executable, "-s", "-S", LAUNCHER],
                cwd="/",
                env={"PYTHONHASHSEED": "0"},  # the same program gives the same score; the launcher clears it
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        with launcher as process:
            try:
                output, errors = process.communicate(marshal.dumps({**job, "folder": folder}), job["seconds"] + GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, errors = process.communicate()
            except BaseException:  # such as Ctrl-C: the program would run on
                os.killpg(process.pid, signal.SIGKILL)
                raise
    finally:
        shutil.rmtree(folder)
    lines = [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith(b"\n")]
    if not lines:
        raise MachineError(f"the sandbox did not start: {errors.decode(errors='replace').strip() or 'no answer'}")
    for line in lines:
        if "unconfined" in line:
            raise MachineError(f"this machine did not confine a program: {line['unconfined']}")
    return lines[1:]  # the first says that it is confined


def _fault(test: UnitTest, line: dict[str, Any]) -> str | None:
    """What was wrong with a test's outcome; None when it passed. The answer is as the program's process wrote it."""
    if "reason" in line:
        return line["reason"]
    try:
        answer = json.loads(line["answer"])
        if "reason" in answer:
            return _printable(answer["reason"])
        value = decode(answer["value"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return "answered with nonsense"
    if test.compare is None or test.compare(value, test.expected):
        return None
    return f"{test.text[:80]}: it is {_printable(repr(value))}"


def decode(value: Any) -> Any:
    """The way back from `encode` in launcher.py. Raises ValueError or TypeError for what that does not write."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case ["complex", [float(real), float(imaginary)]]:
            return complex(real, imaginary)
        case ["bytes", str(text)]:
            return bytes.fromhex(text)
        case ["dict", list(items)]:
            return {decode(key): decode(item) for key, item in items}
        case ["list", list(items)]:
            return [decode(item) for item in items]
        case ["tuple", list(items)]:
            return tuple(decode(item) for item in items)
        case ["set", list(items)]:
            return frozenset(decode(item) for item in items)  # equal to a set, and may itself be in one
    raise ValueError("not a value of the sandbox")


def _printable(text: str) -> str:
    return ascii(str(text)[:80])[1:-1]
