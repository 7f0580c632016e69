"""One process trains in a folder at a time, and one that died keeps nobody out."""

import json
import multiprocessing
import os
import platform
import signal
import threading
import time
from pathlib import Path

import pytest
from common.errors import InputError
from common.run import lock
from common.run.folder import Run, plan_run
from common.run.lock import Lock, refuse_where_held

FORK = multiprocessing.get_context("fork")


ME = lock._this_process()


def hold(folder: Path, taken, identity: dict | None = None) -> None:
    lock._this_process = lambda: {**ME, "pid": os.getpid(), "began": lock._began(os.getpid()), **(identity or {})}
    mine = Lock(folder)
    mine.take()
    taken.set()
    signal.pause()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder."""
    taken = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, taken))
    process.start()
    assert taken.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_refused_by_name_before_and_after_loading(tmp_path, holder):
    message = f"{tmp_path}: process {holder.pid} on {platform.node()}, since 20.*, is training in this folder.*STOP"
    with pytest.raises(InputError, match=message):
        plan_run("sft", "tiny", str(tmp_path), {}, {}, {})
    with pytest.raises(InputError, match=message), Run(tmp_path, {}):
        pass
    assert not (tmp_path / "run.json").exists()


def test_a_holder_that_was_killed_keeps_nobody_out(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / "run.lock").exists()  # what it left
    refuse_where_held(tmp_path)
    assert plan_run("sft", "tiny", str(tmp_path), {}, {}, {}) is not None
    with Run(tmp_path, {}):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run.lock").exists()


def test_a_process_does_not_take_a_lock_that_was_deleted_under_it(tmp_path, monkeypatch):
    """Its last holder deletes the file as it ends; who opened it just before then has a lock on nothing."""
    locked, times = lock.fcntl.lockf, []

    def late(stream, how):
        if not times:
            (tmp_path / "run.lock").unlink()
        times.append(how)
        locked(stream, how)

    monkeypatch.setattr(lock.fcntl, "lockf", late)
    mine = Lock(tmp_path)
    mine.take()
    assert len(times) == 2
    assert (tmp_path / "run.lock").exists()
    mine.give_back()


def test_a_disk_without_locks_is_named_and_the_run_goes_ahead(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", none)
    monkeypatch.setattr(lock, "SETTLE", 0.0)
    mine = Lock(tmp_path)
    mine.take()
    assert capsys.readouterr().out.startswith(f"{tmp_path}: its disk has no locks; ")
    mine.give_back()


def test_a_run_that_another_process_changed_while_this_one_loaded_is_refused(tmp_path):
    plan = ("sft", "tiny", str(tmp_path), {}, {}, {})
    mine = plan_run(*plan)
    other = plan_run(*plan)
    with other:
        other.update(step=3)
    with pytest.raises(InputError, match="another process has trained in it just now"), mine:
        pass
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "done"


# --- other machines, and disks without locks


NODE = {"host": "node1", "boot": "another kernel"}


def without_locks(*_) -> None:
    raise OSError(lock.errno.ENOLCK, "No locks available")


@pytest.fixture
def quick(monkeypatch):
    """Seconds become hundredths, here and in the processes that are forked from here."""
    for name, seconds in {"BEAT": 0.05, "PATIENCE": 0.5, "SETTLE": 0.1}.items():
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture
def elsewhere(tmp_path, quick, monkeypatch):
    """Starts a holder of that identity; `locks` replaces fcntl's for it and for the test: they do not reach it."""
    started = []

    def start(identity: dict, locks=lambda *_: None):
        monkeypatch.setattr(lock.fcntl, "lockf", locks)
        taken = FORK.Event()
        process = FORK.Process(target=hold, args=(tmp_path, taken, identity))
        process.start()
        started.append(process)
        assert taken.wait(60)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def kill(process) -> None:
    process.kill()
    process.join()


@pytest.mark.parametrize("locks", [lambda *_: None, without_locks], ids=["nolock", "no locks at all"])
def test_a_holder_on_another_machine_is_known_by_its_heartbeat(tmp_path, elsewhere, locks, capsys):
    holder = elsewhere(NODE, locks)
    message = f"{tmp_path}: process {holder.pid} on node1, since 20.*, is training in this folder"
    with pytest.raises(InputError, match=message):
        refuse_where_held(tmp_path)
    with pytest.raises(InputError, match=message):
        Lock(tmp_path).take()
    assert "watching for up to" in capsys.readouterr().out
    kill(holder)
    refuse_where_held(tmp_path)  # after PATIENCE, and it removes the file
    assert "watching for up to" in capsys.readouterr().out
    mine = Lock(tmp_path)
    mine.take()
    assert "watching" not in capsys.readouterr().out  # not twice
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == platform.node()
    mine.give_back()


def test_a_holder_that_ends_while_it_is_watched_keeps_nobody_out(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 600.0)
    monkeypatch.setattr(lock.time, "sleep", lambda _, sleep=time.sleep: sleep(0.05))
    file = tmp_path / "run.lock"
    file.write_text(json.dumps({**ME, **NODE}))
    timer = threading.Timer(0.2, file.unlink)
    timer.start()
    begun = time.monotonic()
    refuse_where_held(tmp_path)
    assert time.monotonic() - begun < 60
    timer.join()


def test_a_file_of_long_ago_is_not_watched(tmp_path):
    file = tmp_path / "run.lock"
    file.write_text(json.dumps({**ME, **NODE}))
    os.utime(file, (0, time.time() - 2 * lock.LONG_AGO))
    refuse_where_held(tmp_path)  # PATIENCE is more than a minute here
    assert not file.exists()


def test_without_locks_a_process_of_this_machine_is_known_by_its_number_and_its_start(tmp_path, elsewhere, capsys):
    holder = elsewhere({}, without_locks)
    with pytest.raises(InputError, match=f"process {holder.pid} on "):
        refuse_where_held(tmp_path)
    kill(holder)
    refuse_where_held(tmp_path)
    (tmp_path / "run.lock").write_text(json.dumps({**ME, "began": 1}))  # another process with the number of this one
    refuse_where_held(tmp_path)
    assert "watching" not in capsys.readouterr().out


def test_where_locks_work_a_dead_container_of_this_machine_is_not_watched(tmp_path, capsys):
    """It has another host name and numbers its processes anew, and the kernel is the same."""
    (tmp_path / "run.lock").write_text(json.dumps({**ME, "host": "0123456789ab", "space": 1, "pid": 1}))
    refuse_where_held(tmp_path)
    assert capsys.readouterr().out == ""


def test_of_two_that_write_at_once_without_locks_one_is_refused(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(lock.fcntl, "lockf", without_locks)

    def meanwhile(_):
        (tmp_path / "run.lock").write_text(json.dumps({**ME, **NODE, "pid": 7}))

    monkeypatch.setattr(lock.time, "sleep", meanwhile)
    with pytest.raises(InputError, match="process 7 on node1"):
        Lock(tmp_path).take()


def test_the_heart_beats_while_the_lock_is_held_and_stops_with_it(tmp_path, quick):
    mine = Lock(tmp_path)
    mine.take()
    before = (tmp_path / "run.lock").stat().st_mtime_ns
    end = time.monotonic() + 60
    while (tmp_path / "run.lock").stat().st_mtime_ns == before and time.monotonic() < end:
        time.sleep(0.01)
    assert (tmp_path / "run.lock").stat().st_mtime_ns > before
    mine.give_back()
    assert not mine.beats.is_alive()
    assert not (tmp_path / "run.lock").exists()


def test_a_clock_that_is_hours_ahead_takes_no_live_run(tmp_path, elsewhere, monkeypatch):
    holder = elsewhere(NODE)
    now = time.time
    monkeypatch.setattr(lock.time, "time", lambda: now() + 2 * lock.LONG_AGO)
    with pytest.raises(InputError, match=f"process {holder.pid} on node1"):
        refuse_where_held(tmp_path)


# --- a holder that slept


def stop(process) -> None:
    """SIGSTOP, until it has stopped."""
    os.kill(process.pid, signal.SIGSTOP)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)


@pytest.mark.parametrize("locks", [lambda *_: None, without_locks], ids=["nolock", "no locks at all"])
def test_a_holder_that_wakes_after_it_was_replaced_ends_without_writing(tmp_path, elsewhere, locks, capfd):
    holder = elsewhere(NODE, locks)
    stop(holder)
    mine = Lock(tmp_path)
    mine.take()  # after PATIENCE
    os.kill(holder.pid, signal.SIGCONT)
    holder.join(10)
    assert holder.exitcode == 3
    printed = capfd.readouterr().err
    assert f"process {os.getpid()} on {platform.node()} has taken the run" in printed
    assert "showed no life for " in printed
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    mine.check()
    mine.give_back()


class Broken:
    """Output that nobody reads any more."""

    def write(self, _: str) -> None:
        raise BrokenPipeError

    flush = write


def test_a_holder_that_was_replaced_ends_where_nobody_reads_its_output_too(tmp_path, elsewhere):
    here = os.getpid()

    def locks(*_) -> None:
        if os.getpid() != here:
            lock.sys.stdout = lock.sys.stderr = Broken()  # pyrefly: ignore[bad-assignment]

    holder = elsewhere(NODE, locks)
    (tmp_path / "run.lock").write_text(json.dumps({**ME, **NODE, "pid": 7}))
    holder.join(10)
    assert holder.exitcode == 3


def test_a_holder_that_did_not_sleep_does_not_say_so(tmp_path, elsewhere, capfd, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.7)
    holder = elsewhere(NODE)
    (tmp_path / "run.lock").unlink()
    holder.join(10)
    printed = capfd.readouterr().err
    assert f"{tmp_path}: another process has taken away run.lock. This process ends here" in printed
    assert "no life" not in printed


def test_a_holder_that_slept_and_was_not_replaced_continues(tmp_path, elsewhere, quick):
    holder = elsewhere(NODE)
    stop(holder)
    time.sleep(3 * lock.BEAT)
    os.kill(holder.pid, signal.SIGCONT)
    before = (tmp_path / "run.lock").stat().st_mtime_ns
    time.sleep(3 * lock.BEAT)
    assert holder.is_alive()
    assert (tmp_path / "run.lock").stat().st_mtime_ns > before


def write_late(folder: Path, awake, paused: bool) -> None:
    """Hold the lock, never beat, and write run.json when `awake`; `paused`: by its clock no time has passed."""
    if paused:
        lock._now = lambda: 0.0
    lock._this_process = lambda: {**ME, **NODE, "pid": os.getpid()}
    Lock._beat = lambda _: None  # pyrefly: ignore[bad-assignment]  its thread has not woken yet
    run = Run(folder, {})
    run.lock.take()
    (folder / "taken").touch()
    awake.wait(10)
    run.update(step=7)


@pytest.mark.parametrize("paused", [False, True], ids=["asleep", "a paused virtual machine"])
def test_nothing_is_written_between_waking_and_the_next_beat(tmp_path, quick, monkeypatch, paused):
    """run.json and checkpoints are written after a look of their own."""
    monkeypatch.setattr(lock.fcntl, "lockf", without_locks)
    awake = FORK.Event()
    process = FORK.Process(target=write_late, args=(tmp_path, awake, paused))
    process.start()
    while not (tmp_path / "taken").exists():
        time.sleep(0.01)
    mine = Lock(tmp_path)
    mine.take()
    awake.set()
    process.join(10)
    assert (process.exitcode, (tmp_path / "run.json").exists()) == (3, False)
    mine.give_back()
