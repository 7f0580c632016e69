"""The plan for the main memory against runs that were measured on a CPU, and what is refused and warned of."""

import json
import mmap
import re
from types import SimpleNamespace

import pytest
from common.errors import MachineError
from common.lm.cards import read_card
from common.plan import fit as fitting
from common.plan import host
from common.plan.host import GIB, HostMemory, check_host, host_peak
from common.plan.shape import sizes_in
from common.plan.workload import workload
from conftest import ROOT, run_recipe

# Peaks of the resident memory of a process (VmHWM) on x86-64 without a GPU: torch 2.13.0+cpu, transformers 5.17.0, trl
# 1.15.0, unsloth 2026.10.9, 2026-11-26; tests/common/plan/measure_host.py measures them again. Rows fill --max-length.
RUNS = json.loads((ROOT / "tests" / "common" / "plan" / "host_runs.json").read_text())


def planned(run: dict) -> float:
    card = sizes_in(run["shape"]) if run["shape"] else read_card("tiny")
    work = workload(card, run["method"], run["given"])
    return host_peak(card, work, on_gpu=False, use_peft=run["use_peft"]).total


def ratio(run: dict) -> float:
    return planned(run) * GIB / run["measured"]["peak"]["VmHWM"]


def test_agrees_with_runs_that_were_measured():
    for fitted in (False, True):
        found = {run["name"]: ratio(run) - 1 for run in RUNS if run["fitted"] is fitted}
        assert len(found) >= 4
        assert max(found.values()) <= 0.25, found
        assert min(found.values()) >= -0.10, found


@pytest.mark.parametrize("page", ["docs/plan.md", "docs/zh/plan.md"])
def test_the_documentation_has_every_run(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for run in RUNS:
        gib = run["measured"]["peak"]["VmHWM"] / GIB
        row = f"| {run['name']} | {planned(run):.2f} | {gib:.2f} | {100 * (ratio(run) - 1):+.0f} % |"
        assert row in text, row


def test_each_part_is_what_it_is_of():
    card = read_card("qwen2.5-7b")
    work = workload(card, "sft", {"gradient_checkpointing": True, "per_device_train_batch_size": 2})
    cpu, gpu = host_peak(card, work, on_gpu=False), host_peak(card, work, on_gpu=True)
    assert cpu.weights * GIB == 4 * card.parameters
    assert gpu.weights == 0
    shape = card.architecture
    assert gpu.activations * GIB == shape.layers * work.tokens * shape.hidden_size * 2  # that Unsloth offloads
    assert host_peak(card, work, True, tokens=10**6).data * GIB == host.DATA_TOKEN * 10**6
    whole = host_peak(card, work, False, use_peft=False)
    assert whole.training * GIB == 12 * card.parameters


PLAN = HostMemory(program=1.0, weights=4.0, training=0.5, activations=9.0, data=0.0)


def limits(monkeypatch, limit: float, free: float, swap: float = 0.0) -> None:
    monkeypatch.setattr(host, "swap", lambda: int(swap * GIB))
    monkeypatch.setattr(host, "memory_limit", lambda: (int(limit * GIB), "Slurm's --mem"))
    monkeypatch.setattr(host, "free_memory", lambda: (int(free * GIB), "what is free"))


def test_a_model_that_no_row_could_make_fit_is_refused_in_the_plan_s_words(monkeypatch):
    limits(monkeypatch, 5.0, 5.0)
    message = (
        "The plan for the main memory: at least 5.5 GiB (program 1.0, weights 4.0, training 0.5; activations come "
    )
    message += "on top), and the limit is 5.0: Slurm's --mem. Raise it, or take a smaller model."
    with pytest.raises(MachineError, match=re.escape(message)):
        check_host(PLAN)
    limits(monkeypatch, 10.0, 10.0)
    assert check_host(PLAN) == ""
    with pytest.raises(MachineError, match=r"at least 11\.0 GiB \(for each of 2 processes program 1\.0"):
        check_host(PLAN, processes=2)


def test_where_less_is_free_a_line_says_so(monkeypatch):
    limits(monkeypatch, 16.0, 4.0)
    assert "where 4.0 more can be had: what is free. If it is full, the system may end the run" in check_host(PLAN)
    limits(monkeypatch, 16.0, 4.6)
    assert check_host(PLAN) == ""


def test_a_run_is_checked_before_its_model_is_loaded(monkeypatch):
    """With what this process has already as the program."""
    limits(monkeypatch, 0.1, 0.1)
    base = SimpleNamespace(card=read_card("tiny"), name="tiny")
    run = SimpleNamespace(record={})
    args = SimpleNamespace(use_peft=True, sharded=False, **read_defaults())
    with pytest.raises(MachineError, match="The plan for the main memory: at least"):
        fitting.fit_to_gpu("off", args, "sft", base, {}, run)  # pyrefly: ignore[bad-argument-type]


def needs_of_a_run(monkeypatch, **more) -> HostMemory:
    """What a run on this machine, without a GPU, is checked with."""
    found = []
    monkeypatch.setattr(fitting, "check_host", lambda needs, _: found.append(needs))
    base = SimpleNamespace(card=read_card("tiny"), name="tiny")
    args = SimpleNamespace(use_peft=True, sharded=False, **read_defaults(), **more)
    fitting.check_main_memory(base, "sft", args)  # pyrefly: ignore[bad-argument-type]
    return found[0]


def test_pages_of_a_file_that_is_mapped_are_no_memory_of_the_run(monkeypatch, tmp_path):
    """A large dataset is read through such pages, and the system takes them back where it needs them."""
    (tmp_path / "data").write_bytes(bytes(64 * 2**20))
    before = needs_of_a_run(monkeypatch).program
    with (tmp_path / "data").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        assert sum(data[:: mmap.PAGESIZE]) == 0
        assert needs_of_a_run(monkeypatch).program - before < 16 * 2**20 / GIB
    assert before > 0


def test_a_base_in_16_bit_takes_half(monkeypatch):
    assert (
        needs_of_a_run(monkeypatch, dtype="bfloat16").weights == needs_of_a_run(monkeypatch, dtype="auto").weights / 2
    )


def test_swap_and_what_one_process_saves_refuse_no_run(monkeypatch):
    limits(monkeypatch, 5.0, 4.0, swap=1.0)
    assert "where 4.0 more can be had" in check_host(PLAN)
    limits(monkeypatch, 40.0, 40.0)
    assert check_host(HostMemory(program=2.0, weights=0.0, training=14.0, activations=0.0, data=0.0), processes=8) == ""


@pytest.mark.slow
def test_a_job_with_too_little_memory_ends_before_the_model_is_loaded(tmp_path, warm):
    done = run_recipe("sft", "--max-steps", 1, "--output-dir", tmp_path / "run", SLURM_MEM_PER_NODE="300")
    assert done.returncode == 3, done.stderr
    assert re.search(r"The plan for the main memory: at least \d.*and the limit is 0\.3: Slurm's --mem\.", done.stderr)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def read_defaults() -> dict:
    from common.plan.workload import settings

    return settings(read_card("tiny"), "sft")
