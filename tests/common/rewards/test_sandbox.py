"""A hostile answer costs its own score and nothing else, with every layer and with each of the two that suffice."""

import functools
import json
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from common.errors import InputError, MachineError
from common.rewards import sandbox
from conftest import ROOT

sys.path.insert(0, str(sandbox.LAUNCHER.parent))  # as the launcher finds it
import kernel

ADD = "def add(a, b):\n    return a + b\n"
RIGHT = (ADD, ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"])
LAYERS = {
    "all": frozenset(sandbox.LAYERS),
    "landlock": frozenset({"seccomp", "landlock"}),
    "namespaces": frozenset({"seccomp", "namespaces"}),
    "without-seccomp": frozenset({"landlock", "namespaces", "user"}),
}


def layers_or_skip(name):
    available, missing = sandbox.available_layers()
    wanted = LAYERS[name]
    if name == "all":
        return available
    if wanted - available:
        pytest.skip(f"this machine has no {', '.join(sorted(wanted - available))}: {missing}")
    return wanted


@pytest.fixture(params=["all", *(pytest.param(one, marks=pytest.mark.slow) for one in ("landlock", "namespaces"))])
def layers(request):
    """Every set of layers that is enough."""
    return layers_or_skip(request.param)


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch, tmp_path_factory):
    tmp_path_factory.getbasetemp()  # pytest makes its own where temporary files go, so before that is moved
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)  # where nobody can reach it, as /tmp
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    folder.rmdir()  # which only an empty one allows
    wait_until(lambda: not launchers())


def launchers():
    """The processes of every sandbox, whatever became of their parents, but for those of a test worker beside."""
    found, parents = [], {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, status = (entry / "cmdline").read_bytes(), (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(entry.name)] = int(status.rpartition(")")[2].split()[1])
            if os.fsencode(sandbox.LAUNCHER) in command:
                found.append(int(entry.name))

    def is_of_another(process):
        while process in parents and process != os.getpid():
            if parents[process] == os.getppid():
                return True
            process = parents[process]
        return False

    return [process for process in found if not is_of_another(process)]


def wait_until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.02)


# --- Results


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "x = 2\n"),
        ("```py\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```Python\r\nx = 1\r\n```", "x = 1\n"),
        ("```python title='a.py'\nx = 1\n```", "x = 1\n"),
        ("1. so:\n   ```python\n   if x:\n       y = '```'\n   ```", "if x:\n    y = '```'\n"),
        ("```python\nx = 1\n```\n<answer>```python\nx = 2\n```</answer>", "x = 2\n"),
        ("```python\nx = 1\n```\n<answer>\n```python\nx = 2\n```\n</answer>", "x = 2\n"),
        ("<answer>\n```python\nx = 2\n```\n</answer>\n```python\nx = 3\n```", "x = 2\n"),
        ("<answer>2</answer>\n```python\nx = 3\n```", None),
        ("```bash\nls\n```", None),
        ("```python\nx = 1", None),
        ("x = 1", None),
        ("", None),
    ],
)
def test_the_code_is_the_last_python_block_of_the_answer(text, code):
    assert sandbox.extract_code(text) == code


def test_the_share_is_that_of_the_tests_passed(layers):
    tests = ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "assert add('a', 1)", "x = add(2, 2)\nassert x == 4"]
    result = sandbox.run_tests(ADD, tests, _layers=layers)
    assert (result.passed, result.total, result.share) == (2, 4, 0.5)
    assert result.reason == "test 2: assert add(1, 2) == 4: it is 3"
    assert sandbox.run_tests(*RIGHT, _layers=layers) == sandbox.Result(2, 2, None)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def f(:", "test 1: the program: SyntaxError"),
        ("1 / 0", "test 1: the program: ZeroDivisionError"),
        ("def g(): pass", "test 1: the test: NameError"),
        ("f = '\0'", "test 1: the program: "),
        ("f = '\ud800'", "test 1: the program: UnicodeEncodeError"),
        ("", "test 1: the test: NameError"),
    ],
)
def test_what_is_wrong_with_a_program_is_its_reason(code, reason):
    result = sandbox.run_tests(code, ["assert f() == 1"])
    assert result.passed == 0
    assert result.reason.startswith(reason)


def test_a_test_that_is_no_python_is_the_row_s_fault():
    for tests, message in (
        ([], "at least one"),
        (["assert f() == 1", "assert f( == 1"], "test 2 is not Python"),
        (["# nothing"], "test 1 is empty"),
    ):
        with pytest.raises(InputError, match=message):
            sandbox.run_tests("def f(): pass", tests)


def test_every_test_meets_the_program_afresh_and_an_empty_folder():
    code = "seen = []\ndef f():\n    seen.append(1)\n    open('once', 'x').close()\n    return len(seen)"
    assert sandbox.run_tests(code, ["assert f() == 1"] * 3).passed == 3


@pytest.mark.slow
def test_a_test_that_hangs_leaves_time_to_the_others():
    code = "def f(x):\n    while x: pass\n    return x"
    result = sandbox.run_tests(code, ["assert f(1) == 0", "assert f(0) == 0", "assert f(0) == 0"], seconds=4)
    assert (result.passed, result.reason) == (2, "test 1: took longer than 2.0 s")


def test_what_programs_ordinarily_do_works(layers):
    code = """
from __future__ import annotations
import asyncio, collections, dataclasses, decimal, functools, io, itertools, contextlib, math, random, re, tempfile
import sqlite3, hashlib, datetime, zoneinfo, time, heapq, bisect, string, typing, enum, json, statistics, ssl

@dataclasses.dataclass
class Point:
    x: int
    y: int = 0

def files():
    with open("a.txt", "w") as stream:
        stream.write("hello")
    with tempfile.TemporaryFile() as stream:
        stream.write(b"x")
    return open("a.txt").read()

def printed():
    print("to nowhere", flush=True)
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        print("hi")
    return stream.getvalue()

async def later():
    await asyncio.sleep(0.01)
    return 7

def numbers():
    yield from range(3)

if __name__ == "__main__":
    raise SystemExit("not a part of the answer")
"""
    tests = [
        "assert files() == 'hello'",
        "import os\nassert not os.environ",
        "assert printed() == 'hi\\n'",
        "assert asyncio.run(later()) == 7",
        "assert list(numbers()) == [0, 1, 2]",
        "assert Point(1) == Point(1, 0)",
        "p = Point(2)\np.y += 1\nassert p.y == 1, 'changed'",
        "assert math.isclose(statistics.mean([0.1, 0.2]), 0.15)",
        "assert sqlite3.connect('db').execute('select 1 + 1').fetchone() == (2,)",
        "assert sqlite3.connect('db').execute('create table t (a)').fetchall() == []",
        "assert hashlib.sha256(b'').hexdigest()[:4] == 'e3b0'",
        "assert 3 == len(list(numbers())) and True",
        "assert (3, 4) == tuple([3, 4])",
        "assert re.match('a', 'b') is None",
        "assert str(decimal.Decimal('0.1') + 1) == '1.1'",
        "import random\nrandom.seed(1)\nassert random.random() != random.random()",
        "time.sleep(0.01)\nassert time.time() > 1e9",
        "try:\n    files(1)\nexcept TypeError:\n    pass\nelse:\n    assert False",
    ]
    done = sandbox.run_tests(code, tests, seconds=120, _layers=layers)  # on a busy machine, too
    assert done == sandbox.Result(len(tests), len(tests), None)


def test_the_same_program_gives_the_same_score():
    code = "def f():\n    return list({'a', 'b', 'c', 'd', 'e'})"
    reasons = {sandbox.run_tests(code, ["assert f() == []"]).reason for _ in range(3)}
    assert len(reasons) == 1


@pytest.mark.parametrize(
    "literal",
    [
        *("None", "True", "-3", "1.5", "1e400", "2+3j", "'\\ud800é'", "b'\\xff'", "[]", "()", "{}", "set()"),
        *("[1, (2, [3])]", "{1: {'a': (1,)}, (1, 2): None}", "{1, (2, 3)}", "10**0", str(7**900)),
    ],
)
def test_plain_values_come_out_as_they_were(literal):
    import launcher

    value = eval(literal)
    assert sandbox.decode(json.loads(json.dumps(launcher.encode(value)))) == value


def test_a_subclass_of_a_plain_type_is_judged_as_that_type():
    code = (
        "import collections, enum\nclass Colour(enum.IntEnum):\n    RED = 1\nclass Name(enum.StrEnum):\n    A = 'a'\n"
    )
    code += "Point = collections.namedtuple('Point', 'x y')\n"
    tests = [
        *("assert Colour.RED == 1", "assert Name.A == 'a'", "assert Point(1, 2) == (1, 2)"),
        *("assert collections.Counter('aab') == {'a': 2, 'b': 1}", "assert {1: 2}.keys() == {1}"),
        *("assert collections.defaultdict(list, a=[1]) == {'a': [1]}", "assert {1: 2}.items() == {(1, 2)}"),
    ]
    assert sandbox.run_tests(code, tests) == sandbox.Result(len(tests), len(tests), None)
    result = sandbox.run_tests("", ["assert range(3) == [0, 1, 2]"])
    assert result.reason == "test 1: the test: TypeError: a value of type range cannot be compared with a literal"


# --- What is refused

# Each raises where it is refused. HERE is a folder outside, VICTIM a process, PORT and NAME sockets that listen.
ATTEMPTS = {
    "environment": "assert os.environ['SANDBOX_SECRET']",
    "environment-in-memory": (  # it lies behind the arguments
        "at = ctypes.c_void_p.in_dll(libc, 'program_invocation_name').value;"
        "file = os.open('m', os.O_RDWR | os.O_CREAT);"
        "[libc.write(file, ctypes.c_void_p(at + i), 64) for i in range(0, 2**17, 64)];"
        "assert b'=hunter2' in os.pread(file, 2**17, 0)"
    ),
    "own-proc": "assert b'SANDBOX_SECRET' in open('/proc/self/environ', 'rb').read()",
    "environ-of-another": "assert b'SANDBOX_SECRET' in open(f'/proc/{VICTIM}/environ', 'rb').read()",
    "memory-of-another": "open(f'/proc/{VICTIM}/mem', 'rb')",
    "read": "open(f'{HERE}/secret').read()",
    "read-repository": "open(REPOSITORY + '/README.md').read()",
    "list": "os.listdir(HERE)",
    "write": "open(f'{HERE}/new', 'w')",
    "append": "open(f'{HERE}/secret', 'a')",
    "write-tmp": "open('/tmp/sandbox-attempt', 'w')",
    "write-shm": "open('/dev/shm/sandbox-attempt', 'w')",
    "truncate-by-open": "os.open(f'{HERE}/secret', os.O_RDONLY | os.O_TRUNC)",
    "truncate": "os.truncate(f'{HERE}/secret', 6)",
    "remove": "os.remove(f'{HERE}/old')",
    "mkdir-outside": "os.mkdir(f'{HERE}/folder')",
    "mkdir": "os.mkdir('folder')",
    "move-out": "open('x', 'w').close(); os.rename('x', f'{HERE}/moved')",
    "chmod": "os.chmod(f'{HERE}/secret', 0o666)",
    "chown": "os.chown(f'{HERE}/secret', os.getuid(), os.getgid())",
    "utime": "os.utime(f'{HERE}/secret', (1, 1))",
    "setxattr": "os.setxattr(f'{HERE}/secret', 'user.x', b'y')",
    "symlink": "os.symlink(f'{HERE}/secret', 'link'); open('link').read()",
    "hard-link": "os.link(f'{HERE}/secret', 'hard')",
    "fifo": "os.mkfifo('fifo')",
    "tcp": "socket.create_connection(('127.0.0.1', PORT), 1)",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "listen": "socket.create_server(('127.0.0.1', 0))",
    "dns": "socket.getaddrinfo('localhost', 80)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "abstract-socket": "socket.socket(socket.AF_UNIX).connect(NAME)",
    "datagram-pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "fork": "os.fork() or os._exit(0)",
    "daemon": "os.fork() or (os.setsid(), os._exit(0))",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "subprocess": "subprocess.run(['true'], check=True)",
    "thread": "threading.Thread(target=print).start()",
    "exec-itself": "subprocess.run([sys.executable, '-S', '-c', ''], check=True)",
    "setuid-program": "subprocess.run(['su', '--version'], check=True)",
    "parent-by-proc": "open(f'/proc/{os.getppid()}/cmdline').read()",
    "descriptors-of-the-parent": "os.listdir(f'/proc/{os.getppid()}/fd')",
    "trace-itself-by-the-parent": "assert libc.ptrace(0, 0, 0, 0) == 0",
    "device": "os.mknod('null', 0o20666, os.makedev(1, 3))",
    "kernel-log": "open('/dev/kmsg')",
    "proc-of-all": "os.listdir('/proc')",
    "home": "os.listdir(os.path.expanduser('~root'))",
    "signal": "os.kill(VICTIM, 0)",
    "signal-group": "os.killpg(os.getpgid(VICTIM), 0)",
    "signal-by-file": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, VICTIM)",
    "pidfd": "os.pidfd_open(VICTIM)",
    "renice": "os.setpriority(os.PRIO_PROCESS, VICTIM, 19)",
    "affinity": "os.sched_setaffinity(VICTIM, {0})",
    "limits-of-another": "resource.prlimit(VICTIM, resource.RLIMIT_NOFILE, (64, 64))",
    "session": "assert libc.syscall(39) and libc.getsid(0) != os.getpid() and libc.setpgid(0, 0) == 0",
    "memory-uncounted": "os.memfd_create('x')",
    "shared-memory": "assert libc.shmget(0, 4096, 0o1600) >= 0",
    "chroot-for-all": "assert libc.unshare(0x10000000) == 0",
    "personality": "assert libc.personality(0xffffffff) != -1",
}

NEED_ROOT = ("device", "kernel-log", "home", "setuid-program")  # or a machine that has them


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder, a process and sockets to attack: the head of a program that attacks them."""
    monkeypatch.setenv("SANDBOX_SECRET", "hunter2")
    folder = tmp_path / "outside"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    for name in ("secret", "old"):
        (folder / name).write_text("hunter2")
        (folder / name).chmod(0o666)
    victim = subprocess.Popen(["sleep", "60"], start_new_session=True)
    name = f"\0sandbox-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(name)
        unix.listen()
        values = {
            "HERE": str(folder), "VICTIM": victim.pid, "PORT": listener.getsockname()[1], "NAME": name,
            "REPOSITORY": str(ROOT),
        }  # fmt: skip
        modules = "ctypes, fcntl, os, resource, socket, subprocess, sys, threading"
        constants = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        yield folder, victim, f"import {modules}\nlibc = ctypes.CDLL(None, use_errno=True)\n{constants}\n"
    assert victim.poll() is None, "the process outside was ended"
    victim.kill()
    victim.wait()


def attacks(head):
    functions = (
        f"def attempt_{index}():\n    try:\n        {body}\n    except BaseException as error:\n"
        "        return 'refused'\n    return 'done'\n"
        for index, body in enumerate(ATTEMPTS.values())
    )
    return head + "".join(functions)


def test_unconfined_every_attempt_succeeds(outside, tmp_path):
    """Else the next test would show nothing."""
    _, _, head = outside
    calls = "".join(f"print(attempt_{index}())\n" for index in range(len(ATTEMPTS)))
    undone = "for path in ('/tmp/sandbox-attempt', '/dev/shm/sandbox-attempt'):\n    os.remove(path)\n"
    done = subprocess.run(
        [sys.executable, "-c", attacks(head) + calls + undone],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    outcomes = [line for line in done.stdout.splitlines() if line in ("done", "refused")]
    refused = {name for name, outcome in zip(ATTEMPTS, outcomes, strict=True) if outcome == "refused"}
    # A user without root may not chown, or be allowed namespaces; not every file system has attributes.
    assert refused <= {"chown", "chroot-for-all", "setxattr", *NEED_ROOT}, done.stderr


def test_confined_no_attempt_succeeds(outside, layers):
    folder, _, head = outside
    tests = [f"assert attempt_{index}() == 'refused'" for index in range(len(ATTEMPTS))]
    result = sandbox.run_tests(attacks(head), tests, seconds=60, _layers=layers)
    assert result.reason is None, [*ATTEMPTS.items()][int(re.search(r"\d+", result.reason)[0]) - 1]
    assert sorted(os.listdir(folder)) == ["old", "secret"]
    assert (folder / "secret").read_text() == "hunter2"
    assert (folder / "secret").stat().st_mode & 0o777 == 0o666


@pytest.mark.slow
def test_the_other_layers_hold_where_seccomp_is_not(outside):
    """Not all of it: a folder, a thread and an own session harm nobody there, the tree ends with its first process."""
    layers = layers_or_skip("without-seccomp")
    folder, _, head = outside
    harmless = {
        *(
            "thread",
            "listen",
            "udp",
            "netlink",
            "datagram-pair",
            "session",
            "memory-uncounted",
            "shared-memory",
            "personality",
        ),
        *("signal-by-file", "chroot-for-all", "trace-itself-by-the-parent"),
    }
    for index, name in enumerate(ATTEMPTS):
        if name not in harmless:
            result = sandbox.run_tests(attacks(head), [f"assert attempt_{index}() == 'refused'"], _layers=layers)
            assert result.reason is None, name
    assert sorted(os.listdir(folder)) == ["old", "secret"]


HOSTILE = {
    "loop": "while True: pass",
    "output": "while True: print('x' * 10000)",
    "fork-bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread-bomb": (
        "import threading\nwhile True:\n    try: threading.Thread(target=print).start()\n    except RuntimeError: pass"
    ),
    "memory": "x = []\nwhile True: x.append(bytearray(10**7))",
    "memory-at-once": "x = 'x' * 10**11",
    "huge-file": "with open('x', 'wb') as f:\n    while True: f.write(bytes(10**6))",
    "huge-files": (
        "for i in range(10**6):\n    try:\n        with open(str(i), 'wb') as f:\n            f.write(bytes(10**7))\n"
        "    except OSError: pass"
    ),
    "many-files": ("i = 0\nwhile True:\n    i += 1\n    try: open(str(i), 'w').close()\n    except OSError: pass"),
    "many-descriptors": "import os\nx = [os.open('/dev/null', 0) for _ in range(10**5)]",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return sorted([1], key=lambda _: f())\nf()",
    "segfault": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\nos.abort()",
    "closes-all": "import os\nos.closerange(0, 1000)",
    "reads-stdin": "input()",
    "exits": "import sys\nsys.exit(0)",
    "leaves": "import os\nos._exit(0)",
    "says-passed": "print('passed')\nprint('{\"value\": 42}')\nraise SystemExit",
    "kills-all": "import os\nos.kill(-1, 9)",
    "kills-parent": "import os\nos.kill(os.getppid(), 9)",
    "kills-itself": "import os\nos.kill(os.getpid(), 9)",
    "ignores-signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n"
        "while True: pass"
    ),
    "sleeps": "import time\ntime.sleep(1000)",
    "closes-and-sleeps": "import os, time\nos.closerange(0, 1000)\ntime.sleep(1000)",
    "floods-the-answer": (
        "import os\nwhile True:\n    for fd in range(64):\n        try: os.write(fd, b'x' * 4096)\n"
        "        except OSError: pass"
    ),
    "nests": "def f():\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "answers-much": "def f(): return 'x' * 10**8",
    "answers-long-number": "def f(): return 10**5000",
    "compiles-long": "x = " + "(" * 10**5 + ")" * 10**5,
    "hangs-in-its-message": "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
}


# Ended by the time limit alone, as fork-bomb and ignores-signals are: with some of the layers these two are enough.
ENDLESS = {"loop", "output", "thread-bomb", "sleeps", "hangs-in-its-message"}


def test_a_batch_of_hostile_and_right_programs_scores_the_right_ones_in_order(layers, request):
    every = request.node.callspec.params["layers"] == "all"
    hostiles = {name: code for name, code in HOSTILE.items() if every or name not in ENDLESS}
    programs = []
    for code in hostiles.values():
        programs += [(code, ["assert f() == 42"]), RIGHT]
    started = time.monotonic()
    results = sandbox.run_many(programs, workers=4, seconds=2, memory_mib=256, _layers=layers)
    assert time.monotonic() - started < 120
    for (name, hostile), right in zip(zip(hostiles, results[::2], strict=True), results[1::2], strict=True):
        assert hostile.passed == 0, name
        assert right == sandbox.Result(2, 2, None), f"beside {name}: {right.reason}"


def test_hostile_programs_end_for_the_reason_that_bounds_them():
    for name, reason in {
        "loop": r"took longer than 1\.0 s",
        "memory": "MemoryError",
        "huge-file": "File too large",
        "many-files": "wrote more than 1000 files",
        "many-descriptors": "Too many open files",
        "segfault": "died of SIGSEGV",
        "reads-stdin": "EOFError",
        "exits": "the program: SystemExit",
        "leaves": "ended before its test did",
        "closes-and-sleeps": "died of SIGKILL",
        "answers-much": "answered with more than|MemoryError",
        "nests": "RecursionError",
    }.items():
        seconds = 1 if "took longer" in reason else 20
        result = sandbox.run_tests(HOSTILE[name], ["assert f() == 42"], seconds=seconds, memory_mib=256)
        assert re.search(reason, result.reason), (name, result.reason)


# --- What a score is worth

FORGERIES = {
    "equal-to-all": "class E:\n    def __eq__(self, other): return True\ndef f(): return E()",
    "equal-list": "class E(list):\n    def __eq__(self, other): return True\ndef f(): return E()",
    "equal-number": "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
    "def f(): return E(1)",
    "assertion-error": "class AssertionError(Exception):\n    def __init__(self, *a): import os; os._exit(0)\n"
    "def f(): return 1",
    "builtins": "import builtins\nbuiltins.AssertionError = ValueError\n"
    "builtins.all = builtins.abs = lambda *a: 42\ndef f(): return 1",
    "isinstance": "import builtins\nbuiltins.isinstance = lambda *a: True\ndef f(): return 1",
    "exits-inside": "import sys\ndef f(): sys.exit(0)",
    "leaves-inside": "import os\ndef f(): os._exit(0)",
    "writes-to-every-file": (
        "import os\ndef f():\n    for fd in range(64):\n        for text in (bytes(16), b'{\"value\": 42}'):\n"
        "            try: os.write(fd, text)\n            except OSError: pass\n    os._exit(0)"
    ),
    "at-exit": "import atexit, os\natexit.register(lambda: os._exit(0))\nimport sys\ndef f(): sys.exit(0)",
    "the-hook-of-errors": "import sys\nsys.excepthook = lambda *a: None\ndef f(): raise SystemExit(0)",
    "truth-of-itself": "class E:\n    def __bool__(self): return True\n    def __ne__(self, o): return False\n"
    "    def __gt__(self, o): return False\ndef f(): return E()",
    "hash-of-all": "class E(str):\n    def __eq__(self, o): return True\n    def __hash__(self): return hash('42')\n"
    "def f(): return E('x')",
    "signals-itself": "import os, signal\ndef f(): os.kill(os.getpid(), signal.SIGTERM)",
    "answers-twice": "import os\ndef f():\n    for fd in range(3, 64):\n        try: os.dup2(1, fd)\n"
    "        except OSError: pass\n    return 1",
    "a-module-of-its-name": "import sys, types\nm = types.ModuleType('program')\nm.f = lambda: 42\n"
    "sys.modules['program'] = m\ndef f(): return 1",
    "patches-json": "import json\njson.dumps = lambda *a, **k: '{\"value\": true}'\ndef f(): return 1",
    "traces": "import sys\nsys.settrace(lambda *a: None)\ndef f(): return 1",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_test_with_a_literal_is_not_passed_by_tricks(name):
    tests = ["assert f() == 42", "assert 42 == f()", "assert f() == [42]", "assert f() == '42'", "assert f() is None"]
    assert sandbox.run_tests(FORGERIES[name], tests).passed == 0


# What passes a test that is run beside it, as SECURITY.md says.
FORGE_OTHERS = {"equal-to-all", "equal-list", "equal-number", "hash-of-all", "patches-json"}


@pytest.mark.parametrize("name", sorted({*FORGERIES} - FORGE_OTHERS))
def test_nor_is_any_other_test_passed_by_these(name):
    tests = ["x = f()\nassert x == 42", "assert all([f() == 42])", "assert f() > 41", "assert abs(f()) == f() + 41"]
    assert sandbox.run_tests(FORGERIES[name], tests).passed == 0


def test_the_literal_is_nowhere_in_the_program_s_process():
    """The launcher's own frames are searched, where a test that is not judged outside gives its literal away."""
    code = """
import sys, re
def f():
    frame, text = sys._getframe(), ""
    while frame:
        text += repr({**frame.f_locals, **frame.f_globals})
        frame = frame.f_back
    found = re.search("KEY-[0-9]+", text)
    return found and found[0]
"""
    assert sandbox.run_tests(code, ["assert f() == 'KEY-74123'"]).passed == 0
    assert sandbox.run_tests(code, ["x = f()\nassert x == 'KEY-74123'"]).passed == 1


def test_nor_is_it_in_any_object_of_that_process():
    """All objects that can be reached from what the collector of garbage knows, strings too."""
    code = """
import gc
def f(wanted):
    seen, left = set(), gc.get_objects()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, str) and one.startswith(wanted) and len(one) > len(wanted):
            return one
        left.extend(gc.get_referents(one))
"""
    assert sandbox.run_tests(code, ["assert f('KEY' + '-') == 'KEY-74123'"], memory_mib=2048).passed == 0
    tests = ["x = f('KEY' + '-')\nassert 'KEY-74123' in x"]
    assert sandbox.run_tests(code, tests, memory_mib=2048).passed == 1, "the search finds what is there"


def test_a_program_has_no_descriptor_but_nothing_and_the_two_of_its_answer(layers):
    code = """
import os, stat
def f():
    found = []
    for fd in range(256):
        try:
            state = os.fstat(fd)
        except OSError:
            continue
        kind = "pipe" if stat.S_ISFIFO(state.st_mode) else "device" if stat.S_ISCHR(state.st_mode) else "other"
        found.append((kind, state.st_rdev if kind == "device" else 0))
    return sorted(found)
"""
    null = os.stat("/dev/null").st_rdev
    expected = [("device", null)] * 3 + [("pipe", 0)] * 2
    assert sandbox.run_tests(code, [f"assert f() == {expected!r}"], _layers=layers).reason is None


def test_one_program_leaves_nothing_to_the_next(layers):
    """Neither in a folder, nor in shared memory, nor in a module, nor in an answer."""
    leave = "import builtins, sys\nopen('left', 'w').write('42')\nbuiltins.left = 42\nsys.modules['left'] = 42"
    look = (
        "import os\ndef f():\n    try:\n        import left\n        return left\n    except ImportError:\n"
        "        return os.listdir('.')"
    )
    both = sandbox.run_many(
        [(leave + "\ndef f(): return 1", ["assert f() == 1"] * 2), (look, ["assert f() == []"] * 2)]
    )
    assert [result.passed for result in both] == [2, 2]
    code = f"{look}\ndef g():\n    open('left', 'w').close()\n    return 1"
    assert sandbox.run_tests(code, ["assert g() == 1", "assert f() == []"], _layers=layers).passed == 2


NONSENSE = [
    *("", "7", "[]", "null", "{}", "\ufffd", '{"value": {}}', '{"value": ' + "[" * 10**5),
    *('{"value": ["list", 3]}', '{"value": ["bytes", "zz"]}', '{"value": ["set", [["dict", []]]]}'),
    *('{"value": ["dict", [[1]]]}', '{"value": ["dict", [[["list", []], 1]]]}'),
]


@pytest.mark.parametrize("answer", NONSENSE)
def test_nonsense_for_an_answer_fails_the_test(answer):
    test = sandbox.parse_tests(["assert f() == 42"])[0]
    assert sandbox._fault(test, {"answer": answer}) == "answered with nonsense"


# --- What the machine can do


def test_when_the_trainer_is_killed_the_program_ends(layers):
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'recipes')!r})\nimport tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from common.rewards import sandbox\n"
        f"sandbox.run_tests('while True: pass', ['f()'], seconds=60, _layers=frozenset({sorted(layers)!r}))"
    )
    folder = tempfile.mkdtemp()
    trainer = subprocess.Popen([sys.executable, "-c", script, folder])
    wait_until(lambda: len(launchers()) >= 2 + ("namespaces" in layers))
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    wait_until(lambda: not launchers())
    for left in Path(folder).iterdir():  # a killed process cannot remove its folder
        left.rmdir()
    Path(folder).rmdir()


@pytest.mark.slow
def test_a_launcher_that_no_longer_answers_is_ended_and_its_tests_are_failed(monkeypatch):
    layers = sandbox.available_layers()[0]
    monkeypatch.setattr(sandbox, "GRACE", 0.5)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(sandbox.run_tests, "import time\ndef f(): time.sleep(30)", ["f()", "f()"], seconds=1)
        wait_until(lambda: len(launchers()) >= 2 + ("namespaces" in layers))
        for process in launchers():
            os.kill(process, signal.SIGSTOP)
        assert result.result(5) == sandbox.Result(0, 2, "test 1: not reached, the sandbox was ended")


def in_a_container_without(*calls):
    """Run confinement() where these system calls are refused, as a container's own filter does."""
    numbers = {"landlock": (444, 444), "unshare": (272, 97), "seccomp": (157, 167)}
    column = kernel.MACHINES[platform.machine()][0]
    filters = b""
    for call in calls:
        condition = [(0x20, 0, 0, 16), (0x15, 0, 1, 22)] if call == "seccomp" else []  # prctl(PR_SET_SECCOMP)
        lines = [(0x20, 0, 0, 0), (0x15, 0, len(condition) + 1, numbers[call][column]), *condition]
        filters += b"".join(struct.pack("=HBBI", *line) for line in [*lines, (0x06, 0, 0, 0x00050001)])
    filters += struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
    script = f"""
import ctypes, struct, sys
sys.path[:0] = [{str(ROOT / "recipes")!r}, {str(sandbox.LAUNCHER.parent)!r}]
import kernel
kernel.LIBC.prctl(38, 1, 0, 0, 0)
kernel.seccomp_program = lambda machine: {filters!r}
kernel.filter_system_calls()
from common.rewards import sandbox
from common.errors import run_command
run_command(lambda: print(sandbox.confinement()))
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_machine_without_a_layer_says_so_and_one_without_the_least_is_refused():
    available = sandbox.available_layers()[0]
    if not available >= {"landlock", "namespaces"}:
        pytest.skip(f"this machine has only {sorted(available)}")
    output = in_a_container_without("landlock")
    assert "seccomp, namespaces" in output.stdout, output
    assert "without landlock (" in output.stdout
    output = in_a_container_without("unshare")
    assert "seccomp, landlock" in output.stdout, output
    assert "without namespaces (" in output.stdout
    for calls in (("landlock", "unshare"), ("seccomp",)):
        refused = in_a_container_without(*calls)
        assert refused.returncode == 3, refused
        assert "cannot confine a model's code" in refused.stderr
        assert "Operation not permitted" in refused.stderr


def test_confinement_names_the_layers_in_force():
    words = sandbox.confinement()
    assert words.startswith("seccomp, ")
    assert all(layer in words for layer in sandbox.available_layers()[0])


def test_a_layer_that_fails_is_an_error_and_never_left_out():
    if os.geteuid() == 0:
        pytest.skip("root can become another user")
    with pytest.raises(MachineError, match="did not confine"):
        sandbox.run_tests(*RIGHT, _layers=frozenset({"seccomp", "landlock", "user"}))


def run_filter(machine, architecture, number, *arguments):
    """The verdict of the seccomp program, by hand: allowed or not."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    program = [*struct.iter_unpack("=HBBI", kernel.seccomp_program(machine))]
    place = accumulator = 0
    while True:
        code, hit, miss, value = program[place]
        place += 1
        if code == 0x20:
            accumulator = struct.unpack_from("=I", data, value)[0]
        elif code == 0x54:
            accumulator &= value
        elif code == 0x15:
            place += hit if accumulator == value else miss
        else:
            assert code == 0x06
            return {0x7FFF0000: "allow", 0x00050026: "ENOSYS", 0x80000000: "kill"}[value]


@pytest.mark.parametrize("machine", kernel.MACHINES)
def test_the_filter_lets_through_what_is_listed_and_nothing_else(machine):
    column, architecture = kernel.MACHINES[machine]
    verdict = functools.partial(run_filter, machine, architecture)
    allowed = {numbers[column] for numbers in kernel.ALLOWED.values()}
    limited = {kernel.ALLOWED[name][column] for name in kernel.LIMITED}
    for number in range(600):
        if number not in limited:
            assert verdict(number) == ("allow" if number in allowed else "ENOSYS"), number
    assert verdict(0x40000000) == "ENOSYS"  # x32
    assert run_filter(machine, 0x40000003, 1) == "kill"  # 32-bit x86, where the numbers mean other calls
    number = {name: numbers[column] for name, numbers in kernel.ALLOWED.items()}
    for name, arguments, expected in (
        ("fcntl", (3, 1), "allow"),
        ("fcntl", (3, 1030), "allow"),
        ("fcntl", (3, 8), "ENOSYS"),  # F_SETOWN
        ("fcntl", (3, 2**32 + 8), "ENOSYS"),
        ("ioctl", (0, 0x5401), "allow"),
        ("ioctl", (0, 0x5412), "ENOSYS"),  # TIOCSTI
        ("prlimit64", (0, 7), "allow"),
        ("prlimit64", (1, 7), "ENOSYS"),
        ("socketpair", (1, 1), "allow"),
        ("socketpair", (1, 0o2004001), "allow"),  # SOCK_CLOEXEC | SOCK_NONBLOCK
        ("socketpair", (1, 2), "ENOSYS"),
        ("socketpair", (2, 1), "ENOSYS"),
        ("openat", (0, 0, os.O_RDONLY | os.O_CLOEXEC), "allow"),
        ("openat", (0, 0, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "allow"),
        ("openat", (0, 0, os.O_RDONLY | os.O_TRUNC), "ENOSYS"),
    ):
        assert verdict(number[name], *arguments) == expected, (name, arguments)


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_the_numbers_are_those_of_the_kernel_s_headers(machine, header):
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"{path} is not here (linux-libc-dev)")
    text = re.sub(r"__NR3264_", "__NR_", path.read_text())
    known = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)", text)}
    known |= {"newfstatat": known.get("newfstatat", known.get("fstatat")), "prlimit64": known["prlimit64"]}
    known |= {"landlock": known["landlock_create_ruleset"]}
    column = kernel.MACHINES[machine][0]
    for name, numbers in (kernel.ALLOWED | kernel.PRIVATE).items():
        if numbers[column] is None:
            assert name not in known, name
        else:
            assert known[name] == numbers[column], name


def as_another_user():
    """The words that run Python, with `common` to import, as a user who is not root."""
    if os.geteuid():
        pytest.skip("this is not root already")
    if not (program := shutil.which("setpriv")):
        pytest.skip("there is no setpriv (util-linux)")
    words = [program, "--reuid=65533", "--regid=65533", "--clear-groups", "--no-new-privs", "env"]
    words += [
        f"PYTHONPATH={ROOT / 'recipes'}:{sysconfig.get_path('purelib')}",
        "TMPDIR=/tmp",
        "PYTHONDONTWRITEBYTECODE=1",
    ]
    start = "import subprocess, sys, common.rewards.sandbox; subprocess.run([sys.executable, '-c', ''], check=True)"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        if (
            os.path.exists(python)
            and not subprocess.run([*words, python, "-c", start], cwd="/", capture_output=True, check=False).returncode
        ):
            return [*words, python]
    return pytest.skip("another user cannot read this Python or this repository")


@pytest.mark.slow
def test_what_is_refused_to_root_is_refused_to_another_user(outside):
    """The suite above once more, started by a user without rights: the layers are then other ones."""
    words = as_another_user()
    folder, _, head = outside
    folder.parent.chmod(0o755)
    tests = [f"assert attempt_{index}() == 'refused'" for index in range(len(ATTEMPTS))]
    script = (
        "import json, sys\nfrom common.rewards import sandbox\n"
        "attacks, tests = json.load(sys.stdin)\nlayers = sandbox.available_layers()[0]\n"
        "result = sandbox.run_tests(attacks, tests, seconds=60, _layers=layers)\n"
        "right = sandbox.run_tests('def f(): return 1', ['assert f() == 1'])\n"
        "print(json.dumps([sorted(layers), result.passed, result.reason, right.passed]))"
    )
    given = json.dumps([attacks(head), tests])
    done = subprocess.run([*words, "-c", script], input=given, text=True, capture_output=True, check=False, cwd="/")
    if done.returncode and "cannot confine" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    layers, passed, reason, right = json.loads(done.stdout)
    assert "seccomp" in layers
    assert "user" not in layers
    assert (passed, reason, right) == (len(tests), None, 1)
    assert sorted(os.listdir(folder)) == ["old", "secret"]
