"""The state of every job of a run, a sweep or a pipeline: queued, running, done, or failed and why.

    make slurm-status                            all that was submitted into outputs/
    make slurm-status OUT=outputs/try-3          one

A job that is in the queue is as Slurm says; of any other its own last word counts, which it left in OUT/slurm.
"""

import argparse
import json
import re
import subprocess
from pathlib import Path

from common.errors import InputError, MachineError, run_command

ENDED = re.compile(r"done|failed|stopped|ended")  # a job's own words for its end
GOING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--output-dir", type=Path, help="what was submitted; else all in outputs/")
    folder = parser.parse_args().output_dir
    records = [folder / "slurm" / "jobs.json"] if folder else sorted(Path("outputs").glob("*/slurm/jobs.json"))
    for record in records:
        if not record.is_file():
            raise InputError(f"{folder}: nothing was submitted into it: there is no {record}")
    queue = ask_slurm() if records else {}
    for record in records:
        print(record.parents[1])
        for job in json.loads(record.read_text(encoding="utf-8")):
            print(f"  {describe(job, record.parents[1], queue)}")
    if not records:
        print("Nothing was submitted into outputs/.")


def ask_slurm() -> dict[str, tuple[str, str]]:
    """State and reason of every job that Slurm still knows, by its id; one that ended it knows for minutes."""
    command = ["squeue", "--me", "--states=all", "--array", "--noheader", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MachineError("there is no squeue here: ask on a login node of the cluster") from None
    if done.returncode:
        raise MachineError(f"Slurm does not answer: {done.stderr.strip()}")
    rows = (line.split("|", 2) for line in done.stdout.splitlines())
    return {job: (state, reason) for job, state, reason in rows}


def describe(job: dict[str, str], folder: Path, queue: dict[str, tuple[str, str]]) -> str:
    state, reason = queue.get(job["job"], ("gone", ""))
    file = folder / "slurm" / f"{job['job']}.state"
    time, said = file.read_text(encoding="utf-8").splitlines()[-1].split(" ", 1) if file.exists() else ("", "")
    if state == "PENDING":
        word = f"queued ({reason})" + (f", was {said}" if said else "")
    elif state in GOING or (ENDED.match(said) and state != "CANCELLED"):
        word = said or state.lower()
    elif state == "CANCELLED":
        why = ", as the job before it did not succeed" if reason in ("DependencyNeverSatisfied", "Dependency") else ""
        word = f"cancelled{why}" + (f"; {said}" if said else "")
    else:
        gone = (
            "ended without a word: its node failed, or it was killed" if said else "never ran: cancelled in the queue"
        )
        word = gone if state == "gone" else state.lower().replace("_", " ")
        word += f"; last it was {said}" if said else ""
    return "  ".join(filter(None, [job["job"], job["name"], job["run"], step(job, folder), word, time]))


def step(job: dict[str, str], folder: Path) -> str:
    """The step of the newest checkpoint, of a run or of a pipeline's stage."""
    records = [*(folder / job["run"]).glob("run.json"), *folder.glob(f"{job['name']}-*/run.json")]
    if not records:
        return ""
    newest = max(records, key=lambda path: path.stat().st_mtime)
    return f"step {json.loads(newest.read_text(encoding='utf-8')).get('step', 0)}"


if __name__ == "__main__":
    run_command(main)
