"""The health of runs: what recorded runs with a planted fault show, that healthy ones are silent, and the parts.

health_runs.json is what real runs of the tiny model logged: `tests/references/health_table.py --record` writes it anew.
"""

import copy
import json
import math
import random
import re
from pathlib import Path

import pytest
from common.arguments import read_fields
from common.data.examples import Conversation, Pair, Prompt
from common.errors import BAD_INPUT, STOPPED, Stopped
from common.pages.report import page
from common.run.folder import Run
from common.run.health import texts
from common.run.health.data import measure
from common.run.health.ending import end_health
from common.run.health.files import FILE, NewLines, judge_again, recall, write_findings
from common.run.health.health import RULES, Health
from common.run.health.seen import Curve, correlation, spread
from common.run.stopping import Stop
from conftest import ROOT

RUNS = json.loads(Path(__file__).with_name("health_runs.json").read_text(encoding="utf-8"))
OF_DATA = {"duplicate rows", "chosen equals rejected"}  # there before the first step


@pytest.fixture(params=RUNS, ids=lambda run: run["name"])
def run(request):
    return request.param


def rows_of(run: dict) -> list[dict]:
    columns = run["metrics"]
    return [
        {key: values[index] for key, values in columns.items() if values[index] is not None}
        for index in range(len(columns["step"]))
    ]


def entries_of(run: dict) -> list[dict]:
    names = ("step", "prompt", "completion", "reward")
    return [dict(zip(names, entry, strict=True)) for entry in run["completions"]]


def write(folder: Path, run: dict, steps: int | None = None) -> Path:
    """The files of the run after so many steps."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [row for row in rows_of(run) if steps is None or row["step"] <= steps]
    entries = [entry for entry in entries_of(run) if steps is None or entry["step"] < steps]
    for name, rows in (("metrics.jsonl", kept), ("samples.jsonl", entries)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    record = run["record"] if steps is None else {**run["record"], "status": "running"}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    if steps is None and run["samples"]:
        (folder / "samples.json").write_text(json.dumps(run["samples"]), encoding="utf-8")
    return folder


def test_each_planted_fault_is_found_and_healthy_runs_are_silent(run, tmp_path):
    found = {finding.name for finding in judge_again(write(tmp_path, run), run["record"]).findings}
    if run["finds"]:
        assert run["finds"][0] in found
    assert found <= set(run["finds"])


def test_a_run_of_three_steps_shows_no_more_than_its_data(run, tmp_path):
    """As the shortest runs people make, to see whether a recipe works at all; they end after these steps."""
    short = {**run, "metrics": {key: values[:3] for key, values in run["metrics"].items()}}
    short["record"] = {**run["record"], "steps": 3}
    for measured_at_the_end in ("report", "general"):
        short["record"].pop(measured_at_the_end, None)
    assert {finding.name for finding in judge_again(write(tmp_path, short), short["record"]).findings} <= OF_DATA


def test_a_resumed_run_finds_what_an_uninterrupted_one_does(run, tmp_path):
    whole = judge_again(write(tmp_path / "whole", run), run["record"])
    last = rows_of(run)[-1]["step"]
    for cut in (last // 2,):
        folder = write(tmp_path / str(cut), run, cut)
        before = judge_again(folder, {**run["record"], "status": "running"})
        later = [finding for finding in whole.findings if finding.found > cut]
        write_findings(folder, [*before.findings, *later])  # of steps that a killed run had done since its checkpoint
        health = recall(folder, run["record"], cut)
        assert health.findings == before.findings
        entries = iter([entry for entry in entries_of(run) if entry["step"] >= health.seen.step])
        entry = next(entries, None)
        for row in rows_of(run):
            if row["step"] <= cut:
                continue
            while entry is not None and entry["step"] < row["step"]:
                health.seen.add_completion(entry)
                entry = next(entries, None)
            health.seen.add(row)
            health.judge()
        if run["record"]["status"] == "done":
            health.end(run["record"], run["samples"])
        assert health.findings == whole.findings


def test_a_finding_comes_once_with_its_figures_and_flags_that_the_recipe_has(run, tmp_path):
    findings = judge_again(write(tmp_path, run), run["record"]).findings
    assert len({finding.rule for finding in findings}) == len(findings)
    recipe = run["record"]["recipe"]
    known = {field.flag for field in read_fields(ROOT / "recipes" / f"{recipe}.py") or ()}
    for finding in findings:
        evidence, advice = finding.lines()
        assert evidence.startswith(f"Health: {finding.name}, ")
        assert re.search(r"\d", evidence)
        assert finding.first <= finding.last <= max(row["step"] for row in rows_of(run))
        assert set(re.findall(r"--[a-z-]+", advice)) <= known, advice


def test_a_report_shows_the_findings_and_what_to_change_as_make_variables(tmp_path):
    faulty = next(run for run in RUNS if run["name"] == "sft-learning-rate-too-large")
    folder = write(tmp_path / "faulty", faulty)
    text = page([folder])
    assert '<section id="health">' in text
    assert "learning rate too large" in text
    assert "Divide LEARNING_RATE=1 by 10" in text
    write_findings(folder, [])
    assert "Nothing found." in page([folder])


def test_a_run_without_health_knows_no_rule_and_breaks_nothing():
    assert Health({"recipe": "distill"}).judge() == []
    assert Health({}).judge() == []


@pytest.mark.parametrize("recipe", RULES)
def test_values_that_are_no_numbers_break_no_rule(recipe):
    health = Health({"recipe": recipe, "arguments": {}, "steps": 60})
    keys = {key for run in RUNS for key in run["metrics"]} - {"step"}
    for step in range(1, 61):
        health.seen.add({"step": step, **dict.fromkeys(keys, math.nan)})
        health.judge()
    health.end({}, [{"prompt": None, "before": None, "after": None}] * 4)
    assert "learning rate too large" in {finding.name for finding in health.findings} or recipe in ("grpo", "ppo")


# The parts.


def test_a_curve_keeps_its_ends_and_its_lowest_value():
    curve, values = Curve(), [random.Random(0).random() + step / 1000 for step in range(500)]
    values[250] = -1.0
    for step, value in enumerate(values, 1):
        curve.add(step, value)
    assert curve.begin(3) == values[:3]
    assert curve.last(3) == values[-3:]
    assert curve.lowest == (251, -1.0)
    assert curve.steps(2) == (499, 500)
    assert len(curve.first) + len(curve.latest) < 100


def test_noise_is_no_change_and_a_trend_is_one():
    draw = random.Random(1)
    changes = []
    for slope in (0.0, 0.1):
        for _ in range(100):
            curve = Curve()
            for step in range(30):
                curve.add(step, draw.gauss(slope * step, 1.0))
            change = curve.change(3)
            changes.append(change is not None and change.rises)
    assert sum(changes[:100]) < 15
    assert sum(changes[100:]) > 85


def test_the_spread_of_noise_is_its_deviation_with_a_trend_and_outliers_too():
    draw = random.Random(2)
    values = [draw.gauss(0, 2.0) + step / 50 for step in range(1000)]
    values[::50] = [1e6] * 20
    assert spread(values) == pytest.approx(2.0, rel=0.15)
    assert spread([1.0]) == 0.0


def test_correlation_is_0_where_it_is_not_defined():
    assert correlation([1, 2, 3], [2, 4, 6.5]) > 0.99
    assert correlation([1, 1, 1], [1, 2, 3]) == correlation([1, 2], [1, 2]) == 0.0


def test_repetition_is_found_in_english_and_chinese_and_prose_is_none():
    assert texts.repeats("the cat sat on the mat and " * 5)
    assert texts.repeats("因此我们可以得到" * 6)
    assert not texts.repeats("I do I do I do")  # too short to tell
    assert not texts.repeats(Path(ROOT / "README.md").read_text(encoding="utf-8"))
    assert not texts.repeats((ROOT / "README.zh-CN.md").read_text(encoding="utf-8"))


def test_one_completion_of_many_prompts_is_broken_and_of_one_prompt_it_is_not():
    assert texts.broken(["yes", "yes", "yes", "no"], ["a", "b", "c", "d"]) == [True, True, True, False]
    assert texts.broken(["yes"] * 4, ["a"] * 4) == [False] * 4


def turns(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def test_copies_are_counted_and_the_place_of_a_row_makes_no_difference():
    rows = [Conversation(f"my.jsonl:{line}", turns(text)) for line, text in enumerate("abca")]
    assert measure(rows) == {"rows": 4, "distinct": 3}
    assert measure([Prompt("my.jsonl:1", turns("a"))] * 3) == {"rows": 3}


def test_pairs_without_a_difference_and_longer_chosen_ones_are_counted():
    pairs = [("a b", "a  b"), ("3.5", "35"), ("long", "s"), ("s", "long")]
    rows = [Pair(f"my.jsonl:{n}", turns("?"), turns(one), turns(other)) for n, (one, other) in enumerate(pairs)]
    found = measure(rows)
    assert (found["alike"], found["chosen longer"]) == (1, 2)


def test_completions_that_differ_in_a_call_or_in_their_reasoning_are_not_alike():
    def calls(city: str) -> list[dict]:
        function = {"name": "weather", "arguments": {"city": city}}
        return [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}]

    def thinks(text: str) -> list[dict]:
        return [{"role": "assistant", "content": "4", "reasoning_content": text}]

    pairs = [(calls("巴黎"), calls("Rome")), (thinks("2 and 2."), thinks("A guess.")), (calls("Rome"), calls("Rome"))]
    assert measure([Pair("my.jsonl:1", turns("?"), *pair) for pair in pairs])["alike"] == 1


@pytest.mark.parametrize("spec", [["math=1.5,format=0.2", "judge=0"], ["math=1.5", "my.py:judge=0", "format=0.2"]])
def test_the_rewards_of_a_run_are_read_as_its_recipe_reads_them(spec):
    """Several in a word too: `make grpo REWARDS=math=1.5,format=0.2`."""
    health = Health({"recipe": "grpo", "arguments": {"rewards": {"value": spec}}, "steps": 40})
    for step in range(1, 41):
        rising = {"reward": step / 40, "reward_std": 0.5, "rewards/format/mean": step / 40}
        health.seen.add({"step": step, "rewards/math/mean": 0.5, "rewards/judge/mean": 1 - step / 40, **rising})
        health.judge()
    assert {"format only", "judged quality falls"} <= {finding.name for finding in health.findings}


@pytest.mark.parametrize("recipe", RULES)
def test_what_run_json_holds_stays_and_the_counts_are_added(recipe, tmp_path):
    """`make evaluate` finds the held-out rows by what the recipe recorded of its data."""
    from common.run.health.callback import HealthCallback
    from transformers import TrainerControl, TrainerState

    data = {"rows": 4, "format": "messages", "trained": 3, "held_out_rows": "0", "tokens": {"longest": 9}, "notes": []}
    before = {"recipe": recipe, "arguments": {}, "matters": {"base": "a"}, "git": {"commit": "b"}, "data": data}
    run = Run(tmp_path, copy.deepcopy(before))
    rows = [Conversation(f"my.jsonl:{line}", turns(text)) for line, text in enumerate("abca")]
    health, state = HealthCallback(run, Stop(), False, rows), TrainerState(max_steps=3)
    health.on_train_begin(None, state, TrainerControl())
    for state.global_step in (1, 2, 3):
        health.on_log(None, state, TrainerControl(), {"loss": 1.0})
    health.on_train_end(None, state, TrainerControl())
    end_health(run)
    after = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert {**after, "data": data} == {**after, **before}
    assert after["data"] == {**data, "distinct": 3}
    assert after["steps"] == 3


def test_lines_that_are_added_are_read_once_and_a_half_one_later(tmp_path):
    file = tmp_path / "samples.jsonl"
    lines = NewLines(file)
    assert lines.read() == []
    file.write_text('{"step": 0}\n{"st', encoding="utf-8")
    assert lines.read() == [{"step": 0}]
    with file.open("a", encoding="utf-8") as stream:
        stream.write('ep": 1}\n')
    assert lines.read() == [{"step": 1}]


def test_a_run_that_a_fault_stopped_is_not_one_to_resume_as_it_is():
    by_fault = Stopped("--stop-on-fault (flat loss)", "after step 7 of 50")
    assert by_fault.exit_code == BAD_INPUT
    assert "the same command resumes" not in str(by_fault)
    assert Stopped("SIGTERM", "after step 7 of 50").exit_code == STOPPED


def test_findings_are_lines_of_a_file(tmp_path):
    faulty = next(run for run in RUNS if run["name"] == "sft-learning-rate-too-large")
    findings = judge_again(write(tmp_path, faulty), faulty["record"]).findings
    write_findings(tmp_path, findings)
    lines = (tmp_path / FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["name"] for line in lines] == [finding.name for finding in findings]
