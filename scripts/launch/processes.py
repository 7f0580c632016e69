"""Run a recipe in several processes of this machine, one for each GPU.

    python scripts/launch/processes.py 2 recipes/sft.py --model tiny

What torchrun does for one machine, with the recipe's own exit code, which torchrun turns into 1, and with each signal
passed on once. Rank 0 has the terminal; what another writes is shown when that one fails. A rank that fails or is
killed ends the others: they could only wait for it.
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
STOPPED, CANNOT, BAD_INPUT = 75, 3, 2
PATIENCE = 20  # seconds that the others have to end, after one has failed; one that waits in NCCL hears no signal


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
    code = processes[failed].returncode
    if processes[0].returncode == code == BAD_INPUT:
        return code  # all were given the same, and rank 0 has written what is wrong with it
    how = "failed" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    if output := outputs[failed]:
        output.seek(0)
        sys.stderr.write(f"Rank {failed} of {count} {how}:\n")
        sys.stderr.write("".join(output.read().decode(errors="replace").splitlines(keepends=True)[-40:]))
    elif code < 0:  # else it has written why
        sys.stderr.write(f"Rank {failed} of {count} {how}.\n")
    return code if code > 0 else 128 - code


def wait(processes: list[subprocess.Popen]) -> int | None:
    """Wait for all; the first that fails, None when none does. The others, which wait for it, are ended."""
    failed, deadline = None, None
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        codes = [process.poll() for process in processes]
        if ended := [rank for rank, code in enumerate(codes) if code not in (None, 0, STOPPED)]:
            failed = failed if failed is not None else first_of(ended, codes)
        if ended and deadline is None:
            deadline = time.monotonic() + PATIENCE
            for process in processes:
                process.terminate()
        if deadline and time.monotonic() > deadline:
            for process in processes:
                process.kill()
    if failed is None:
        failed = next((n for n, process in enumerate(processes) if process.returncode not in (0, STOPPED)), None)
    return failed


def first_of(ended: list[int], codes: list[int | None]) -> int:
    """Of ranks that failed at the same time the cause: one that was killed, else one that did not just miss another."""
    return min(ended, key=lambda rank: ((codes[rank] or 0) > 0, codes[rank] == CANNOT, rank))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
