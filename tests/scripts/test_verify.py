"""make verify and make repro: a run's first steps again, equal bit for bit, or what differs and why."""

import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import repro
import verify as command
from common.environment import ROOT
from common.errors import InputError
from common.lm.hub import base_sha256
from common.run import replay
from common.run.record import identity_of
from common.run.replay import Replay
from conftest import adapter_bytes, read_jsonl, run_recipe
from in_process import refusal
from verification.archive import contents_of, unpack, write
from verification.circumstances import differences
from verification.comparison import compare, sample_sha256
from verification.record import Recorded, read_recorded, repeat_words

TINY = ROOT / "data_samples" / "tiny"


def record(**arguments: object) -> dict:
    """run.json of a run of GRPO with these arguments."""
    arguments = {"learning_rate": 1e-5, "model": "tiny", "data": "my.jsonl", "seed": 42, **arguments}
    matters = {name: value for name, value in arguments.items() if name not in ("model", "data", "output_dir")}
    matters |= {"recipe": "grpo", "data": "d" * 64, "base": "b" * 64, "lock": "1" * 64}
    return {
        "recipe": "grpo",
        "arguments": {name: {"value": value, "from": "recipe"} for name, value in arguments.items()},
        "matters": matters,
        "identity": identity_of(matters),
        "code": {
            "git": {"commit": "c" * 40, "dirty": False},
            "lock": {"file": "docker/cpu.lock", "sha256": "1" * 64},
            "image": None,
            "recipes": "r" * 64,
            "python": "3.11.7",
            "packages": {"torch": "2.13.0", "trl": "1.15.0"},
        },
        "machine": {"host": "here", "cpu": "EPYC", "threads": 2, "locale": "C.UTF-8", "settings": {"MKL_CBWR": "AVX2"}},
        "weights_sha256": {"1": "a" * 64, "5": "b" * 64},
    }


def rows() -> list[dict]:
    return [
        {"step": 1, "loss": 0.1, "grad_norm": math.nan, "tokens_per_second": 10.0, "rewards/time/mean": 0.5},
        {"step": 5, "loss": 0.2, "grad_norm": 1.0, "timestamp": 1.0, "step_time": 2.0},
        {"step": 9, "loss": 0.3},
    ]


def run(folder: Path = Path("run"), **arguments: object) -> Recorded:
    samples = [{"step": step, "completion": f"text {step}", "reward": 0.5} for step in range(6)]
    return Recorded(folder, record(**arguments), rows(), samples)


def saved(folder: Path, **arguments: object) -> Path:
    """A folder with such a run."""
    folder.mkdir(parents=True, exist_ok=True)
    one = run(folder, **arguments)
    (folder / "run.json").write_text(json.dumps(one.record), encoding="utf-8")
    for name, entries in (("metrics", one.metrics), ("samples", one.samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in entries), encoding="utf-8")
    return folder


# --- comparing


def test_equal_runs_are_equal_whatever_the_clock_says_and_nan_is_nan():
    now = run()
    now.metrics[0]["tokens_per_second"], now.metrics[1]["step_time"], now.metrics[1]["timestamp"] = 1, 1, 9
    now.metrics.append({"step": 9, "train_runtime": 1.0, "train_loss": 7.0})  # of where training ended
    found = compare(run(), now, 9)
    assert found.differences == []
    assert (found.rows, found.weights, found.samples) == (3, [1, 5], 6)


@pytest.mark.parametrize(
    ("change", "step", "what"),
    [
        (lambda one: one.metrics[1].update(loss=math.nextafter(0.2, 1)), 5, "loss"),
        (lambda one: one.metrics[0].update(loss=-0.1), 1, "loss"),
        (lambda one: one.metrics[0].update(grad_norm=1.0), 1, "grad_norm"),
        (lambda one: one.metrics[0].update({"rewards/time/mean": 0.25}), 1, "rewards/time/mean"),
        (lambda one: one.metrics[1].pop("grad_norm"), 5, "grad_norm"),
        (lambda one: one.metrics.pop(1), 5, "step"),
        (lambda one: one.samples[3].update(completion="other"), 4, "samples.jsonl, line 4, completion"),
        (lambda one: one.record["weights_sha256"].update({"5": "c" * 64}), 5, "sha256 of the trained weights"),
    ],
)
def test_the_first_difference_is_named_by_its_step(change, step, what):
    now = run()
    change(now)
    now.metrics[-1]["loss"] = 7.0  # a later one
    first = compare(run(), now, 9).first
    assert (first.step, first.what) == (step, what)
    assert first.then != first.now


def test_only_the_first_steps_are_compared():
    now = run()
    now.metrics[1]["loss"], now.samples[4]["completion"], now.record["weights_sha256"]["5"] = 7.0, "other", "c" * 64
    assert compare(run(), now, 4).differences == []
    assert {one.step for one in compare(run(), now, 5).differences} == {5}


# --- circumstances


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("code packages torch", "2.14.0", "torch: 2.13.0 in the run, 2.14.0 now"),
        ("code packages trl", None, "trl: 1.15.0 in the run, none now"),
        ("code python", "3.12.1", "Python: 3.11.7 in the run, 3.12.1 now"),
        ("code git commit", "e" * 40, "commit: cccccccccccc in the run, eeeeeeeeeeee now"),
        ("code recipes", "e" * 64, "code below recipes/: rrrrrrrrrrrr in the run, eeeeeeeeeeee now"),
        (
            "code lock",
            {"file": "docker/cuda.lock", "sha256": "2" * 64},
            "lock: docker/cpu.lock 111111111111 in the run",
        ),
        ("code image", "sha256:1", "image: none in the run, sha256:1 now"),
        ("machine threads", 4, "threads: 2 in the run, 4 now (sums are added in another order; OMP_NUM_THREADS=2 has"),
        ("machine gpu", "NVIDIA H200", "GPU: none in the run, NVIDIA H200 now"),
        ("machine cpu", "Xeon", "processor: EPYC in the run, Xeon now"),
        ("machine locale", "tr_TR.UTF-8", "locale: C.UTF-8 in the run, tr_TR.UTF-8 now"),
        ("machine settings", {}, "setting MKL_CBWR: AVX2 in the run, none now"),
        ("machine host", "there", "machine's name: here in the run, there now"),
        ("dtype", "torch.bfloat16", "type of the numbers: none in the run, torch.bfloat16 now"),
        ("micro_batch", {"per_device_train_batch_size": 2}, "micro-batch by --oom=retry: none in the run"),
        ("ranks", 2, "processes: 1 in the run, 2 now"),
    ],
)
def test_a_circumstance_that_differs_is_named_with_both_values(path, value, words):
    now = record()
    *folders, name = path.split()
    place = now
    for folder in folders:
        place = place[folder]
    place[name] = value
    (found,) = differences(record(), now)
    assert str(found).startswith(words)


def test_equal_circumstances_have_no_differences_and_neither_has_what_an_older_run_did_not_record():
    assert differences(record(), record()) == []
    old = record()
    del old["code"]["recipes"], old["machine"]["locale"], old["machine"]["settings"]
    assert differences(old, record()) == []


# --- what is refused


def test_a_record_that_was_changed_after_the_run_is_refused_with_both_values(tmp_path):
    folder = saved(tmp_path)
    changed = record()
    changed["arguments"]["learning_rate"]["value"] = 1e-3
    (folder / "run.json").write_text(json.dumps(changed))
    with pytest.raises(
        InputError, match=r"run.json: was changed after the run: --learning-rate is 0.001, and was 1e-05"
    ):
        read_recorded(folder)
    changed["matters"]["learning_rate"] = 1e-3
    (folder / "run.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match="do not have the hash in `identity`"):
        read_recorded(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of the two: --run outputs/try, or --repro ARCHIVE"),
        (["--run", "a", "--repro", "b"], "give one of the two"),
        (["--run", "gone"], "gone: holds no run; give the folder of a run, which has a run.json"),
        (["--repro", "gone.tar.gz"], "--repro gone.tar.gz: cannot be unpacked"),
        (["--run", "run", "--steps", "0"], "--steps 0: give 1 or more"),
        (
            ["--run", "run"],
            f"--data my.jsonl: the run read it (sha256 of its contents: {'d' * 64}), and it is not there",
        ),
    ],
)
def test_what_cannot_be_verified_is_refused_before_anything_slow(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "run")
    assert message in refusal(command.main, capsys, *words)


def test_data_and_base_that_changed_are_named_with_both_hashes():
    read = {"data": "d" * 64, "base": "b" * 64, "reward_files": ["e" * 64]}
    again = Replay(5, {"matters": {**read, "data": "f" * 64}})
    given = {"data": "my.jsonl", "model": "tiny"}
    with pytest.raises(InputError) as caught:
        again.check(given, read)
    assert f"the data (my.jsonl) is not what the run read: {'f' * 60} then, {'d' * 60} now" in str(caught.value)
    assert "the base" not in str(caught.value)
    with pytest.raises(InputError, match=r"the base model \(tiny\) is not what the run read.*\n.*--rewards reads"):
        again.check(given, {"data": "f" * 64, "base": "a" * 64, "reward_files": []})
    again.check(given, {**read, "data": "f" * 64})


def test_a_replay_is_requested_by_a_variable_and_keeps_what_the_run_had_chosen(tmp_path, monkeypatch):
    assert replay.requested() is None
    chosen = {"fit": {"load_in_4bit": False}, "micro_batch": {"per_device_train_batch_size": 2}}
    (tmp_path / "run.json").write_text(json.dumps({**record(), **chosen, "seconds": 9}))
    monkeypatch.setenv(replay.VARIABLE, f"20:{tmp_path / 'run.json'}")
    assert replay.requested().steps == 20
    assert replay.requested().chosen() == chosen


# --- the command of a replay


def test_a_replay_has_the_runs_arguments_but_where_it_writes_and_what_stops_it(tmp_path):
    data = tmp_path / "my.jsonl"
    data.touch()
    given = {"output_dir": "x", "report_to": ["wandb"], "time_limit": "1:00:00", "oom": "retry", "fit": "auto"}
    words = repeat_words(run(data=str(data), temperature=0.5, rewards=["math", "format=0.2"], **given), {}, False)
    pairs = dict(zip(words, [*words[1:], ""], strict=True))
    assert pairs["--data"] == str(data)
    assert (pairs["--learning-rate"], pairs["--temperature"], pairs["--rewards"]) == ("1e-05", "0.5", "math")
    assert pairs["--fit"] == "off"  # it had chosen nothing
    assert {"--output-dir", "--report-to", "--time-limit", "--oom"}.isdisjoint(words)
    assert "--full-determinism" in repeat_words(run(data=str(data)), {}, True)
    assert "--load-in-4bit" not in repeat_words(run(data=str(data), load_in_4bit=True, load_in_fp8=True), {}, False)


def test_what_moved_is_taken_from_where_the_user_says_and_the_repositorys_own_from_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [*repeat_words(run(data="data_samples/sft.jsonl"), {}, False)]
    assert str(ROOT / "data_samples/sft.jsonl") in pairs
    assert "there.jsonl" in repeat_words(run(), {"data": "there.jsonl"}, False)
    assert "org/name" in repeat_words(hub_run(), {}, False)  # nobody looks for it on this disk


def hub_run() -> Recorded:
    one = run(data="org/name")
    one.record["matters"]["data"] = "org/name@abc"
    return one


# --- the archive


def archived(tmp_path: Path, with_data: bool = False) -> Recorded:
    """A run whose data and reward file are the user's, in a folder of the user's."""
    (tmp_path / "mine").mkdir(exist_ok=True)
    (tmp_path / "mine" / "my.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    (tmp_path / "mine" / "my_rewards.py").write_text("def shorter(texts):\n    return [0.0 for text in texts]\n")
    rewards = ["math", f"{tmp_path}/mine/my_rewards.py:shorter=0.5"]
    return read_recorded(
        saved(tmp_path / "run", data=f"{tmp_path}/mine/my.jsonl", rewards=rewards, output_dir="/home/me/x")
    )


def test_the_same_run_gives_the_same_archive_wherever_it_is_written(tmp_path):
    for name in ("one.tar.gz", "two.tar.gz"):
        write(contents_of(archived(tmp_path), with_data=False), tmp_path / name)
    assert (tmp_path / "one.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "one.tar.gz") as tar:
        assert {(entry.mtime, entry.uid, entry.uname, entry.mode) for entry in tar} == {(0, 0, "", 0o644)}


def test_an_archive_names_no_machine_and_no_place_and_holds_data_only_where_wanted(tmp_path):
    files = contents_of(archived(tmp_path), with_data=False)
    assert set(files) == {"README.md", "run.json", "metrics.jsonl", "samples.jsonl", "files/rewards/my_rewards.py"}
    texts = b"".join(content for content in files.values() if isinstance(content, bytes)).decode()
    for told in (str(tmp_path), "/home/me", '"here"', "text 3"):
        assert told not in texts
    assert sample_sha256({"step": 3, "completion": "text 3", "reward": 0.5}) in texts
    assert "DATA=PLACE" in files["README.md"].decode()
    files = contents_of(archived(tmp_path), with_data=True)
    assert files["files/data/my.jsonl"] == tmp_path / "mine" / "my.jsonl"
    assert b"text 3" in files["samples.jsonl"]
    assert "DATA=PLACE" not in files["README.md"].decode()


def test_a_run_from_an_archive_is_compared_and_repeated_as_the_run_itself(tmp_path, monkeypatch):
    one = archived(tmp_path)
    write(contents_of(one, with_data=True), tmp_path / "one.tar.gz")
    shutil.rmtree(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    again = read_recorded(unpack(tmp_path / "one.tar.gz", tmp_path / "elsewhere"))
    assert compare(again, one, 9).differences == []
    words = repeat_words(again, {}, False)
    assert str(again.folder / "files" / "data" / "my.jsonl") in words
    assert f"{again.folder}/files/rewards/my_rewards.py:shorter=0.5" in words
    write(contents_of(archived(tmp_path), with_data=False), tmp_path / "two.tar.gz")
    again = read_recorded(unpack(tmp_path / "two.tar.gz", tmp_path / "third"))
    assert compare(again, one, 9).differences == []
    again.samples[2]["sha256"] = "0" * 64
    assert compare(again, one, 9).first.what == "samples.jsonl, line 3, sha256"


def test_an_archive_with_a_secret_is_not_written(tmp_path, monkeypatch, capsys):
    one = archived(tmp_path)
    (tmp_path / "mine" / "my_rewards.py").write_text(f"key = 'hf_{'x' * 34}'\ndef shorter(texts):\n    return []\n")
    message = refusal(repro.main, capsys, "--run", one.folder, "--output", tmp_path / "one.tar.gz")
    assert "files/rewards/my_rewards.py: holds a token of Hugging Face" in message
    assert not (tmp_path / "one.tar.gz").exists()


# --- real runs


SMALL = ["--sample-prompts", "2", "--sample-tokens", "4", "--save-steps", "1000", "--logging-steps", "1"]
ROWS = ["--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "1"]
SUMS = ["--max-completion-length", "8", "--data", str(ROOT / "data_samples" / "arithmetic.jsonl")]
RECIPES = {
    "sft": [*SMALL, *ROWS, "--lora-dropout", "0.1"],
    "dpo": [*SMALL, *ROWS],
    "kto": [*SMALL, *ROWS],
    "grpo": [*SMALL, *SUMS, *ROWS[:1], "4", "--num-generations", "4"],
    "reward": [*SMALL[4:], *ROWS],
    "ppo": [*SMALL, *SUMS, "--rollout-batch-size", "4", *ROWS[:1], "4", "--gradient-accumulation-steps", "1",
            "--num-ppo-epochs", "2", "--critic-warmup-steps", "1", "--eval-ratio", "0.01"],
}  # fmt: skip
STEPS = "3"


def verify(*words: object, root: Path = ROOT, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    path = {"PYTHONPATH": os.pathsep.join([str(root / "recipes"), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, root / "scripts" / "verify.py", *map(str, words)],
        cwd=cwd, env={**os.environ, **path, **environment}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def made(runs: Path, recipe: str, **environment: str) -> Path:
    """The run of a recipe, made when it is first needed."""
    if not (runs / recipe).exists():
        flags = (*RECIPES[recipe], "--max-steps", STEPS, "--output-dir", runs / recipe)
        done = run_recipe(recipe, *flags, **environment)
        assert done.returncode == 0, done.stderr
    return runs / recipe


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_of_each_recipe_is_equal_taken_again_and_left_as_it_was(recipe, runs):
    folder = made(runs, recipe)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    done = verify("--run", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    logged = [row for row in read_jsonl(folder / "metrics.jsonl") if "train_runtime" not in row]
    assert f" numbers in {len(logged)} rows of metrics.jsonl" in done.stdout.partition("Equal: ")[2]
    assert "the trained weights after steps 1, 3" in done.stdout
    assert ("completions" in done.stdout) == (recipe in ("grpo", "ppo"))
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_strict_computes_both_sides_of_a_run_that_was_not_strict(runs):
    done = verify("--run", made(runs, "dpo"), "--steps", 1, "--strict")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "It was not trained with --full-determinism, so the steps are taken twice here." in done.stdout
    assert "Equal: " in done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_a_changed_row_and_a_changed_weight_of_the_base_are_named(runs, tmp_path):
    """In a copy of the run that read files of a user, from which an archive is verified in another folder first."""
    from safetensors.torch import load_file, save_file

    data, base = tmp_path / "mine" / "rows.jsonl", tmp_path / "mine" / "base"
    shutil.copytree(TINY, base)
    lines = (ROOT / "data_samples" / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:40]
    data.write_text("".join(lines), encoding="utf-8")
    flags = (*RECIPES["sft"], "--max-steps", 2, "--data", data, "--model", base, "--output-dir", tmp_path / "run")
    done = run_recipe("sft", *flags)
    assert done.returncode == 0, done.stderr

    archive = tmp_path / "run.tar.gz"
    words = ["--run", tmp_path / "run", "--with-data", "--output", archive]
    done = subprocess.run([sys.executable, ROOT / "scripts" / "repro.py", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data.rename(tmp_path / "moved.jsonl")
    (tmp_path / "elsewhere").mkdir()
    done = verify("--repro", archive, cwd=tmp_path / "elsewhere")
    assert done.returncode == 2
    assert "--model base: the run read it" in done.stderr
    done = verify("--repro", archive, "--model", base, cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the trained weights after steps 1, 2" in done.stdout
    assert list((tmp_path / "elsewhere").iterdir()) == []

    done = verify("--run", tmp_path / "run")
    assert done.returncode == 2
    assert f"--data {data}: the run read it" in done.stderr
    data.write_text("".join([lines[1], *lines[1:]]), encoding="utf-8")
    weights = load_file(base / "model.safetensors")
    was = base_sha256(base)
    weights["model.norm.weight"][0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    done = verify("--run", tmp_path / "run")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"the data ({data}) is not what the run read" in done.stderr
    assert (
        f"the base model ({base}) is not what the run read: {was[:60]} then, {base_sha256(base)[:60]} now"
        in done.stderr
    )


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_another_learning_rate_differs_from_its_first_step_on(runs, tmp_path):
    """In run.json and everywhere that it is a hash of: no file tells of it, only the numbers do."""
    shutil.copytree(made(runs, "sft"), tmp_path / "run")
    changed = json.loads((tmp_path / "run" / "run.json").read_text())
    changed["arguments"]["learning_rate"]["value"] = changed["matters"]["learning_rate"] = 1e-3
    changed["identity"] = identity_of(changed["matters"])
    (tmp_path / "run" / "run.json").write_text(json.dumps(changed))
    done = verify("--run", tmp_path / "run")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Different from step 2 on: learning_rate: 0.0005 in the run, 0.0001 now." in done.stdout
    assert "No circumstance differs that is recorded." in done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The repository as another person has it, under a name that is no ASCII."""
    folder = tmp_path_factory.mktemp("clone") / "ein Klon ü"
    folder.mkdir()
    for name in ("recipes", "scripts", "data_samples", "docker"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(ROOT / ".venv")
    for words in (
        ["init", "-q"],
        ["add", "recipes"],
        ["-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", "-C", folder, *words], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "locale"), [("sft", "tr_TR.UTF-8"), ("grpo", "POSIX")])
def test_another_clone_process_folder_locale_and_hash_seed_give_the_same_bytes(recipe, locale, runs, clone, tmp_path):
    """Cold processes, as the locale and the hash seed are read where Python starts."""
    first = made(runs, recipe)
    path = os.pathsep.join([str(clone / "recipes"), str(clone / "scripts")])
    flags = [*RECIPES[recipe], "--max-steps", STEPS, "--output-dir", tmp_path / "run"]
    others = {"LC_ALL": locale, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, clone / "recipes" / f"{recipe}.py", *map(str, flags)],
        cwd=tmp_path, env={**os.environ, **others}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    of_clone, here = adapter_bytes(tmp_path / "run"), adapter_bytes(first)
    assert of_clone.pop("README.md") != here.pop("README.md")  # the model card names the commit
    assert of_clone == here
    one, other = read_recorded(first), read_recorded(tmp_path / "run")
    assert compare(one, other, int(STEPS)).differences == []
    names = {found.name for found in differences(one.record, other.record)}
    assert {"locale", "setting PYTHONHASHSEED", "commit"} <= names
    assert "code below recipes/" not in names


@pytest.mark.slow
def test_changed_code_and_other_threads_are_named(runs, clone):
    first = made(runs, "sft", OMP_NUM_THREADS="1")
    file = clone / "recipes" / "sft.py"
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("weight_decay=args.weight_decay,", "weight_decay=args.weight_decay + 0.5,"))
    shutil.copytree(first, clone / "outputs" / "run")
    commit = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    of_run = json.loads((clone / "outputs" / "run" / "run.json").read_text())
    of_run["code"]["git"] = {"commit": commit, "dirty": False}
    (clone / "outputs" / "run" / "run.json").write_text(json.dumps(of_run))
    done = verify("--run", "outputs/run", root=clone, cwd=clone, OMP_NUM_THREADS="2")
    file.write_text(text, encoding="utf-8")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Different from step " in done.stdout
    assert "changed since its commit: recipes/sft.py)" in done.stdout
    assert "threads: 1 in the run, 2 now (sums are added in another order; OMP_NUM_THREADS=1 has those" in done.stdout
