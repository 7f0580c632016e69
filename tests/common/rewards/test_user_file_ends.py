"""A user's reward file cannot end the run without a word: whatever it does to end, there is a message with the line."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from common.errors import InputError, Stopped
from common.rewards import user_file
from common.rewards.reward import Reward
from common.rewards.user_file import find_function
from conftest import ROOT

WAYS = {
    "sys.exit(0)": "SystemExit: 0",
    "sys.exit()": "SystemExit",
    "os._exit(0)": "Ended: os._exit(0)",
    "_exit(0)": "Ended: os._exit(0)",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "raise GeneratorExit('x')": "GeneratorExit: x",
}


@pytest.fixture(autouse=True)
def as_in_a_run(monkeypatch):
    """A run handles Ctrl-C itself, so that a KeyboardInterrupt can only be the file's; no other function is running."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    monkeypatch.setattr(user_file, "RUNNING", {})  # else a thread of another test, which it left hanging, is in it
    monkeypatch.setattr(os, "_exit", user_file.END)
    yield
    signal.signal(signal.SIGINT, before)


def reward(tmp_path, body: str, name: str) -> Reward:
    file = tmp_path / f"{name}.py"
    file.write_text(f"import os, sys, subprocess\nfrom os import _exit\ndef score(completions):\n    {body}\n")
    function, found = find_function(f"{file}:score")
    return Reward("score", 1.0, function, file=found, takes=frozenset({"completions"}))


@pytest.mark.parametrize("way", WAYS)
def test_a_function_that_ends_the_process_is_named_with_its_line(tmp_path, way):
    ending = reward(tmp_path, way, f"ends_{len(way)}_{way[0]}{way[-2]}")
    with pytest.raises(InputError) as caught:
        ending([], ["a"])
    assert str(caught.value) == f"{ending.file}:4: score raised {WAYS[way]}"

    caught_there = []

    def on_a_thread() -> None:
        try:
            ending([], ["a"])
        except InputError as error:
            caught_there.append(str(error))

    thread = threading.Thread(target=on_a_thread)
    thread.start()
    thread.join()
    assert caught_there == [str(caught.value)]
    assert os._exit.__module__ == "posix"  # as before


@pytest.mark.parametrize("way", WAYS)
def test_so_is_a_file_that_does_as_it_is_imported(tmp_path, way):
    file = tmp_path / f"imported_{len(way)}_{way[0]}{way[-2]}.py"
    file.write_text(f"import os, sys\nfrom os import _exit\n{way}\n")
    with pytest.raises(InputError) as caught:
        find_function(f"{file}:score")
    assert str(caught.value) == f"{file}:3: importing it raised {WAYS[way]}"


def test_a_fork_of_a_reward_may_end_as_it_likes(tmp_path):
    waits = "return [float(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))]"
    body = f"pid = os.fork()\n    if not pid: _exit(7)\n    {waits}"
    assert reward(tmp_path, body, "forks")([], ["a"]) == [7.0]


def test_what_stops_the_run_passes_through(tmp_path):
    stopping = reward(tmp_path, "from common.errors import Stopped; raise Stopped('SIGTERM', 'now')", "stops")
    with pytest.raises(Stopped):
        stopping([], ["a"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        reward(tmp_path, "raise KeyboardInterrupt", "interrupted")([], ["a"])


def test_a_long_text_of_an_error_is_cut(tmp_path):
    with pytest.raises(InputError) as caught:
        reward(tmp_path, "raise ValueError('x y ' * 10_000)", "long")([], ["a"])
    assert len(str(caught.value)) < 500


@pytest.mark.slow
def test_a_command_with_such_a_file_exits_with_2(tmp_path):
    """Not with the 0 that the file asks for, which a batch job takes for done."""
    (tmp_path / "mine.py").write_text("import sys\ndef score(completions):\n    sys.exit(0)\n")
    command = [sys.executable, ROOT / "scripts" / "test-rewards.py", "--rewards", f"{tmp_path}/mine.py:score"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2, done.stdout
    assert "mine.py:3: score raised SystemExit: 0" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
