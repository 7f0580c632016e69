"""Import unsloth once, then run each command that comes in a child of this process: `server.py SOCKET`.

A command is a script with its arguments, folder, environment and three open files. It runs as if Python had started it,
but for what is read from the environment while unsloth is imported. Tests that ask whether a recipe computes the right
thing start a process of their own; this one is for those that ask whether many commands run at all.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress

from common import environment, errors


def preload() -> None:
    """Import what the commands import."""
    environment.set_variables()
    environment.quiet_loggers()
    import unsloth  # noqa: F401, I001  first: it changes what is imported after it
    import datasets  # noqa: F401
    import tyro  # noqa: F401
    from transformers import Trainer, TrainingArguments  # noqa: F401
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer  # noqa: F401

    import common.cli
    import common.data.read
    import common.rewards.specification
    import common.run.checkpoints
    import common.run.progress  # noqa: F401

    gc.freeze()  # what is there already is not looked at again, in any child


def main() -> None:
    preload()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who waits
        print("ready", flush=True)
        while True:
            client, _ = listener.accept()
            with client:
                _, files, _, _ = socket.recv_fds(client, 1, 3)
                job = json.loads(client.makefile("rb").readline())
                if not os.fork():  # waits for the job; the ranks of a run are jobs at the same time
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    if not (child := os.fork()):
                        break
                    watch(child, client)
                    os._exit(0)
                for file in files:
                    os.close(file)
    run(job, files)


def watch(child: int, client: socket.socket) -> None:
    """Tell who waits for a command its process, and how it ended; kill it when nobody waits any more."""
    client.sendall(child.to_bytes(4))
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, client], [], [])  # the other side writes nothing: it is gone
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(BrokenPipeError):
        client.sendall(code.to_bytes(2, signed=True))


def run(job: dict, files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    errors.SPELLING = os.environ.pop("RECIPES_SPELLING", "")  # as its module does when it is imported
    sys.argv = job["words"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  as the interpreter does it
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # taking down all that was imported would cost 2 seconds


if __name__ == "__main__":
    main()
