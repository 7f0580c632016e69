"""The steps of a stage, each a process of its own: train, merge, evaluate. What is done already is not done again."""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.data.rows import find_source, source_identity, source_sha256
from common.environment import ROOT, code_sha256, installed_lock
from common.errors import STOPPED, InputError, Stopped
from common.lm.adapter import CONFIG
from common.lm.hub import MERGE_RECORD, READS_TEXT, Model, contents, find_model
from common.run.files import read_object
from common.run.stopping import Stop

EVALUATION = ("scripts/evaluate.py", "scripts/evaluation", "recipes/common/rewards")  # the code that measures
Figures = dict[str, dict[str, Any]]  # by held-out file, by what is measured


@dataclass(frozen=True)
class Plan:
    """What all stages of a pipeline share.

    Args:
        folder: the pipeline's.
        policy_files: held-out files that score a policy.
        reward_files: held-out pairs and ratings, which judge a reward model.
        eval_words: more arguments for scripts/evaluate.py.
        stop: whether the pipeline is to end.
    """

    folder: Path
    policy_files: list[str]
    reward_files: list[str]
    eval_words: list[str]
    stop: Stop


@dataclass(frozen=True)
class Done:
    """A stage that is finished, or the start.

    Args:
        model: what the next stage starts from.
        seconds: of training.
        figures: of the policy on held-out files; empty after `reward`, which changes none.
        judged: the report on a reward model, by held-out file.
        scored: of `ppo`, the mean score of its own held-out prompts before and after, and how many they are.
    """

    name: str
    folder: Path
    model: str
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    judged: Figures = field(default_factory=dict)
    scored: dict[str, Any] = field(default_factory=dict)


class StepFailed(Exception):
    """A step of a stage ended with another exit code than 0 and 75; the pipeline ends with the same code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def start_from(model: str, plan: Plan) -> Done:
    """The model before the first stage, and how it does on the held-out files."""
    folder = plan.folder / f"start-{digest(contents(find_model(model)))}"
    return Done("start", folder, model, figures=evaluate("start", model, folder, plan))


def run_stage(name: str, words: list[str], source: str, before: Done, plan: Plan) -> Done:
    """Train, merge and evaluate, as far as it is not done already.

    Raises StepFailed or Stopped where a step ends early, InputError where the folder holds what was made of another
    base.
    """
    base = find_model(before.model)
    reward_model = before.folder / "adapter" if before.name == "reward" else None
    folder = plan.folder / f"{name}-{address(name, words, source, base, reward_model)}"
    record = folder / "run.json"
    if not (record.is_file() and read_object(record)["status"] == "done"):
        ours = ["--model", before.model, "--data", source, "--output-dir", str(folder)]
        ours += ["--reward-model", str(reward_model)] if reward_model else []
        run(f"{name}: train", ["recipes", f"{name}.py", *ours, *words], plan)
    trained = read_object(record)
    if name == "reward":
        judged = judge(folder, plan) if plan.reward_files else {"held out by the run": trained.get("report") or {}}
        return Done(name, folder, before.model, trained["seconds"], judged=judged)
    merged = folder / "merged"
    if not (merged / MERGE_RECORD).is_file():
        adapter = ["--adapter", str(folder / "adapter"), "--model", before.model, "--output-dir", str(merged)]
        run(f"{name}: merge", ["scripts", "merge.py", *adapter], plan)
    made_of = read_object(merged / MERGE_RECORD)
    if made_of["base"] != contents(base):
        raise InputError(f"{merged}: merged into {made_of['base'][:16]}, not into {before.model}; remove {folder}")
    figures = evaluate(name, str(merged), folder, plan)
    return Done(name, folder, str(merged), trained["seconds"], figures, scored=trained.get("held_out") or {})


def address(name: str, words: list[str], source: str, base: Model, reward_model: Path | None) -> str:
    """The hash of all that decides a stage's outcome; files and folders that its arguments name count by contents."""
    pieces = [Path(piece) for word in words for piece in re.split("[=:,]", word) if piece]
    return digest(
        name,
        words,
        {str(piece): files_sha256(piece) for piece in pieces if piece.exists()},
        files_sha256(reward_model) if reward_model else None,
        source_identity(find_source(source)),
        contents(base),
        getattr(base.card, name) if base.card else None,
        installed_lock(),
    )


def made_of(word: str) -> str | None:
    """A word of a command; of a folder what is in it, by its contents."""
    if (Path(word) / "config.json").is_file():
        return contents(find_model(f"{word}/"))
    return files_sha256(Path(word)) if Path(word).is_dir() else word


def files_sha256(path: Path) -> str | None:
    """One hash over a file, or over what a folder computes: that of a model or an adapter, or of a run's adapter."""
    if path.is_file():
        return source_sha256([path])
    names = ("*.safetensors", "config.json", CONFIG, "head.json", *READS_TEXT)
    return source_sha256(
        sorted(file for name in names for place in (path, path / "adapter") for file in place.glob(name))
    )


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def evaluate(name: str, model: str, folder: Path, plan: Plan) -> Figures:
    """The figures of a policy on the held-out files."""
    results = measure(f"{name}: evaluate", ["--model", model], plan.policy_files, folder, plan)
    return {data: result["figures"]["all"] for data, result in results.items()}


def judge(folder: Path, plan: Plan) -> Figures:
    """The report on the reward model in the run `folder`, by held-out file."""
    words = ["--reward-model", str(folder / "adapter")]
    results = measure("reward: evaluate", words, plan.reward_files, folder, plan)
    return {data: result["report"] for data, result in results.items()}


def measure(what: str, words: Sequence[str], files: list[str], folder: Path, plan: Plan) -> dict[str, Any]:
    """What scripts/evaluate.py finds on the files: now, or before on the same files with the same arguments."""
    if not files:
        return {}
    identities = {file: source_identity(find_source(file)) for file in files}
    measured = [made_of(word) for word in words]
    key = digest(measured, plan.eval_words, identities, installed_lock(), code_sha256(*EVALUATION))
    written = folder / f"evaluation-{key}.json"
    if not written.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["scripts", "evaluate.py", *words, "--data", *files, "--json", str(written), *plan.eval_words]
        run(what, command, plan)
    return read_object(written)


def run(what: str, words: list[str], plan: Plan) -> None:
    """Run a recipe or a script, WORDS being its folder, name and arguments; what it prints is shown as it comes.

    When the pipeline is to stop, so is it. Raises Stopped where it was, else StepFailed with its exit code and the last
    line of its errors.
    """
    command = [sys.executable, str(ROOT / words[0] / words[1]), *words[2:]]
    print(f"== {what}: {shlex.join(command)}", flush=True)
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "PIPELINE_STAGE": what},  # a run then proposes no next command
        start_new_session=words[0] == "scripts",  # a recipe handles Ctrl-C; a script would end in a traceback
    )
    last = ""

    def pass_on_errors() -> None:
        nonlocal last
        for line in process.stderr or ():
            last = line.strip(" │\n") if re.search(r"\w", line) else last
            if not line.startswith("Stopped by "):  # the pipeline's own last line has it
                sys.stderr.write(line)

    reader = threading.Thread(target=pass_on_errors)
    reader.start()
    code = plan.stop.wait(process, plan.folder)
    reader.join()
    if code == STOPPED or plan.stop.requested:
        found = re.match(r"Stopped by (?P<reason>.+?) (?P<when>(after|before|while) .+?);", last)
        when = f", {found['when']}" if found else ""
        raise Stopped(plan.stop.requested or (found["reason"] if found else "its own process"), f"in {what}{when}")
    if code < 0:
        last, code = f"killed by {signal.Signals(-code).name}; its last line: {last}", 128 - code
    if code:
        raise StepFailed(f"{what} failed with exit code {code}: {last}\nTo repeat it: {shlex.join(command)}", code)
