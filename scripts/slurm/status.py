"""The state of every job of a run, a sweep or a pipeline: queued, running, done, or failed and why.

    make slurm-status                            all jobs with a folder in outputs/
    make slurm-status OUT=outputs/try-3          those of one folder

The state of a job in the queue is Slurm's; that of any other is the last line which the job wrote to OUT/slurm.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common.arguments import parse
from common.errors import InputError, MachineError, run_command
from common.run.files import read_object, read_objects

ENDED = re.compile(r"done|failed|stopped|ended")  # how a job's last line begins when it has ended
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD")


@dataclass(frozen=True)
class Args:
    output_dir: Path | None = None
    """The folder that was submitted; else all in outputs/."""


def main() -> None:
    folder = parse(Args, sys.argv[1:], "slurm-status").output_dir
    records = [folder / "slurm" / "jobs.json"] if folder else sorted(Path("outputs").glob("*/slurm/jobs.json"))
    for record in records:
        if not record.is_file():
            raise InputError(f"--output-dir={folder}: no job has this folder; there is no {record}.")
    queue = read_queue() if records else {}
    for record in records:
        print(record.parents[1])
        for job in read_objects(record):
            print(f"  {describe(job, record.parents[1], queue)}")
    if not records:
        print("No job has a folder in outputs/.")


def read_queue() -> dict[str, tuple[str, str]]:
    """State and reason of every job that Slurm still knows, by its id; it forgets a job minutes after its end."""
    command = ["squeue", "--me", "--states=all", "--array", "--noheader", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MachineError("There is no squeue here. Run this on a login node of the cluster.") from None
    if done.returncode:
        raise MachineError(f"Slurm does not answer: {done.stderr.strip()}")
    rows = (line.split("|", 2) for line in done.stdout.splitlines())
    return {job: (state, reason) for job, state, reason in rows}


def describe(job: dict[str, str], folder: Path, queue: dict[str, tuple[str, str]]) -> str:
    """A job in one line: id, name, run of a sweep, step, state, and when the job wrote its last line."""
    state, reason = queue.get(job["job"], ("gone", ""))
    file = folder / "slurm" / f"{job['job']}.state"
    # What ended a job may hold any bytes, and a full disk leaves the file empty.
    lines = file.read_text(encoding="utf-8", errors="replace").rstrip("\n") if file.exists() else ""
    time, _, last = lines.rpartition("\n")[2].partition(" ")
    if state == "PENDING":
        word = f"queued ({reason})" + (f", was {last}" if last else "")
    elif state in ALIVE or (ENDED.match(last) and state != "CANCELLED"):
        word = last or state.lower()
    elif state == "CANCELLED":
        why = ", since the job before it failed" if reason in ("DependencyNeverSatisfied", "Dependency") else ""
        word = f"cancelled{why}" + (f"; {last}" if last else "")
    else:
        gone = "killed, or its node failed" if last else "never ran: cancelled in the queue"
        word = gone if state == "gone" else state.lower().replace("_", " ")
        word += f"; last state: {last}" if last else ""
    return "  ".join(filter(None, [job["job"], job["name"], job["run"], step(job, folder), word, time]))


def step(job: dict[str, str], folder: Path) -> str:
    """The step of the newest checkpoint, of a run or of a pipeline's stage."""
    records = [*(folder / job["run"]).glob("run.json"), *folder.glob(f"{job['name']}-*/run.json")]
    if not records:
        return ""
    newest = max(records, key=lambda path: path.stat().st_mtime)
    return f"step {read_object(newest).get('step', 0)}"


if __name__ == "__main__":
    run_command(main)
