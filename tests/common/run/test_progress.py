"""What people see while a command works: at 80 and 120 columns, in a log file, and nothing of the libraries' noise."""

import contextlib
import fcntl
import io
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest
from common.run import progress, screen
from common.run.metrics import ProgressCallback, as_text, mean_loss
from common.run.progress import LiveBar, bar, duration, track, wrapped
from conftest import ROOT, read_jsonl
from rich.console import Console
from rich.text import Text
from transformers import TrainerControl, TrainerState

GRPO = {
    "reward": "reward",
    "math": ("rewards/math/mean", "rewards/math/std"),
    "format": ("rewards/format/mean", "rewards/format/std"),
    "flat": "flat",
    "length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "kl": "kl",
    "entropy": "entropy",
}
LOGS = {
    "loss": -0.0123,
    "reward": 0.42134,
    "rewards/math/mean": 0.3125,
    "rewards/math/std": 0.46351,
    "rewards/format/mean": 0.54412,
    "rewards/format/std": 0.49821,
    "flat": 0.25,
    "completions/mean_length": 112.375,
    "completions/clipped_ratio": 0.0625,
    "kl": 0.0012345,
    "entropy": 0.71234,
}


@pytest.fixture
def log(monkeypatch):
    """The console of the process as it is in a log file."""
    console = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(screen, "console", lambda: console)
    monkeypatch.setattr(progress, "console", lambda: console)
    return console


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: `clock.now`, in seconds."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def drawn(renderable: object, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    console.print(renderable)
    return Text.from_ansi(console.file.getvalue()).plain.splitlines()


def grpo_bar(total: int = 1000, done: int = 37) -> LiveBar:
    shown = LiveBar("step", total)
    shown.update(done, ["38.2 GiB", "12,291 tok/s"])
    shown.values = as_text(LOGS, GRPO)
    return shown


@pytest.mark.parametrize(("width", "lines"), [(80, 3), (120, 2), (200, 2)])
def test_the_numbers_of_grpo_leave_step_bar_time_and_memory_where_they_are(width, lines):
    screenful = drawn(grpo_bar(), width)
    assert len(screenful) == lines
    assert max(map(len, screenful)) <= width
    first, *rest = screenful
    assert first.startswith(("step   37/1000 ━", "step   37/1000 ╸"))
    assert first.endswith("  -:--:-- left  38.2 GiB  12,291 tok/s")
    assert first.count("━") + first.count("╸") > 20
    assert "  ".join(line.strip() for line in rest) == (
        "reward 0.4213  math 0.312±0.464  format 0.544±0.498  flat 0.25  length 112  truncated 0.0625  kl 0.00123  "
        "entropy 0.712"
    )


@pytest.mark.parametrize("width", [24, 40, 50])
def test_where_there_is_little_room_the_speed_goes_first_and_step_and_time_stay(width):
    first, *rest = drawn(grpo_bar(), width)
    assert max(map(len, [first, *rest])) <= width
    assert first.startswith("step   37/1000 ") or width == 24
    assert ("38.2 GiB" in first) == (width >= 50)
    assert "tok/s" not in first


def test_values_are_wrapped_between_values_only():
    assert wrapped(["a 1", "b 2", "c 3"], 8) == ["a 1  b 2", "c 3"]
    assert wrapped(["a 1", "b 2", "c 3"], 2) == ["a 1", "b 2", "c 3"]
    assert wrapped([], 80) == []


def test_durations_read_as_a_time_limit():
    assert [duration(s) for s in (0, 59.6, 3599, 7322, 360000)] == [
        "0:00:00",
        "0:01:00",
        "0:59:59",
        "2:02:02",
        "100:00:00",
    ]


# Time left.


def test_the_time_left_is_right_from_the_second_step_on_though_the_first_one_is_slow(clock):
    shown = LiveBar("step", 100)
    assert shown.seconds_left() is None
    clock.now += 60  # it compiles
    shown.update(1)
    assert shown.seconds_left() is None
    shown.update(1)
    assert shown.seconds_left() is None
    for done in (2, 3, 40):
        clock.now += 2 * (done - shown.done)
        shown.update(done)
        assert shown.seconds_left() == pytest.approx(2 * (100 - done))
    clock.now += 1.5  # within a step it counts down
    assert shown.seconds_left() == pytest.approx(2 * 60 - 1.5)
    clock.now += 1000
    assert shown.seconds_left() == 0


def test_the_time_left_of_a_resumed_run_counts_only_its_own_steps(clock):
    shown = LiveBar("step", 1000, done=900)
    for done, passed in ((901, 30), (902, 5), (903, 5)):
        clock.now += passed
        shown.update(done)
    assert shown.seconds_left() == pytest.approx(97 * 5)


def test_the_time_left_follows_steps_that_become_slower(clock):
    """As GRPO's do when completions become longer. rich's own estimate forgets steps that take over 30 s."""
    shown = LiveBar("step", 1000)
    for done in range(1, 301):
        clock.now += 1 if done <= 200 else 40
        shown.update(done)
    assert shown.seconds_left() == pytest.approx(700 * 40)


def test_a_bar_that_is_full_shows_the_time_taken(clock):
    shown = LiveBar("step", 2)
    for done in (1, 2):
        clock.now += 40
        shown.update(done)
    clock.now += 999
    assert shown.line([]) == "step 2/2  took 0:01:20"


# Commands that sample and score.


def test_in_a_log_file_a_bar_is_ten_lines_at_most_and_the_items_are_all_there(log):
    assert list(track(range(1000), "Sampling completions")) == list(range(1000))
    lines = log.file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("Sampling completions 100/1000  0:00:0")
    assert lines[-1] == "Sampling completions 1000/1000  took 0:00:00"


def test_a_bar_over_a_few_pieces_of_several_each(log):
    with bar("Scoring", 7) as advance:
        for count in (3, 3, 1):
            advance(count)
    assert [line.split("  ")[0] for line in log.file.getvalue().splitlines()] == [
        "Scoring 3/7",
        "Scoring 6/7",
        "Scoring 7/7",
    ]
    assert list(track([], "Scoring")) == []


def test_on_a_terminal_a_bar_moves_and_what_is_printed_stays_above_it(monkeypatch):
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    for module in (screen, progress):
        monkeypatch.setattr(module, "console", lambda: console)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back afterwards
    with bar("Scoring", 2) as advance:
        advance(1)
        print("a line of the command")
        time.sleep(0.3)
        assert screen._height == 1
    written = console.file.getvalue()
    assert written.index("0/2") < written.index("a line of the command\n") < written.rindex("Scoring 1/2")
    assert screen._height == 0


# The trainer's callback.


def run_steps(callback: ProgressCallback, first: int, last: int, total: int, every: int, eval_at: int = 0) -> None:
    """As a trainer calls it: logs where it has to, or where a callback says so."""
    state = TrainerState(global_step=first - 1, max_steps=total)
    callback.on_train_begin(None, state, TrainerControl())
    for step in range(first, last + 1):
        state.global_step, state.epoch = step, step / total
        control = TrainerControl(should_log=step % every == 0 or step == 1)
        callback.on_step_end(None, state, control)
        if control.should_log:
            callback.on_log(None, state, control, logs={**LOGS, "loss": 10 - step / 10})
        if step == eval_at:
            callback.on_log(None, state, control, logs={"eval_loss": 0.5, "eval_runtime": 1.0})
    callback.on_train_end(None, state, TrainerControl())


def test_the_last_step_is_logged_where_logging_steps_does_not_divide_the_steps(tmp_path, log):
    run_steps(ProgressCallback(tmp_path / "metrics.jsonl", 1000, log), 1, 13, 13, every=5)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 5, 10, 13]
    assert [line.split()[1] for line in log.file.getvalue().splitlines()] == ["1/13", "5/13", "10/13", "13/13"]


def test_a_logged_step_is_one_line_of_a_log_file_however_many_its_numbers(tmp_path, log):
    run_steps(ProgressCallback(tmp_path / "metrics.jsonl", 1000, log, GRPO), 1, 3, 3, every=1, eval_at=2)
    lines = log.file.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("step 1/3  reward 0.4213  math 0.312±0.464  format ")
    assert lines[0].endswith(" left")
    assert lines[2].startswith("step 2/3  eval loss 0.5")
    assert "took 0:00:0" in lines[3]


def test_rows_of_steps_that_a_resumed_run_repeats_are_dropped(tmp_path, log):
    file = tmp_path / "metrics.jsonl"
    run_steps(ProgressCallback(file, 1000, log), 1, 8, 10, every=2)
    run_steps(ProgressCallback(file, 1000, log), 5, 10, 10, every=2)  # the checkpoint was of step 4
    assert [row["step"] for row in read_jsonl(file)] == [1, 2, 4, 6, 8, 10]


def test_the_mean_loss_is_one_over_all_steps_that_were_logged():
    history = [
        {"step": 1, "loss": 4.0},
        {"step": 3, "loss": 1.0},
        {"step": 3, "eval_loss": 9.0},
        {"step": 4, "loss": 2.0},
    ]
    assert mean_loss(history) == pytest.approx((4 + 2 * 1 + 2) / 4)
    assert mean_loss([]) is None


# The libraries' noise.

LIBRARIES = """\
🦥 Unsloth: Will patch your computer to enable 2x faster free finetuning.
==((====))==  Unsloth 2026.10.9: Fast Qwen2 patching. Transformers: 5.17.0.
   \\\\   /|    NVIDIA H100 80GB HBM3. Num GPUs = 1. Max memory: 79.1 GB. Platform: Linux.
O^O/ \\_/ \\    Torch: 2.13.0+cu130. CUDA: 9.0. CUDA Toolkit: 13.0. Triton: 3.7.1
\\        /    Bfloat16 = TRUE. FA [Xformers = None. FA2 = False]
 "-____-"     Free license: http://github.com/unslothai/unsloth
Unsloth 2026.10.9: no GPU found, training on CPU (x86_64, 1 threads, bfloat16 = True). CPU training is slower.
Unsloth (CPU): Qwen2ForCausalLM on 1 CPU threads. dtype = torch.float32, 4-bit = False, chunked CE = True.
Unsloth 2026.10.9 patched 24 layers with 24 QKV layers, 24 O layers and 24 MLP layers.
🦥 Unsloth: Packing enabled - training is >2x faster and uses less VRAM!
🦥 Unsloth: Padding-free auto-enabled, enabling faster training.
Unsloth: Will smartly offload gradients to save VRAM!
Unsloth: Double buffering enabled (parallel H2D + compute) for backward pass.
Not an error, but Unsloth cannot patch O projection layer with our manual autograd engine since either LoRA adapters
"""
WARNINGS = """\
Unsloth: Your learning rate of `3.0` is way too larger > 1!
Unsloth 2026.10.9 patched 24 layers with 0 QKV layers, 0 O layers and 0 MLP layers. Dropout is not 0.
Unsloth: could not truncate the pre-tokenized dataset to `max_length` (x).
Traceback (most recent call last):
   a line of somebody else
"""


def test_the_libraries_noise_is_dropped_and_every_other_line_of_theirs_is_shown(log):
    output = screen._Output(log, log.file)
    print(LIBRARIES + WARNINGS, end="", file=output)
    print("no end yet", end="", file=output, flush=True)
    assert log.file.getvalue() == WARNINGS + "no end yet\n"


def test_noise_in_the_log_of_a_library_is_dropped_too(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    screen._quiet_libraries()
    logger = logging.getLogger("transformers.trainer")
    monkeypatch.setattr(logger, "isEnabledFor", lambda level: True)  # whatever another test made transformers print
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    logger.warning(
        "==((====))==  Unsloth - 2x faster free finetuning | Num GPUs used = 1\n   \\\\   /|    Num examples = 9"
    )
    logger.warning("Unsloth is running with multi GPUs")
    logger.removeHandler(handler)
    assert records == ["Unsloth is running with multi GPUs"]
    assert isinstance(sys.stdout, screen._Output)
    print(json.dumps({"stays": "whole"}))
    assert capfd.readouterr().out == '{"stays": "whole"}\n'


def test_a_line_above_the_bar_leaves_it_whole_when_it_is_drawn_again(monkeypatch, capfd):
    monkeypatch.setattr(screen, "_height", 2)
    screen.write_above("SIGTERM: the run stops")
    out, err = capfd.readouterr()
    assert (out, err) == ("\r\x1b[2K\x1b[1A\x1b[2KSIGTERM: the run stops\n\n", "")
    monkeypatch.setattr(screen, "_height", 0)
    screen.write_above("SIGTERM: the run stops")
    assert capfd.readouterr() == ("", "SIGTERM: the run stops\n")


# A real run.


@pytest.mark.slow
def test_a_log_file_of_a_run_holds_its_own_lines_and_none_of_the_libraries(trained):
    _, output = trained
    before_steps, _, _ = output.partition("step 1/")
    loading, data, gpu, *more = before_steps.splitlines()
    assert loading == "Loading tiny ..."
    assert data.startswith("tiny, ")
    assert gpu.startswith("No GPU: ")
    assert more == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_a_spinner_then_the_bar_and_none_of_the_libraries_bars(tmp_path, width):
    command = [sys.executable, ROOT / "recipes" / "sft.py", "--output-dir", tmp_path / "run", "--max-steps", "4"]
    written = on_a_terminal([*map(str, command), "--logging-steps", "3"], width)
    plain = Text.from_ansi(written.replace("\r", "\n")).plain
    assert "Loading tiny" in plain
    for noise in ("Unsloth", "Truncating", "Dropping", "Building", "Loading weights", "it/s", "examples"):
        assert noise not in plain
    assert re.search(r"step 4/4 ━+  took 0:00:\d\d  \d+\.\d GiB  [\d,]+ tok/s", plain)
    assert "Done in 0:0" in plain
    assert "  make merge ADAPTER=" in plain
    assert max(len(line) for line in plain.splitlines() if line.startswith(("step", "loss"))) <= width
    assert [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row] == [1, 3, 4]


def on_a_terminal(command: list[str], width: int) -> str:
    """What a command writes to a terminal of that width, control codes included."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment, cwd=ROOT)
    os.close(its)
    written = b""
    with contextlib.suppress(OSError):  # of the end
        while piece := os.read(ours, 65536):
            written += piece
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()
