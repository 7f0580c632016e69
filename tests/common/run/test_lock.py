"""One process trains in a folder at a time, and one that died keeps nobody out."""

import json
import multiprocessing
import os
import platform
import signal
from pathlib import Path

import pytest
from common.errors import InputError
from common.run import lock
from common.run.folder import Run, plan_run
from common.run.lock import Lock, refuse_where_held

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, taken) -> None:
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
    assert taken.wait(10)
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
    Lock(tmp_path).take()
    assert capsys.readouterr().out.startswith(f"{tmp_path}: its disk has no locks; ")


def test_a_run_that_another_process_changed_while_this_one_loaded_is_refused(tmp_path):
    plan = ("sft", "tiny", str(tmp_path), {}, {}, {})
    mine = plan_run(*plan)
    other = plan_run(*plan)
    with other:
        other.update(step=3)
    with pytest.raises(InputError, match="another process has trained in it just now"), mine:
        pass
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "done"
