"""`scripts/pipeline.py`: real stages on the tiny model once, and its book-keeping on stages that only leave files."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common.errors import InputError
from common.lm.hub import base_sha256
from conftest import ROOT, read_jsonl

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


# What is held out.


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(module, folder: Path, eval_data: tuple[str, ...] = (), **settings):
    args = module.Args(**settings)
    names = [name for name, stage in module.STAGES.items() if getattr(args, stage.data)]
    data = {name: module.read_data(name, args, own_data=True) for name in names}
    return module.hold_out(data, eval_data, True, folder)


def test_a_twentieth_of_the_prompts_is_held_out_of_all_stages(module, tmp_path, capsys):
    problems = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(100)]
    # The same questions as examples, every one twice, and some more.
    examples = [{"question": row["question"], "answer": "a"} for row in problems * 2]
    examples += [{"question": f"Say {n}.", "answer": "b"} for n in range(60)]
    settings = {
        "sft_data": write(tmp_path / "examples.jsonl", examples),
        "sft_args": "--max-steps 3 --columns prompt=question completion=answer --seed 1",
        "math_data": write(tmp_path / "problems.jsonl", problems),
    }
    data, files = prepared(module, tmp_path / "p", **settings)
    assert [Path(file).name for file in files] == ["sft-heldout.jsonl", "grpo-heldout.jsonl"]
    held = [read_jsonl(Path(file)) for file in files]
    assert [len(rows) for rows in held] == [8, 5]  # of 160 and of 100 prompts
    assert set(held[0][0]) == {"prompt", "completion"}
    assert set(held[1][0]) == {"question", "answer"}
    asked = {row["prompt"] for row in held[0]} | {row["question"] for row in held[1]}
    trained = [read_jsonl(Path(data[name].source)) for name in ("sft", "grpo")]
    assert not asked & ({row["prompt"] for row in trained[0]} | {row["question"] for row in trained[1]})
    assert len(trained[1]) == 100 - len(asked & {row["question"] for row in problems})
    assert data["sft"].words == ["--max-steps", "3", "--seed", "1"]  # the columns have their names already
    assert "8 prompts" in capsys.readouterr().out

    # The same rows in another order: the same are held out.
    write(tmp_path / "problems.jsonl", problems[::-1])
    _, files = prepared(module, tmp_path / "q", **settings)
    assert {row["question"] for row in read_jsonl(Path(files[1]))} == {row["question"] for row in held[1]}


def test_at_least_one_and_at_most_two_hundred_are_held_out(module, tmp_path):
    for count, held in ((3, 1), (5000, 200)):
        rows = [{"prompt": f"{n}?", "answer": str(n)} for n in range(count)]
        _, (file,) = prepared(module, tmp_path / "p", math_data=write(tmp_path / "rows.jsonl", rows))
        assert len(read_jsonl(Path(file))) == held


def test_rows_that_ask_what_is_held_out_are_left_out(module, tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(10)]
    questions = write(tmp_path / "questions.jsonl", [{"prompt": " 3? ", "answer": "3"}])
    data, files = prepared(module, tmp_path, (questions,), dpo_data=write(tmp_path / "rows.jsonl", rows))
    assert files == [questions]
    assert [row["prompt"] for row in read_jsonl(Path(data["dpo"].source))] == [f"{n}?" for n in range(10) if n != 3]
    other = write(tmp_path / "other.jsonl", [{"prompt": "else?", "answer": "3"}])
    data, _ = prepared(module, tmp_path, (other,), dpo_data=str(tmp_path / "rows.jsonl"))
    assert data["dpo"].source == str(tmp_path / "rows.jsonl")  # as it is
    all_of_them = write(tmp_path / "all.jsonl", rows)
    with pytest.raises(InputError, match="nothing is left to train dpo on"):
        prepared(module, tmp_path, (all_of_them,), dpo_data=str(tmp_path / "rows.jsonl"))


def test_rows_without_an_answer_are_not_held_out(module, tmp_path, capsys):
    rows = [{"prompt": f"{n}?", "tests": "assert True"} for n in range(40)]
    settings = {"math_data": write(tmp_path / "rows.jsonl", rows)}
    with pytest.raises(InputError, match="nothing to score the stages on"):
        prepared(module, tmp_path, **settings)
    assert "nothing is held out" in capsys.readouterr().out
    settings["dpo_data"] = write(
        tmp_path / "pairs.jsonl",
        [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 2 + [{"prompt": "q", "chosen": "a", "rejected": "b"}],
    )
    data, files = prepared(module, tmp_path, **settings)
    assert [Path(file).name for file in files] == ["dpo-heldout.jsonl"]
    assert len(data["grpo"].rows) == 40


def test_the_sample_data_shares_no_prompt_with_its_held_out_files(module, tmp_path):
    data = {name: module.read_data(name, module.Args(), own_data=False) for name in module.STAGES}
    kept, files = module.hold_out(data, (), False, tmp_path)
    assert [Path(file).name for file in files] == list(module.SAMPLES_HELD_OUT)
    assert kept == data


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
