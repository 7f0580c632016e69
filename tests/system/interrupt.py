"""Run a recipe unchanged, and make something happen at the end of a step, before any callback looks.

python tests/system/interrupt.py WAY STEP recipes/sft.py FLAGS...

STEP 0 is before the run. WAY is the name of a signal; STOP: the file; clock: an hour passes; kill-save: SIGKILL when
half of a file of the next checkpoint is written; kill-adapter: SIGKILL after training, before the adapter has its name.
"""

import io
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from common.run import files, stopping
from common.run import folder as run_folder

way, step, recipe = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_half(value: object, file: object) -> None:
    whole = io.BytesIO()
    save(value, whole)
    Path(file).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    kill()


def happen(folder: Path) -> None:
    global save
    if way == "STOP":
        (folder / "STOP").touch()
    elif way == "clock":
        later = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600, time=time.time)
        stopping.time = later
    elif way == "kill-save":
        torch = sys.modules["torch"]
        save, torch.save = torch.save, save_half
    elif way == "kill-adapter":
        files.put_in_place = kill
    else:
        os.kill(os.getpid(), signal.Signals[way])


def begin_steps(stop: stopping.Stop, folder: Path, *agree: object) -> None:
    callback = sys.modules["common.run.checkpoints"].CheckpointCallback
    look = callback.on_step_end

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == step:
            happen(folder)
        look(self, args, state, control, **kwargs)

    callback.on_step_end = on_step_end
    begin(stop, folder, *agree)


def plan_run(*args, **kwargs):
    if step == 0:
        happen(Path())
    return plan(*args, **kwargs)


plan, run_folder.plan_run = run_folder.plan_run, plan_run
begin, stopping.Stop.begin_steps = stopping.Stop.begin_steps, begin_steps
sys.argv = [recipe, *sys.argv[4:]]
runpy.run_path(recipe, run_name="__main__")
