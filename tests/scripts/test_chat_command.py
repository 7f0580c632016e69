"""`scripts/chat.py`: what it refuses, its commands, and conversations as a user has them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import chat as command
import pytest
from common.errors import InputError
from common.run.record import adapter_of
from conftest import ROOT, run_recipe
from in_process import refusal


def record(folder, recipe="sft", status="done", **more):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"recipe": recipe, "status": status, **more}), encoding="utf-8")
    return folder


def test_the_adapter_of_a_run_is_found_or_a_message_tells_why_there_is_none(tmp_path):
    done = record(tmp_path / "done")
    (done / "adapter").mkdir()
    assert adapter_of(done) == done / "adapter"
    with pytest.raises(InputError, match="no adapter yet; the run is stopped after step 12, and its command resumes"):
        adapter_of(record(tmp_path / "stopped", status="stopped", step=12))
    with pytest.raises(InputError, match="a reward model scores and writes nothing"):
        adapter_of(record(tmp_path / "reward", "reward"))
    for none in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match="holds no run"):
            adapter_of(none)


def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    for words, why in (
        (["--run", "a", "--adapter", "b"], "give one of the two"),
        (["--compare"], "--compare needs an adapter"),
        (["--prompt", " "], "--prompt: is empty"),
        (["--temperature", "-1"], "from 0 to 10"),
        (["--temperature", "nan"], "from 0 to 10"),
        (["--prompt", "caf\udce9"], "not UTF-8"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--run", tmp_path], "holds no run"),
    ):
        assert why in refusal(command.main, capsys, *words)


class Echo(command.Talk):
    """A conversation with a model that repeats the last question, and how many turns it saw."""

    def prompt(self):
        if "long" in self.turns[-1]["content"]:
            raise InputError("too long")
        return self.turns

    def answer(self, ids):
        return f"{ids[-1]['content']} ({len(ids)})"


def talk(**settings):
    return Echo(None, None, "", adapted=False, args=replace(command.Args(), **settings))


def test_what_a_model_writes_is_shown_as_it_is(capsys):
    command.say("[bold] :100: and :smile:")
    assert capsys.readouterr().out == "[bold] :100: and :smile:"


def test_commands_change_the_conversation_as_they_say(tmp_path, capsys):
    one = talk(system_prompt="Be short.")
    for line in ("a", "", "b", "/undo", "c", "/again"):
        one.read(line)
    assert [turn["content"] for turn in one.turns] == ["Be short.", "a", "a (2)", "c", "c (4)"]
    one.read(f"/save {tmp_path / 'talk.json'}")
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"] == one.turns
    one.read("/temperature 0")
    assert one.temperature == 0
    one.read("/new")
    assert one.turns == [{"role": "system", "content": "Be short."}]
    one.read("/system")
    assert one.turns == []
    capsys.readouterr()
    one.read("/help")
    printed = capsys.readouterr().out
    assert all(f"/{name}" in printed for name in command.COMMANDS if name != "help")
    with pytest.raises(SystemExit):
        one.read("/quit")


def test_what_cannot_be_done_has_a_message_and_changes_nothing(tmp_path, capsys):
    one = talk()
    one.read("a")
    before = list(one.turns)
    there = tmp_path / "there.json"
    there.write_text("kept", encoding="utf-8")
    for line, why in (
        ("/compre", "/compre: no such command"),
        ("/compare", "/compare needs an adapter"),
        ("/compare off", "/compare takes no word"),
        ("/temperature", "nothing is no number"),
        ("/temperature\thigh", "high is no number"),
        ("caf\udce9", "not UTF-8"),
        ("/system caf\udce9", "not UTF-8"),
        ("/temperature 11", "from 0 to 10"),
        ("/save", "give a file"),
        (f"/save {there}", "is there already"),
        (f"/save {tmp_path / 'no' / 'such' / 'folder.json'}", "No such file or directory"),
        ("a long question", "too long"),
    ):
        one.read(line)
        assert why in capsys.readouterr().out, line
        assert one.turns == before
    assert there.read_text(encoding="utf-8") == "kept"
    one.read("/undo")
    one.read("/undo")
    assert "there is no question yet" in capsys.readouterr().out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "run"
    done = run_recipe("sft", "--output-dir", folder, "--sample-prompts", 0, "--max-steps", 60)
    assert done.returncode == 0, done.stderr
    return folder


def start(*words, **how):
    program = [sys.executable, ROOT / "scripts" / "chat.py", *words, "--temperature", 0]
    return subprocess.Popen([str(word) for word in program], text=True, stdout=subprocess.PIPE, cwd=ROOT, **how)


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_a_trained_adapter_answers_beside_its_base(run):
    once = start("--run", run, "--prompt", "What is 3 + 4?", "--compare", "--max-new-tokens", 40)
    printed, _ = once.communicate(timeout=300)
    assert once.returncode == 0
    base, tuned = printed.partition("base  ")[2].split("\ntuned ")
    assert "</answer>" in tuned
    assert "<answer>" not in base
    piped = start("--run", run, stdin=subprocess.PIPE)
    printed, _ = piped.communicate("What is 7 - 2?\n/undo\nWhat is 3 + 4?\n", timeout=300)
    assert piped.returncode == 0
    assert printed.count("</answer>") == 2
    assert printed.rstrip().endswith("</answer>")
    assert "> " not in printed


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_not_the_conversation():
    """The base alone talks without an end."""
    process = start("--max-new-tokens", 2000, "--seed", 1, stdin=subprocess.PIPE, env={**os.environ, "TERM": "dumb"})
    seen: list[str] = []
    reader = threading.Thread(target=lambda: seen.extend(iter(lambda: process.stdout.read(1), "")))
    reader.start()

    def wait_for(condition, what):
        started = time.time()
        while not condition("".join(seen)):
            assert time.time() - started < 200, f"{what}: {''.join(seen)}"
            time.sleep(0.1)

    process.stdin.write("Tell me a story about numbers.\n")
    process.stdin.flush()
    wait_for(lambda text: len(text.partition("...\n")[2]) > 40, "it answers")
    process.send_signal(signal.SIGINT)
    wait_for(lambda text: "[stopped]" in text, "it stops")
    process.stdin.write("/save\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    reader.join()
    assert "/save: give a file" in "".join(seen)
