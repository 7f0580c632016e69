"""`make evaluate RUN=…`: its statistics by hand, the rows it takes, its questions, and tasks of lm-eval."""

import copy
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluate as command
import pytest
from common.data.examples import Pair, Prompt
from common.errors import InputError, MachineError
from common.pages.evaluation import read_evaluation
from common.rewards.answers import gold
from common.run.intervals import interval
from conftest import ROOT, read_jsonl, run_recipe
from evaluation import general, harness, of_run, questions
from evaluation.figures import PERPLEXITY, Line, Measured, line_table, lines
from evaluation.held_out import all_lines, marked_answer
from evaluation.of_reward_run import ACCURACY, ERROR, row_by_row
from evaluation.of_run import table
from evaluation.policy import majority
from evaluation.results import Section, write
from evaluation.subject import Held, Side, Subject, held_rows, side
from in_process import refusal
from install import overlay
from references.paired_bootstrap import percentile_interval
from rich.console import Console

DATA = ROOT / "data_samples"


# Statistics.


def test_the_interval_of_a_difference_is_that_of_an_independent_bootstrap():
    draw = random.Random(5)
    before = [draw.gauss(1, 1) for _ in range(60)]
    after = [value - 0.2 + draw.gauss(0, 0.5) for value in before]
    weights = [draw.randrange(1, 30) for _ in range(60)]
    (line,) = lines(Measured({"loss (nats)": after}, {}, weights=weights), Measured({"loss (nats)": before}, {}), 3)

    def change(rows):
        return sum((a - b) * w for a, b, w in rows) / sum(w for *_, w in rows)

    rows = list(zip(after, before, weights, strict=True))
    assert line.difference == pytest.approx(change(rows))
    assert line.interval == pytest.approx(percentile_interval(rows, change, 2_000, 1), abs=0.03)


def test_perplexity_is_e_to_the_mean_loss_and_so_is_its_difference():
    """Losses of ln 2 over three tokens and ln 32 over one: (3 ln 2 + 5 ln 2) / 4 = 2 ln 2, so 4; before 2."""
    after = Measured({PERPLEXITY: [math.log(2), math.log(32)]}, {}, weights=[3, 1])
    before = Measured({PERPLEXITY: [math.log(2), math.log(2)]}, {}, weights=[3, 1])
    (line,) = lines(after, before, 0)
    assert (line.after, line.before, line.difference) == (pytest.approx(4), pytest.approx(2), pytest.approx(2))
    # Of two rows: the first twice, 2 - 2; the second twice, 32 - 2.
    assert line.interval == (pytest.approx(0), pytest.approx(30))


@pytest.mark.parametrize(
    ("name", "change", "verdict"),
    [
        ("greedy right", 0.5, "better"),
        ("greedy right", -0.5, "worse"),
        ("loss (nats)", -0.5, "better"),
        ("perplexity (per token)", 0.5, "worse"),
        ("log-probability, bad (nats)", -0.5, "lower"),
    ],
)
def test_a_verdict_knows_which_way_is_better(name, change, verdict):
    assert Line(name, 9, 0, (0, 0), 0, (0, 0), change, (change, change)).verdict == verdict
    assert Line(name, 9, 0, (0, 0), 0, (0, 0), change, (-1, 1)).verdict == "no difference"
    assert Line(name, 9, 0, (0, 0)).verdict == ""


def test_two_samples_of_the_same_model_show_no_difference_19_times_of_20():
    found = 0
    for seed in range(60):
        draw = random.Random(seed)
        sides = [Measured({"right": [draw.random() < 0.6 for _ in range(60)]}, {}) for _ in range(2)]
        found += lines(*sides, seed)[0].verdict == "no difference" if seed % 10 == 0 else covers(sides)
    assert found >= 51  # of 60; 57 are expected


def covers(sides: list[Measured]) -> bool:
    """As `lines`, with 400 draws: sixty times ten thousand would take long."""
    rows = list(zip(sides[0].values["right"], sides[1].values["right"], strict=True))
    low, high = percentile_interval(rows, lambda drawn: sum(a - b for a, b in drawn) / len(drawn), 400, 0)
    return low <= 0 <= high


def test_good_and_bad_completions_have_lines_of_their_own():
    tasks = ["good", "bad"]
    values = {"log-probability (nats)": [-1.0, -3.0], "signed by label (nats)": [-1.0, 3.0]}
    found = all_lines([Measured(values, {}, tasks)], None, 0)
    assert [(line.name, line.after) for line in found] == [
        ("signed by label (nats)", 1),
        ("log-probability, bad (nats)", -3),
        ("log-probability, good (nats)", -1),
    ]


def test_a_table_fits_80_columns():
    wide = Line("log-probability, good (nats)", 200, -12345.6, (-2e4, -1e4), -12345.6, (-1, 1), 0.5, (-0.5, 12345.6))
    console = Console(width=80)
    with console.capture() as capture:
        console.print(line_table("a title", [wide, Line("pass@8", 9, 1, (1, 1), 0, (0, 0), 1, (1, 1))]))
    printed = capture.get()
    assert max(map(len, printed.splitlines())) <= 80
    for words in ("no difference", "+100.0%", "95 % interval", "-12,345.60", "+12,345.60"):
        assert words in printed, printed


# Answers.


def test_the_majority_counts_equal_answers_once_and_shares_a_tie():
    half = gold("1/2")
    assert majority(["0.5", "1/2", "7", "7", "\\frac12"], half) == 1
    assert majority(["7", "7", "1/2"], half) == 0
    assert majority(["7", "7", "0.5", "1/2"], half) == 0.5
    assert majority([None, None, "1/2"], half) == 1
    assert majority([None], half) == 0


def test_only_a_marked_answer_of_the_data_is_compared_with():
    assert marked_answer("<think>2 + 2</think><answer>4</answer>").text == "4"
    assert marked_answer("that is\n#### 4").text == "4"
    assert marked_answer("It is 4.") is None
    assert marked_answer("<answer></answer>") is None


def test_the_facts_are_80_in_two_languages_and_no_wrong_end_is_right():
    items = general.items()
    assert [sum(item.language == language for item in items) for language in ("English", "Chinese")] == [40, 40]
    assert len({item.text for item in items}) == 80
    for item in items:
        assert len({item.right, *item.wrong}) == 4, item


def test_the_end_of_a_sentence_is_scored_in_the_tokens_that_it_has_after_it(tokenizer):
    for item in general.items():
        text, end = general.spans(tokenizer, item.text, item.right)
        assert text + end == tokenizer(item.text + item.right)["input_ids"]
        assert text
        assert end


# Questions.


def test_answers_in_words_are_measured_by_the_words_they_share():
    assert questions.by_text("Bogotá", "<think>hm</think><answer>bogotá.</answer>") == (1, "exact")
    assert questions.by_text("星期六", "答案是星期六。") == (1, "contains")
    # red, green shared of 3 and of 4 words: 2 * 2 / 7.
    assert questions.by_text("red green blue", "Red and green, mostly") == (pytest.approx(4 / 7), "F1 0.57")
    assert questions.by_text("red", "<think>red</think>blue") == (0, "F1 0.00")
    assert questions.by_text("👍", "<answer>👍</answer>") == (1, "contains")  # no word of it
    assert questions.by_text("👍", "no") == (0, "contains")


def ask(*pairs: tuple[str, str]) -> list[Prompt]:
    return [Prompt(f"q:{n}", [{"role": "user", "content": text}], answer) for n, (text, answer) in enumerate(pairs)]


def test_a_question_is_judged_by_the_scorer_else_the_judge_else_the_text():
    to_answer = ask(("3 + 4?", "7"), ("capital?", "Bogota"), ("why?", "because of the long rain"))
    before, after = ["#### 8", "Bogota it is", "no idea"], ["so\n#### 7.0", "Lima", "because of rain"]
    plain = questions.judged(to_answer, before, after, None, 0)
    assert [(one.verdict, one.by) for one in plain] == [
        ("better", ("scorer", "scorer")),
        ("worse", ("contains", "F1 0.00")),
        ("better", ("F1 0.00", "F1 0.75")),
    ]
    requests: list[str] = []

    def judge(given: list[str]) -> list[str]:
        """Prefers the answer with an l in it."""
        requests.extend(given)
        replies = []
        for request in given:
            parts = [request.split(f"<answer_{n}>")[1].split(f"</answer_{n}>")[0] for n in (1, 2)]
            rated = {
                f"answer_{n}": dict.fromkeys(questions_dimensions(), 5 if "L" in text else 1)
                for n, text in enumerate(parts, start=1)
            }
            replies.append(json.dumps(rated))
        return replies

    found = questions.judged(to_answer, before, after, judge, 0)
    assert [one.verdict for one in found] == ["better", "better", "same"]
    assert found[1].by == ("judge", "judge")
    assert len(requests) == 2
    assert "A good answer, for you to judge by: Bogota" in requests[0]


def questions_dimensions() -> tuple[str, ...]:
    from comparison.rules import DIMENSIONS

    return DIMENSIONS


@pytest.mark.parametrize(
    ("better", "worse", "p", "verdict"),
    # Two-sided sign test: 2 * sum of C(n, k) / 2^n over the smaller side.
    [(6, 0, 2 / 64, "better"), (0, 6, 2 / 64, "worse"), (7, 1, 18 / 256, "no difference"), (0, 0, 1, "no difference")],
)
def test_ten_questions_are_added_up_by_a_sign_test(better, worse, p, verdict):
    scores = [(0.0, 1.0)] * better + [(1.0, 0.0)] * worse + [(1.0, 1.0)] * (10 - better - worse)
    total = questions.total([questions.Answered("", "", "", "", one, ("", "")) for one in scores])
    assert (total.better, total.worse, total.same) == (better, worse, 10 - better - worse)
    assert total.p == pytest.approx(p)
    assert total.verdict == verdict
    assert verdict in total.in_words()


def test_the_table_of_questions_shows_text_and_no_markup():
    one = questions.Answered("[bold]why[/bold]?", "r", "b" * 200, "说" * 90, (0.0, 1.0), ("F1 0.00", "exact"))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(questions.as_table([one], "1 question"))
    printed = capture.get()
    assert "[bold]why" in printed
    assert "better" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_a_question_without_an_answer_is_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "why?", "answer": " "}\n')
    with pytest.raises(InputError, match=r"q\.jsonl:1: answer: "):
        questions.read(str(tmp_path / "q.jsonl"))
    assert len(questions.read(str(DATA / "questions.jsonl"))) == 10


# The rows of a run.


def planted(folder: Path, recipe: str, data: Path, kept: str, **given: object) -> Subject:
    from common.data.rows import find_source, source_identity

    folder.mkdir(exist_ok=True)
    matters = {"data": source_identity(find_source(str(data)))}
    arguments = {"data": str(data), **given}
    (folder / "run.json").write_text(json.dumps({"matters": matters, "data": {"held_out_rows": kept}}))
    return Subject(folder, recipe, arguments, side("tiny"), None)


def test_the_held_out_rows_are_those_that_the_run_wrote_down(tmp_path):
    data = tmp_path / "pairs.jsonl"
    shutil.copy(DATA / "preferences.jsonl", data)
    (found,) = held_rows(planted(tmp_path / "run", "dpo", data, "0 3-4"), ())
    assert [row.place.rpartition(":")[2] for row in found.examples] == ["1", "4", "5"]
    assert all(isinstance(row, Pair) for row in found.examples)
    assert found.name == "held-out rows of pairs.jsonl"


def test_prompts_come_with_the_system_prompt_of_the_run(tmp_path):
    data = tmp_path / "sums.jsonl"
    data.write_text('{"prompt": "1 + 1", "answer": "2"}\n{"prompt": "1 + 2", "answer": "3"}\n')
    (found,) = held_rows(planted(tmp_path / "run", "grpo", data, "1", system_prompt="Think."), ())
    assert [turn["content"] for turn in found.examples[0].prompt] == ["Think.", "1 + 2"]
    assert found.examples[0].answer == "3"


def test_where_nothing_was_held_out_there_are_no_rows_but_those_given(tmp_path):
    data = tmp_path / "pairs.jsonl"
    shutil.copy(DATA / "preferences.jsonl", data)
    run = planted(tmp_path / "run", "dpo", data, "")
    assert held_rows(run, ()) == []
    (given,) = held_rows(run, (str(DATA / "preferences.jsonl"),))
    assert len(given.examples) == 200


def test_files_of_one_name_in_two_folders_are_two(tmp_path):
    for folder, part in (("a", slice(0, 2)), ("b", slice(2, 5))):
        (tmp_path / folder).mkdir()
        rows = (DATA / "preferences.jsonl").read_text().splitlines(keepends=True)[part]
        (tmp_path / folder / "test.jsonl").write_text("".join(rows))
    names = tuple(str(tmp_path / folder / "test.jsonl") for folder in "ab")
    found = held_rows(planted(tmp_path / "run", "dpo", DATA / "preferences.jsonl", ""), names)
    assert [(one.name, len(one.examples)) for one in found] == [(names[0], 2), (names[1], 3)]


def test_a_table_counts_the_rows_that_were_measured():
    """Of many prompts a part is completed, and a row that is truncated to nothing is left out."""
    loss, stops = Measured({"loss (nats)": [1.0] * 5}, {}), Measured({"stops": [True] * 3}, {})
    assert table("rows", [loss, stops], [loss, stops], 1).rows == 5
    assert table("prompts", [stops], [stops], 1).rows == 3


def test_the_sample_data_brings_the_file_that_nothing_trains_on(tmp_path):
    found = held_rows(planted(tmp_path / "run", "sft", DATA / "sft.jsonl", "5"), ())
    assert [one.name for one in found] == ["held-out rows of sft.jsonl", "heldout.jsonl"]


def test_data_that_changed_since_the_run_is_refused(tmp_path):
    data = tmp_path / "pairs.jsonl"
    shutil.copy(DATA / "preferences.jsonl", data)
    run = planted(tmp_path / "run", "dpo", data, "0")
    data.write_text(data.read_text().splitlines()[3] + "\n")
    with pytest.raises(InputError, match="has changed since the run"):
        held_rows(run, ())


# What is written.


def test_a_second_evaluation_of_the_same_models_keeps_the_first_and_of_others_does_not(tmp_path):
    run = planted(tmp_path / "run", "dpo", DATA / "preferences.jsonl", "")
    (run.folder / "run.json").write_text(json.dumps({"recipe": "dpo", "status": "done"}))
    line = Line("right", 9, 0.5, (0.4, 0.6), 0.25, (0.1, 0.3), 0.25, (0.1, 0.4))
    write(run, 1, [Section("one", 9, [line])], {"questions": {"rows": [], "total": {"in words": "none"}}})
    write(run, 1, [Section("two", 9, [line])], {})
    found = read_evaluation(run.folder)
    assert list(found["sections"]) == ["one", "two"]
    assert "questions" in found
    assert found["sections"]["one"]["lines"][0]["verdict"] == "better"
    assert "25.0%" in (run.folder / "report.html").read_text(encoding="utf-8")
    other = Subject(**{**run.__dict__, "before": Side("other", run.after.model, None)})
    write(other, 1, [Section("three", 9, [line])], {})
    assert list(read_evaluation(run.folder)["sections"]) == ["three"]


# lm-evaluation-harness.


@pytest.fixture
def fake_overlay(tmp_path, monkeypatch):
    """A folder with the task files of three tasks, as the harness has them."""
    tasks = tmp_path / "overlay" / "lm_eval" / "tasks"
    tasks.mkdir(parents=True)
    (tasks / "gsm8k.yaml").write_text("tag:\n  - math_word_problems\ntask: gsm8k\ndataset_path: openai/gsm8k\n")
    (tasks / "mmlu.yaml").write_text("group: mmlu\ntask:\n  - group: stem\n    task:\n      - mmlu_stem_tasks\n")
    monkeypatch.setattr(overlay, "ensure", lambda: tmp_path / "overlay")


@pytest.mark.usefixtures("fake_overlay")
def test_names_of_tasks_are_checked_and_the_nearest_is_named(tmp_path):
    assert harness.find(()) is None
    assert harness.find(("gsm8k,mmlu",)).names == ["gsm8k", "mmlu"]
    with pytest.raises(InputError, match=r"--tasks gsm8: no task .* \(did you mean gsm8k\?\)"):
        harness.find(("mmlu,gsm8",))
    own = tmp_path / "mine.yaml"
    own.write_text("task: my_sums\n")
    found = harness.find((str(own),))
    assert (found.names, found.folders, found.public) == (["my_sums"], [str(tmp_path)], False)
    own.write_text("dataset_path: json\n")
    with pytest.raises(InputError, match="has no line `task: NAME`"):
        harness.find((str(own),))
    with pytest.raises(InputError, match="No such file"):
        harness.find((str(tmp_path / "none.yaml"),))


def child(rows: dict[str, list[float]], **more: float | str) -> dict:
    """An answer of the child for a group of the tasks `rows`, each with the accuracies of its rows."""
    every = [value for own in rows.values() for value in own]
    results = {task: {"alias": task, "acc,none": sum(own) / len(own)} for task, own in rows.items()}
    results["both"] = {"acc,none": sum(every) / len(every), "acc_stderr,none": 0.1, **more}
    return {
        "results": results,
        "subtasks": {"both": list(rows)},
        "higher_is_better": {},
        "rows": {
            task: {"acc,none": {str(index): value for index, value in enumerate(own)}} for task, own in rows.items()
        },
    }


def test_a_task_has_the_paired_interval_and_a_group_that_of_all_its_rows():
    before = child({"one": [0, 1, 0, 1] * 8, "two": [0, 0] * 8})
    after = child({"one": [1, 1, 0, 1] * 8, "two": [1, 0] * 8})
    section = harness.section(["one", "both"], after, before, 7)
    one, both = section.lines
    assert (one.name, one.rows, one.before, one.after) == ("one acc", 32, 0.5, 0.75)
    assert one.interval == interval([1, 0, 0, 0] * 8, seed=7)
    assert (both.rows, both.difference, both.verdict) == (48, pytest.approx(1 / 3), "better")
    assert section.details["results"]["after"]["both"]["acc_stderr,none"] == 0.1


def test_what_is_no_mean_over_rows_has_an_interval_of_the_harness_standard_errors():
    before, after = ({**child({"one": [0, 1]}), "rows": {}} for _ in range(2))
    after["results"]["one"] |= {"word_perplexity,none": 12.0, "word_perplexity_stderr,none": 0.3}
    before["results"]["one"] |= {"word_perplexity,none": 14.0, "word_perplexity_stderr,none": 0.4}
    for side_ in (before, after):
        side_["higher_is_better"] = {"one": {"word_perplexity": False}}
    line = next(line for line in harness.section(["one"], after, before, 0).lines if "perplexity" in line.name)
    assert line.name == "one word_perplexity (points)"
    assert line.interval == pytest.approx((-2 - 1.96 * 0.5, -2 + 1.96 * 0.5))
    assert line.verdict == "better"


def test_without_an_index_in_reach_it_ends_as_a_fault_of_the_machine(tmp_path, monkeypatch):
    from install import index, uv

    monkeypatch.setattr(overlay, "CACHE", tmp_path)
    monkeypatch.setattr(index, "use_pip_settings", lambda: None)
    monkeypatch.setattr(uv, "find", lambda: "false")
    with pytest.raises(MachineError, match=r"lm-evaluation-harness cannot be had here: uv could not install"):
        overlay.ensure()
    assert list(tmp_path.iterdir()) == []


# What is refused.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "{run}", "--model", "tiny"], "--model: not with --run"),
        (["--base", "tiny"], "--base: give --run too"),
        (["--tasks", "gsm8k"], "--tasks: give --run too"),
        (["--run", "data_samples"], "holds no run"),
        (["--run", "{run}"], "the run is stopped after step 3; its command resumes it"),
        (["--run", "{run}", "--samples", "-1"], "expected 0 or more"),
        (["--run", "{run}", "--tasks", "gsm8k", "--load-in-4bit"], "the harness runs in 16 bit"),
        (["--run", "{run}", "--num-fewshot", "0"], "--num-fewshot: give --tasks too"),
        (["--run", "{run}", "--tasks", "gsm8k", "--num-fewshot", "-1"], "--num-fewshot -1: expected 0 or more"),
        (["--run", "{run}", "--judge", "tiny"], "--judge: give --questions or --compare too"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    record = {"recipe": "sft", "status": "stopped", "step": 3, "arguments": {}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert message in refusal(command.main, capsys, *(word.format(run=tmp_path) for word in words))


def test_a_base_of_other_tokens_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, tokenizer):
    shutil.copytree(DATA / "tiny", tmp_path / "other")
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<another>"])
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(of_run, "use_for_inference", lambda *_: pytest.fail("a model is loaded"))
    subject = Subject(tmp_path / "run", "sft", {}, side("tiny"), side(str(tmp_path / "other")))
    args = SimpleNamespace(max_length=None)
    with pytest.raises(InputError, match=r"--base .*other: reads text as other tokens than tiny"):
        of_run.both(args, subject, subject.before, [], None, [], None)


def test_a_reward_model_answers_no_questions(tmp_path):
    from evaluation.of_reward_run import evaluate_reward_run

    args = SimpleNamespace(questions="q.jsonl", tasks=(), compare=False)
    with pytest.raises(InputError, match="a reward model scores"):
        evaluate_reward_run(args, Subject(tmp_path, "reward", {}, side("tiny"), None))


def test_a_reward_model_is_loaded_once_for_all_files(monkeypatch):
    from evaluation import of_reward_run

    loaded = []

    class Loaded:
        def __init__(self, trained, load_in_4bit):
            loaded.append(trained)

        def tokens_of(self, rows, max_length):
            return rows, None

        def report(self, rows, tokens, what):
            return {"what": what}, [{"score": None, "outputs": row} for row in rows]

    monkeypatch.setattr(of_reward_run, "LoadedRewardModel", Loaded)
    files = [Held("a", [(2.0, 1.0), (1.0, 1.0)]), Held("b", [(1.0, 2.0)])]
    found = of_reward_run.measure(SimpleNamespace(facts={}), files, False, 16)
    assert len(loaded) == 1
    assert [report["what"] for _, report in found] == ["a", "b"]
    assert [measured.values[ACCURACY] for measured, _ in found] == [[1.0, 0.5], [0.0]]


def test_outputs_of_a_reward_model_of_pairs_have_no_error_in_scores():
    scores = [{"outputs": [0.5], "score": 3.0}, {"outputs": [-1.0], "score": 1.0}]
    assert row_by_row(scores, {"kind": "regression", "mean": 2.0, "std": 1.0}) == {ERROR: [0.25, 0.0]}
    assert row_by_row(scores, {"kind": "bradley-terry"}) == {}
    assert row_by_row([{"outputs": [1.0, 0.0], "score": None}, {"outputs": [0.0, 0.0], "score": None}], {}) == {
        ACCURACY: [1.0, 0.5]
    }


# The whole, on real runs.


def evaluate(*words: object, code: int = 0) -> str:
    words = [sys.executable, ROOT / "scripts" / "evaluate.py", *map(str, words)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def first_lines(name: str, count: int, folder: Path) -> Path:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines(keepends=True)[:count]
    (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder / name


def figures(section: dict) -> dict[str, dict]:
    return {line["name"]: line for line in section["lines"]}


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_a_run_of_sft_is_evaluated_before_and_after_on_what_it_held_out(tmp_path):
    run, data = tmp_path / "sft", tmp_path / "chats.jsonl"
    data.write_text("".join((DATA / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:300]))
    words = ("--data", data, "--output-dir", run, "--eval-ratio", 0.1, "--num-train-epochs", 2)
    done = run_recipe("sft", *words)
    assert done.returncode == 0, done.stderr
    trained = json.loads((run / "run.json").read_text(encoding="utf-8"))
    words = ("--questions", DATA / "questions.jsonl", "--compare", "--max-new-tokens", 48)
    printed = evaluate("--run", run, *words)
    found = read_evaluation(run)
    own = figures(found["sections"]["held-out rows of chats.jsonl"])
    # The trainer's own held-out loss is of 30 rows, ours of these and of the three whose completions are shown.
    losses = [row["eval_loss"] for row in read_jsonl(run / "metrics.jsonl") if "eval_loss" in row]
    assert own["loss (nats)"]["rows"] == trained["data"]["held_out"] == 33
    assert own["loss (nats)"]["after"] == pytest.approx(min(losses), rel=0.3)
    assert own["loss (nats)"]["verdict"] == "better"
    assert own["perplexity (per token)"]["after"] == pytest.approx(math.exp(own["loss (nats)"]["after"]))
    assert own["format kept"]["before"] < 0.1 < 0.5 < own["format kept"]["after"]
    assert {"stops", "answer right"} <= own.keys()
    kept = figures(found["sections"]["general ability"])
    assert kept["right"]["rows"] == 80
    assert {"right, English", "right end, Chinese (nats per byte)"} <= kept.keys()
    assert len(found["questions"]["rows"]) == 10
    for text in ("before: tiny", "held-out rows of chats.jsonl, 33 rows", "general ability", "completeness", "sign"):
        assert text in printed, printed
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "perplexity (per token)" in report
    assert (run / "compare" / "compare.json").is_file()
    # Another base is another "before": the adapter against itself shows no difference.
    printed = evaluate("--run", run, "--base", run, "--no-general", "--max-new-tokens", 48)
    assert f"make compare A={run / 'adapter'} B={run / 'adapter'}" in printed
    again = figures(read_evaluation(run)["sections"]["held-out rows of chats.jsonl"])
    assert {line["verdict"] for line in again.values()} == {"no difference"}
    assert again["loss (nats)"]["difference"] == 0


OTHERS = {
    "dpo": ("preferences-train.jsonl", {"chosen likelier", "margin (nats)", "loss (nats)", "format kept"}),
    "kto": ("feedback-train.jsonl", {"signed by label (nats)", "log-probability, good (nats)", "stops"}),
    "reward": ("scores.jsonl", {"loss: squared error (of a score)"}),
    "ppo": ("arithmetic-train.jsonl", {"reward (greedy)", "greedy right"}),
}


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("method", OTHERS)
def test_a_run_of_any_other_method_is_evaluated_on_what_it_held_out(method, tmp_path):
    name, wanted = OTHERS[method]
    run, data = tmp_path / "run", first_lines(name, 60, tmp_path)
    batch = ("--rollout-batch-size", 8, "--per-device-train-batch-size", 8, "--max-completion-length", 16)
    own = ("--max-steps", 2, "--eval-ratio", 0.2, *((*batch, "--critic-warmup-steps", 0) if method == "ppo" else ()))
    done = run_recipe(method, "--data", data, "--output-dir", run, *own)
    assert done.returncode == 0, done.stderr
    evaluate("--run", run, "--no-general", "--max-new-tokens", 16)
    held = json.loads((run / "run.json").read_text(encoding="utf-8"))["data"]["held_out"]
    (section,) = read_evaluation(run)["sections"].values()
    assert section["title"] == f"held-out rows of {name}"
    assert section["rows"] == held > 0
    found = figures(section)
    assert wanted <= found.keys()
    assert all(math.isfinite(line["after"]) for line in found.values())
    assert method == "reward" or all(line["interval"] is not None for line in found.values())


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_a_run_of_grpo_is_evaluated_by_its_rewards_pass_and_majority(merged, tmp_path):
    run = tmp_path / "grpo"
    words = ("--model", merged, "--output-dir", run, "--max-steps", 2, "--sample-prompts", 12)
    done = run_recipe("grpo", *words, "--max-completion-length", 48)
    assert done.returncode == 0, done.stderr
    entry = read_jsonl(run / "samples.jsonl")[0]
    (prompt, _, before), (text, count, after) = entry["mask"]
    assert (before, after) == (False, True)
    assert entry["completion"] in text
    assert entry["prompt"][-1]["content"] in prompt
    assert count > 1
    evaluate("--run", run, "--samples", 4, "--no-general", "--data", first_lines("arithmetic.jsonl", 40, tmp_path))
    (section,) = read_evaluation(run)["sections"].values()
    found = figures(section)
    names = ["reward (greedy)", "math (greedy)", "format (greedy)", "reward (sampled)", "greedy right", "majority@4"]
    assert {*names, "pass@1", "pass@4", "stops"} <= found.keys()
    # The reward math is the scorer of the answers; the whole is math + 0.2 format.
    assert found["math (greedy)"]["after"] == pytest.approx(found["greedy right"]["after"])
    whole = found["math (greedy)"]["after"] + 0.2 * found["format (greedy)"]["after"]
    assert found["reward (greedy)"]["after"] == pytest.approx(whole)
    assert found["pass@1"]["after"] <= found["pass@4"]["after"]


@pytest.mark.slow
def test_tasks_of_lm_eval_run_with_the_adapter_on_and_off(trained, tmp_path):
    """On a task of our own over a local file; the harness is installed if it is not yet, which needs an index."""
    try:
        overlay.ensure()
    except MachineError as error:
        pytest.skip(str(error))
    run = tmp_path / "run"
    shutil.copytree(trained[0], run, ignore=shutil.ignore_patterns("checkpoints"))
    rows = [
        {"question": f"{a} + {b} =", "choices": [f" {a + b}", f" {a + b + 1}", f" {abs(a - b)}"]}
        for a in range(2, 9)
        for b in range(2, 7)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        f"task: my_sums\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path / 'sums.jsonl'}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_target: 0\n"
        "doc_to_choice: '{{choices}}'\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    printed = evaluate("--run", run, "--tasks", tmp_path / "sums.yaml", "--no-general", "--max-new-tokens", 16)
    section = read_evaluation(run)["sections"]["lm-evaluation-harness: my_sums"]
    line = figures(section)["my_sums acc"]
    assert line["rows"] == 35
    assert line["before"] != line["after"]  # the adapter was on, and off
    own = section["details"]["results"]
    assert own["after"]["my_sums"]["acc,none"] == pytest.approx(line["after"])
    p = line["after"]
    assert own["after"]["my_sums"]["acc_stderr,none"] == pytest.approx(math.sqrt(p * (1 - p) / 34))
    assert line["after_interval"][0] <= p <= line["after_interval"][1]
    assert "my_sums acc" in printed
    # A public task whose data is on a hub that is not in reach.
    printed = evaluate("--run", run, "--tasks", "gsm8k", "--task-limit", 1, code=3)
    assert "the data of a task cannot be had here" in printed
