"""Run a recipe unchanged, and make something happen at the end of a step, before any callback looks.

python tests/system/interrupt.py WAY STEP recipes/sft.py FLAGS...

STEP 0 is before the run. INTERRUPT_RANK: the rank to which it happens; without it to each. WAY is the name of a
signal; STOP: the file; clock: an hour passes; kill-save: SIGKILL when half of a file of the next checkpoint is
written; kill-adapter: SIGKILL before the adapter has its name; bad-gradient: the next one is not finite; full-memory:
the next backward pass raises what torch does where a GPU's memory is full; EROFS or another error number: the next
line of the log cannot be written; gone: the run's folder is deleted; no-memory: the next step asks for more than there
is.
"""

import errno
import io
import os
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from common.run import files, ranks, stopping
from common.run import folder as run_folder

way, step, recipe = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_half(value: object, file: object) -> None:
    whole = io.BytesIO()
    save(value, whole)
    Path(file).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    kill()


def once(model: object, answer: object) -> None:
    """In the next backward pass a trained weight gets `answer(gradient)` for its gradient."""
    weight = next(one for name, one in model.named_parameters() if one.requires_grad and "lora_B" in name)
    handle = weight.register_hook(lambda gradient: (handle.remove(), answer(gradient))[1])


def fill_memory(_: object) -> None:
    raise sys.modules["torch"].OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def refuse(number: int, folder: Path) -> None:
    """The next file of the run that is opened to append to it has a disk that answers so."""
    unchanged = Path.open

    def refused(path: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if mode == "a" and path.is_relative_to(folder):
            raise OSError(number, os.strerror(number), str(path))
        return unchanged(path, mode, *args, **kwargs)

    Path.open = refused


def happen(folder: Path, model: object = None) -> None:
    global save
    if os.environ.get("INTERRUPT_RANK", str(ranks.rank())) != str(ranks.rank()):
        return
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
    elif way == "bad-gradient":
        once(model, lambda gradient: gradient * float("nan"))
    elif way == "full-memory":
        once(model, fill_memory)
        if "RESTART_BY_HAND" in os.environ:  # by who called: this process ends with 99 in place of a new one
            os.execv = lambda *_: os._exit(99)
        elif "WARM_SERVER" in os.environ:
            del os.environ["PYTHONPATH"]  # the new process is none of the warm server's, which waits for this one
    elif way == "no-memory":
        once(model, lambda gradient: sys.modules["torch"].empty(2**60))
    elif way == "gone":
        shutil.rmtree(folder)
    elif hasattr(errno, way):
        refuse(getattr(errno, way), folder)
    else:
        os.kill(os.getpid(), signal.Signals[way])


def begin_steps(stop: stopping.Stop, folder: Path, *agree: object) -> None:
    callback = sys.modules["common.run.checkpoints"].CheckpointCallback
    look = callback.on_step_end

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == step:
            happen(folder, kwargs.get("model"))
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
