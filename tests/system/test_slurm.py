"""`make slurm` on a real Slurm of this machine's own (slurm_cluster.py): two nodes, fake GPUs, the tiny model.

Jobs on one node each; test_slurm_nodes.py has those on two.

The tests follow each other on one cluster. The chain, which takes longest, is submitted first and looked at last, and
keeps to node n2; what is done to a node is done to n1.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from conftest import ROOT, adapter_bytes, read_jsonl
from slurm_cluster import Cluster, missing
from test_readme import commands

pytestmark = pytest.mark.slow

# The commands of README.md and docs/slurm.md, each run below with the tiny model and on folders of the test's own.
SINGLE = "make slurm RECIPE=sft MODEL=qwen2.5-7b DATA=my.jsonl TIME=4:00:00 GPUS=1"
SHOWN = "make slurm RECIPE=sft MODEL=qwen2.5-7b DATA=my.jsonl TIME=4:00:00 GPUS=1 DRY=1"
CHAIN = "make slurm STAGES=sft,dpo,grpo TIME=4:00:00 GPUS=1"
SWEEP = "make slurm RECIPE=sft TIME=1:00:00 GPUS=1 SWEEP='learning_rate=1e-4,2e-4 seed=1,2'"
TWO_NODES = "make slurm RECIPE=sft MODEL=qwen2.5-7b DATA=my.jsonl TIME=4:00:00 NODES=2 GPUS=8"
STATUS = "make slurm-status OUT=outputs/try"
STATUS_OF_ALL = "make slurm-status"
SEEN_HERE = {SINGLE, SHOWN, CHAIN, SWEEP, TWO_NODES, STATUS, STATUS_OF_ALL}

TOKEN = "hf_" + "Secret0" * 5
STEPS = "--max-steps 30 --save-steps 15 --sample-prompts 0 --logging-steps 1"


def make(command: str, environment: dict[str, str], cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess:
    """Run a command of the README with other values of its variables; None takes one away."""
    words = shlex.split(command)
    given = dict(word.split("=", 1) for word in words[2:]) | changes
    variables = [f"{name}={value}" for name, value in given.items() if value is not None]
    return subprocess.run(
        ["make", "-C", ROOT, words[1], *variables], cwd=cwd, env=environment, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip


def wait_for(what: str, happened, seconds: float = 400):
    """Wait until `happened` gives something, and give it back."""
    deadline = time.monotonic() + seconds
    while not (result := happened()):
        assert time.monotonic() < deadline, f"{what}: not in {seconds} s"
        time.sleep(0.2)
    return result


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if lacking := missing():
        reason = f"needs a Slurm cluster; not here: {', '.join(lacking)} (apt-get install slurm-wlm munge)"
        pytest.fail(reason) if "CI" in os.environ else pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Jobs:
    """What one `make slurm` has submitted: `ids` of the jobs, in their order, and `folder`, their OUT."""

    def __init__(self, cluster: Cluster, folder: Path, command: str, **changes: str) -> None:
        self.cluster, self.folder = cluster, folder
        self.done = make(command, {**cluster.environment, "HF_TOKEN": TOKEN}, OUT=str(folder), **changes)
        assert self.done.returncode == 0, self.done.stdout + self.done.stderr
        self.ids = re.findall(r"^\w+: job (\d+)", self.done.stdout, re.M)

    def states(self, job: str | None = None) -> list[str]:
        """The states that a job has written, without the times."""
        file = self.folder / "slurm" / f"{job or self.ids[-1]}.state"
        return [line.split(" ", 1)[1] for line in file.read_text().splitlines()] if file.exists() else []

    def wait_until(self, word: str | tuple[str, ...], times: int = 1, job: str | None = None) -> str:
        """Its last state that begins with `word`, or one of several, once there are so many."""

        def found() -> str | None:
            as_wanted = [line for line in self.states(job) if line.startswith(word)]
            return as_wanted[-1] if len(as_wanted) >= times else self._has_not_ended(job)

        return wait_for(f"job {job or self.ids[-1]} says {word!r}", found)

    def wait_for_step(self, step: int, folder: Path | None = None, job: str | None = None) -> None:
        file = (folder or self.folder) / "metrics.jsonl"

        def reached() -> bool | None:
            return (file.exists() and any(row["step"] >= step for row in rows_so_far(file))) or self._has_not_ended(job)

        wait_for(f"step {step}", reached)

    def _has_not_ended(self, job: str | None) -> None:
        """Raises AssertionError when the job has ended."""
        states = self.states(job)
        assert not states or not states[-1].startswith(("done", "failed")), self.log(job)

    def signal(self, name: str = "USR1", job: str | None = None) -> None:
        """What Slurm does before the time is up: the batch script alone gets the signal."""
        self.cluster("scancel", "--batch", f"--signal={name}", job or self.ids[-1])

    def log(self, job: str | None = None) -> str:
        return (self.folder / "slurm" / f"{job or self.ids[-1]}.log").read_text(encoding="utf-8")

    def status(self) -> str:
        done = make(STATUS, self.cluster.environment, OUT=str(self.folder))
        assert done.returncode == 0, done.stderr
        return done.stdout


def rows_so_far(file: Path) -> list[dict]:
    """The whole lines of a file that is being written."""
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def chain(cluster, tmp_path_factory):
    """Three stages, the first of which is stopped and queued again while the others wait."""
    folder = tmp_path_factory.mktemp("chain") / "run"
    held_out = folder.parent / "heldout.jsonl"
    rows = (ROOT / "data_samples" / "heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    held_out.write_text("".join(rows[:4]), encoding="utf-8")
    short = "--sample-prompts 0 --max-steps"
    return Jobs(
        cluster, folder, CHAIN, GPUS=None, SBATCH="--nodelist=n2", EVAL_DATA=str(held_out),
        SFT_ARGS=f"{short} 30 --logging-steps 1", DPO_ARGS=f"{short} 2",
        GRPO_ARGS=f"{short} 1 --num-generations 4 --per-device-train-batch-size 8 --max-completion-length 16",
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(cluster, chain, tmp_path_factory):
    """One job, left alone."""
    return Jobs(
        cluster, tmp_path_factory.mktemp("undisturbed") / "run", SINGLE, MODEL="tiny", DATA=None, ARGS=STEPS
    )  # fmt: skip


@pytest.fixture(scope="module")
def hopeless(cluster, chain, tmp_path_factory):
    """A job that is stopped before its first step, each time, beside the other tests."""

    def run() -> tuple[Jobs, str]:
        folder = tmp_path_factory.mktemp("hopeless") / "run"
        jobs = Jobs(cluster, folder, SINGLE, MODEL="tiny", DATA=None, GPUS=None, SBATCH="--nodelist=n2", ARGS=STEPS)
        for times in (1, 2):
            jobs.wait_until("running", times)
            jobs.signal()
        return jobs, jobs.wait_until("failed")

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run)


def test_every_command_of_the_pages_is_run_here():
    texts = [command.text for page in ("README.md", "docs/slurm.md") for command in commands(page)]
    there = {text for text in texts if text.startswith("make slurm")}
    assert there
    assert there <= {" ".join(shlex.split(command)) for command in SEEN_HERE}


def test_no_token_comes_to_lie_in_a_file_of_slurm(undisturbed, cluster):
    assert "JobState=" in cluster("scontrol", "show", "job", undisturbed.ids[0])  # so its files are there still
    files = [
        file
        for folder in (cluster.folder, undisturbed.folder)
        for file in folder.rglob("*")
        if file.is_file() and not file.is_socket()
    ]
    assert any("state" in file.parts for file in files)
    assert any(file.name == "sft.sh" for file in files)
    assert [file for file in files if TOKEN.encode() in file.read_bytes()] == []


def test_a_token_on_the_command_line_is_refused(cluster, tmp_path):
    environment = {**cluster.environment, "HF_TOKEN": TOKEN}
    done = make(SINGLE, environment, MODEL="tiny", DATA=None, OUT=str(tmp_path / "run"), ARGS=f"--data {TOKEN}")
    assert "Error 2" in done.stderr
    assert "the value of HF_TOKEN is on the command line" in done.stderr
    assert not list(tmp_path.rglob("*.sh"))


def test_the_job_reads_the_token_from_a_file(tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    environment = {**os.environ, "HF_TOKEN_PATH": str(tmp_path / "token")}
    done = make(SHOWN, environment, MODEL="tiny", DATA=None, OUT=str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    exports = "\n".join(line for line in done.stdout.splitlines() if line.startswith("export HF_TOKEN_PATH"))
    python = f"{ROOT}/.venv/bin/python -c 'from huggingface_hub import get_token; print(get_token())'"
    done = subprocess.run(["bash", "-c", f"{exports}\n{python}"], env={}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == TOKEN


def test_a_stage_is_stopped_and_queued_again(chain):
    sft, dpo, _ = chain.ids
    (own,) = wait_for("the first stage", lambda: list(chain.folder.glob("sft-*")))
    chain.wait_for_step(3, own, job=sft)
    chain.signal(job=sft)
    chain.wait_until("requeued", job=sft)
    assert 0 < record(own)["step"] < 30
    assert re.search(rf"{dpo}  dpo  queued \(Dependency\)", chain.status())


def test_one_job_runs_to_its_end(undisturbed):
    assert "tail -F" in undisturbed.done.stdout
    assert undisturbed.wait_until("done")
    assert [word.split(" on ")[0] for word in undisturbed.states()] == ["running", "done"]
    assert record(undisturbed.folder)["machine"]["slurm_job"] == undisturbed.ids[0]
    assert "step 30/30" in undisturbed.log()
    assert re.search(rf"{undisturbed.ids[0]}  sft  step 30  done", undisturbed.status())
    assert not list(undisturbed.folder.rglob("STOP"))


def test_cancelled_stopped_preempted_and_its_node_lost_a_run_ends_like_one_left_alone(
    cluster, undisturbed, hopeless, tmp_path
):
    folder = tmp_path / "run"
    trial = {"MODEL": "tiny", "DATA": None, "ARGS": STEPS}
    first = Jobs(cluster, folder, SINGLE, **trial)
    first.wait_for_step(3)
    again = make(SINGLE, cluster.environment, OUT=str(folder), **trial)
    assert f"job {first.ids[0]} writes into it" in again.stderr  # two jobs would write into the same run
    cluster("scancel", first.ids[0])
    first.wait_until("stopped with a checkpoint, as Slurm ended the job")
    wait_for("the end", lambda: cluster.job(first.ids[0])["JobState"] == "CANCELLED")
    assert cluster.job(first.ids[0])["Restarts"] == "0"
    cancelled_after = record(folder)["step"]
    assert cancelled_after >= 3

    jobs = Jobs(cluster, folder, SINGLE, **trial)
    jobs.wait_for_step(cancelled_after + 3)
    jobs.signal()
    jobs.wait_until("requeued")
    stopped_after = record(folder)["step"]
    assert stopped_after > cancelled_after
    jobs.wait_until("running on n1, restart 1")

    cluster(
        "sbatch", "--partition=urgent", "--nodelist=n1", "--gpus-per-node=2", "--output=/dev/null", "--wrap=sleep 1"
    )
    jobs.wait_until("running on n1, restart 2")
    assert cluster.job(jobs.ids[0])["Restarts"] == "2"
    jobs.wait_for_step(stopped_after + 2)

    cluster.kill_node("n1")
    try:
        jobs.wait_until("running on n2, restart 3")
        jobs.wait_until("done")
    finally:
        cluster.start_node("n1")
    assert adapter_bytes(folder) == adapter_bytes(undisturbed.folder)
    steps = [row["step"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 31))
    assert jobs.log().count("running on") == 4  # one log for all restarts
    assert jobs.log().count("Resuming after step") >= 3  # one may be preempted before it gets there


def test_a_sweep_is_an_array_in_which_one_failure_stops_no_other(cluster, tmp_path):
    """Submitted from another folder, with data that is named from there."""
    rows = (ROOT / "data_samples" / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "my data.jsonl").write_text("".join(rows[:64]), encoding="utf-8")
    submit = [ROOT / "scripts" / "run", "slurm", "--recipe", "sft", "--time", "0:10:00"]
    words = ["--data", "my data.jsonl", "--max-steps", "2", "--sample-prompts", "0"]
    done = subprocess.run(
        [*submit, "--sweep", "learning_rate=1e-4,often seed=1", "--output-dir", "outputs/sweep", "--", *words],
        cwd=tmp_path, env=cluster.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = re.search(r"sft: job (\d+)", done.stdout)[1]

    def status() -> str | None:
        shown = make(STATUS, cluster.environment, OUT=str(tmp_path / "outputs" / "sweep")).stdout
        return shown if re.search(rf"{job}_0 .* done", shown) and "failed" in shown else None

    shown = wait_for("both ended", status)
    assert re.search(rf"{job}_0  sft  learning_rate=1e-4,seed=1  step 2  done", shown)
    assert re.search(
        rf"{job}_1  sft  learning_rate=often,seed=1  failed with exit code 2: --learning-rate=often", shown
    )
    assert (tmp_path / "outputs" / "sweep" / "learning_rate=1e-4,seed=1" / "adapter").is_dir()
    status_of_all = [ROOT / "scripts" / "run", "slurm-status"]
    assert (
        cluster(*status_of_all, cwd=tmp_path).partition("\n")[2]
        == shown.partition("sweep\n")[2].partition("make")[0].rstrip()
    )
    assert make(STATUS_OF_ALL, cluster.environment).returncode == 0


def test_the_sweep_of_the_readme_has_a_run_for_every_choice(tmp_path):
    done = make(SWEEP, dict(os.environ), OUT=str(tmp_path), DRY="1")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-3\n" in done.stdout
    assert "3) out=$folder/learning_rate=2e-4,seed=2 command+=(--learning-rate 2e-4 --seed 2) ;;" in done.stdout


def test_a_job_that_gets_no_further_is_not_queued_for_ever(cluster, hopeless):
    jobs, last = hopeless.result()
    assert last == "failed: no checkpoint between two restarts; give it more TIME or a lower --save-steps"
    wait_for("the end", lambda: cluster.job(jobs.ids[0])["JobState"] == "FAILED")
    assert jobs.states()[-1] in jobs.status()


def test_a_stage_that_fails_ends_the_chain_and_says_why(cluster, tmp_path):
    (tmp_path / "my.jsonl").write_text('{"instruction": "Say a.", "output": "a"}\n{"instruction": "Say b."}\n')
    pairs = ROOT / "data_samples" / "preferences-train.jsonl"
    jobs = Jobs(
        cluster, tmp_path / "run", CHAIN, GPUS=None, STAGES="sft,dpo", SFT_DATA=f"{tmp_path}/my.jsonl",
        DPO_DATA=str(pairs),
    )  # fmt: skip
    sft, dpo = jobs.ids
    jobs.wait_until("failed", job=sft)
    wait_for("the end of the chain", lambda: cluster.job(dpo)["JobState"] == "CANCELLED")
    assert re.search(rf"{sft}  sft  failed with exit code 2: .*my.jsonl:2: output: missing", jobs.status())
    assert re.search(rf"{dpo}  dpo  cancelled, since the job before it failed", jobs.status())


def test_the_chain_waits_for_a_stage_that_was_queued_again(cluster, chain):
    """It ends with what `make pipeline` would have made: that finds every stage done."""
    sft, dpo, grpo = chain.ids
    assert [word.split(" on ")[0] for word in chain.states(sft)][:2] == [
        "running",
        "requeued, to resume from its checkpoint",
    ]
    chain.wait_until("done", job=sft)
    chain.wait_until("done", job=dpo)
    chain.wait_until("done", job=grpo)
    assert [stage["stage"] for stage in json.loads((chain.folder / "report.json").read_text())["stages"]] == [
        "start", "sft", "dpo", "grpo",
    ]  # fmt: skip


# --- what is refused ----------------------------------------------------------------------------------------------

REFUSED = {
    "a time that is none": ({"TIME": "4h"}, "TIME=4h: expected hours:minutes:seconds, such as 4:00:00"),
    "a number of GPUs that is none": ({"GPUS": "two"}, "GPUS=two: expected how many of each node"),
    "a sweep with an open quotation": ({"SWEEP": "seed='1"}, "SWEEP: No closing quotation."),
    "an option with an open quotation": ({"SBATCH": "--comment='a"}, "SBATCH: No closing quotation."),
    "GPUs without a process": ({"GPUS": None, "SBATCH": "--gres=gpu:8"}, "this asks Slurm for GPUs; give GPUS too"),
    "no nodes": ({"NODES": "0"}, "NODES=0: expected 1 or more"),
    "several processes of a chain": (
        {"RECIPE": None, "DATA": None, "STAGES": "sft,ppo", "NODES": "2"},
        "Stages train in one process each",
    ),
    "an unknown recipe": ({"RECIPE": "sfd"}, "RECIPE=sfd: unknown (did you mean sft?)"),
    "an unknown stage": (
        {"RECIPE": None, "DATA": None, "STAGES": "sft,dpa"},
        "unknown stage 'dpa' (did you mean dpo?)",
    ),
    "a recipe and stages": ({"DATA": None, "STAGES": "sft,dpo"}, "Give RECIPE or STAGES, one of them"),
    "a sweep of nothing": ({"SWEEP": "seed="}, "SWEEP: seed=: expected an argument and its values"),
    "a sweep of a chain": ({"RECIPE": None, "DATA": None, "STAGES": "sft", "SWEEP": "seed=1"}, "SWEEP is for a RECIPE"),
    "a folder that Slurm would misread": ({"OUT": "100%j"}, "Slurm takes no quotes, backslashes or per cent signs"),
    "a container without an image": ({"RUNTIME": "apptainer"}, "RUNTIME=apptainer: needs IMAGE="),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_run_is_refused_at_once(tmp_path, fault):
    changes, says = REFUSED[fault]
    done = make(SHOWN, dict(os.environ), **{"OUT": str(tmp_path / "run"), **changes})
    assert "Error 2" in done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_slurm_would_never_start_is_refused(cluster, tmp_path):
    done = make(SINGLE, cluster.environment, MODEL="tiny", DATA=None, OUT=str(tmp_path / "run"), PARTITION="gpus")
    assert "Error 2" in done.stderr
    assert "invalid partition specified: gpus" in done.stderr
    assert not (tmp_path / "run" / "slurm" / "jobs.json").exists()


@pytest.mark.parametrize("way", ["variable", "argument"])
def test_a_password_of_a_url_is_in_no_script(tmp_path, way):
    url = "https://me:s3cretword@mirror.lan/hub"
    environment = {**os.environ, **({"HF_ENDPOINT": url} if way == "variable" else {})}
    done = make(SHOWN, environment, OUT=str(tmp_path / "run"), **({"DATA": url} if way == "argument" else {}))
    assert "Error 2" in done.stderr
    assert "of a URL ***@mirror.lan/hub, would be in" in done.stderr
    assert "s3cretword" not in done.stdout + done.stderr
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"s3cretword" in file.read_bytes()]


def test_without_slurm_the_script_is_shown_and_nothing_submitted(tmp_path):
    (tmp_path / "bin").mkdir()
    for program in ("make", "bash", "sh", "readlink", "dirname"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program))
    (tmp_path / "bin" / "python3").symlink_to(sys._base_executable)
    lone = {**os.environ, "PATH": str(tmp_path / "bin")}
    shown = make(SHOWN, lone, OUT=str(tmp_path / "run"))
    assert shown.returncode == 0, shown.stderr
    for option in (
        "gpus-per-node=1", "time=4:00:00", "signal=B:USR1@300", "requeue", "open-mode=append", "export=NONE",
    ):  # fmt: skip
        assert f"#SBATCH --{option}\n" in shown.stdout
    submitted = make(SINGLE, lone, OUT=str(tmp_path / "run"))
    assert "There is no sbatch here. Submit from a login node" in submitted.stderr
    assert "Error 3" in submitted.stderr


# --- what a script holds ------------------------------------------------------------------------------------------


def stand_in(folder: Path, **programs: str) -> None:
    """Programs in folder/bin, and in folder/root, the repository of the script: bash that does this."""
    for name, does in programs.items():
        program = folder / ("root/scripts/run" if name == "run" else f"bin/{name}")
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/bash\n{does}\n")
        program.chmod(0o755)


def start(script: Path, folder: Path, **environment: str) -> list[str]:
    """Run a job's script, with the programs of `stand_in`; the states that it writes, without the times."""
    text = re.sub("^export PATH=", f"export PATH={folder}/bin:", script.read_text(), flags=re.M)
    script.write_text(re.sub("^root=.*", f"root={folder}/root", text, flags=re.M))
    slurm = {"SLURM_JOB_ID": "60017", "SLURM_JOB_NODELIST": "n[1-2]", "TMPDIR": str(folder), **environment}
    log = script.parent / f"{slurm['SLURM_JOB_ID']}.log"
    with log.open("a") as output:
        subprocess.run(
            ["bash", script], env={**os.environ, **slurm}, stdout=output, stderr=output, check=False, timeout=60
        )
    assert not list(folder.glob("job-*"))
    return [line.split(" ", 1)[1] for line in log.with_suffix(".state").read_text().splitlines()]


NODE = '[ "$2" = hostnames ] && echo n1 || echo NodeName=n1 NodeAddr=127.0.0.1 NodeHostName=n1'


def launched(script: Path, folder: Path, **environment: str) -> tuple[list[str], str, str]:
    """The command that a script starts, and the GPUs and DOCKER_ARGS it sees: stand-ins print what they are given."""
    say = f'printf "%s\\n" "${{CUDA_VISIBLE_DEVICES-unset}}" "${{DOCKER_ARGS-}}" "${{0##*/}}" "$@" >{folder}/given'
    stand_in(folder, srun=say, run=say, docker=f'echo "$@" >>{folder}/given.docker', scontrol=NODE)
    start(script, folder, **environment)
    gpus, docker_args, *words = (folder / "given").read_text().splitlines()
    return words, gpus, docker_args


@pytest.mark.parametrize("runtime", ["docker", "apptainer", "pyxis"])
@pytest.mark.parametrize("nodes", ["1", "2"])
def test_the_script_for_a_container(tmp_path, runtime, nodes):
    image = {"docker": "recipes:cuda", "apptainer": "/images/recipes.sif", "pyxis": "/images/recipes.sqsh"}[runtime]
    (tmp_path / "my.jsonl").write_text("{}\n")
    done = make(
        SHOWN, {**os.environ, "HF_HOME": f"{tmp_path}/hub"}, OUT=str(tmp_path / "run"), DATA=f"{tmp_path}/my.jsonl",
        GPUS="2", NODES=nodes, RUNTIME=runtime, IMAGE=image,
    )  # fmt: skip
    if runtime == "docker" and nodes == "2":
        assert "RUNTIME=docker: its containers do not see other nodes" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    words, gpus, docker_args = launched(tmp_path / "run" / "slurm" / "sft.sh", tmp_path, SLURM_JOB_GPUS="2,3")
    recipe = words.index(f"{ROOT}/recipes/sft.py")
    assert words[recipe:] == [
        f"{ROOT}/recipes/sft.py", "--data", f"{tmp_path}/my.jsonl", "--model", "qwen2.5-7b", "--output-dir",
        f"{tmp_path}/run",
    ]  # fmt: skip
    if runtime == "pyxis":
        assert f"--container-image={image}" in words
        (mounts,) = (word.partition("=")[2] for word in words if word.startswith("--container-mounts="))
        places = (ROOT, f"{tmp_path}/run", f"{tmp_path}/my.jsonl", f"{tmp_path}/hub")
        assert {f"{place}:{place}" for place in places} <= set(mounts.split(","))
        (passed,) = (word.partition("=")[2] for word in words if word.startswith("--container-env="))
        assert "HF_HOME" in passed.split(",")
    else:
        assert words[words.index("exec") - 1].endswith("run")
        # Two jobs that compile into the same folder can deadlock.
        assert "--env UNSLOTH_COMPILE_LOCATION=/tmp/unsloth" in docker_args
    if runtime == "docker":
        assert gpus == "2,3"
        assert "rm --force job-60017" in (tmp_path / "given.docker").read_text()
    where = ["--master-addr=127.0.0.1", "--master-port=20017"] if nodes == "2" else []  # 20000 + 60017 % 12000
    assert words[:recipe][-2 - len(where) :] == [f"{tmp_path}/root/scripts/launch/processes.py", *where, "2"]
    assert (words[:2] == ["srun", f"--nodes={nodes}"]) == (runtime == "pyxis" or nodes == "2")


TASKS = """while [[ $1 == --* ]]; do shift; done
[ "$1" = bash ] && { %s SLURMD_NODENAME=n2 exec "$@"; }
%s
"""  # srun, of the question whether the nodes see one disk, and of the ranks
OF_RANKS = {  # what they print, and the exit code of srun: the last state of the job, and whether it is queued again
    "killed": (
        "Rank 0 of 2, on n1, failed with exit code 3\nsrun: error: n1: task 0: Exited with exit code 3\n"
        "Rank 1 of 2, on n2, was ended by SIGKILL",
        "failed with exit code 137: Rank 1 of 2, on n2, was ended by SIGKILL",
    ),
    "a limit of memory": (
        "Rank 1 of 2, on n2, was ended by SIGKILL\nslurmstepd: error: Detected 1 oom_kill event in StepId=1.1",
        "failed with exit code 137: Rank 1 of 2, on n2, was ended by SIGKILL, for memory; more is SBATCH=--mem=",
    ),
    "the input, which rank 0 says": (
        "my.jsonl:2: output: missing\nRank 0 of 2, on n1, failed with exit code 2\nsrun: error: n1: task 0: Exited",
        "failed with exit code 2: Rank 0 of 2, on n1: my.jsonl:2: output: missing",
    ),
    "a fault of another rank": (
        "Rank 0 of 2, on n1, failed with exit code 3\nRank 1 of 2 failed:\nTraceback\nValueError: so\n"
        "Rank 1 of 2, on n2, failed with exit code 1: ValueError: so",
        "failed with exit code 1: Rank 1 of 2, on n2: ValueError: so",
    ),
    "a full disk": (
        "/x: no space left\nRank 0 of 2, on n1, failed with exit code 3\n"
        "Rank 1 of 2, on n2, failed with exit code 3: Rank 1 ended, since another rank did",
        "failed with exit code 3: Rank 0 of 2, on n1: /x: no space left",
    ),
    "a node": (
        "Rank 0 of 2, on n1, failed with exit code 3\nsrun: error: Node failure on n2",
        "requeued, to resume from its checkpoint, since it lost a node (srun: error: Node failure on n2)",
    ),
}


def test_of_several_nodes_the_state_names_the_rank_that_failed_and_a_lost_node_queues_the_job_again(tmp_path):
    done = make(SHOWN, dict(os.environ), OUT=str(tmp_path / "run"), MODEL="tiny", DATA=None, NODES="2")
    assert done.returncode == 0, done.stderr
    script, logs = tmp_path / "run" / "slurm" / "sft.sh", tmp_path / "run" / "slurm"
    answers = f'[ "$1" = requeue ] && touch {tmp_path}/requeued; {NODE}'
    for fault, (printed, state) in OF_RANKS.items():
        error = "another rank ended" if fault == "a node" else "no space left" if fault == "a full disk" else ""
        (tmp_path / "run" / "run.json").write_text(json.dumps({"status": "failed", "error": error}, indent=2))
        stand_in(tmp_path, srun=TASKS % ("", f"echo {shlex.quote(printed)}; exit 1"), scontrol=answers)
        (tmp_path / "root" / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / ".venv" / "bin" / "python").touch()
        assert start(script, tmp_path)[-1] == state, fault
        assert (tmp_path / "requeued").exists() == (fault == "a node")
    # Preempted before there is a run, twice: by TERM for the ranks alone, which Slurm's record of the job explains.
    (tmp_path / "run" / "run.json").unlink()
    answers = f'[ "$2" = job ] && echo JobId=60017 PreemptTime=2026-01-02T03:04:05 || {{ {NODE}; }}'
    stand_in(tmp_path, srun=TASKS % ("", "echo Stopped by SIGTERM before training began; exit 0"), scontrol=answers)
    for _ in range(2):
        assert start(script, tmp_path)[-1] == "requeued, to resume from its checkpoint"
    stand_in(tmp_path, srun="kill -9 $$", scontrol=answers)  # as the question ends whose task got TERM
    assert start(script, tmp_path)[-1] == "requeued, to resume from its checkpoint"
    stand_in(tmp_path, srun=TASKS % (f"rm {logs}/*.seen;", "exit 0"))
    assert start(script, tmp_path, SEEN_SECONDS="1")[-1] == (
        f"failed: node n2 does not see {tmp_path}/run of the first node: put it on a disk that all nodes share"
    )
    (tmp_path / "root" / ".venv" / "bin" / "python").unlink()
    stand_in(tmp_path, srun=TASKS % ("", "exit 0"))
    assert "node n2 does not see" in start(script, tmp_path, SEEN_SECONDS="1")[-1]


def test_two_jobs_whose_numbers_give_one_port_take_two(tmp_path):
    done = make(SHOWN, dict(os.environ), OUT=str(tmp_path / "run"), MODEL="tiny", DATA=None, NODES="2")
    assert done.returncode == 0, done.stderr
    with ExitStack() as stack:
        with suppress(OSError):  # another program has it
            stack.enter_context(socket.create_server(("127.0.0.1", 20017)))
        words, _, _ = launched(tmp_path / "run" / "slurm" / "sft.sh", tmp_path)
    (port,) = (word.partition("=")[2] for word in words if word.startswith("--master-port="))
    assert 20017 < int(port) < 20050


def test_gpus_that_sbatch_gets_in_its_own_words_are_requested_once(tmp_path):
    own = {"SBATCH": "--gres=gpu:h200:8", "GPUS": "8", "NODES": "2"}
    done = make(SHOWN, {**os.environ, "NCCL_SOCKET_IFNAME": "ib0", "RANKS_TIMEOUT": "60"}, OUT=str(tmp_path), **own)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --gres=gpu:h200:8\n" in done.stdout
    assert "--gpus-per-node" not in done.stdout
    assert {"per_node=8", "export NCCL_SOCKET_IFNAME=ib0", "export RANKS_TIMEOUT=60"} <= set(done.stdout.splitlines())


def test_a_container_of_a_job_without_gpus_gets_none(tmp_path):
    done = make(SHOWN, dict(os.environ), OUT=str(tmp_path / "run"), GPUS=None, RUNTIME="docker", IMAGE="recipes:cpu")
    assert done.returncode == 0, done.stderr
    assert launched(tmp_path / "run" / "slurm" / "sft.sh", tmp_path)[1] == ""


# --- what a state means -------------------------------------------------------------------------------------------

STATES = {
    "123|PENDING|Resources": "queued (Resources), was requeued, to resume from its checkpoint",
    "123|RUNNING|None": "requeued, to resume from its checkpoint",
    "123|CANCELLED|None": "cancelled; requeued, to resume from its checkpoint",
    "123|TIMEOUT|TimeLimit": "timeout; last state: requeued, to resume from its checkpoint",
    "9|RUNNING|None": "killed, or its node failed; last state: requeued, to resume from its checkpoint",
}


@pytest.mark.parametrize("queue", STATES)
def test_the_state_of_slurm_and_that_of_the_job_make_one_line(tmp_path, queue):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{queue}'\n")
    (tmp_path / "squeue").chmod(0o755)
    logs = tmp_path / "run" / "slurm"
    logs.mkdir(parents=True)
    jobs = [{"job": "123", "name": "sft", "run": ""}, {"job": "124", "name": "dpo", "run": ""}]
    (logs / "jobs.json").write_text(json.dumps(jobs))
    (logs / "123.state").write_text("2026-01-02T03:04:05 requeued, to resume from its checkpoint\n")
    done = make(STATUS, {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, OUT=str(tmp_path / "run"))
    first, second = (line for line in done.stdout.splitlines() if line.startswith("  "))
    assert STATES[queue] in first
    assert second == "  124  dpo  never ran: cancelled in the queue"
