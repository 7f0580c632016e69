"""Stopping and resuming: what stops a run, checkpoints that are killed while they are written, and one real run.

That a resumed run ends as one that was never stopped is shown for the other recipes in their own files, by one way of
stopping each.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common.errors import InputError, MachineError, Stopped
from common.rewards import algebra
from common.run import checkpoints, disk, files, stopping
from common.run import folder as record
from common.run.checkpoints import CheckpointCallback, newest_checkpoint
from common.run.files import put_in_place, write_folder
from common.run.folder import Run
from common.run.stopping import Stop, seconds, shielded
from conftest import ROOT, adapter_bytes, in_two_ranks, interrupt, read_jsonl, run_recipe
from transformers import TrainerControl, TrainerState


@pytest.fixture(autouse=True)
def handlers():
    """Restores pytest's handlers."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def child(code: str, **environment: str) -> subprocess.Popen:
    """Python that runs `code`, after its first line of output, "ready"."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "recipes"), **environment}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, env=environment, cwd=ROOT)
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


# What stops a run.


def test_a_time_limit_is_hours_minutes_and_seconds():
    assert seconds("3:55:00") == 14100
    assert seconds("0:00:07") == 7
    assert seconds("100:00:00") == 360000
    for wrong in ("300", "55:00", "3:5:00", "1:60:00", "3h", "", "-1:00:00", "1:00:00 "):
        with pytest.raises(InputError, match="expected hours:minutes:seconds, as 3:55:00"):
            seconds(wrong)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_before_training_ends_the_run_and_one_in_a_step_is_recorded(tmp_path, number):
    stop = Stop()
    with pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), number)
    name = signal.Signals(number).name
    assert str(caught.value) == f"Stopped by {name} before training began; the same command resumes from there."
    assert caught.value.reason == name

    stop = Stop()
    stop.begin_steps(tmp_path)
    assert stop.reason(tmp_path) is None
    os.kill(os.getpid(), number)
    assert stop.reason(tmp_path) == name


def test_the_signal_after_the_first_does_not_disturb_how_the_run_ends(tmp_path):
    stop = Stop()
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.reason(tmp_path) == "SIGTERM"


def test_a_signal_that_a_library_swallowed_ends_the_run_before_its_first_step(tmp_path):
    stop = Stop()
    with suppress(BaseException):  # as a bare `except:` of theirs does
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="by SIGTERM before training began"):
        stop.begin_steps(tmp_path)
    with pytest.raises(Stopped), suppress(Exception):  # which swallows none
        stop.begin_steps(tmp_path)


def test_a_stop_is_announced_once_and_a_second_ctrl_c_ends_the_run_at_once():
    code = (
        "import time; from pathlib import Path; from common.run.stopping import Stop\n"
        "stop = Stop(); stop.begin_steps(Path('/')); print('ready', flush=True)\n"
        "while True: time.sleep(0.01)"
    )
    process = child(code)
    process.send_signal(signal.SIGTERM)
    announced = "SIGTERM: the run stops after this step, with a checkpoint. Ctrl-C twice ends it at once.\n"
    assert process.stderr.readline() == announced
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):  # as Slurm and make send them
        process.send_signal(number)
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors == "Ended at once; the same command resumes from the last checkpoint.\n"

    process = child(code)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().endswith(" Ctrl-C again ends it at once.\n")
    process.kill()
    process.communicate()


def test_of_several_processes_the_first_announces_the_stop():
    code = (
        "import os; from pathlib import Path; from common.run.stopping import Stop; print('ready', flush=True)\n"
        "stop = Stop(); stop.begin_steps(Path('/')); os.kill(os.getpid(), 15)\n"
        "assert stop.reason(Path('/')) == 'SIGTERM'"
    )
    for rank, announcements in (("0", 1), ("1", 0)):
        process = child(code, RANK=rank)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors
        assert errors.count("the run stops after this step") == announcements


def test_a_signal_ends_a_fork_of_the_run_as_any_process():
    Stop()
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_a_stop_file_is_obeyed_once_and_one_of_an_earlier_run_never(tmp_path, monkeypatch):
    file = tmp_path / "STOP"
    stop = Stop()
    stop.begin_steps(tmp_path)
    file.touch()
    assert stop.reason(tmp_path) == "the file STOP"
    assert not file.exists()

    # Slurm's script created it a second time, when that run was over.
    file.touch()
    monkeypatch.setattr(stopping, "STARTED", time.time() + 1)
    stop = Stop()
    stop.begin_steps(tmp_path)
    assert stop.reason(tmp_path) is None
    assert not file.exists()


@pytest.mark.parametrize("ahead", [-3600, 3600])
def test_a_stop_file_is_obeyed_whatever_the_clock_of_its_disk_says(tmp_path, monkeypatch, ahead):
    """On a network disk the server dates files."""

    def touch(file: Path) -> None:
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY))
        os.utime(file, (time.time() + ahead,) * 2)

    monkeypatch.setattr(Path, "touch", touch)
    stop = Stop()
    stop.begin_steps(tmp_path)
    (tmp_path / "STOP").touch()
    assert stop.reason(tmp_path) == "the file STOP"
    monkeypatch.setattr(stopping, "STARTED", time.time() + 1)
    (tmp_path / "STOP").touch()
    assert Stop().reason(tmp_path) is None  # of an earlier run


def test_the_time_limit_counts_from_the_start_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "STARTED", time.time() - 60)
    assert Stop("0:01:10").reason(tmp_path) is None
    stop = Stop("0:00:59")
    assert stop.reason(tmp_path) == "--time-limit 0:00:59"
    with pytest.raises(Stopped, match="by --time-limit 0:00:59 before training began"):
        stop.begin_steps(tmp_path)


# Child processes.


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_is_passed_on_to_the_child_that_does_the_work_and_announced_by_it(tmp_path, number, capfd):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); time.sleep(30)"
    )
    stop = Stop()
    with stop.noted_only():
        process = child(code)
        os.kill(os.getpid(), number)
        assert stop.wait(process, tmp_path) == 75
    assert stop.requested == signal.Signals(number).name
    assert capfd.readouterr().err == ""

    (tmp_path / "STOP").touch()
    assert Stop().wait(child(code), tmp_path) == 75
    assert Stop().wait(child("print('ready')"), tmp_path) == 0


def test_a_signal_to_all_processes_leaves_a_comparison_and_its_process_alone():
    """scancel sends SIGTERM to every process of a job; a comparison that died of it would be a wrong reward."""
    assert algebra.equal("1/2", "0.5", 10)
    process = algebra._process
    for number in stopping.SIGNALS:
        process.send_signal(number)
    assert algebra.equal("3/4", "0.75", 10)
    assert algebra._process is process
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(stopping.SIGNALS) == set()


def test_a_shielded_process_is_so_from_its_first_instruction_on():
    with shielded():
        process = subprocess.Popen([sys.executable, "-c", "print('lived')"], stdout=-1, text=True)
    for number in stopping.SIGNALS:
        process.send_signal(number)
    assert process.communicate(timeout=10)[0] == "lived\n"


# Checkpoints.


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, {})


def write_checkpoint(run: Run, step: int, **facts) -> None:
    """What a trainer does: files in checkpoints/part, then on_save."""
    state = TrainerState(global_step=step, max_steps=9, **facts)
    part = run.folder / "checkpoints" / "part"
    (part / f"checkpoint-{step}").mkdir(parents=True)
    (part / f"checkpoint-{step}" / "adapter_model.safetensors").write_bytes(bytes(1000 + step))
    torch.save({"step": torch.ones(2000)}, part / f"checkpoint-{step}" / "optimizer.pt")
    state.save_to_json(str(part / f"checkpoint-{step}" / "trainer_state.json"))
    callback = CheckpointCallback(run, Stop(), 2)
    callback.on_save(SimpleNamespace(output_dir=str(part)), state, TrainerControl())


def names(run: Run) -> list[str]:
    return sorted(path.name for path in (run.folder / "checkpoints").iterdir() if path.name != "part")


def see(rank: int, folder: Path) -> None:
    """Both ranks on one disk, which shows the second one late what is new; then each on a disk of its own."""
    checkpoints.SEEN = 1.0
    (folder / "run").mkdir(exist_ok=True)
    run = Run(folder / "run", {"started": "at noon"})
    if rank == 0:
        write = run.update
        run.update = lambda **facts: (time.sleep(0.6), write(**facts))  # the record of this start, late
    begun = time.monotonic()
    assert newest_checkpoint(run) is None
    assert rank == 0 or time.monotonic() - begun > 0.4
    (folder / f"run-{rank}").mkdir()
    run = Run(folder / f"run-{rank}", {"started": "at one"})
    if rank == 0:
        newest_checkpoint(run)
    else:
        with pytest.raises(MachineError, match=r"run-1: rank 1, on .*, does not see what rank 0 writes there. Give"):
            newest_checkpoint(run)


@pytest.mark.slow
def test_a_rank_waits_for_a_shared_disk_and_ends_where_there_is_none(tmp_path):
    in_two_ranks(see, tmp_path)


def test_a_run_resumes_from_the_newest_and_as_many_as_wanted_are_kept(run):
    assert newest_checkpoint(run) is None
    for step in (8, 9, 10):
        write_checkpoint(run, step)
    assert names(run) == ["checkpoint-10", "checkpoint-9"]
    assert not list((run.folder / "checkpoints" / "part").iterdir())
    assert newest_checkpoint(run).name == "checkpoint-10"
    assert json.loads((run.folder / "run.json").read_text())["step"] == 10


def cut(name: str, size: int):
    return lambda folder: os.truncate(folder / name, size)


def flip(name: str, first: int, count: int = 1):
    """Other bytes in a file that keeps its size."""

    def breaks(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[first : first + count] = bytes(255 - byte for byte in content[first : first + count])
        (folder / name).write_bytes(content)

    return breaks


FAULTS = {
    "truncated": (cut("adapter_model.safetensors", 700), "is damaged: adapter_model.safetensors has 700 of 1002 bytes"),
    "an empty state": (cut("trainer_state.json", 0), "is damaged: trainer_state.json has 0 of "),
    "a file that is gone": (lambda folder: (folder / "optimizer.pt").unlink(), "lacks optimizer.pt"),
    "no list": (lambda folder: (folder / "files.json").unlink(), "has no list of its files"),
    "an empty list": (cut("files.json", 0), "has no list of its files"),
    "a flipped byte": (
        flip("adapter_model.safetensors", 500),
        "is damaged: adapter_model.safetensors has other contents",
    ),
    "zeros after a power cut": (flip("optimizer.pt", 0, 2000), "is damaged: optimizer.pt has other contents"),
    "half a list": (cut("files.json", 20), "has no list of its files"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_one_is_renamed_and_the_one_before_it_taken(run, capsys, fault):
    breaks, says = FAULTS[fault]
    for step in (1, 2):
        write_checkpoint(run, step)
    breaks(run.folder / "checkpoints" / "checkpoint-2")
    assert newest_checkpoint(run).name == "checkpoint-1"
    assert names(run) == ["broken-checkpoint-2", "checkpoint-1"]
    line, other = capsys.readouterr().out.splitlines()
    assert f"checkpoint-2 {says}" in line
    assert "renamed to broken-checkpoint-2, which may be deleted" in line
    assert other.startswith("Resuming after step 1, ")
    write_checkpoint(run, 2)  # its name is free again
    assert newest_checkpoint(run).name == "checkpoint-2"


def test_what_others_put_there_is_left_alone(run):
    write_checkpoint(run, 1)
    (run.folder / "checkpoints" / "checkpoint-1-copy").mkdir()
    assert newest_checkpoint(run).name == "checkpoint-1"
    assert names(run) == ["checkpoint-1", "checkpoint-1-copy"]


def test_killed_at_any_point_of_its_writing_there_is_a_whole_one(run, tmp_path, capsys):
    """After each call that changes the disk in turn; the older one is there until the new one is, and never a part."""
    found, steps = [], 0
    while "checkpoint-2" not in found or found[-1] != "done":
        run = Run(tmp_path / f"run-{steps}", {})
        run.folder.mkdir()
        write_checkpoint(run, 1)
        pid = os.fork()
        if pid == 0:
            left = steps

            def die_in_time(call):
                def calls(*args, **kwargs):
                    nonlocal left
                    result = call(*args, **kwargs)
                    if left == 0:
                        os._exit(9)
                    left -= 1
                    return result

                return calls

            for place, name in ((os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "replace"), (os, "chmod")):
                setattr(place, name, die_in_time(getattr(place, name)))
            Path.rename, Path.replace = die_in_time(Path.rename), die_in_time(Path.replace)
            checkpoints.rotate_checkpoints = die_in_time(checkpoints.rotate_checkpoints)
            write_checkpoint(run, 2)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        newest = newest_checkpoint(run)
        assert newest is not None
        assert checkpoints._fault(newest) is None
        assert "has no list" not in capsys.readouterr().out  # what has its name has its list
        found += [newest.name, *(["done"] if status == 0 else [])]
        steps += 1
        assert steps < 100
    assert found.count("checkpoint-1") > 8  # it was killed often enough before the new one had its name
    assert found.count("checkpoint-2") > 1


def test_all_of_it_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    did = []
    monkeypatch.setattr(files, "_sync", lambda path: did.append(f"sync {path.relative_to(tmp_path)}"))
    monkeypatch.setattr(Path, "rename", lambda path, new: did.append(f"rename {path.name} {new.name}"))
    for file in ("a/x", "a/b/y"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    put_in_place(tmp_path / "a", tmp_path / "c")
    assert set(did[:4]) == {"sync a", "sync a/x", "sync a/b", "sync a/b/y"}
    assert did[4:] == ["rename a c", "sync ."]


def test_a_folder_is_there_when_the_block_has_ended_well(tmp_path):
    saved = tmp_path / "adapter"
    with suppress(ValueError), write_folder(saved) as part:
        (part / "old").touch()
        raise ValueError
    assert not saved.exists()
    with write_folder(saved) as part:
        (part / "weights").touch(mode=0o600)
    assert [file.name for file in saved.iterdir()] == ["weights"]
    umask = os.umask(0)
    os.umask(umask)
    assert (saved / "weights").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_best_checkpoint_keeps_its_place_and_its_path(run):
    for step in (1, 2, 3, 4):
        write_checkpoint(run, step, best_global_step=2 if step > 1 else 1, best_metric=0.5)
    assert names(run) == ["checkpoint-2", "checkpoint-4"]
    for step in (2, 4):
        folder = run.folder / "checkpoints"
        state = TrainerState.load_from_json(str(folder / f"checkpoint-{step}" / "trainer_state.json"))
        assert state.best_model_checkpoint == str(folder / "checkpoint-2")

    # The folder is somewhere else now: what the state says of it leads nowhere.
    moved = run.folder.with_name("moved")
    run.folder.rename(moved)
    state.best_model_checkpoint = None  # as the trainer has it then
    callback = CheckpointCallback(Run(moved, {}), Stop(), 2)
    callback.on_train_begin(SimpleNamespace(output_dir=str(moved / "checkpoints" / "part")), state, TrainerControl())
    assert state.best_model_checkpoint == str(moved / "checkpoints" / "checkpoint-2")


# The callback, and the record.


def end_step(callback: CheckpointCallback, step: int, **flags) -> TrainerControl:
    control = TrainerControl(**flags)
    callback.on_step_end(None, TrainerState(global_step=step, max_steps=9), control)
    return control


def test_a_run_that_has_to_stop_saves_and_ends_training(run, capfd):
    args = SimpleNamespace(output_dir=str(run.folder / "checkpoints" / "part"))
    stop = Stop()
    callback = CheckpointCallback(run, stop, 2)
    callback.on_train_begin(args, TrainerState(max_steps=9), TrainerControl())
    assert end_step(callback, 1) == TrainerControl()
    assert end_step(callback, 2, should_save=True) == TrainerControl(should_save=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert end_step(callback, 3) == TrainerControl(should_save=True, should_training_stop=True)
    with pytest.raises(Stopped, match="by SIGUSR1 after step 3 of 9; the same command resumes from there"):
        callback.on_train_end(args, TrainerState(global_step=3, max_steps=9), TrainerControl())

    stop = Stop()
    callback = CheckpointCallback(run, stop, 2)
    callback.on_train_begin(args, TrainerState(max_steps=9), TrainerControl())
    os.kill(os.getpid(), signal.SIGTERM)
    assert end_step(callback, 9, should_save=True) == TrainerControl(should_save=True)  # it is done anyway
    callback.on_train_end(args, TrainerState(global_step=9, max_steps=9), TrainerControl())

    stop = Stop()
    callback = CheckpointCallback(run, stop, 2)
    callback.on_train_end(args, TrainerState(global_step=9, max_steps=9), TrainerControl())
    capfd.readouterr()
    os.kill(os.getpid(), signal.SIGTERM)  # the run finishes what is left
    assert capfd.readouterr().err.startswith("SIGTERM: the run stops when this is done. ")


def test_a_run_stops_only_where_a_batch_of_completions_is_used_up(run):
    callback = CheckpointCallback(run, Stop(), 2, every=3)
    callback.stop.begin_steps(run.folder)
    assert not end_step(callback, 2, should_save=True).should_save
    assert end_step(callback, 3).should_save
    os.kill(os.getpid(), signal.SIGTERM)
    for step in (4, 5):
        assert not end_step(callback, step).should_training_stop
    control = end_step(callback, 6)
    assert control.should_save
    assert control.should_training_stop
    assert end_step(callback, 9, should_save=True).should_save  # the last


def one_of_two(rank: int, folder: Path) -> None:
    """The second gets a signal in step 4; it writes its part of the checkpoint long after the first."""
    callback = CheckpointCallback(Run(folder, {}), Stop(), 2)
    callback.stop.begin_steps(folder)
    for step in range(1, 9):
        if (rank, step) == (1, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        if (control := end_step(callback, step)).should_training_stop:
            break
    part, final = folder / "checkpoints" / "part", folder / "checkpoints" / f"checkpoint-{step}"
    (part / final.name).mkdir(parents=True, exist_ok=True)
    time.sleep(rank)
    torch.save({}, part / final.name / f"rng_state_{rank}.pth")
    state = TrainerState(global_step=step, max_steps=9, is_world_process_zero=rank == 0)
    callback.on_save(SimpleNamespace(output_dir=str(part)), state, control)
    files = sorted(file.name for file in final.iterdir())  # the second one sees it too
    (folder / f"{rank}.json").write_text(json.dumps([step, callback.reason, files]))


def signal_before_the_steps(rank: int, folder: Path) -> None:
    """Only the second one got a signal, where a library caught it."""
    callback = CheckpointCallback(Run(folder, {}), Stop(), 2)
    callback.stop.requested = "SIGTERM" if rank == 1 else None
    args = SimpleNamespace(output_dir=str(folder / "checkpoints" / "part"))
    with pytest.raises(Stopped, match="by SIGTERM before training began"):
        callback.on_train_begin(args, TrainerState(max_steps=9), TrainerControl())


def test_several_processes_stop_before_the_same_step(tmp_path):
    in_two_ranks(signal_before_the_steps, tmp_path)


def test_several_processes_stop_after_the_same_step(tmp_path):
    in_two_ranks(one_of_two, tmp_path)
    for rank in (0, 1):
        files = ["files.json", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"]
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [4, "SIGTERM", files]


def status(run: Run) -> dict:
    return json.loads((run.folder / "run.json").read_text())


def test_of_several_processes_the_first_one_keeps_the_record(run, monkeypatch):
    with run:
        run.update(step=3)
        before = status(run)
        monkeypatch.setenv("RANK", "1")
        run.update(step=4)
        monkeypatch.setenv("RANK", "0")
        assert status(run) == before


def test_the_record_says_how_a_run_ended(run):
    with pytest.raises(Stopped), run:
        raise Stopped("SIGTERM", "after step 2 of 9")
    assert status(run)["status"] == "stopped"
    assert status(run)["reason"] == "SIGTERM"
    with pytest.raises(KeyError), run:
        raise KeyError("x")
    assert (status(run)["status"], status(run)["error"]) == ("failed", "KeyError: 'x'")
    gone = SystemExit(1)  # rich's, when what it prints into is gone
    gone.__context__ = BrokenPipeError()
    with pytest.raises(SystemExit), run:
        raise gone
    assert (status(run)["status"], status(run)["error"]) == ("failed", "nobody read its output any more")
    with run:
        pass
    assert status(run)["status"] == "done"


def test_the_record_adds_up_the_time_of_all_processes_of_a_run(run):
    with run:
        run.started -= 100
    assert status(run)["seconds"] == pytest.approx(100, abs=1)
    resumed = Run(run.folder, {"seconds": status(run)["seconds"]})
    resumed.started -= 20
    resumed.update(step=3)  # a checkpoint: after it the process is killed
    assert status(run)["seconds"] == pytest.approx(120, abs=1)


def test_a_resumed_run_knows_its_step_before_it_has_loaded_anything(tmp_path):
    """A batch script that compares the progress of two starts must not read that there was none."""
    plan = ("sft", "tiny", str(tmp_path), {"time_limit": "1:00:00"}, {"time_limit": "command line"}, {})
    with suppress(Stopped), record.plan_run(*plan) as run:
        run.update(step=7)
        raise Stopped("SIGTERM", "after step 7 of 9")
    other_limit = (*plan[:3], {"time_limit": None}, {"time_limit": "recipe"}, {})
    with suppress(Stopped), record.plan_run(*other_limit) as run:
        assert status(run)["step"] == 7
        assert status(run)["status"] == "running"
        raise Stopped("SIGTERM", "before training began")


def test_a_full_disk_is_named_and_the_half_checkpoint_makes_room(run):
    write_checkpoint(run, 3)
    half = run.folder / "checkpoints" / "part" / "checkpoint-4"
    half.mkdir()
    with pytest.raises(MachineError, match=r"the disk is full.*resumes after step 3"), run:
        Path("/dev/full").write_text("x")
    assert status(run)["error"] == "the disk is full"
    assert not half.exists()
    assert newest_checkpoint(run).name == "checkpoint-3"


@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_a_full_disk_is_seen_through_the_words_of_a_library(tmp_path, library):
    import torch
    from safetensors.torch import save_file

    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs to mount a small disk, which takes root")
    try:
        run = Run(tmp_path, {})
        write_checkpoint(run, 1)
        file = tmp_path / "checkpoints" / "part" / "checkpoint-2" / "file"
        file.parent.mkdir()
        save = {"torch": torch.save, "safetensors": save_file}[library]
        with pytest.raises(MachineError, match="the disk is full"), run:
            save({"x": torch.rand(2**20)}, file)
        assert status(run)["error"] == "the disk is full"
        assert newest_checkpoint(run).name == "checkpoint-1"
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(30, "Read-only file system", "{folder}/run.json"),
            "run.json: Read-only file system. See to the disk; ",
        ),
        (OSError(5, "Input/output error"), ": Input/output error. See to the disk; "),
        (
            RuntimeError("SafetensorError: I/O error: File too large (os error 27)"),
            ": File too large. See to the disk; ",
        ),
    ],
)
def test_a_disk_that_fails_is_named_with_the_place(run, error, message):
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.format(folder=run.folder)
    with pytest.raises(MachineError, match=f"{message}the same command resumes after step 0"), run:
        raise error
    assert status(run)["status"] == "failed"


def test_an_error_of_another_disk_is_none_of_the_runs(run):
    with pytest.raises(PermissionError), run:
        raise PermissionError(13, "Permission denied", "/elsewhere")
    assert status(run)["error"].startswith("PermissionError")


def test_a_folder_that_was_deleted_is_not_made_again(run):

    def deleted() -> None:
        with run:
            shutil.rmtree(run.folder)
            run.update(step=1)

    with pytest.raises(MachineError, match="The folder was deleted while the run wrote it"):
        deleted()
    assert not run.folder.exists()


def test_a_name_that_is_too_long_is_refused_with_the_place(tmp_path):
    with pytest.raises(MachineError, match="File name too long"), Run(tmp_path / ("x" * 300), {}):
        pass


def test_a_record_that_is_damaged_is_named_with_the_way_out(tmp_path):
    (tmp_path / "run.json").write_text("")
    with pytest.raises(InputError, match=r"run\.json: is damaged .* give another --output-dir"):
        record.plan_run("sft", "tiny", str(tmp_path), {}, {}, {})


def test_what_a_process_leaves_that_was_killed_as_it_began_is_no_other_run(tmp_path):
    for name in ("run.lock", "run.json.part", "STOP"):
        (tmp_path / name).write_text("")
    assert record.plan_run("sft", "tiny", str(tmp_path), {}, {}, {}) is not None
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        record.plan_run("sft", "tiny", str(tmp_path), {}, {}, {})


def test_a_disk_without_room_is_refused_before_the_run_and_before_each_checkpoint(run, monkeypatch):
    model = torch.nn.Linear(1000, 1000)  # 4 MB of weights, 8 of Adam: 12 a checkpoint
    args = SimpleNamespace(output_dir=str(run.folder / "checkpoints" / "part"), optim="adamw_torch_fused")

    def free(size: int) -> None:
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=size))

    callback = CheckpointCallback(run, Stop(), 2)
    free(39_000_000)
    with pytest.raises(MachineError, match=r"2 checkpoints and the result need 0\.04 GiB, and its disk has 0\.04 GiB"):
        callback.on_train_begin(args, TrainerState(max_steps=9), TrainerControl(), model=model)
    free(41_000_000)
    callback.on_train_begin(args, TrainerState(max_steps=9), TrainerControl(), model=model)
    control, state = TrainerControl(should_save=True), TrainerState(global_step=4, max_steps=9)
    callback.on_step_end(args, state, control, model=model)
    free(11_000_000)
    with pytest.raises(MachineError, match=r"the checkpoint of step 4 needs 0\.01 GiB"):
        callback.on_step_end(args, state, control, model=model)


def test_weights_that_are_not_finite_are_never_saved(run):
    model = torch.nn.Linear(4, 4)
    callback, args = CheckpointCallback(run, Stop(), 2), SimpleNamespace(load_best_model_at_end=False)
    callback.on_step_end(args, TrainerState(global_step=9, max_steps=9), TrainerControl(), model=model)
    model.weight.data[0, 0] = float("nan")
    callback.on_step_end(args, TrainerState(global_step=4, max_steps=9), TrainerControl(), model=model)
    for step, control in ((4, TrainerControl(should_save=True)), (9, TrainerControl())):
        with pytest.raises(InputError, match=f"no longer finite, seen after step {step}, before they were saved"):
            callback.on_step_end(args, TrainerState(global_step=step, max_steps=9), control, model=model)


# A real run.


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_stopped_killed_and_damaged_a_run_ends_as_one_that_was_left_alone(tmp_path):
    """At a constant rate, where a step too many would be seen."""
    flags = ("--max-steps", 8, "--save-steps", 2, "--sample-prompts", 2, "--sample-tokens", 8, "--logging-steps", 1)
    flags += ("--lr-scheduler-type", "constant", "--lora-dropout", 0.1, "--per-device-train-batch-size", 2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_recipe("sft", "--output-dir", whole, *flags).returncode == 0
    kept = cut / "checkpoints"

    def record() -> dict:
        return json.loads((cut / "run.json").read_text())

    done = interrupt("SIGTERM", 3, "sft", "--output-dir", cut, *flags)
    assert done.returncode == 75, done.stderr
    last = "Stopped by SIGTERM after step 3 of 8; the same command resumes from there."
    assert done.stderr.splitlines()[-1] == last
    assert "Traceback" not in done.stderr
    assert (record()["status"], record()["reason"], record()["step"]) == ("stopped", "SIGTERM", 3)
    assert not (cut / "adapter").exists()

    done = interrupt("kill-save", 6, "sft", "--output-dir", cut, *flags)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert f"Resuming after step 3, from {kept / 'checkpoint-3'}" in done.stdout
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoint-3", "checkpoint-4", "part"]
    os.truncate(kept / "checkpoint-4" / "adapter_model.safetensors", 1000)

    done = interrupt("kill-adapter", 8, "sft", "--output-dir", cut, *flags)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "checkpoint-6 was half written when the run ended: renamed to" in done.stdout
    assert "checkpoint-4 is damaged: adapter_model.safetensors has 1000 of" in done.stdout
    assert "Resuming after step 3, " in done.stdout
    assert (record()["status"], record()["step"]) == ("running", 8)
    assert not (cut / "adapter").exists()

    done = run_recipe("sft", "--output-dir", cut, *flags, "--time-limit", "1:00:00")  # which is not another run
    assert done.returncode == 0, done.stderr
    assert "Resuming after step 8, " in done.stdout
    assert adapter_bytes(cut) == adapter_bytes(whole)
    assert (cut / "samples.json").read_bytes() == (whole / "samples.json").read_bytes()
    losses = [[row["loss"] for row in read_jsonl(run / "metrics.jsonl") if "loss" in row] for run in (cut, whole)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8
    assert record()["train_loss"] == pytest.approx(json.loads((whole / "run.json").read_text())["train_loss"])
    assert record()["status"] == "done"
    again = run_recipe("sft", "--output-dir", cut, *flags)
    assert again.returncode == 0
    assert "finished already" in again.stdout


def test_a_signal_before_there_is_a_run_ends_in_one_line(tmp_path):
    done = interrupt("SIGTERM", 0, "sft", "--output-dir", tmp_path / "run")
    assert done.returncode == 75
    last = "Stopped by SIGTERM before training began; the same command resumes from there.\n"
    assert done.stderr == last
    assert not list(tmp_path.iterdir())
