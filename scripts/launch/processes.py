"""Run a recipe in several processes of this machine, one for each GPU.

    python scripts/launch/processes.py 2 recipes/sft.py --model tiny

What torchrun does for one machine, with the recipe's own exit code, which torchrun turns into 1, and with each signal
passed on once. The first process has the terminal; what another writes is shown when that one fails alone.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import IO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75
PATIENCE = 60  # seconds that the others have to end, after one has failed


def main(count: int, command: list[str]) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    outputs: list[IO[bytes] | None] = [None, *(tempfile.TemporaryFile() for _ in range(count - 1))]  # noqa: SIM115  open to the end
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, _frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    for rank, output in enumerate(outputs):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **{name: str(value) for name, value in environment.items()}},
                stdout=output,
                stderr=output,
                process_group=0,  # signals of the terminal or the container come here alone, to be passed on
            )
        )
    failed = wait(processes)
    if failed is None:
        return max(process.returncode for process in processes)
    if output := outputs[failed]:
        output.seek(0)
        sys.stderr.write(f"Process {failed} of {count} failed:\n")
        sys.stderr.write("".join(output.read().decode(errors="replace").splitlines(keepends=True)[-40:]))
    code = processes[failed].returncode
    return code if code > 0 else 128 - code


def wait(processes: list[subprocess.Popen]) -> int | None:
    """Wait for all; the first that fails, None when none does. The others, which wait for it, are ended."""
    failed, deadline = None, None
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        codes = [process.poll() for process in processes]
        if failed is None and any(code not in (None, 0, STOPPED) for code in codes):
            failed = next(rank for rank, code in enumerate(codes) if code not in (None, 0, STOPPED))
            deadline = time.monotonic() + PATIENCE
            for process in processes:
                process.terminate()
        if deadline and time.monotonic() > deadline:
            for process in processes:
                process.kill()
    if failed is None:
        failed = next((n for n, process in enumerate(processes) if process.returncode not in (0, STOPPED)), None)
    return failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
