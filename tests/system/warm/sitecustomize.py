"""Every Python process with this folder in PYTHONPATH begins here: a command that imports unsloth goes to server.py.

Importing unsloth takes 20 seconds of processor time on the CPU, and most commands of the pages take 3 more. Signals are
passed on to the child there, and it is killed with this process.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress

IMPORT_UNSLOTH = {"sft", "dpo", "kto", "grpo", "reward", "ppo", "evaluate", "merge", "compare", "distill"}
IMPORT_UNSLOTH |= {"preferences", "interrupt", "collectives"}  # of which the last two run one of them

words = sys.orig_argv
script = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
if script and os.path.basename(words[script])[:-3] in IMPORT_UNSLOTH and "--help" not in words:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["WARM_SERVER"])
        socket.send_fds(server, [b"+"], [0, 1, 2])
        job = {"words": words[script:], "folder": os.getcwd(), "environment": dict(os.environ)}
        server.sendall(json.dumps(job).encode() + b"\n")
        child = int.from_bytes(server.recv(4))

        def pass_on(number: int, _frame: object) -> None:
            with suppress(ProcessLookupError):
                os.kill(child, number)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, pass_on)
        answer = server.recv(2)
    code = int.from_bytes(answer, signed=True) if answer else 1  # as Popen has it: negative where a signal ended it
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)
