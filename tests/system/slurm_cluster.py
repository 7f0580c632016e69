"""A Slurm cluster on this machine: a controller, two nodes with two fake GPUs each, a munge of its own.

Nothing of it is shared with a Slurm that is installed here for real: configuration, key, socket, ports and files lie in
one folder. Both nodes are this machine under two names, so their memory and their cores are not held apart.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SEARCH = os.environ["PATH"] + ":/usr/sbin:/sbin"
NODES = ("n1", "n2")


def missing() -> list[str]:
    """The programs that are not here and without which there is no cluster."""
    return [program for program in PROGRAMS if shutil.which(program, path=SEARCH) is None]


class Cluster:
    """Started by `start`, ended by `stop`: by their ids, what it started and nothing else.

    `environment` makes Slurm's client programs, and `make slurm`, speak to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {**os.environ, "PATH": SEARCH, "SLURM_CONF": str(self.conf)}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Raises TimeoutError, with the daemons' logs, when the nodes are not idle after half a minute."""
        for name in ("state", "logs", "tmp", *NODES):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._write_configuration()
        munge = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "seed-file")]
        # --force: it warns of a folder that others could write to, and starts.
        self._spawn("munged", "munged", "--foreground", "--force", f"--key-file={key}", *munge)
        self._wait(lambda: (self.folder / "munge.socket").exists())
        self._spawn("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self._wait(lambda: self("sinfo", "--noheader", "--format=%T") == "idle")

    def start_node(self, node: str) -> None:
        self._spawn(node, "slurmd", "-D", "-N", node)

    def use(self, environment: dict[str, str]) -> None:
        """From now on the tasks that srun starts have these variables too; job.sh sets its own after this."""
        lines = [f"echo export {name}={value}" for name, value in environment.items()]
        self._write_prolog(lines)

    def kill_node(self, node: str) -> None:
        """As a power cut: the daemon and all that it has started are gone at once."""
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()
        self._kill_jobs(node)

    def stop(self) -> None:
        if "slurmctld" in self.daemons:
            subprocess.run(["scancel", "--me"], env=self.environment, check=False, timeout=60)
            deadline = time.monotonic() + 20
            while self("squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for node in NODES:
            self._kill_jobs(node)

    def __call__(self, *command: str, cwd: Path | None = None) -> str:
        """What a program prints that speaks to the cluster. Raises AssertionError with its errors when it fails."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """All that Slurm knows of a job, by its own names: JobState, NodeList, Restarts, ..."""
        words = self("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _spawn(self, name: str, program: str, *flags: str) -> None:
        with (self.folder / "logs" / f"{name}.out").open("ab") as log:
            command = [shutil.which(program, path=SEARCH), *flags]
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _wait(self, ready) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                if ready():
                    return
            except AssertionError:
                pass  # the controller does not answer yet
            time.sleep(0.2)
        logs = "".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in (self.folder / "logs").glob("*"))
        raise TimeoutError(f"the cluster does not start:\n{logs}")

    def _kill_jobs(self, node: str) -> None:
        """Kill the processes of the jobs on a node, and those that watch over them; both run on without its daemon."""
        ours = {f"SLURM_CONF={self.conf}", f"SLURMD_NODENAME={node}"}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if ours <= set((process / "environ").read_text(errors="replace").split("\0")):
                    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                    if (Path("/proc") / parent / "cmdline").read_text().startswith("slurmstepd"):
                        os.kill(int(parent), signal.SIGKILL)
                    os.kill(int(process.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # gone already, or somebody else's

    def _write_configuration(self) -> None:
        ports = free_ports(1 + len(NODES))
        host, user = socket.gethostname().partition(".")[0], subprocess.getoutput("id -un")
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=8000 Gres=gpu:2"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        lines = [
            f"ClusterName=test{os.getpid()}",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            # A job that was requeued waits until its credential has expired: two minutes by default.
            f"AuthInfo=socket={self.folder}/munge.socket,cred_expire=5",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/%n.pid",
            "ProctrackType=proctrack/pgid",
            "TaskPlugin=task/none",
            f"TaskProlog={self.folder}/prolog",  # what it prints changes a job's environment
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SlurmdParameters=config_overrides",  # more cores than there are
            "SchedulerParameters=batch_sched_delay=1,sched_min_interval=0,sched_interval=2",
            "ReturnToService=2",
            "SlurmdTimeout=10",  # a node that says nothing so long is down
            "KillWait=15",
            "GresTypes=gpu",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            *nodes,
            "PartitionName=normal Nodes=ALL Default=YES PriorityTier=1",
            "PartitionName=patient Nodes=ALL PriorityTier=1 GraceTime=60",  # preempted by TERM for the steps alone
            "PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF",
        ]
        self.conf.write_text("\n".join(lines) + "\n")
        self._write_prolog([])
        # Slurm believes in a GPU when it has a device file.
        gpus = [f"NodeName={node} Name=gpu File=/dev/{device}" for node in NODES for device in ("null", "zero")]
        (self.folder / "gres.conf").write_text("\n".join(gpus) + "\n")
        (self.folder / "cgroup.conf").write_text("")

    def _write_prolog(self, lines: list[str]) -> None:
        # A job that is killed with its node cannot clean up after itself.
        lines = ["#!/bin/sh", f"echo export TMPDIR={self.folder}/tmp", *lines]
        part = self.folder / "prolog.part"  # a task may read it at this moment
        part.write_text("\n".join(lines) + "\n")
        part.chmod(0o755)
        part.rename(self.folder / "prolog")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
