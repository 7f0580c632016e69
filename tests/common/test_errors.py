"""Errors of the machine are one line with exit code 3; text is printed whatever the stream can show; no password is."""

import os
import subprocess
import sys

import pytest
from common import memory_limits
from common.errors import LONGEST, explanation, one_line, without_credentials, without_secrets
from common.memory_limits import memory_limit
from conftest import ROOT


def command(code: str, **environment: str) -> subprocess.CompletedProcess:
    code = f"from common.errors import *\ndef main():\n    {code}\nrun_command(main)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "recipes"), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("raise MemoryError", "The memory of the CPU is full: this process had "),
        ("raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried')", "DefaultCPUAllocator: can't"),
        ("open('/' + 'x' * 300, 'w')", "File name too long"),
        ("raise OSError(30, 'Read-only file system', '/mnt/a')", "/mnt/a: Read-only file system"),
    ],
)
def test_an_error_of_the_machine_is_named_without_a_traceback(code, line):
    done = command(code)
    assert done.returncode == 3
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bug_keeps_its_traceback():
    done = command("raise FileNotFoundError(2, 'No such file', '/nowhere')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert explanation(RuntimeError("shapes differ")) is None


def test_a_stream_that_cannot_show_a_letter_is_no_failure():
    done = command("print('中文 ✓')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "?? ?\n")


def unread(code: str, *streams: str) -> tuple[int, bytes]:
    """The exit code of a command of which nobody reads these streams, and what it writes to the other ones."""
    code = f"from rich.console import Console\nfrom common.errors import *\ndef main():\n    {code}\nrun_command(main)"
    reads, writes = os.pipe()
    os.close(reads)
    places = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | dict.fromkeys(streams, writes)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "recipes"), "PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", code], **places, check=False, env=environment)
    os.close(writes)
    return done.returncode, (done.stdout or b"") + (done.stderr or b"")


@pytest.mark.parametrize("lines", [1, 5000], ids=["kept until the end", "more than a pipe holds"])
@pytest.mark.parametrize("show", ["print", "Console().print"])
def test_a_reader_that_is_gone_is_no_traceback_and_no_bug(show, lines):
    assert unread(f"{show}('a line of some words\\n' * {lines})", "stdout") == (141, b"")


@pytest.mark.parametrize("streams", [["stdout"], ["stdout", "stderr"], ["stderr"]], ids=" and ".join)
@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("raise InputError('a message')", 2), ("raise MachineError('a message')", 3), ("return 2", 2),
        ("raise Stopped('why', 'a message')", 75), ("raise KeyboardInterrupt", 130), ("raise MemoryError", 3),
    ],
)  # fmt: skip
def test_a_command_that_fails_unread_keeps_its_exit_code(ends, code, streams):
    number, written = unread(f"print('a line'); {ends}", *streams)
    assert number == code
    assert b"Exception ignored" not in written
    if "message" in ends and "stderr" not in streams:
        assert b"a message" in written


def test_a_full_disk_under_the_output_is_one_message():
    done = command("print('a line', file=open('/dev/full', 'w'), flush=True)")
    assert (done.returncode, "No space left" in done.stderr) == (3, True)
    words = [sys.executable, "-c", "from common.errors import *\nrun_command(lambda: print('a line'))"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "recipes")}
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, check=False, env=environment)
    assert done.returncode == 3
    assert done.stderr == b"a file: No space left on device\n"


def test_a_broken_pipe_of_something_else_keeps_its_traceback():
    done = command("raise BrokenPipeError(32, 'Broken pipe')")
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr


def test_a_password_in_a_url_is_in_no_message():
    done = command("raise MachineError('https://me:s3cret@mirror/simple cannot be reached')")
    assert done.stderr == "https://***@mirror/simple cannot be reached\n"
    plain = "see https://host/a@b, or mail me@host; my.jsonl:3: x"
    assert without_credentials(plain) == plain


def test_the_error_of_somebody_else_is_one_line_of_a_readable_length():
    text = one_line(ValueError("first\n  second " + "x " * 10_000))
    assert text.startswith("first second x x")
    assert len(text) == LONGEST


def test_the_lowest_limit_of_memory_is_named(tmp_path, monkeypatch):
    """A group above this process's own may have the limit, and so may Slurm."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:       8388608 kB\nMemFree: 1 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/job/step\n")
    group = tmp_path / "job"
    (group / "step").mkdir(parents=True)
    (group / "step" / "memory.max").write_text("max\n")
    (group / "memory.max").write_text(f"{4 * 2**30}\n")
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"):
        monkeypatch.delenv(name, raising=False)
    found = [*memory_limits._limits(tmp_path, tmp_path / "proc")]
    assert found[0] == (8 * 2**30, "the machine's memory")
    assert min(found)[0] == min(4 * 2**30, *(size for size, _ in found))
    assert (4 * 2**30, f"a container's or job's limit ({group}/memory.max)") in found
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2048")
    assert (2 * 2**30, "Slurm's --mem") in [*memory_limits._limits(tmp_path, tmp_path / "proc")]
    assert memory_limit()[0] <= 2 * 2**30


def test_the_limits_of_old_control_groups_and_of_slurm_are_known(tmp_path, monkeypatch):
    """A job under cgroup v1, as Slurm makes it; --mem=0 is all the memory of a node and no limit."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(
        "5:cpu,cpuacct:/x\n9:memory:/slurm/uid_0/job_7/step_0\n1:name=systemd:/\n"
    )
    job = tmp_path / "memory" / "slurm" / "uid_0" / "job_7"
    (job / "step_0").mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text(f"{3 * 2**30}\n")
    (job / "step_0" / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none
    for name in [name for names in memory_limits.SLURM for name in names[:2]]:
        monkeypatch.delenv(name or "NONE", raising=False)

    def lowest() -> tuple[int, str]:
        return min(memory_limits._limits(tmp_path, tmp_path / "proc"))

    assert lowest() == (3 * 2**30, f"a container's or job's limit ({job}/memory.limit_in_bytes)")
    for variables, gib, option in (
        ({"SLURM_MEM_PER_NODE": "2048"}, 2, "--mem"),
        ({"SLURM_MEM_PER_CPU": "512", "SLURM_CPUS_ON_NODE": "2"}, 1, "--mem-per-cpu"),
        ({"SLURM_MEM_PER_GPU": "256", "SLURM_GPUS_ON_NODE": "2"}, 0.5, "--mem-per-gpu"),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert lowest() == (gib * 2**30, f"Slurm's {option}")
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU"):
        monkeypatch.setenv(name, "0")
    assert lowest()[0] == 3 * 2**30


def test_a_limit_of_ulimit_is_in_the_message():
    limit = 2**33
    code = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit})); bytearray(2**40)"
    done = command(code, SLURM_MEM_PER_NODE="")
    assert done.returncode == 3
    assert "The least limit is " in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "is_secret"),
    [
        ("WANDB_API_KEY", "0123456789abcdef", True),
        ("DB_PASSWORD", "correct-horse-battery-staple", True),
        ("SORT_KEY", "completion", False),
        ("PAD_TOKEN", "<|endoftext|>", False),
        ("POSTGRES_PASSWORD", "postgres", False),
    ],
)
def test_a_plain_word_is_no_secret(name, value, is_secret, monkeypatch):
    monkeypatch.setenv(name, value)
    shown = f"${name}" if is_secret else value
    assert without_secrets(f"the column {value} is missing") == f"the column {shown} is missing"
