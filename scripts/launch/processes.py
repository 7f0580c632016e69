"""Run a recipe in several processes, one for each GPU: on this machine, or on every node of a Slurm job.

    python scripts/launch/processes.py 2 recipes/sft.py --model tiny
    srun ... processes.py --master-addr=n1 --master-port=20017 8 recipes/sft.py --model tiny      one on each node

What torchrun does, with the recipe's own exit code, which torchrun turns into 1, with each signal passed on once, and
with as much time to save a checkpoint as it takes, which torchrun ends after 30 s. Rank 0 has the terminal; what
another writes is shown when that one fails. A rank that fails or is killed ends the others: they could only wait for
it. On several nodes srun ends those on the other nodes, as soon as one node has ended with another code than 0; so a
stop with a checkpoint, 75, is 0 there, and run.json says that steps are left.
"""

import argparse
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOPPED, CANNOT, BAD_INPUT = 75, 3, 2
PATIENCE = 20  # seconds that the others have to end, after one has failed; one that waits in NCCL hears no signal
CAUSE = 2.0  # seconds in which the cause is awaited, after a rank has failed that perhaps just missed another
SHOWN = 40  # lines of the output of a rank that failed
SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Job:
    """`count` ranks on each of `nodes` machines, of which this one has the number `node`; they meet at the master's."""

    count: int
    nodes: int = 1
    node: int = 0
    name: str = ""
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def ranks(self) -> int:
        return self.count * self.nodes

    def environment(self, local_rank: int) -> dict[str, str]:
        """What torch reads to find the other ranks."""
        values = {
            "MASTER_ADDR": self.address,
            "MASTER_PORT": self.port,
            "WORLD_SIZE": self.ranks,
            "LOCAL_WORLD_SIZE": self.count,
            "RANK": self.node * self.count + local_rank,
            "LOCAL_RANK": local_rank,
        }
        # Gloo takes the address of the host's name, which on many machines is that of the loopback.
        if self.nodes > 1 and "GLOO_SOCKET_IFNAME" not in os.environ and (found := interface_to(self.address)):
            values["GLOO_SOCKET_IFNAME"] = found
        return {**os.environ, **{name: str(value) for name, value in values.items()}}


def main(job: Job, command: list[str]) -> int:
    if job.nodes == 1:
        return run(job, command)
    # The code that Unsloth writes is separate for each job, as job.sh says, which can remove it on its own node only.
    with tempfile.TemporaryDirectory(prefix=f"job-{os.environ['SLURM_JOB_ID']}.", ignore_cleanup_errors=True) as folder:
        os.environ["UNSLOTH_COMPILE_LOCATION"] = f"{folder}/unsloth"
        return run(job, command)


def run(job: Job, command: list[str]) -> int:
    """The exit code of the ranks on this node, once they have ended."""
    # Rank 0 has the terminal.
    outputs: list[IO[bytes] | None] = [
        None if job.node == local == 0 else tempfile.TemporaryFile()  # noqa: SIM115  open to the end
        for local in range(job.count)
    ]
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, _frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    for local, output in enumerate(outputs):
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=job.environment(local),
                stdout=output,
                stderr=output,
                process_group=0,  # signals of the terminal or the container come here alone, to be passed on
            )
        )
    failed = wait(processes)
    code = max(process.returncode for process in processes) if failed is None else processes[failed].returncode
    if failed is not None:
        # All were given the same input, and rank 0 has written what is wrong with it.
        known = job.node == 0 and processes[0].returncode == code == BAD_INPUT
        sys.stderr.write(describe(job, failed, code, None if known else outputs[failed]))
        return code if code > 0 else 128 - code
    return 0 if job.nodes > 1 and code == STOPPED else code


def describe(job: Job, local: int, code: int, output: IO[bytes] | None) -> str:
    """How a rank ended, after the end of its output; nothing where that one has the terminal, and wrote why.

    On several nodes the last line has node, code and reason: job.sh looks for it in the log.
    """
    rank = f"Rank {job.node * job.count + local} of {job.ranks}"
    how = "failed" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    lines: list[str] = []
    if output:
        output.seek(0)
        lines = [f"{rank} {how}:", *output.read().decode(errors="replace").splitlines()[-SHOWN:]]
    elif code < 0 and job.nodes == 1:
        lines = [f"{rank} {how}."]
    if job.nodes > 1:
        reasons = [line.strip() for line in lines[1:] if line.strip()]
        reason = f": {reasons[-1]}" if reasons and code > 0 else ""
        lines = [] if code == BAD_INPUT else lines  # which the first node says
        lines.append(f"{rank}, on {job.name}, {how}{f' with exit code {code}' if code > 0 else ''}{reason}")
    return "".join(f"{line}\n" for line in lines)


def wait(processes: list[subprocess.Popen]) -> int | None:
    """Wait for all; the first that fails, None when none does. The others, which wait for it, are ended."""
    failed: int | None = None
    since = 0.0  # when the first one failed
    ended: list[int] = []  # those that failed, in their order
    while any(process.poll() is None for process in processes):
        time.sleep(0.1)
        ended += new_failures(processes, ended)
        since = since or (time.monotonic() if ended else 0.0)
        waited = time.monotonic() - since if since else 0.0
        if ended and failed is None:
            first = cause(processes, ended)
            if processes[first].returncode != CANNOT or waited > CAUSE:
                failed = first
                for process in processes:
                    process.terminate()
        if waited > PATIENCE:
            for process in processes:
                process.kill()
    ended += new_failures(processes, ended)
    return failed if failed is not None or not ended else cause(processes, ended)


def new_failures(processes: list[subprocess.Popen], known: list[int]) -> list[int]:
    return [
        rank for rank, process in enumerate(processes) if process.poll() not in (None, 0, STOPPED) and rank not in known
    ]


def cause(processes: list[subprocess.Popen], ended: list[int]) -> int:
    """Of ranks that failed: one that was killed, else one that did not just miss another; the first of these."""
    codes = {rank: processes[rank].returncode for rank in ended}
    return min(ended, key=lambda rank: (codes[rank] > 0, codes[rank] == CANNOT))


def interface_to(address: str) -> str | None:
    """The network interface of this machine by which it reaches `address`, its own included; None if none has it."""
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for _, name in socket.if_nameindex() if own in addresses(name)), None)


def addresses(interface: str) -> list[str]:
    """Those of an interface: one of IPv4, as far as it has one, and all of IPv6."""
    file = Path("/proc/net/if_inet6")
    rows = [line.split() for line in (file.read_text().splitlines() if file.exists() else [])]
    found = [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0])) for row in rows if row[-1] == interface]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # it has none
            return found
    return [*found, socket.inet_ntoa(answer[20:24])]


def read_job(words: list[str]) -> tuple[Job, list[str]]:
    """The ranks that a command line asks for, and the command of each."""
    parser = argparse.ArgumentParser(prog="processes.py")
    parser.add_argument("--master-addr", help="on several nodes, each by srun: the first of them")
    parser.add_argument("--master-port", type=int)
    parser.add_argument("count", type=int, help="ranks on each node")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(words)
    if given.master_addr is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return Job(given.count, port=free.getsockname()[1]), given.command
    nodes, node = int(os.environ["SLURM_STEP_NUM_NODES"]), int(os.environ["SLURM_NODEID"])
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return Job(given.count, nodes, node, name, given.master_addr, given.master_port), given.command


if __name__ == "__main__":
    sys.exit(main(*read_job(sys.argv[1:])))
