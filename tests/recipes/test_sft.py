"""`recipes/sft.py` as a user runs it, on the tiny model: what it learns, what it leaves, what it refuses."""

import json
import os
import random
import subprocess
import sys

import pytest
from conftest import ROOT, read_jsonl, run_recipe
from fake_hub import FIRST, SECOND, serve

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
pytestmark = pytest.mark.slow


def evaluate(tmp_path, *flags):
    figures = tmp_path / "figures.json"
    command = [sys.executable, ROOT / "scripts" / "evaluate.py", "--json", figures, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(figures.read_text(encoding="utf-8")).values()
    return result["figures"]["all"]


@pytest.mark.usefixtures("warm")
def test_the_form_is_learned_and_the_end_token_with_it(trained, tmp_path):
    folder, _ = trained
    before = evaluate(tmp_path)
    assert before["follows the format"] < 0.10
    after = evaluate(tmp_path, "--adapter", folder / "adapter")
    assert after["follows the format"] > 0.95
    assert after["stops"] > 0.95
    assert after["greedy right"] > 0.5  # what the base knows, it now says


@pytest.mark.usefixtures("warm")
def test_there_is_room_for_reinforcement(trained, tmp_path):
    """Sampling finds right sums far more often than one draw does: what GRPO will have to work with."""
    folder, _ = trained
    arithmetic = ROOT / "data_samples" / "arithmetic.jsonl"
    figures = evaluate(tmp_path, "--adapter", folder / "adapter", "--data", arithmetic, "--samples", "8")
    assert figures["pass@8"] - figures["pass@1"] > 0.25
    assert figures["greedy right"] < 0.80


def test_a_run_leaves_its_record(trained):
    folder, output = trained
    assert "by autocast" not in output
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "done"
    assert record["arguments"]["learning_rate"]["from"] == "card tiny"
    assert record["arguments"]["output_dir"] == {"value": str(folder), "from": "command line"}
    assert record["arguments"]["seed"] == {"value": 42, "from": "recipe"}
    assert len(record["matters"]["data"]) == len(record["matters"]["base"]) == 64
    assert record["code"]["packages"]["trl"]
    assert record["machine"]["threads"]
    rows = read_jsonl(folder / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] / 3
    assert all(row["tokens_per_second"] > 0 and row["memory_gib"] > 0 for row in rows if "loss" in row)
    samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    assert len(samples) == 3
    trained_on = (ROOT / "data_samples" / "sft.jsonl").read_text(encoding="utf-8")
    assert all(set(sample) == {"prompt", "before", "after", "reference"} for sample in samples)
    assert all(json.dumps(sample["reference"], ensure_ascii=False) in trained_on for sample in samples)
    assert "Held-out prompts" in output
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    assert list((folder / "checkpoints").glob("checkpoint-*/trainer_state.json"))
    umask = os.umask(0)
    os.umask(umask)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (folder / "adapter").iterdir()}
    assert modes["adapter_model.safetensors"] == 0o666 & ~umask
    assert {"adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= modes.keys()


@pytest.mark.usefixtures("warm")
def test_a_finished_run_is_not_run_again_and_another_setting_is_refused(trained):
    folder, _ = trained
    written = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    again = run_recipe("sft", "--output-dir", folder)
    assert again.returncode == 0
    assert "finished already" in again.stdout
    other = run_recipe("sft", "--output-dir", folder, "--seed", 7)
    assert other.returncode == 2
    assert "seed: 42 there, 7 now" in other.stderr
    assert written == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_the_loss_curve_is_that_of_a_plain_trl_script(tmp_path):
    """Step for step, on the same rows, seed and settings; references/plain_trl.py uses no code of ours."""
    rows = (ROOT / "data_samples" / "sft.jsonl").read_text(encoding="utf-8").splitlines()
    single = [row for row in rows if len(json.loads(row)["messages"]) == 2][:48]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(single) + "\n", encoding="utf-8")
    done = run_recipe(
        *("sft", "--data", data, "--output-dir", tmp_path / "run", "--sample-prompts", 0, "--logging-steps", 1),
        *("--num-train-epochs", 2, "--per-device-train-batch-size", 8, "--gradient-accumulation-steps", 2),
    )
    assert done.returncode == 0, done.stderr
    ours = [row["loss"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    command = [sys.executable, ROOT / "tests" / "references" / "plain_trl.py", data, tmp_path / "plain"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    plain = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert plain.returncode == 0, plain.stderr
    theirs = json.loads((tmp_path / "plain" / "losses.json").read_text())
    assert len(ours) == len(theirs) == 6
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_nothing_calls_the_network(tmp_path):
    """Every attempt to connect or to resolve a name ends the process, loudly."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, socket, sys\n"
        "def refuse(*args, **kwargs):\n"
        "    print('NETWORK', args, file=sys.stderr, flush=True)\n"
        "    os._exit(99)\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse\n"
    )
    environment = {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "", "WANDB_MODE": ""}
    done = run_recipe("sft", "--output-dir", tmp_path / "run", "--max-steps", 2, **environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("warm")
def test_a_held_out_split_is_evaluated_and_the_best_checkpoint_kept(tmp_path):
    # Answers that follow from nothing: the form is learned, then the rows by heart, and held-out loss rises again.
    draw = random.Random(0)
    rows = [{"instruction": f"Number {n}?", "output": str(draw.randrange(10**8))} for n in range(48)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ("--eval-ratio", 0.5, "--max-steps", 60, "--save-steps", 6, "--save-total-limit", 9)
    done = run_recipe("sft", "--data", data, "--output-dir", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    losses = {
        row["step"]: row["eval_loss"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row
    }
    best = min(losses, key=losses.get)
    assert best < max(losses)
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all((kept[name] == checkpoint[name]).all() for name in checkpoint)


def test_a_hub_dataset_at_another_commit_is_another_run(tmp_path):
    rows = [json.loads(line) for line in (ROOT / "data_samples" / "sft.jsonl").read_text().splitlines()[:32]]
    flags = ("--data", "org/rows", "--output-dir", tmp_path / "run", "--max-steps", 1, "--sample-prompts", 0)
    command = [sys.executable, *map(str, [ROOT / "recipes" / "sft.py", *flags])]
    with serve({"org/rows": rows}) as hub:
        options = {"env": hub.environment(tmp_path), "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(command, check=False, **options)
        assert done.returncode == 0, done.stderr
        assert "finished already" in subprocess.run(command, check=False, **options).stdout
        hub.commit = SECOND
        done = subprocess.run(command, check=False, **options)
        assert done.returncode == 2
        assert f"data: 'org/rows@{FIRST}' there, 'org/rows@{SECOND}' now" in done.stderr
        of_first = [f"org/rows@{FIRST}" if word == "org/rows" else word for word in command]
        assert "finished already" in subprocess.run(of_first, check=False, **options).stdout


@pytest.mark.usefixtures("warm")
def test_every_weight_is_trained_without_an_adapter(tmp_path):
    done = run_recipe("sft", "--no-use-peft", "--output-dir", tmp_path / "run", "--max-steps", 4, "--sample-prompts", 0)
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    before = load_file(ROOT / "data_samples" / "tiny" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all((before[name].float() != after[name].float()).any() for name in before)


@pytest.mark.usefixtures("warm")
def test_a_four_bit_base_trains_on_the_cpu(tmp_path):
    done = run_recipe("sft", "--load-in-4bit", "--output-dir", tmp_path / "run", "--max-steps", 20)
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0] * 0.7


@pytest.mark.skipif(not GSM8K.exists(), reason="needs ../shared/data/gsm8k/train.jsonl, which is not here")
@pytest.mark.usefixtures("warm")
def test_two_thousand_rows_of_gsm8k_train(tmp_path):
    with GSM8K.open(encoding="utf-8") as rows:
        (tmp_path / "gsm8k.jsonl").write_text("".join(next(rows) for _ in range(2000)), encoding="utf-8")
    done = run_recipe(
        *("sft", "--data", tmp_path / "gsm8k.jsonl", "--columns", "prompt=question", "completion=answer"),
        *("--output-dir", tmp_path / "run", "--max-length", 1024, "--max-steps", 8, "--logging-steps", 1),
    )
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert losses[-1] < losses[0]


GOOD = '{"instruction": "Say a.", "output": "a"}\n'
LONG = '{"instruction": "Say a.", "output": "' + "a " * 200 + '"}\n'
BAD = {
    "an empty file": ("", [], "the file is empty"),
    "broken JSON": (GOOD * 16 + '{"instruction": \n', [], ":17: broken JSON"),
    "a missing field": (GOOD * 2 + '{"instruction": "Say a."}\n', [], ":3: output: missing"),
    "a wrong type": (GOOD + '{"instruction": "Say a.", "output": 5}\n', [], ":2: output: should be a valid string"),
    "an empty answer": (GOOD + '{"instruction": "Say a.", "output": ""}\n', [], ":2: output: is empty"),
    "all rows cut": (LONG * 30, ["--max-length", 100], "(100.0%) are longer than 100 tokens and truncated"),
    "no trainable token": (GOOD * 3, ["--max-length", 4], "3 of them have no token with loss in those"),
    "an unknown format": ('{"a": 1, "b": 2}\n', [], ":1: unknown format: the columns are a, b"),
    "bytes that are not UTF-8": (GOOD.encode() + b'{"instruction": "\xff"}\n', [], ":2: byte 18 is 0xff"),
    "mixed formats": (GOOD + '{"prompt": "a", "completion": "b"}\n', [], ":2: this row is prompt-completion, but"),
    "a folder that is not there": (None, ["--data", "/no/such/folder"], "/no/such/folder: no such file or folder"),
    "an unknown model": (GOOD, ["--model", "qwen2.5-8b"], "did you mean qwen2.5-7b?"),
    "an unknown flag": (GOOD, ["--learning-rte", "1"], "--learning-rate"),
    "an unknown pad token": (GOOD, ["--pad-token", "<|no|>"], "--pad-token <|no|>: not in this model's vocabulary"),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.usefixtures("warm")
def test_bad_input_has_one_clear_message_and_leaves_nothing(tmp_path, fault):
    content, flags, says = BAD[fault]
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_bytes(content if isinstance(content, bytes) else content.encode())
        flags = ["--data", data, *flags]
    before = sorted(tmp_path.rglob("*"))
    done = run_recipe("sft", *flags, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


AS_ON_A_GPU = """
import os, runpy, sys
import unsloth, trl

begin, trainers = trl.SFTTrainer.__init__, []


def begin_as_on_a_gpu(self, *args, **kwargs):
    trainers.append(self)
    kwargs["args"].optim = "adamw_8bit"
    # What the trainer that Unsloth compiles does there:
    kwargs["args"].bf16 = kwargs["args"].bf16_full_eval = True
    kwargs["args"].mixed_precision = os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    begin(self, *args, **kwargs)


trl.SFTTrainer.__init__ = begin_as_on_a_gpu
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("optimizer:", *(kind.__name__ for kind in type(trainers[0].optimizer.optimizer).__mro__[:3]))
"""


def test_a_run_as_on_a_gpu_batches_its_updates_and_computes_in_float32(tmp_path):
    # Updates too small to change a number, so that all losses are equal; in bfloat16 they differ in the third digit.
    flags = "--dtype float32 --max-steps 3 --sample-prompts 0 --logging-steps 1 --learning-rate 1e-30 --eval-ratio 0.02"
    losses = []
    for name, start in (("cpu", ["recipes/sft.py"]), ("gpu", ["-c", AS_ON_A_GPU, "recipes/sft.py"])):
        command = [sys.executable, *start, *flags.split(), "--output-dir", tmp_path / name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        rows = read_jsonl(tmp_path / name / "metrics.jsonl")
        losses.append([row[kind] for row in rows for kind in ("loss", "eval_loss") if kind in row])
    assert "optimizer: AdamW BatchedUpdates AdamW" in done.stdout
    assert losses[0] == losses[1]
    assert len(losses[0]) > 3
