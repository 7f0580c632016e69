"""The report of a run: what it tells, that text stays text, that no extreme is lost, and how a browser shows it."""

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
from common.errors import InputError
from common.pages.curves import thinned
from common.pages.facts import held_out
from common.pages.page import as_json, plotly
from common.pages.reading import Ends, read_run
from common.pages.report import page, write_report
from common.run.folder import Run

BAD = (
    '</script><script>window.planted = 1</script><img src=x onerror="window.planted = 2"><b>&amp;</b>\u2028{{ 7 * 7 }}'
)
ARGUMENTS = {
    "model": ("qwen2.5-7b", "command line"),
    "data": ("/srv/算术.jsonl", "command line"),
    "learning_rate": (1e-6, "card qwen2.5-7b"),
    "rewards": (["math", "format=0.2"], "command line"),
    "load_in_4bit": (False, "command line"),
    "beta": (0.0, "recipe"),
    "output_dir": ("outputs/one", "command line"),
}


def write_run(folder: Path, steps: int = 30, text: str = "一加一等于二。", **changed) -> Path:
    """A finished run of GRPO with everything that a folder can hold; `changed` are other arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {name: {"value": value, "from": origin} for name, (value, origin) in ARGUMENTS.items()}
    arguments |= {name: {"value": value, "from": "command line"} for name, value in changed.items()}
    record = {
        "recipe": "grpo",
        "arguments": arguments,
        "matters": {"data": "d" * 64, "base": "Qwen/Qwen2.5-7B@abc", "lock": "e" * 64},
        "identity": "f" * 64,
        "code": {"git": {"commit": "1" * 40, "dirty": False}, "lock": {"file": "docker/cuda.lock", "sha256": "e" * 64}},
        "machine": {"host": "gpu-7", "gpu": "NVIDIA H200", "gpu_memory_gib": 139.8, "cuda": "13.0"},
        "status": "done",
        "seconds": 3725.0,
        "tokens": 1_234_567,
        "data": {
            "rows": 1_280,
            "trained": 1_200,
            "held_out": 80,
            "duplicates": 64,
            "format": "prompt-answer",
            "tokens": {"of": "prompt", "measured": 1_000, "mean": 30.5, "median": 30, "longest": 99},
            "examples": [{"place": "a.jsonl:1", "label": "", "segments": [[text, 3, False], ["yes<|end|>", 4, True]]}],
        },
        "held_out": {"prompts": 60, "before": {"score": 0.25, "kl": 0.0}, "after": {"score": 0.75, "kl": 0.5}},
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    draw = random.Random(steps)
    rows = [
        {
            "step": step,
            "epoch": step / steps,
            "loss": draw.random(),
            "learning_rate": 1e-6,
            "grad_norm": 0.1,
            "reward": draw.random(),
            "reward_std": 0.3,
            "rewards/math/mean": draw.random(),
            "kl": draw.random(),
            "rewards/" + text[:40] + "/mean": draw.random(),
            "completions/clipped_ratio": 0.125,
            "completions/mean_length": 100 * draw.random(),
            "flat": 0.5,
            "entropy": draw.random(),
            "tokens": 100 * step,
            "tokens_per_second": 1e4 * draw.random(),
            "memory_gib": 40.5,
            "odd/one": step,
        }
        for step in range(1, steps + 1)
    ]
    lines = [json.dumps(row) for row in [*rows, {"step": steps, "train_loss": 0.5, "train_runtime": 1.0}]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    turns = [{"role": "user", "content": text}]
    samples = [{"prompt": turns, "before": "vorher " + text, "after": text, "reference": text}]
    (folder / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    entries = [
        {
            "step": step,
            "prompt": turns,
            "completion": f"completion {step} {text}",
            "ended": step % 2 == 0,
            "answer": "2",
            "reward": float(step),
            "rewards": {"math": float(step), text[:40]: None},
            "mask": [["<|user|>" + text, 7, False], [f"completion {step}<|end|>", 5, True]],
        }
        for step in range(min(steps, 300))
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    (folder / "evaluation.json").write_text(json.dumps(evaluation(text)), encoding="utf-8")
    return folder


def evaluation(text: str) -> dict:
    """An evaluation.json with a better, a worse and an equal figure, and a question."""

    def line(name: str, before: float, after: float, verdict: str) -> dict:
        return {
            "name": name,
            "rows": 9,
            "before": before,
            "before_interval": [before - 0.1, before + 0.1],
            "after": after,
            "after_interval": [after - 0.1, after + 0.1],
            "difference": after - before,
            "interval": [after - before - 0.125, after - before + 0.125],
            "verdict": verdict,
        }

    lines = [
        line("greedy right", 0.25, 0.5, "better"),
        line("perplexity (per token)", 3.5, 4.25, "worse"),
        line("right, English", 0.5, 0.5, "no difference"),
    ]
    question = {"question": text, "reference": "2", "before": "1", "after": text, "by": ["scorer", "F1 0.50"]}
    return {
        "before": {"name": "qwen2.5-7b"},
        "after": {"name": "outputs/one"},
        "finished": "2026-11-26T12:00:00+0000",
        "sections": {"held out": {"title": "held out", "rows": 9, "lines": lines, "notes": ["9 rows are few"]}},
        "questions": {
            "rows": [{**question, "verdict": "better"}],
            "total": {"in words": "1 better, 0 worse, 0 the same: no difference (sign test, p = 1)"},
        },
    }


class Page(HTMLParser):
    """What a browser makes of a page: its text, its tags, and the figures that its scripts draw."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words, self.tags, self.figures, self.inside = [], [], [], ("", {})
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.inside = (tag, dict(attributes))
        self.tags.append(self.inside)

    def handle_endtag(self, tag):
        self.inside = ("", {})

    def handle_data(self, data):
        tag, attributes = self.inside
        if tag == "script" and attributes.get("type") == "application/json":
            self.figures.append(json.loads(data))
        elif tag not in ("script", "style"):
            self.words.append(data)

    def curve(self, name: str) -> list[float]:
        return next(trace["y"] for figure in self.figures for trace in figure["data"] if trace["name"] == name)


def test_a_report_tells_what_was_trained_how_it_went_and_how_to_repeat_it(tmp_path):
    run = write_run(tmp_path / "one")
    shown = Page(page([run]))
    for words in (
        "GRPO of qwen2.5-7b on 算术.jsonl",
        "held-out score 0.25 → 0.75",
        "time 1:02:05",
        "useful tokens 1,234,567",
        "peak memory 40.5 GiB",
        "REWARDS math format=0.2 command line",
        "LEARNING_RATE 1e-06 card qwen2.5-7b",
        "sha256 " + "d" * 64,
        "Qwen/ Qwen2.5-7B@abc",
        "NVIDIA H200, 139.8 GiB, CUDA 13.0",
        "git checkout " + "1" * 40,
        f"make grpo FROM={run}/run.json OUT=outputs/again",
        "make grpo MODEL=qwen2.5-7b 'DATA=/srv/算术.jsonl' LEARNING_RATE=1e-06 'REWARDS=math format=0.2' "
        "LOAD_IN_4BIT=no OUT=outputs/again",
        "before vorher 一加一等于二。 after 一加一等于二。",
        "mean score 0.25 0.75 +0.5",
        "29 at step 29 · math 29",
        "truncated",
        "1 other metric",
        "rows 1,280",
        "1,200 rows; 80 are held out",
        "tokens of a prompt: median 30, mean 30.5, longest 99 (of 1,000)",
        "duplicates 64 rows (5.0%)",
        "7 tokens, 4 with loss",
        "12 tokens, 5 with loss",
        "Before: qwen2.5-7b. After: outputs/ one.",
        "greedy right 25.0% 15.0% to 35.0% 50.0% 40.0% to 60.0% +25.0% +12.5% to +37.5% better",
        "perplexity (per token) 3.50 3.40 to 3.60 4.25 4.15 to 4.35 +0.750 +0.625 to +0.875 worse",
        "no difference",
        "1 questions: 1 better, 0 worse, 0 the same",
    ):
        assert words in shown.text, words
    assert len(shown.curve("math")) == 30
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert shown.curve("mean")[0] == pytest.approx(first["reward"], rel=1e-4)


def test_only_what_carries_loss_is_marked(tmp_path):
    shown = Page(page([write_run(tmp_path / "one", steps=2)]))
    marked = [found.get("title") for tag, found in shown.tags if tag == "span" and found.get("class") == "loss"]
    assert sorted(marked) == ["4 tokens, with loss", "5 tokens, with loss", "5 tokens, with loss"]


@pytest.mark.parametrize("missing", ["metrics.jsonl", "samples.json", "samples.jsonl", "evaluation.json"])
def test_a_run_is_shown_at_every_time_of_its_life(tmp_path, missing):
    run = write_run(tmp_path)
    (run / missing).unlink()
    shown = Page(page([run]))
    assert ("No step has been logged yet" in shown.text) == (missing == "metrics.jsonl")
    (run / "run.json").write_text('{"recipe": "sft", "status": "running"}')
    assert "running" in Page(page([run])).text


def test_figures_on_held_out_rows_have_the_names_of_the_charts_and_no_counter_is_one(tmp_path):
    run = write_run(tmp_path)
    row = {"step": 30, "eval_loss": 0.5, "eval_mean_token_accuracy": 0.9, "eval_rewards/chosen": 1.0, "eval_mine": 2.0}
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(row | {"eval_num_tokens": 9, "eval_runtime": 1.0}) + "\n")
    table = held_out(read_run(run))[-1]
    assert [name for name, *_ in table.rows] == ["Loss", "Tokens predicted right", "Implicit rewards: chosen", "mine"]


def test_a_half_written_line_is_not_read_and_hides_no_other(tmp_path):
    run = write_run(tmp_path, steps=5)
    whole = read_run(run)
    for file in ("metrics.jsonl", "samples.jsonl"):
        with (run / file).open("ab") as stream:
            stream.write('{"step": 6, "loss": 0.1, "completion": "算'.encode()[:-1])
    half = read_run(run)
    assert (half.metrics, half.best, half.completions) == (whole.metrics, whole.best, whole.completions)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no run; give the folder of a run"):
        page([tmp_path / "nowhere"])
    (tmp_path / "run.json").write_text("[")
    with pytest.raises(InputError, match=r"run\.json: is damaged or no JSON"):
        page([tmp_path])


def test_runs_share_their_plots_and_what_differs_is_listed(tmp_path):
    runs = [write_run(tmp_path / name, learning_rate=rate) for name, rate in (("a", 1e-6), ("b", 1e-5))]
    shown = Page(page(runs))
    assert "What differs a b LEARNING_RATE 1e-06 1e-05 Health" in shown.text
    assert [trace["name"] for trace in shown.figures[0]["data"]] == ["a", "b"]
    assert len({trace["line"]["color"] for figure in shown.figures for trace in figure["data"]}) == 2


def test_text_of_data_is_text_and_no_script_of_its_own_begins(tmp_path):
    clean, planted = (Page(page([write_run(tmp_path / name, text=text)])) for name, text in (("a", "x"), ("b", BAD)))
    assert [tag for tag, _ in planted.tags] == [tag for tag, _ in clean.tags]
    assert " ".join(BAD.split()) in planted.text
    assert not any(name.startswith("on") or name in ("src", "href") for _, found in planted.tags for name in found)


def test_json_in_a_script_is_what_it_was_and_cannot_end_the_script():
    written = as_json({"a": BAD, "数": 1.5})
    assert not set(written) & set("<>&\u2028\u2029")
    assert json.loads(written) == {"a": BAD, "数": 1.5}


def test_thinned_curves_keep_their_extremes_and_their_order():
    draw = random.Random(0)
    points = [(step, draw.gauss(0, 1)) for step in range(10_000)]
    points[777], points[5555] = (777, 99.0), (5555, -99.0)
    kept = thinned(points, 400)
    assert len(kept) <= 400
    assert {(777, 99.0), (5555, -99.0), points[0], points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:400], 400) == points[:400]


def test_values_that_are_not_finite_are_counted_and_not_drawn(tmp_path):
    run = write_run(tmp_path, steps=3)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 4, "loss": math.nan}) + "\n")
    shown = Page(page([run]))
    assert "1 of the logged values are not finite" in shown.text
    assert len(shown.curve("loss")) == 3


def test_the_best_and_the_worst_of_many_completions_are_those_of_a_full_sort():
    draw = random.Random(1)
    entries = [{"prompt": "p", "completion": f"c{n}", "reward": draw.randrange(50)} for n in range(2_000)]
    ends = Ends()
    for entry in entries:
        ends.add(entry)
    ranked = sorted(enumerate(entries), key=lambda one: (-one[1]["reward"], -one[0]))
    assert ends.best() == [entry for _, entry in ranked[:5]]
    ranked = sorted(enumerate(entries), key=lambda one: (one[1]["reward"], -one[0]))
    assert ends.worst() == [entry for _, entry in ranked[:5]]


@pytest.mark.slow
def test_a_long_run_stays_below_a_megabyte_without_the_library(tmp_path):
    run = write_run(tmp_path, steps=10_000)
    assert len(page([run]).encode()) - len(plotly().encode()) < 1_000_000


@pytest.mark.parametrize(("error", "word"), [(None, "done"), (ValueError("boom"), "failed: ValueError: boom")])
def test_a_run_ends_with_its_report(tmp_path, capsys, error, word):
    run = write_run(tmp_path)
    ended = Run(run, json.loads((run / "run.json").read_text()))
    ended.__exit__(type(error) if error else None, error, None)
    assert capsys.readouterr().out == f"Report in {run}/report.html\n"
    assert word in Page((run / "report.html").read_text(encoding="utf-8")).text


def test_a_report_that_cannot_be_written_fails_no_run(tmp_path, capsys):
    run = write_run(tmp_path)
    (run / "report.html").mkdir()
    with Run(run, json.loads((run / "run.json").read_text())) as ended:
        pass
    assert ended.record["status"] == "done"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{run}/report.html could not be written: IsADirectoryError")


# --- in a browser ---------------------------------------------------------------------------------------------------

in_browser = pytest.mark.skipif(browser.PROGRAM is None, reason="chromium is not installed")


@in_browser
@pytest.mark.slow
def test_a_browser_shows_the_report_without_errors_requests_or_a_horizontal_scroll(tmp_path):
    one = write_run(tmp_path / "one", text=BAD)
    two = write_run(tmp_path / "two", steps=2_000, seed=7)
    write_report([one], tmp_path / "one.html")
    write_report([one, two], tmp_path / "both.html")
    backgrounds = set()
    with browser.browser() as tab:
        for name, width, scheme in (
            ("one", 360, "light"),
            ("one", 1280, "dark"),
            ("both", 360, "dark"),
            ("both", 1280, "light"),
        ):
            address = (tmp_path / f"{name}.html").as_uri()
            tab.requests.clear()
            tab.open(address, width=width, scheme=scheme, touch=width == 360)
            tab.value("document.querySelectorAll('details').forEach((one) => (one.open = true))")
            tab.wait("[...document.querySelectorAll('.figure')].every((one) => one.querySelector('.main-svg'))")
            assert tab.value("document.documentElement.scrollWidth") <= width
            assert tab.value("window.planted") is None
            assert {request for request in tab.requests if not request.startswith("data:")} == {address}
            backgrounds.add((scheme, tab.value("getComputedStyle(document.body).backgroundColor")))
        assert tab.errors == []
    assert backgrounds == {("light", "rgb(255, 255, 255)"), ("dark", "rgb(13, 17, 23)")}


@in_browser
@pytest.mark.slow
def test_the_page_runs_no_script_but_its_own(tmp_path):
    """Were the escaping to fail, the page's policy would still stop what is planted."""
    file = tmp_path / "page.html"
    html = page([write_run(tmp_path / "run")])
    file.write_text(html.replace("<h1>", "<script>window.planted = 1</script><img src=x onerror='planted = 2'><h1>"))
    with browser.browser() as tab:
        tab.open(file.as_uri())
        assert tab.value("[window.planted ?? null, document.querySelectorAll('.main-svg').length > 0]") == [None, True]
        assert any("Content Security Policy" in error for error in tab.errors)
