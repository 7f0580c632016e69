"""`make benchmark` on a shape for a CPU: contestants have the same rows, and what is reported is what was measured."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import benchmark
import pytest
from benchmarks.ceiling import need, training
from benchmarks.contestants import Failed, contestants, figures, reason_to_skip, run
from benchmarks.peer import make_clock
from benchmarks.prepare import text_rows
from benchmarks.table import page, spread, summary
from benchmarks.workloads import WORKLOADS, Job, Workload
from common.errors import MachineError
from common.lm.cards import read_card
from conftest import ROOT
from in_process import refusal

OF_ROWS = ("sft", "dpo", "kto", "reward")  # whose prompts and completions share the workload's length
MACHINE = {"cpu": "a CPU", "python": "3.11", "packages": {"torch": "2.13.0"}, "clocks": None}
MACHINE |= {"flops_per_second": 1e12, "bytes_per_second": 1e11}


def make_benchmark(output, *variables: str) -> tuple[dict, str]:
    """What `make benchmark` wrote as JSON and as Markdown, which it prints too."""
    command = ["make", "benchmark", f"OUT={output}", *variables]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    written = (output / "benchmark.md").read_text(encoding="utf-8")
    assert written in done.stdout
    return json.loads((output / "benchmark.json").read_text(encoding="utf-8")), written


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_ours_and_trl_are_measured_on_the_same_tokens_and_ours_is_profiled(tmp_path):
    output = tmp_path / "out"
    found, text = make_benchmark(
        output, "WORKLOAD=sft-tiny", "CONTESTANTS=ours trl vllm", "STEPS=3", "WARMUP=1", "PROFILE=yes"
    )
    facts = found["workloads"]["sft-tiny"]
    ours, trl = facts["results"]["ours"], facts["results"]["trl"]
    assert ours["tokens"] == trl["tokens"] == 2 * 4 * 64  # two measured steps of 4 full rows
    for reported in (ours, trl):
        speed = reported["tokens_per_second"]
        assert 0 < speed["p5"] <= speed["median"] <= speed["p95"]
        assert reported["memory_gib"]["reserved"] > 0
        assert reported["dtype"] == "float32"
        assert reported["share_of_ceiling"] > 0
    assert ours["cold_start_seconds"] > ours["seconds_per_step"]["median"]
    assert found["machine"]["packages"].keys() >= {"torch", "triton", "transformers", "trl", "unsloth"}
    assert "| trl | " in text
    profile = output / "sft-tiny" / "run" / "profile"
    assert (profile / "trace.json.gz").stat().st_size > 1000
    assert "Steps 5 to 6." in (profile / "kernels.md").read_text(encoding="utf-8")  # behind those that are measured


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_phases_of_ppo_scores_and_rollouts_are_measured(tmp_path):
    found, text = make_benchmark(
        tmp_path / "out", "WORKLOAD=ppo-tiny score-tiny rollout-tiny", "CONTESTANTS=ours", "STEPS=2", "WARMUP=1"
    )
    results = {name: facts["results"]["ours"] for name, facts in found["workloads"].items()}
    phases = results["ppo-tiny"]["phases"]
    seconds = [phases[f"time/{name}"] for name in ("sample", "reward", "advantages", "update")]
    assert all(part > 0 for part in seconds)
    assert sum(seconds) < 1.2 * results["ppo-tiny"]["seconds_per_step"]["median"]
    assert results["score-tiny"]["tokens"] == 50 * 16
    assert results["rollout-tiny"]["tokens"] == 5 * 8 * 16
    assert "Phases of a step of ours: sample" in text


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_where_the_recipe_refuses_the_benchmark_does(tmp_path):
    command = [
        sys.executable,
        ROOT / "scripts" / "benchmark.py",
        "--workload",
        "sft-tiny",
        "--output",
        tmp_path / "out",
    ]
    command += ["--contestants", "ours", "--recipe-args=--max-lenth 5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "--max-lenth (did you mean --max-length?)" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_workload_is_refused_with_the_nearest(capsys, tmp_path):
    message = refusal(benchmark.main, capsys, "--workload", "sft-7b-bf61", "--output", tmp_path / "out")
    assert "did you mean sft-7b-bf16?" in message
    assert not (tmp_path / "out").exists()


def test_steps_that_are_all_left_out_are_refused(capsys, tmp_path):
    message = refusal(benchmark.main, capsys, "--steps", 5, "--warmup", 5, "--output", tmp_path / "out")
    assert "--warmup=5 of --steps=5" in message


def test_a_loss_is_logged_where_the_warm_up_ends(capsys):
    message = refusal(benchmark.main, capsys, "--steps", 10, "--warmup", 4, "--logging-steps", 4)
    assert "for --warmup=4 of --steps=10 that is 1, 2 or what divides 2" in message


def test_four_means_are_left_by_default():
    numbers = {(25, 5): 5, (10, 5): 1, (30, 15): 3, (3, 1): 1, (100, 20): 20}
    assert {key: benchmark.default_logging("sft", *key) for key in numbers} == numbers
    assert benchmark.default_logging("grpo", 25, 5) == 1


def test_each_step_between_two_losses_gets_their_mean():
    times = [(1, 9.0), (2, 10.0), (4, 11.0), (6, 13.0)]
    rows = [{"step": step, "timestamp": at, "tokens": 100 * step, "memory_gib": 2.0} for step, at in times]
    found = figures(rows, 2, started=3.0)
    assert found["seconds"] == [0.5, 0.5, 1.0, 1.0]
    assert found["tokens"] == [100, 100, 100, 100]
    assert found["cold_start_seconds"] == 6.0


def test_the_clock_of_a_peer_gives_each_step_the_mean_of_its_losses():
    clock = make_clock(1000)
    clock.on_train_begin(None, SimpleNamespace(epoch=0.0, global_step=0), None)
    for step in (2, 4):
        clock.on_log(None, SimpleNamespace(epoch=step / 10, global_step=step), None, {"loss": 1.0})
        clock.on_log(None, SimpleNamespace(epoch=step / 10, global_step=step), None, {"eval_loss": 1.0})
    assert clock.tokens == [pytest.approx(100)] * 4
    assert clock.seconds[0] == clock.seconds[1] > 0
    assert clock.seconds[2] == clock.seconds[3] > 0


def test_numbers_of_the_command_line_hold_in_place_of_those_of_a_named_workload(monkeypatch):
    words = ["benchmark", "--workload", "grpo-1.5b", "sft-7b-nf4", "--max-length", "99", "--no-load-in-4bit"]
    monkeypatch.setattr(sys, "argv", words)
    args = benchmark.parse_arguments(benchmark.Args, "")
    named = benchmark.named_workloads(args)
    for name in ("grpo-1.5b", "sft-7b-nf4"):
        changed = asdict(WORKLOADS[name]) | {"max_length": 99, "load_in_4bit": False}
        assert asdict(named[name]) == changed


def test_without_a_name_the_numbers_are_the_recipes():
    workload = benchmark.named_workloads(benchmark.Args(method="dpo"))["dpo-qwen2.5-7b"]
    assert (workload.batch, workload.accumulation, workload.length) == (2, 4, 2048)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_has_a_ceiling_and_somebody_to_measure(name):
    workload = WORKLOADS[name]
    assert need(read_card(workload.model).architecture, workload, 1000).seconds(1e12, 1e12) > 0
    assert reason_to_skip("ours", workload.method) is None
    assert contestants(workload.method)[0] == "ours"


@pytest.mark.parametrize("name", [name for name, workload in WORKLOADS.items() if workload.method in OF_ROWS])
def test_a_prompt_leaves_room_for_its_completion(name, tokenizer):
    """A row is truncated to the workload's length: with nothing left behind the prompt it would be dropped."""
    workload = WORKLOADS[name]
    turns = [{"role": "user", "content": text_rows(workload, 1)[0]["prompt"]}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert len(prompt) < workload.length - 4


def test_ppo_has_no_peer_and_the_table_says_so():
    skipped = {name: {"skipped": reason} for name in ("trl", "unsloth") if (reason := reason_to_skip(name, "ppo"))}
    text = page(MACHINE, {"ppo-tiny": skipped}, {"ppo-tiny": "ppo"})
    assert text.count("skipped: no PPO in TRL since 1.13") == 2


def test_the_flops_of_a_token_are_those_worked_out_by_hand():
    """Qwen2.5-7B at 2,048 tokens: linear layers 26.10, head 2.18, attention 1.44 and LoRA 0.24, in 10^9."""
    shape = read_card("qwen2.5-7b").architecture
    assert training(shape, 2048, False) / 1e9 == pytest.approx(26.10 + 2.18 + 1.44 + 0.24, abs=0.02)
    more = 2 * 6.5253 + 2 * 2048 * 3584 * 28 / 1e9 + 2 * 0.04037  # linear, attention and LoRA once again
    assert training(shape, 2048, True) / 1e9 == pytest.approx(29.96 + more, abs=0.02)


def test_a_decoding_step_reads_the_weights_once_and_the_cache_of_each_row():
    """Qwen2.5-7B, 32 rows at 512 tokens of context: 14.14 GB of weights and 57,344 bytes of cache a token."""
    shape = read_card("qwen2.5-7b").architecture
    workload = Workload(method="rollout", per_device_train_batch_size=32, max_length=512, prompt_length=256)
    assert need(shape, workload, 32).bytes == pytest.approx(14.14e9 + 32 * 512 * 57344, rel=1e-3)


def test_a_share_of_the_ceiling_is_the_least_time_over_the_measured():
    workload = WORKLOADS["sft-tiny"]
    tokens = 256
    least = need(read_card("tiny").architecture, workload, tokens).flops / 1e12
    raw = {"seconds": [4 * least] * 3, "tokens": [tokens] * 3, "reserved_gib": 1.0, "allocated_gib": None, "dtype": "x"}
    reported = summary(raw, workload, MACHINE)
    assert reported["share_of_ceiling"] == pytest.approx(0.25)
    assert reported["tokens_per_second"]["median"] == pytest.approx(tokens / (4 * least))


def test_steps_of_the_warm_up_do_not_count():
    times = [(1, 10.0), (2, 11.0), (3, 11.5), (4, 12.0)]
    rows = [
        {"step": step, "timestamp": at, "tokens": 100 * step, "memory_gib": 2.0 + step, "time/sample": step / 10}
        for step, at in times
    ]
    found = figures(rows, 2, started=3.0)
    assert found["seconds"] == [0.5, 0.5]
    assert found["tokens"] == [100, 100]
    assert found["reserved_gib"] == 6.0
    assert found["cold_start_seconds"] == 7.0
    assert found["phases"] == {"time/sample": [0.3, 0.4]}
    with pytest.raises(MachineError, match="4 losses"):
        figures(rows, 4, started=3.0)


def test_the_spread_holds_nine_values_of_ten():
    assert spread([float(value) for value in range(101)]) == {"median": 50.0, "p5": 5.0, "p95": 95.0}
    assert spread([2.0]) == {"median": 2.0, "p5": 2.0, "p95": 2.0}


def test_a_contestant_that_ends_with_an_error_is_reported_by_its_last_line(tmp_path):
    with pytest.raises(Failed, match=r"^no memory left$") as failed:
        run(["-c", "import sys; print('first'); sys.exit('no memory left')"], tmp_path / "log")
    assert failed.value.code == 1
    text = page(MACHINE, {"w": {"trl": {"failed": str(failed.value)}}}, {"w": "w"})
    assert "| trl | failed: no memory left |" in text


def test_the_line_that_tells_why_is_shown_and_not_what_follows_it(tmp_path):
    printing = "print('torch.OutOfMemoryError: CUDA out of memory.'); print('[rank0] left'); raise SystemExit(1)"
    with pytest.raises(Failed, match=r"^torch\.OutOfMemoryError: CUDA out of memory\.$"):
        run(["-c", printing], tmp_path / "log")


def test_a_contestant_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(Failed, match=r"^ended after 0\.002 minutes$") as failed:
        run(["-c", "import time; time.sleep(60)"], tmp_path / "log", minutes=0.002)
    assert failed.value.code == 124


@pytest.mark.slow
def test_where_ours_fails_it_is_reported_and_the_peers_can_follow(tmp_path):
    """A recipe that this machine cannot run; one that refuses its arguments ends the command."""
    work = Workload(model="tiny", load_in_4bit=False, gradient_accumulation_steps=1, max_length=16)
    job = Job(work, ROOT / "data_samples" / "tiny", tmp_path, steps=2, warmup=1, logging=1, on_gpu=False)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Continue.", "completion": "1 2 3"}\n' * 20)
    args = benchmark.Args(recipe_args="--load-in-fp8")
    found = benchmark.figures_of("ours", job, args)
    assert "--load-in-fp8" in found["failed"]
    assert found["log"].endswith("ours.log")
    assert "| ours | failed: --load-in-fp8" in page(MACHINE, {"w": {"ours": found}}, {"w": "w"})
    assert benchmark.one_line(found) == f"failed: {found['failed']}"
    with pytest.raises(Failed):
        benchmark.figures_of("ours", job, replace(args, recipe_args="--no-such-argument"))
