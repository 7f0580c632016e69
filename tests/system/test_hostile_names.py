"""Names and contents of somebody else: a command works on exactly that file, or refuses it in one message, exit code 2.

Nothing in a name is executed, by make, a shell, Slurm or Docker; nothing in a name or a row reaches the terminal as
something that it obeys; nothing is written but what was requested; and nothing waits for a pipe.
"""

import csv
import io
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from common.data.rows import find_source, read_rows
from common.errors import CONTROL, InputError, run_command
from common.lm.hub import find_model
from common.rewards.user_file import find_function
from common.run import screen
from in_process import as_it_was, command
from launch import engines
from launch.mounts import Mounts, check_paths
from launch.repeat import repeat
from launch.where import Image
from rich.console import Console
from scripts.checkout import Checkout, given

ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
NAMES = {
    "spaces": "a  b ",  # make takes those at the beginning of a value away
    "a single quote": "it's",
    "double quotes": 'a "b"',
    "a substitution": "$(touch planted)",
    "backquotes": "`touch planted`",
    "a call of make": "$(shell touch planted)",
    "a dollar": "$HOME ${HOME} $$ $1",
    "a semicolon": "a; touch planted;",
    "ampersands": "a && touch planted &",
    "a bar": "a | touch planted",
    "redirections": "a > planted < x",
    "stars": "* ?[a-z]",
    "braces": "{a,b} ~root !x",
    "a dash": "-rf",
    "a flag": "--output-dir=planted",
    "a hash": "a # b",
    "a per cent sign": "%s %n 100%",
    "an equals sign": "A=b:c",
    "a comma": "a,target=planted,b",
    "a backslash": "a\\nb\\",
    "a tab": "a\tb",
    "dots": "..a",
    "another alphabet": "数据 é 🦥",
    "markup": "[b] [link=x]a :100: [red]",
    "a page's tags": "<script>touch planted<@script>",
    "right to left": "a\u202elnosj.b",
    "a long one": "x" * 240,
}
REFUSED = {
    "an escape sequence": "a\x1b[2J\x1b]0;planted\x07",
    "a newline": "a\ntouch planted\nb",
    "a carriage return": "a\rb",
    "a bell": "a\x07b",
    "no UTF-8": "a\udcff\udcfeb",
    "a second control set": "a\x9b2Jb",
    "too long": "x" * 300,
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Path]:
    """The working directory, in which nothing planted appears, and beside which nothing does."""
    folder = tmp_path / "outer" / "work"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    yield folder
    assert os.listdir(tmp_path / "outer") == ["work"]
    assert not list(folder.rglob("planted"))


def data_file(name: str) -> str:
    """The name of a file of data that is there, where the file system takes it."""
    file = f"{name}.jsonl"
    try:
        Path(file).write_text(ROW)
    except OSError:
        assert len(name) > 255
    return file


def run(main, capsys, *words: object, shown: bool = True) -> tuple[int, str, str]:
    """The exit code of a command in this process, and what it prints; in 20 seconds, for a pipe would hold it up.

    What is `shown` to a person has nothing that a terminal would obey; a script that is printed is as it is.
    """
    with pytest.MonkeyPatch.context() as patch, as_it_was():
        patch.setattr(sys, "argv", ["command", *map(str, words)])
        signal.alarm(20)
        try:
            with pytest.raises(SystemExit) as exited:
                run_command(main)
        finally:
            signal.alarm(0)
    printed = capsys.readouterr()
    assert exited.value.code in (0, 2), printed.err
    for text in (printed.out if shown else "", printed.err):
        assert not CONTROL.search(text), repr(text)
        assert "Traceback" not in text
    return exited.value.code, printed.out, printed.err


QUICK = ("a flag", "markup", "a substitution", "right to left", "a tab")  # of the others, the slow tests


@pytest.mark.parametrize("kind", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in NAMES])
def test_a_command_works_on_exactly_that_file(kind, place, capsys):
    file = data_file(NAMES[kind])
    written = f"{NAMES[kind]}.html" if kind != "a long one" else "out.html"
    code, out, err = run(command("scripts/check-data.py").main, capsys, f"--data={file}", f"--html={written}")
    assert (code, err) == (0, "")
    assert "1 rows" in out
    assert sorted(os.listdir(place)) == sorted([file, written])


@pytest.mark.parametrize("kind", REFUSED)
def test_a_name_that_is_no_text_is_refused_in_one_message(kind, place, capsys):
    file = data_file(REFUSED[kind])
    if kind in ("a newline", "a carriage return", "too long"):  # the launcher knows what is a path, and a prompt may
        with pytest.raises(InputError, match=r"has the end of a line in it|no such file or folder"):
            check_paths(["--data", file])
        return
    code, _, err = run(command("scripts/check-data.py").main, capsys, f"--data={file}")
    assert code == 2
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind != "too long"])
def test_a_folder_s_file_with_such_a_name_is_refused(kind, place):
    Path("folder").mkdir()
    data_file(f"folder/{REFUSED[kind]}")
    with pytest.raises(InputError, match="its name has a character that is no text"):
        find_source("folder")


@pytest.mark.parametrize("kind", NAMES)
def test_docker_gets_the_file_and_nothing_else(kind, place, monkeypatch):
    """The command line of `docker run`: one mount of that folder, one word that is that file."""
    folder = place / NAMES[kind].replace("/", "@")
    folder.mkdir()
    file = str(folder / data_file(f"{folder.name}/data").rpartition("/")[2])
    monkeypatch.setenv("HF_HOME", str(place / "hub"))
    mounts = Mounts()
    words = mounts.take(["recipes/sft.py", f"--data={file}", "--output-dir", str(folder / "run")])
    line = engines.docker("docker", Image("recipes:cpu"), mounts, engines.environment(mounts, Image("x")), words)
    assert line[-3:] == [f"--data={file}", "--output-dir", str(folder / "run")]
    given = [one for word, one in itertools.pairwise(line) if word == "--mount"]
    fields = [dict(field.partition("=")[::2] for field in next(csv.reader([one]))) for one in given]
    assert {"type": "bind", "source": str(folder), "target": str(folder)} in fields
    assert all(set(one) <= {"type", "source", "target", "readonly"} for one in fields)


VARIABLES = ("sft_data", "dpo_data", "kto_data", "math_data", "reward_data", "ppo_data")


def groups(names: list[str]) -> list[dict[str, str]]:
    """Files as the values of the arguments of a pipeline, six at a time."""
    return [dict(zip(VARIABLES, names[at : at + 6], strict=False)) for at in range(0, len(names), 6)]


def test_make_hands_on_exactly_those_files(place):
    checkout = Checkout(place)
    checkout.make_venv()
    (checkout.bin / "docker").unlink()
    os.chdir(checkout.root)
    for group in groups([data_file(name) for name in NAMES.values()]):
        done = checkout.make("pipeline", *(f"{name.upper()}={file}" for name, file in group.items()), RUNTIME="local")
        words = given(done)
        for name, file in group.items():
            flag = f"--{name.replace('_', '-')}"
            assert f"{flag}={file}" in words or words[words.index(flag) + 1] == file
    for file in ("a\x1b[2J.jsonl", "a\nb.jsonl", "\udcff.jsonl"):
        Path(os.fsencode(file).decode("utf-8", "surrogateescape")).write_text(ROW)
        done = subprocess.run(
            ["make", "check-data", f"DATA={file}"], env={"PATH": str(checkout.bin), "HOME": str(checkout.home)},
            capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        assert b"Error 2" in done.stderr
        assert b"given" not in done.stdout
        assert b"\x1b[2J" not in done.stderr.splitlines()[0]


@pytest.mark.slow
def test_a_job_script_of_slurm_holds_exactly_those_files(place, capsys):
    """bash reads the script's own settings, and prints the words of the command."""
    for number, group in enumerate(groups([data_file(name) for name in NAMES.values()])):
        words = [f"--{name.replace('_', '-')}={file}" for name, file in group.items()]
        options = ("--stages", "sft", "--time", "1:00:00", "--dry", f"--output-dir=out $(touch planted) {number}")
        code, out, _ = run(command("scripts/slurm/submit.py").main, capsys, *options, "--", *words, shown=False)
        assert code == 0
        settings = out.partition("\n# One job")[0]
        show = settings + '\nprintf "%s\\0" "${command[@]}"'
        done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True)
        assert set(words) <= set(done.stdout.split("\0"))


@pytest.mark.parametrize("name", ['a"b', "a\\b", "100%", "a\nb"])
def test_a_folder_that_slurm_could_not_take_is_refused(name, place, capsys):
    words = ("--recipe", "sft", "--time", "1:00:00", "--dry", f"--output-dir={name}")
    code, _, err = run(command("scripts/slurm/submit.py").main, capsys, *words)
    assert code == 2
    assert "Slurm takes no quotes" in err
    assert os.listdir(place) == []


# --- what is no plain file


@pytest.fixture
def special(place):
    """{kind: a path} of what reading would wait for, or never end."""
    os.mkfifo("pipe.jsonl")
    os.mkfifo("pipe.py")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("socket.jsonl")
        os.symlink("loop.jsonl", "loop.jsonl")
        os.symlink("/dev/zero", "zero.jsonl")
        os.symlink("gone.jsonl", "dangling.jsonl")
        Path("folder.jsonl").mkdir()
        yield ["pipe.jsonl", "socket.jsonl", "loop.jsonl", "zero.jsonl", "dangling.jsonl", "folder.jsonl", "/dev/zero"]


def test_data_that_is_no_plain_file_is_refused_at_once(special, capsys):
    for name in [*special, "/dev/stdin", "/proc/self/fd/0", "."]:
        code, _, err = run(command("scripts/check-data.py").main, capsys, "--data", name)
        assert code == 2, name
        assert err.count("\n") == 1


def test_nor_is_it_read_by_any_other_argument(special, capsys):
    for name in special:
        with pytest.raises(InputError):
            find_model(name)
        with pytest.raises(InputError):
            repeat("sft", [], ["--from", name])
        code, _, err = run(command("scripts/chat.py").main, capsys, "--run", name)
        assert code == 2, name
        assert err.count("\n") == 1
    with pytest.raises(InputError, match="there is no file"):
        find_function("pipe.py:f")


def test_a_chat_template_that_is_no_plain_file_is_refused(special, tokenizer):
    from common.lm.render import set_chat_template

    for name in special:
        with pytest.raises(InputError, match="--chat-template-path"):
            set_chat_template(tokenizer, name, "tiny")


def test_a_link_to_a_plain_file_is_that_file(place):
    data_file("real")
    os.symlink("real.jsonl", "link.jsonl")
    assert [row.place for row in read_rows(find_source("link.jsonl"), None)] == ["link.jsonl:1"]


# --- what is in the rows

ESCAPE = "\x1b[2J\x1b]0;owned\x07\x1bc"
CONTENTS = {
    "a value": {"messages": [{"role": "user", "content": ESCAPE}, {"role": "assistant", "content": ESCAPE}]},
    "a column": {ESCAPE: "x", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "a role": {"messages": [{"role": ESCAPE, "content": "a"}]},
    "a key": {"messages": [{"role": "user", "content": "a", ESCAPE: 1}, {"role": "assistant", "content": "b"}]},
    "markup": {"messages": [{"role": "user", "content": "[/b]"}, {"role": "assistant", "content": "[red]a[/x]"}]},
    "markup in a column": {"[/b]": "x", "messages": [{"role": "user", "content": "a"}]},
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_row_reaches_no_terminal_raw(kind, place, capsys):
    Path("a.jsonl").write_text(json.dumps(CONTENTS[kind]) + "\n")
    run(command("scripts/check-data.py").main, capsys, "--data", "a.jsonl")
    run(command("scripts/check-data.py").main, capsys, "--data", "a.jsonl", "--model", "tiny", "--show-mask", "1")


def test_the_console_shows_text_as_it_is(monkeypatch):
    """Markup is for nobody, and what a terminal would obey is written out, also in tables and on a real terminal."""
    monkeypatch.setattr(screen, "console", lambda: None)
    screen.obey_no_text()
    shown = Console(file=io.StringIO(), force_terminal=True, markup=False, emoji=False, highlight=False, width=200)
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"[/b]{ESCAPE}")
    table.add_row(Text(f"[red]a :100: {ESCAPE}\u202e"))
    shown.print(table)
    shown.print(f"[/x]{ESCAPE}")
    shown.print(Text.from_ansi(ESCAPE))
    text = shown.file.getvalue()
    assert "[/x]\\x1b[2J\\x1b]0;owned" in text
    assert "[red]a :100: " in text
    for bad in ("\x1b[2J", "\x1b]0", "\x1bc", "\u202e", "\x07"):
        assert bad not in text


def test_words_for_a_shell_that_a_command_proposes_are_quoted():
    """What is to be typed next names the user's own files."""
    from common.commands import command as proposed

    for name in NAMES.values():
        words = shlex.split(proposed("chat", run=Path(f"outputs/{name}")))
        assert f"RUN=outputs/{name}" in words or words[-1].endswith(f"outputs/{name}")
