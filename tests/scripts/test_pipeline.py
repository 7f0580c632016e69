"""`scripts/pipeline.py`: real stages on the tiny model once, and its book-keeping on stages that only leave files."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tyro
from common.lm.hub import base_sha256
from conftest import ROOT

STEPS = ("--sft-args=--max-steps 25 --sample-prompts 1", "--dpo-args=--max-steps 4 --sample-prompts 1")


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("pipeline", ROOT / "scripts" / "pipeline.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pipeline"] = module
    spec.loader.exec_module(module)
    return module


def pipeline(root: Path, *words, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, root / "scripts" / "pipeline.py", *map(str, words)]
    return subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "recipes"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


def ran(done: subprocess.CompletedProcess) -> list[str]:
    """The steps that were run, such as "dpo: train"."""
    return [line[3:].rpartition(": /")[0] for line in done.stdout.splitlines() if line.startswith("== ")]


# Two real stages.


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    files = []
    for name in ("heldout.jsonl", "preferences.jsonl"):
        lines = (ROOT / "data_samples" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        files.append(folder / name)
        files[-1].write_text("".join(lines[:24]), encoding="utf-8")
    words = ["--stages", "sft,dpo", "--output-dir", folder / "run", "--eval-data", *files, *STEPS]
    done = pipeline(ROOT, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", words, done


@pytest.mark.slow
def test_every_stage_starts_from_the_merge_of_the_one_before(staged):
    folder, _, done = staged
    assert ran(done) == [
        "start: evaluate",
        *("sft: train", "sft: merge", "sft: evaluate"),
        *("dpo: train", "dpo: merge", "dpo: evaluate"),
    ]
    (sft,), (dpo,) = folder.glob("sft-*"), folder.glob("dpo-*")
    bases = [json.loads((run / "run.json").read_text(encoding="utf-8"))["matters"]["base"] for run in (sft, dpo)]
    assert bases == [base_sha256(ROOT / "data_samples" / "tiny"), base_sha256(sft / "merged")]
    assert len({*bases, base_sha256(dpo / "merged")}) == 3
    for run in (sft, dpo):
        assert json.loads((run / "merged" / "merge.json").read_text(encoding="utf-8"))["check"]["tokens"] > 0


@pytest.mark.slow
def test_the_report_has_every_stage_and_its_change(staged):
    folder, _, done = staged
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    start, sft, dpo = report["stages"]
    assert [stage["stage"] for stage in report["stages"]] == ["start", "sft", "dpo"]
    assert start["change"] is None
    for before, after in ((start, sft), (sft, dpo)):
        for data, figures in after["figures"].items():
            for figure, value in figures.items():
                assert after["change"][data][figure] == pytest.approx(value - before["figures"][data][figure])
    questions, pairs = start["figures"]
    assert start["figures"][questions]["keeps the form"] < 0.1 < sft["figures"][questions]["keeps the form"]
    assert start["figures"][pairs]["rows"] == 24
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "| held out |  | start | sft | dpo |" in markdown
    gain = sft["change"][questions]["keeps the form"] * 100
    assert f"({gain:+.1f})" in markdown
    assert f"({gain:+.1f})" in done.stdout


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_what_is_missing_is(staged):
    folder, words, _ = staged
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*-*/**/*")}
    again = pipeline(ROOT, *words)
    assert again.returncode == 0, again.stderr
    assert ran(again) == []
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*-*/**/*")} == written
    (dpo,) = folder.glob("dpo-*")
    before = base_sha256(dpo / "merged")
    shutil.rmtree(dpo / "merged")
    mended = pipeline(ROOT, *words)
    assert mended.returncode == 0, mended.stderr
    assert ran(mended) == ["dpo: merge"]
    assert base_sha256(dpo / "merged") == before


@pytest.mark.slow
def test_an_adapter_of_another_parent_is_refused(staged, tmp_path):
    folder, words, _ = staged
    (sft,), (dpo,) = folder.glob("sft-*"), folder.glob("dpo-*")
    # The adapter of the DPO stage, and the model before SFT, by hand.
    command = [sys.executable, ROOT / "scripts" / "merge.py", "--adapter", dpo / "adapter", "--model", "tiny"]
    done = subprocess.run([*command, "--output-dir", tmp_path / "m"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "an adapter fits its own base only" in done.stderr
    assert not (tmp_path / "m").exists()
    # In the pipeline's own folder: the SFT run, whose base is the start, in the place of the DPO run.
    planted = tmp_path / "run"
    shutil.copytree(folder, planted)
    shutil.rmtree(planted / dpo.name)
    shutil.copytree(sft, planted / dpo.name, ignore=shutil.ignore_patterns("merged"))
    words = [planted if word == folder else word for word in words]
    done = pipeline(ROOT, *words)
    assert done.returncode == 2, done.stdout
    assert "dpo: merge failed with exit code 2" in done.stderr
    assert "an adapter fits its own base only" in done.stderr
    # And once merged onto that base.
    shutil.copytree(sft / "merged", planted / dpo.name / "merged")
    done = pipeline(ROOT, *words)
    assert done.returncode == 2
    assert "merged into" in done.stderr


# What is measured on held-out data that has no right and wrong.


@pytest.fixture(scope="module")
def evaluate():
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "scripts" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate"] = module
    spec.loader.exec_module(module)
    return module


def test_the_loss_on_conversations_is_that_of_what_the_assistant_says(evaluate, tokenizer):
    import torch
    from common.data.rows import Faults
    from common.lm.chat import tokenize
    from transformers import AutoModelForCausalLM

    rows = evaluate.read([ROOT / "data_samples" / "sft.jsonl"])[:2]
    assert all(isinstance(row, evaluate.Conversation) for row in rows)
    assert len(rows[0].messages) == 4  # the assistant speaks twice
    examples = list(tokenize(tokenizer, rows, 512, Faults()))
    model = AutoModelForCausalLM.from_pretrained(ROOT / "data_samples" / "tiny", dtype=torch.float32).eval()
    total = count = 0
    for example in examples:  # as the trainer does: labels of -100 where nothing is learned
        ids, mask = torch.tensor([example.input_ids.tolist()]), torch.tensor([example.completion_mask.tolist()])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss) * int(mask.sum())
        count += int(mask.sum())
    figures = evaluate.imitate(model, tokenizer, examples)["figures"]["all"]
    assert figures == {"rows": 2, "loss (nats)": pytest.approx(total / count, abs=1e-4)}


def test_without_a_form_the_end_of_an_answer_counts(evaluate):
    gold = evaluate.gold("72")
    assert evaluate.is_right("", "48 + 24 = 72\n#### 72", gold)
    assert not evaluate.is_right("", "48 + 24 = 72\n#### 71", gold)
    assert not evaluate.is_right(evaluate.Args().form, "48 + 24 = 72\n#### 72", gold)


# What is refused.


def test_make_passes_every_variable_on(module):
    wanted = {
        "stages": "sft,dpo",
        "model": "a b",
        "sft_data": "it's",
        "dpo_data": "d",
        "math_data": "m",
        "output_dir": "o p",
        "sft_args": "--no-load-in-4bit",
        "dpo_args": "--columns 'prompt=a b' --beta 1",
        "grpo_args": "--rewards math",
        "eval_args": "--samples 2",
    }
    stages = ("sft", "dpo", "grpo", "eval")
    variables = {"output_dir": "OUT"} | {f"{name}_args": f"ARGS_{name.upper()}" for name in stages}
    words = [f"{variables.get(name, name.upper())}={value}" for name, value in wanted.items()]
    done = subprocess.run(
        ["make", "-n", "pipeline", *words, "EVAL_DATA=x 'y z'"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    typed = shlex.split(done.stdout.partition("scripts/pipeline.py")[2].replace("\\\n", " "))
    assert tyro.cli(module.Args, args=typed) == module.Args(**wanted, eval_data=("x", "y z"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages", "sft,dop"], "(did you mean dpo?). There are"),
        (["--stages", "sft,dpo", "--until", "grpo"], "--until grpo: it is none of --stages sft,dpo"),
        (["--stages", ""], "expected one or more of sft, dpo, grpo"),
        (["--stages", "dpo,dpo"], "each once"),
        (["--stages", "dpo,sft"], "put sft first"),
        (["--dpo-args=--output-dir x"], "the pipeline itself sets"),
        (["--sft-args=--no-use-peft"], "the pipeline itself sets"),
        (["--sft-args=--columns 'a"], "No closing quotation"),
        (["--sft-data", "data_samples/sft.jsonl"], "stage dpo: no --dpo-data (DPO_DATA)"),
        (["--stages", "sft", "--sft-data", "data_samples/arithmetic.jsonl"], "unknown format"),
        (["--model", "tiyn"], "did you mean tiny?"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(words, said, tmp_path):
    done = pipeline(ROOT, *words, "--output-dir", tmp_path / "run")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# The book-keeping, in a copy of the repository whose recipes only leave the files that real ones leave.

RECIPE = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output-dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
print("one line\\nlast words", file=sys.stderr, flush=True)
if os.environ.get("WAIT") == Path(sys.argv[0]).stem:
    (folder / "started").touch()
    time.sleep(60)
if os.environ.get("FAILS") == Path(sys.argv[0]).stem:
    (folder / "run.json").write_text(json.dumps({"status": "failed"}))
    sys.exit(int(os.environ["CODE"]))
(folder / "adapter").mkdir()
(folder / "adapter" / "weights").write_text(Path(sys.argv[4]).read_text() + " ".join(sys.argv[7:]))
(folder / "run.json").write_text(json.dumps({"status": "done", "seconds": 1.0}))
"""
MERGE = """
import json, shutil, sys
from pathlib import Path
from common.lm.hub import contents, find_model
_, _, adapter, _, model, _, folder = sys.argv
Path(folder).mkdir()
shutil.copy(find_model(model).source + "/config.json", folder)
weights = contents(find_model(model)) + Path(adapter, "weights").read_text()
Path(folder, "model.safetensors").write_text(weights)
Path(folder, "merge.json").write_text(json.dumps({"base": contents(find_model(model)), "card": "tiny"}))
"""
EVALUATE = """
import json, sys
data = sys.argv[sys.argv.index("--data") + 1 : sys.argv.index("--json")]
figures = {name: {"figures": {"all": {"rows": 1, "greedy right": 0.5}}} for name in data}
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps(figures))
"""


@pytest.fixture
def copy(tmp_path):
    root = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "recipes" / "common", root / "recipes" / "common", ignore=ignored)
    shutil.copytree(ROOT / "recipes" / "models", root / "recipes" / "models")
    (root / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "pipeline.py", root / "scripts")
    for name in ("sft", "dpo", "grpo"):
        (root / "recipes" / f"{name}.py").write_text(RECIPE)
    (root / "scripts" / "merge.py").write_text(MERGE)
    (root / "scripts" / "evaluate.py").write_text(EVALUATE)
    shutil.copytree(ROOT / "data_samples", root / "data_samples", ignore=shutil.ignore_patterns("formats"))
    return root


def whole(*names: str) -> list[str]:
    return [f"{name}: {step}" for name in names for step in ("train", "merge", "evaluate")]


def test_a_change_runs_its_stage_and_what_follows(copy):
    first = pipeline(copy)
    assert first.returncode == 0, first.stderr
    assert ran(first) == ["start: evaluate", *whole("sft", "dpo", "grpo")]
    assert ran(pipeline(copy)) == []
    assert ran(pipeline(copy, "--dpo-args=--beta 0.2")) == whole("dpo", "grpo")
    assert ran(pipeline(copy, "--stages", "sft,grpo")) == whole("grpo")  # another parent
    (copy / "my.py").write_text("def shorter(): ...\n")
    words = ["--stages", "sft,dpo,grpo", "--grpo-args=--rewards math my.py:shorter=0.5"]
    assert ran(pipeline(copy, *words)) == whole("grpo")
    (copy / "my.py").write_text("def shorter(): return 1\n")
    assert ran(pipeline(copy, *words)) == whole("grpo")
    lines = (copy / "data_samples" / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (copy / "data_samples" / "sft.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    assert ran(pipeline(copy)) == whole("sft", "dpo", "grpo")
    # Other held-out data: nothing is trained again.
    evaluated = pipeline(copy, "--eval-data", "data_samples/arithmetic.jsonl")
    assert ran(evaluated) == [f"{name}: evaluate" for name in ("start", "sft", "dpo", "grpo")]


def test_jobs_that_each_end_after_a_stage_make_what_one_pipeline_makes(copy):
    """As scripts/slurm/submit.py starts them."""
    assert ran(pipeline(copy, "--until", "sft")) == ["start: evaluate", *whole("sft")]
    assert ran(pipeline(copy, "--until", "dpo")) == whole("dpo")
    assert ran(pipeline(copy, "--until", "grpo")) == whole("grpo")
    assert ran(pipeline(copy)) == []


@pytest.mark.parametrize("code", [75, 3, 1])
def test_a_recipe_that_ends_early_ends_the_pipeline_which_goes_on_there(copy, code):
    done = pipeline(copy, FAILS="dpo", CODE=str(code))
    assert done.returncode == code
    last = done.stderr.splitlines()[-1]
    if code == 75:
        assert last == "dpo: train: stopped; the same command again goes on from here"
    else:
        assert f"dpo: train failed with exit code {code}: last words" in done.stderr
        assert last.startswith("To repeat it: ")
        assert "recipes/dpo.py --model" in last
    assert ran(pipeline(copy)) == whole("dpo", "grpo")


def start(copy: Path) -> subprocess.Popen:
    """A pipeline whose recipe is at work."""
    command = [sys.executable, copy / "scripts" / "pipeline.py", "--stages", "sft"]
    environment = {**os.environ, "PYTHONPATH": str(copy / "recipes"), "WAIT": "sft"}
    process = subprocess.Popen(command, cwd=copy, env=environment, stdout=-1, stderr=-1, text=True)
    while not list(copy.glob("outputs/*/sft-*/started")):
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("told", ["SIGTERM", "SIGUSR1", "SIGINT", "STOP"])
def test_what_stops_the_pipeline_reaches_the_recipe(copy, told):
    process = start(copy)
    if told == "STOP":
        (copy / "outputs" / "pipeline-tiny" / "STOP").touch()
    else:
        process.send_signal(signal.Signals[told])  # to it alone, as docker does
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75
    assert errors.splitlines()[-1] == "sft: train: stopped; the same command again goes on from here"


def test_a_recipe_that_was_killed_is_named(copy):
    process = start(copy)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 137
    assert "sft: train failed with exit code 137: killed by SIGKILL" in errors
