"""`scripts/pipeline.py`: real stages on the tiny model once, and its book-keeping on stages that only leave files."""

import ast
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pipeline as command
import pytest
from common.data.hold_out import prompt_key, read_held_out
from common.errors import InputError
from common.lm.hub import base_sha256
from conftest import ROOT
from in_process import refusal
from stages.chain import SAMPLES, STAGES, stage_data, stage_names, stage_of, stage_words

STEPS = ("--sft-args=--max-steps 25 --sample-prompts 1", "--dpo-args=--max-steps 4 --sample-prompts 1")


def pipeline(root: Path, *words, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, root / "scripts" / "pipeline.py", *map(str, words)]
    path = os.pathsep.join(filter(None, [str(root / "recipes"), environment.pop("PYTHONPATH", "")]))
    return subprocess.run(
        command,
        cwd=root,
        env={**os.environ, **environment, "PYTHONPATH": path},
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
def staged(tmp_path_factory, warm_server):
    folder = tmp_path_factory.mktemp("pipeline")
    files = []
    for name in ("heldout.jsonl", "preferences.jsonl"):
        lines = (ROOT / "data_samples" / name).read_text(encoding="utf-8").splitlines(keepends=True)
        files.append(folder / name)
        files[-1].write_text("".join(lines[:24]), encoding="utf-8")
    words = ["--stages", "sft,dpo", "--output-dir", folder / "run", "--eval-data", *files, *STEPS]
    done = pipeline(ROOT, *words, **warm_server)
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
    assert start["figures"][questions]["follows the format"] < 0.1 < sft["figures"][questions]["follows the format"]
    assert start["figures"][pairs]["rows"] == 24
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "| held out |  | start | sft | dpo |" in markdown
    gain = sft["change"][questions]["follows the format"] * 100
    assert f"({gain:+.1f})" in markdown
    assert f"({gain:+.1f})" in done.stdout


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_what_is_missing_is(staged, warm_server):
    folder, words, _ = staged
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*-*/**/*")}
    again = pipeline(ROOT, *words, **warm_server)
    assert again.returncode == 0, again.stderr
    assert ran(again) == []
    assert {file: file.stat().st_mtime_ns for file in folder.glob("*-*/**/*")} == written
    (dpo,) = folder.glob("dpo-*")
    before = base_sha256(dpo / "merged")
    shutil.rmtree(dpo / "merged")
    again = pipeline(ROOT, *words, **warm_server)
    assert again.returncode == 0, again.stderr
    assert ran(again) == ["dpo: merge"]
    assert base_sha256(dpo / "merged") == before


@pytest.mark.slow
def test_an_adapter_of_another_parent_is_refused(staged, warm_server, tmp_path):
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
    done = pipeline(ROOT, *words, **warm_server)
    assert done.returncode == 2, done.stdout
    assert "dpo: merge failed with exit code 2" in done.stderr
    assert "an adapter fits its own base only" in done.stderr
    # And once merged onto that base.
    shutil.copytree(sft / "merged", planted / dpo.name / "merged")
    done = pipeline(ROOT, *words, **warm_server)
    assert done.returncode == 2
    assert "merged into" in done.stderr


# A real reward model, and PPO by it.


@pytest.mark.slow
def test_ppo_starts_from_the_base_of_its_reward_model_and_is_scored_by_it(warm_server, tmp_path):
    few = "--max-steps {} --per-device-train-batch-size 16 --rollout-batch-size 16 --critic-warmup-steps 1"
    words = ("--stages", "reward,ppo", "--reward-args=--max-steps 20", f"--ppo-args={few.format(3)} --sample-prompts 1")
    done = pipeline(ROOT, *words, "--output-dir", tmp_path, "--eval-args=--max-new-tokens 8", **warm_server)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ran(done) == ["start: evaluate", "reward: train", "reward: evaluate", *whole("ppo")]
    (reward,), (ppo,) = tmp_path.glob("reward-*"), tmp_path.glob("ppo-*")
    runs = [json.loads((run / "run.json").read_text(encoding="utf-8")) for run in (reward, ppo)]
    assert runs[0]["matters"]["base"] == runs[1]["matters"]["base"] == base_sha256(ROOT / "data_samples" / "tiny")
    assert runs[1]["arguments"]["reward_model"]["value"] == str(reward / "adapter")
    _, judged, trained = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["stages"]
    assert judged["report"][str(SAMPLES / "scores-heldout.jsonl")]["rated completions"] == 100
    assert judged["report"][str(SAMPLES / "preferences.jsonl")]["accuracy"] > 0.5
    assert trained["held_out_score"] == runs[1]["held_out"]
    assert trained["change"].keys() == {str(SAMPLES / name) for name in command.SAMPLES_HELD_OUT}
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| reward | scores-heldout (100) | pearson |" in page
    assert f"| ppo | its own prompts ({runs[1]['held_out']['prompts']}) | mean score |" in page
    assert "| held out |  | start | ppo |" in page


@pytest.mark.slow
def test_a_stop_is_announced_once_and_the_same_command_resumes(warm_server, tmp_path):
    """Ctrl-C reaches the pipeline and the recipe, as every process of a terminal."""
    words = [
        "--stages",
        "sft",
        "--output-dir",
        tmp_path,
        "--sft-args=--max-steps 40 --logging-steps 1 --sample-prompts 0",
    ]
    words += ["--eval-data", SAMPLES / "preferences.jsonl"]
    script = [sys.executable, ROOT / "scripts" / "pipeline.py", *words]
    process = subprocess.Popen(
        list(map(str, script)), cwd=ROOT, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    while not list(tmp_path.glob("sft-*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert errors.count("SIGINT: the run stops after this step") == 1
    lines = errors.splitlines()
    assert lines[-1].startswith("Stopped by SIGINT in sft: train, after step ")
    assert lines[-1].endswith(" of 40; the same command resumes from there.")
    assert sum("Stopped by" in line for line in lines) == 1
    done = pipeline(ROOT, *words, **warm_server)
    assert done.returncode == 0, done.stderr
    assert ran(done) == ["sft: train", "sft: merge", "sft: evaluate"]


# What is refused.


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("sft,dpo,grpo", ["sft", "dpo", "grpo"]),
        ("sft reward, ppo", ["sft", "reward", "ppo"]),
        ("reward,ppo", ["reward", "ppo"]),
        ("reward", ["reward"]),
        ("sft,kto,grpo", ["sft", "kto", "grpo"]),
        ("ppo", ["ppo"]),
        ("sft,reward,ppo,dpo", ["sft", "reward", "ppo", "dpo"]),
    ],
)
def test_chains_with_a_sense(text, names):
    assert stage_names(text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft,dop", r"unknown stage 'dop' \(did you mean dpo\?\)\. There are sft, dpo, kto, grpo, reward, ppo\."),
        ("", "expected one or more of sft, dpo, kto, grpo, reward, ppo, each once"),
        ("dpo,dpo", "each once"),
        ("dpo,sft", "put sft first"),
        ("reward,sft", "put sft first"),
        ("reward,dpo,ppo", "put reward last, or directly before ppo"),
        ("reward,grpo", "put reward last, or directly before ppo"),
    ],
)
def test_chains_without_a_sense_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        stage_names(text)


def test_the_arguments_of_a_stage_are_those_of_its_recipe():
    words, given = stage_words("dpo", STAGES["dpo"], "--beta 0.2 --columns 'prompt=a b' chosen=c --no-load-in-4bit")
    assert words == ["--beta", "0.2", "--columns", "prompt=a b", "chosen=c", "--no-load-in-4bit"]
    assert given == {"beta": [0.2], "columns": ["prompt=a b", "chosen=c"], "load_in_4bit": [False]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dpo", "--output-dir x", "--dpo-args: the pipeline itself sets --output-dir; leave it out"),
        ("dpo", "--model=x", "the pipeline itself sets --model"),
        ("dpo", "--output_dir x", "the pipeline itself sets --output-dir"),
        ("sft", "--no-use-peft", "the pipeline itself sets --use-peft"),
        ("reward", "--stand-alone", "the pipeline itself sets --stand-alone"),
        ("ppo", "--reward-model x", "the pipeline itself sets --reward-model"),
        ("sft", "--columns 'a", "No closing quotation"),
        ("dpo", "--betta 0.2", r"--dpo-args: there is no --betta \(did you mean --beta\?\)"),
        ("dpo", "--beta much", "--dpo-args: --beta=much: expected a number"),
    ],
)
def test_arguments_that_a_recipe_would_refuse_are_refused_before_any_stage(name, text, message):
    with pytest.raises(InputError, match=message):
        stage_words(name, stage_of(name, ["reward", "ppo"]), text)


def test_a_reward_model_of_the_users_own_may_be_given_without_the_stage():
    words, _ = stage_words("ppo", stage_of("ppo", ["sft", "ppo"]), "--reward-model outputs/reward")
    assert words == ["--reward-model", "outputs/reward"]


NO_DATA = dict.fromkeys(command.DATA)


@pytest.mark.parametrize(
    ("given", "stages", "data"),
    [
        ({"ppo_data": "p", "reward_data": "r", "math_data": "m"}, "reward,ppo", "p"),
        ({"reward_data": "r", "math_data": "m"}, "reward,ppo", "r"),
        ({"math_data": "m"}, "sft,ppo", "m"),
        ({"ppo_data": "p", "math_data": "m"}, "ppo", "p"),
        ({}, "reward,ppo", "scores.jsonl"),
        ({}, "ppo", "arithmetic-train.jsonl"),
    ],
)
def test_where_ppo_has_its_prompts_from(given, stages, data, tmp_path):
    files = {
        "p": '{"prompt": "a"}',
        "r": '{"prompt": "a", "response": "b", "score": 1}',
        "m": '{"prompt": "a", "answer": "b"}',
    }
    for name, row in files.items():
        (tmp_path / f"{name}.jsonl").write_text(row + "\n")
    sources = NO_DATA | {name: str(tmp_path / f"{file}.jsonl") for name, file in given.items()}
    found = stage_data("ppo", stage_of("ppo", stages.split(",")), {}, sources)
    assert Path(found.source).name == (data if "." in data else f"{data}.jsonl")


def test_the_sample_data_shares_no_prompt_with_its_held_out_files():
    names = ("heldout.jsonl", "preferences.jsonl", "arithmetic.jsonl", "scores-heldout.jsonl")
    held_out = {prompt_key(example) for name in names for example in read_held_out(str(SAMPLES / name))}
    for name in STAGES:
        for chain in ([name], ["reward", "ppo"]):
            if name in chain:
                data = stage_data(name, stage_of(name, chain), {}, NO_DATA)
                assert not held_out & set(map(prompt_key, data.examples)), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages", "sft,dop"], "did you mean dpo?"),
        (["--stages", "sft,dpo", "--until", "grpo"], "--until grpo: expected one of the stages sft,dpo"),
        (["--stage", "sft"], "there is no --stage (did you mean --stages?)"),
        (["--dpo-args=--betta 1"], "did you mean --beta?"),
        (["--sft-data", "data_samples/sft.jsonl"], "stage dpo needs --dpo-data"),
        (["--stages", "sft,ppo", "--sft-data", "data_samples/sft.jsonl"], "stage ppo needs --ppo-data or --math-data"),
        (["--stages", "sft", "--sft-data", "data_samples/arithmetic.jsonl"], "unknown format"),
        (["--stages", "reward", "--reward-data", "data_samples/sft.jsonl"], "unknown format"),
        (["--model", "tiyn"], "did you mean tiny?"),
        (
            ["--stages", "sft", "--eval-data", "data_samples/scores-heldout.jsonl"],
            "there is nothing to score the stages",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_runs(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert message in refusal(command.main, capsys, *words, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The book-keeping, in a copy of the repository whose recipes only leave the files that real ones leave.


def as_weights(text):
    """A file of the form that safetensors have, in ASCII: what a stub wrote is text that the next one reads."""
    import json

    header = json.dumps({"__metadata__": {"weights": text}})
    header += " " * (-len(header) % 65536)
    return len(header).to_bytes(8, "little").decode("ascii") + header


WEIGHTS = inspect.getsource(as_weights)
RECIPE = (
    WEIGHTS
    + """
import json, os, sys, time
from pathlib import Path
name = Path(sys.argv[0]).stem
folder = Path(sys.argv[sys.argv.index("--output-dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
print("one line\\nlast words", file=sys.stderr, flush=True)
if os.environ.get("WAIT") == name:
    (folder / "started").touch()
    time.sleep(60)
if os.environ.get("FAILS") == name:
    (folder / "run.json").write_text(json.dumps({"status": "failed"}))
    sys.exit(int(os.environ["CODE"]))
(folder / "adapter").mkdir()
weights = Path(sys.argv[4]).read_text() + " ".join(sys.argv[7:])
(folder / "adapter" / "adapter_model.safetensors").write_text(as_weights(weights))
record = {"status": "done", "seconds": 1.0, "command": sys.argv}
if name == "ppo":
    record["held_out"] = {"prompts": 7, "before": {"score": 0.25}, "after": {"score": 0.75}}
if name == "reward":
    record["report"] = {"rated completions": 3, "pearson": 0.5}
(folder / "run.json").write_text(json.dumps(record))
sys.exit()
"""
)
MERGE = (
    WEIGHTS
    + """
import json, shutil, sys
from pathlib import Path
from common.lm.hub import contents, find_model
_, _, adapter, _, model, _, folder = sys.argv
Path(folder).mkdir()
shutil.copy(find_model(model).source + "/config.json", folder)
weights = contents(find_model(model)) + Path(adapter, "adapter_model.safetensors").read_text()
Path(folder, "model.safetensors").write_text(as_weights(weights))
Path(folder, "merge.json").write_text(json.dumps({"base": contents(find_model(model)), "card": "tiny"}))
"""
)
EVALUATE = """
import json, sys
data = sys.argv[sys.argv.index("--data") + 1 : sys.argv.index("--json")]
found = {"figures": {"all": {"rows": 1, "greedy right": 0.5}}}
if "--reward-model" in sys.argv:
    found = {"report": {"pairs": 4, "accuracy": 0.75, "accuracy, 95 %": [0.5, 1.0]}}
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps(dict.fromkeys(data, found)))
"""


def arguments_of(recipe: Path) -> str:
    """The source of a recipe's `class Args`, by which the pipeline knows its arguments."""
    source = recipe.read_text(encoding="utf-8")
    args = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return ast.get_source_segment(source, args)


@pytest.fixture
def copy(tmp_path):
    root = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "recipes" / "common", root / "recipes" / "common", ignore=ignored)
    shutil.copytree(ROOT / "recipes" / "models", root / "recipes" / "models")
    shutil.copytree(ROOT / "scripts" / "stages", root / "scripts" / "stages", ignore=ignored)
    shutil.copy(ROOT / "scripts" / "pipeline.py", root / "scripts")
    for name in STAGES:
        recipe = RECIPE + arguments_of(ROOT / "recipes" / f"{name}.py")
        (root / "recipes" / f"{name}.py").write_text(recipe, encoding="utf-8")
    (root / "scripts" / "merge.py").write_text(MERGE)
    (root / "scripts" / "evaluate.py").write_text(EVALUATE)
    shutil.copytree(ROOT / "data_samples", root / "data_samples", ignore=shutil.ignore_patterns("formats"))
    return root


def whole(*names: str) -> list[str]:
    return [f"{name}: {step}" for name in names for step in ("train", "merge", "evaluate")]


@pytest.mark.slow
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


@pytest.mark.slow
def test_jobs_that_each_end_after_a_stage_make_what_one_pipeline_makes(copy):
    """As scripts/slurm/submit.py starts them."""
    assert ran(pipeline(copy, "--until", "sft")) == ["start: evaluate", *whole("sft")]
    assert ran(pipeline(copy, "--until", "dpo")) == whole("dpo")
    assert ran(pipeline(copy, "--until", "grpo")) == whole("grpo")
    assert ran(pipeline(copy)) == []


REWARD = ["reward: train", "reward: evaluate"]


@pytest.mark.slow
def test_a_reward_model_and_ppo_start_from_one_base(copy):
    words = ("--stages", "sft,reward,ppo")
    first = pipeline(copy, *words)
    assert first.returncode == 0, first.stderr
    assert ran(first) == ["start: evaluate", *whole("sft"), *REWARD, *whole("ppo")]
    assert ran(pipeline(copy, *words)) == []
    (sft,), (reward,), (ppo,) = (
        list((copy / "outputs" / "pipeline-tiny").glob(f"{n}-*")) for n in ("sft", "reward", "ppo")
    )
    commands = [json.loads((run / "run.json").read_text())["command"] for run in (reward, ppo)]
    for given in commands:
        assert copy / given[2] == sft / "merged"
        assert Path(given[4]).name == "scores.jsonl"
    assert "--reward-model" not in commands[0]
    assert copy / commands[1][commands[1].index("--reward-model") + 1] == reward / "adapter"
    assert not (reward / "merged").exists()
    report = json.loads((copy / "outputs" / "pipeline-tiny" / "report.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == ["start", "sft", "reward", "ppo"]
    assert {name: found["accuracy"] for name, found in report["stages"][2]["report"].items()} == {
        str(copy / "data_samples" / name): 0.75 for name in ("preferences.jsonl", "scores-heldout.jsonl")
    }
    assert report["stages"][3]["held_out_score"]["after"] == {"score": 0.75}
    page = (copy / "outputs" / "pipeline-tiny" / "report.md").read_text()
    assert "| held out |  | start | sft | ppo |" in page
    assert "| reward | scores-heldout (4) | accuracy | 0.750 |" in page
    assert "| reward | scores-heldout (4) | accuracy, 95 % | 0.500 to 1.000 |" in page
    assert "| ppo | its own prompts (7) | mean score | 0.250 -> 0.750 |" in page
    # Another reward model is another PPO; another PPO is no other reward model.
    assert ran(pipeline(copy, *words, "--ppo-args=--kl-coef 0.1")) == whole("ppo")
    assert ran(pipeline(copy, *words, "--reward-args=--seed 1")) == [*REWARD, *whole("ppo")]


@pytest.mark.slow
def test_ppo_without_a_reward_model_has_its_reward_functions(copy):
    done = pipeline(copy, "--stages", "ppo", "--eval-data", "data_samples/arithmetic.jsonl")
    assert ran(done) == ["start: evaluate", *whole("ppo")]
    (ppo,) = (copy / "outputs" / "pipeline-tiny").glob("ppo-*")
    given = json.loads((ppo / "run.json").read_text())["command"]
    assert Path(given[4]).name == "arithmetic-train.jsonl"
    assert "--reward-model" not in given


@pytest.mark.slow
def test_stages_that_no_policy_can_be_scored_on_have_their_own_report(copy):
    """Scores alone: nothing to evaluate a policy on, but the reward model has held-out scores, PPO its prompts."""
    rows = [{"prompt": f"{n}?", "response": "a", "score": n} for n in range(40)]
    (copy / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = pipeline(copy, "--stages", "reward,ppo", "--reward-data", "scores.jsonl")
    assert done.returncode == 0, done.stderr
    assert ran(done) == [*REWARD, "ppo: train", "ppo: merge"]
    held_out = copy / "outputs" / "pipeline-tiny" / "data" / "reward-heldout.jsonl"
    prompts = {row["prompt"] for row in map(json.loads, held_out.read_text().splitlines())}
    assert len(prompts) == 2
    for name in ("reward", "ppo"):
        trained = held_out.with_name(f"{name}-train.jsonl").read_text()
        assert len(trained.splitlines()) == 38
        assert not any(json.loads(line)["prompt"] in prompts for line in trained.splitlines())
    # Held-out data of another kind: the reward model's own report stands in.
    done = pipeline(copy, "--stages", "reward", "--eval-data", "data_samples/arithmetic.jsonl")
    assert "held out by the run (3)" in (copy / "outputs" / "pipeline-tiny" / "report.md").read_text()


@pytest.mark.slow
def test_jobs_that_each_end_after_a_stage_work_with_a_reward_model_too(copy):
    words = ("--stages", "reward,ppo", "--until")
    assert ran(pipeline(copy, *words, "reward")) == ["start: evaluate", *REWARD]
    assert ran(pipeline(copy, *words, "ppo")) == whole("ppo")


@pytest.mark.slow
def test_a_file_or_a_folder_that_arguments_name_counts_by_its_contents(copy):
    (copy / "mine").mkdir()
    weights = copy / "mine" / "adapter_model.safetensors"
    for text, stages in (("a", whole("ppo")), ("b", whole("ppo")), ("b", [])):
        weights.write_text(as_weights(text))
        words = ("--stages", "ppo", "--ppo-args=--reward-model mine", "--eval-data", "data_samples/arithmetic.jsonl")
        assert [step for step in ran(pipeline(copy, *words)) if not step.startswith("start")] == stages


@pytest.mark.parametrize("code", [75, pytest.param(3, marks=pytest.mark.slow)])
def test_a_recipe_that_ends_early_ends_the_pipeline_which_resumes_there(copy, code):
    done = pipeline(copy, "--stages", "sft,dpo", FAILS="dpo", CODE=str(code))
    assert done.returncode == code
    last = done.stderr.splitlines()[-1]
    if code == 75:
        assert last == "Stopped by its own process in dpo: train; the same command resumes from there."
    else:
        assert f"dpo: train failed with exit code {code}: last words" in done.stderr
        assert last.startswith("To repeat it: ")
        assert "recipes/dpo.py --model" in last
    assert ran(pipeline(copy, "--stages", "sft,dpo")) == whole("dpo")


def start(copy: Path) -> subprocess.Popen:
    """A pipeline whose recipe is at work."""
    command = [sys.executable, copy / "scripts" / "pipeline.py", "--stages", "sft"]
    environment = {**os.environ, "PYTHONPATH": str(copy / "recipes"), "WAIT": "sft"}
    process = subprocess.Popen(command, cwd=copy, env=environment, stdout=-1, stderr=-1, text=True)
    while not list(copy.glob("outputs/*/sft-*/started")):
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["SIGTERM", "SIGUSR1", "SIGINT", "the file STOP"])
def test_what_stops_the_pipeline_reaches_the_recipe(copy, reason):
    process = start(copy)
    if "STOP" in reason:
        (copy / "outputs" / "pipeline-tiny" / "STOP").touch()
    else:
        process.send_signal(signal.Signals[reason])  # to it alone, as docker does
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75
    assert errors.splitlines()[-1] == f"Stopped by {reason} in sft: train; the same command resumes from there."
    assert sum(reason in line for line in errors.splitlines()) == 1


@pytest.mark.slow
def test_a_recipe_that_was_killed_is_named(copy):
    process = start(copy)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 137
    assert "sft: train failed with exit code 137: killed by SIGKILL" in errors
