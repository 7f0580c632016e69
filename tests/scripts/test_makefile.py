"""make and scripts/run as a user types them, in a copy whose .venv is whole and whose commands print what they get."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import Checkout, given
from common import errors
from common.aliases import ALIASES
from common.arguments import read_words
from common.errors import InputError
from conftest import ROOT
from in_process import as_it_was
from launch import usage
from launch.__main__ import read
from launch.commands import COMMANDS, GROUPS, VARIABLES

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.search(r"^\.PHONY: help (.*)$", MAKEFILE, re.M)[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    copy = Checkout(tmp_path)
    copy.make_venv()
    (copy.bin / "docker").unlink()
    return copy


@pytest.fixture
def by_make(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Messages name arguments as those of a make do, that has just begun."""
    monkeypatch.setattr(errors, "SPELLING", "make")
    names = dict(errors.ARGUMENTS)
    errors.ARGUMENTS.clear()
    yield
    errors.ARGUMENTS.clear()
    errors.ARGUMENTS.update(names)


def arrived(name: str, *typed: str) -> list[str]:
    """The words that `make NAME TYPED` gives a command: what the launcher makes of them, in this process."""
    with as_it_was():
        return read(name, [], dict(word.split("=", 1) for word in typed))


def refused(name: str, *typed: str) -> str:
    """The message that `make NAME TYPED` ends with, which the launcher raises before it starts anything."""
    with pytest.raises(InputError) as caught:
        arrived(name, *typed)
    return errors.spell(str(caught.value))


# --- the file and the list ------------------------------------------------------------------------------------------


def test_the_makefile_is_short_and_every_target_is_one_line_of_scripts_run():
    assert len(MAKEFILE.splitlines()) <= 120
    assert set(re.findall(r"^\t(.*)", MAKEFILE, re.M)) == {"@scripts/run $@", "@scripts/run $* --help"}


def test_the_targets_are_the_commands():
    lists = dict(re.findall(r"^(\w+) := ([a-z -]+)$", MAKEFILE, re.M))
    assert [name.split() for name in lists.values()] == [list(commands) for commands in GROUPS.values()]
    assert re.findall(r"\$\((\w+)\)", TARGETS) == list(lists)


@pytest.mark.parametrize("words", [["make"], ["scripts/run"], ["make", "help"], ["scripts/run", "--help"]])
def test_the_list_fits_a_screen_and_begins_with_where_to_start(words, checkout):
    done = subprocess.run(words, cwd=checkout.root, env={"PATH": str(checkout.bin)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert 24 <= len(lines) <= 40
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Start here"
    listed = set(re.findall(r"(?<!\S)[a-z-]+(?!\S)", done.stdout))
    assert set(COMMANDS) - {"exec"} <= listed


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_argument_and_setting_at_80_columns(name, by_make, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    fields = COMMANDS[name].fields()
    shown = usage.help_of(name, by_make=True)
    monkeypatch.setattr(errors, "SPELLING", "")
    for text, names in (
        (shown, [field.variable for field in fields]),
        (usage.help_of(name, by_make=False), [field.flag for field in fields] if name != "exec" else []),
    ):
        assert max(map(len, text.splitlines())) <= 80
        assert [name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", text)] == []
        assert [name for name in COMMANDS[name].variables if f"  {name}=" not in text and name != "FROM"] == []


def test_help_spells_arguments_as_make_does(checkout):
    assert max(map(len, checkout.make("help-exec", COLUMNS="80").stdout.splitlines())) <= 80
    help_text = " ".join(checkout.make("help-sft").stdout.split())
    assert "LOAD_IN_4BIT=yes Load the frozen base in nf4 (QLoRA); LOAD_IN_4BIT=no for 16 bit." in help_text
    assert "LEARNING_RATE=2e-4" in help_text
    assert "DATA=data_samples/sft.jsonl" in help_text
    assert 'LORA_TARGET_MODULES="q_proj k_proj' in help_text
    assert "DTYPE=auto" in help_text
    assert "One of auto, bfloat16, float16, float32." in help_text
    help_text = " ".join(checkout.run("sft", "--help").stdout.split())
    shown = "--load-in-4bit, --no-load-in-4bit (yes) Load the frozen base in nf4 (QLoRA); --no-load-in-4bit for"
    assert shown in help_text
    assert "MODEL= Required. The name of a card." in " ".join(checkout.make("help-pin").stdout.split())


def test_help_needs_no_venv(checkout):
    subprocess.run(["rm", "-r", checkout.root / ".venv"], check=True)
    for words in ([], ["help-sft"], ["sft", "ARGS=--help"]):
        assert checkout.make(*words).returncode == 0
    assert not (checkout.root / ".venv").exists()


def test_help_in_a_pipe_that_ends(checkout):
    done = subprocess.run(
        ["bash", "-c", "scripts/run sft --help | read -r line; echo ${PIPESTATUS[0]}"],
        cwd=checkout.root, env={"PATH": str(checkout.bin)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == ""


# --- arguments ------------------------------------------------------------------------------------------------------


def test_nothing_given_leaves_the_defaults_to_the_recipe(checkout):
    assert given(checkout.make("sft")) == []
    assert given(checkout.make("sft", MODEL="qwen2.5-7b", DATA="my.jsonl")) == []  # those of the environment


def test_any_argument_is_a_variable(checkout):
    typed = ["MODEL=qwen2.5-7b", "MAX_LENGTH=1024", "LOAD_IN_4BIT=no", "PACKING=1", "OUT=outputs/x", "WARMUP_STEPS=5"]
    typed += ["OUTPUT_DIR=outputs/x"]
    done = checkout.make("sft", *typed)
    assert done.returncode == 2
    assert "the same argument" in done.stderr
    words = given(checkout.make("sft", *typed[:-1]))
    pairs = dict(zip(words, [*words[1:], ""], strict=True))
    assert {"--no-load-in-4bit", "--packing"} <= set(words)
    assert pairs["--max-length"] == "1024"
    assert pairs["--output-dir"] == "outputs/x"
    assert pairs["--model"] == "qwen2.5-7b"
    words = given(checkout.make("grpo", "REWARDS=math format=0.2 'my rewards.py:shorter'", "BETA=-0.5"))
    assert words in (
        ["--rewards", "math", "format=0.2", "my rewards.py:shorter", "--beta=-0.5"],
        ["--beta=-0.5", "--rewards", "math", "format=0.2", "my rewards.py:shorter"],
    )
    assert given(checkout.make("ppo", "REWARD=outputs/reward", "KL_TARGET=None")) in (
        ["--reward-model", "outputs/reward", "--kl-target", "None"],
        ["--kl-target", "None", "--reward-model", "outputs/reward"],
    )
    assert given(checkout.make("pin", "MODEL=qwen2.5-7b")) == ["--model", "qwen2.5-7b"]
    assert given(checkout.make("distill", "K=2")) == ["--k", "2"]


@pytest.mark.parametrize(
    "name",
    [name for name, command in COMMANDS.items() if command.fields() and name not in ("slurm", "lock", "lock-check")],
)
def test_every_argument_of_every_command_is_a_variable(name, checkout, monkeypatch):
    fields = COMMANDS[name].fields()
    wanted, typed = {}, []
    for field in fields:
        text = "--seed '$a, b'" if field.name.endswith("_args") else "it's $a, b"  # a stage's arguments are shell words
        one = {"bool": "no", "int": "7", "float": "0.5"}.get(field.kind, text)
        values = list(field.choices[:1]) or ["my own" if field.literal else one]
        wanted[field.name] = [] if field.kind == "bool" else values * (2 if field.many else 1)
        typed.append(f"{field.variable}={shlex.join(values * 2) if field.many else values[0]}")
    monkeypatch.chdir(checkout.root)
    assert {one.field.name: one.values for one in read_words(fields, arrived(name, *typed))} == wanted


def test_args_are_added_as_a_shell_would_split_them(checkout):
    words = given(checkout.make("sft", "SEED=3", """ARGS=--columns 'prompt=the question' completion=b --no-packing"""))
    assert words == ["--seed", "3", "--columns", "prompt=the question", "completion=b", "--no-packing"]
    done = checkout.make("sft", "ARGS=--columns 'x")
    assert done.stderr.splitlines()[0] == "ARGS: No closing quotation."
    assert given(checkout.make("shell", 'ARGS=-c \'printf "given %s" "[0, 1]"\'')) == [1]


@pytest.mark.parametrize("value", ["yes", "true", "1", "YES", "True", "on"])
def test_what_is_yes(value):
    assert arrived("sft", f"PACKING={value}") == ["--packing"]


@pytest.mark.parametrize("value", ["no", "false", "0", "No", "off"])
def test_what_is_no(value):
    assert arrived("sft", f"PACKING={value}") == ["--no-packing"]


def test_evaluation_data_may_be_one_file_with_a_space_in_its_name(checkout):
    (checkout.root / "my data.jsonl").write_text("{}\n")
    (checkout.root / "b.jsonl").write_text("{}\n")
    assert given(checkout.make("evaluate", "DATA=my data.jsonl")) == ["--data", "my data.jsonl"]
    assert given(checkout.make("evaluate", "DATA='my data.jsonl' b.jsonl")) == ["--data", "my data.jsonl", "b.jsonl"]


HOSTILE = {
    "spaces": "a  b ",
    "both quotes": """it's "mine" """,
    "a dollar": "$HOME/$x $$ ${HOME}",
    "a call of make": "$(shell touch planted)",
    "an error of make": "$(error no) $(info no)",
    "a substitution": "$(touch planted) `touch planted`",
    "a newline": "one\ntwo\n",
    "a newline in a call": "$(shell \\\ntouch planted)",
    "a dash": "-x",
    "a flag": "--seed 7",
    "a hash": "a # b",
    "backslashes": "a\\ b\\",
    "an assignment": "A=b",
    "braces and stars": "{a,b} * ? [x] ~",
    "a semicolon": "; touch planted; & | > planted",
    "another alphabet": "数据/é",
    "nothing": "",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_value_arrives_whole_and_is_never_run(case, checkout):
    value = HOSTILE[case]
    words = given(checkout.make("grpo", f"SYSTEM_PROMPT={value}"))
    assert words in (["--system-prompt", value], [f"--system-prompt={value}"])
    if "planted" in value:  # in variables of every kind, and in those of the Makefile itself
        every = ("DATA", "GPUS", "ARGS", "FROM", "unknown", "RECIPES_GIVEN", "given", "name", "train", "MAKEFLAGS")
        for done in (checkout.make("sft", *(f"{name}={value}" for name in every)), checkout.make(f"data={value}")):
            assert "Traceback" not in done.stderr
    assert not list(checkout.root.glob("**/planted"))


def test_so_do_many_by_scripts_run_and_quoted_by_make(checkout):
    """By make as in the commands that choose prints."""
    values = [f"column={value}" for value in HOSTILE.values()]
    assert given(checkout.run("grpo", "--columns", *values)) == ["--columns", *values]
    assert given(checkout.make("grpo", f"COLUMNS={shlex.join(values)}")) == ["--columns", *values]
    for value in ("-x", "--seed 7", ""):
        assert given(checkout.run("grpo", f"--system-prompt={value}")) == [f"--system-prompt={value}"]
    assert not list(checkout.root.glob("**/planted"))


def test_data_with_a_dollar_in_its_name_is_found(checkout):
    name = "$HOME $(shell touch planted)y.jsonl"
    (checkout.root / name).write_text("{}\n")
    assert given(checkout.make("check-data", f"DATA={name}")) == ["--data", name]
    assert not (checkout.root / "planted").exists()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("DATA=", "DATA is empty; leave it out for its default."),
        ("OUT=", "OUT is empty; leave it out for its default."),
        ("PACKING=", "PACKING=: expected yes or no."),
        ("PACKING=maybe", "PACKING=maybe: expected yes or no."),
        ("MAX_LENGTH=", "MAX_LENGTH=: expected a whole number."),
        ("MAX_LENGTH=1k", "MAX_LENGTH=1k: expected a whole number."),
        ("LEARNING_RATE=2e-4x", "LEARNING_RATE=2e-4x: expected a number."),
        ("DTYPE=bf16", "DTYPE=bf16: unknown (did you mean bfloat16?). There are auto, bfloat16, float16, float32."),
        ("COLUMNS='x", "COLUMNS: No closing quotation."),
        ("COLUMNS=a --b", "COLUMNS=a --b: only the first of several values can begin with a dash."),
        ("DATA=no.jsonl", "DATA=no.jsonl: no such file or folder (from {root})"),
        ("ARGS=--max-length 1k", "MAX_LENGTH=1k: expected a whole number."),
        ("ARGS=words", "'words' belongs to no argument; a flag comes first, as in `--model tiny`."),
        ("BAKE=1", "sft takes no BAKE. See `make help-sft`."),
        ("FROM=outputs/x", "FROM=outputs/x: no such file"),
    ],
)
def test_what_is_wrong_is_one_line(typed, message, by_make, checkout, monkeypatch):
    monkeypatch.chdir(checkout.root)
    assert refused("sft", typed) == message.format(root=checkout.root)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("PACKING=maybe", "PACKING=maybe: expected yes or no."),
        ("DATA=no.jsonl", "DATA=no.jsonl: no such file or folder (from {root})"),
        ("GPUS=0,2", "GPUS=0,2: expected how many GPUs; which ones is CUDA_VISIBLE_DEVICES, such as 0,2."),
        ("DATASET=my.jsonl EPOCHS=3", "DATASET is DATA here; EPOCHS is NUM_TRAIN_EPOCHS here. See `make help-sft`."),
    ],
)
def test_it_is_printed_before_anything_starts(typed, message, checkout):
    done = checkout.make("sft", *typed.split())
    assert (done.returncode, done.stdout) == (2, "")
    first, last = done.stderr.splitlines()
    assert first == message.format(root=checkout.root)
    assert last.endswith("Error 2")


def test_an_argument_that_is_missing(checkout):
    example = "for example ADAPTER=outputs/try/adapter"
    assert checkout.make("merge").stderr.splitlines()[0] == f"merge needs ADAPTER=..., {example}"
    assert checkout.run("merge").stderr == ("merge needs --adapter=..., for example --adapter=outputs/try/adapter\n")
    assert checkout.run("merge").returncode == 2


# --- names ----------------------------------------------------------------------------------------------------------

NAMES = {
    "DATASET=my.jsonl EPOCHS=3": "DATASET is DATA here; EPOCHS is NUM_TRAIN_EPOCHS here",
    "lr=1e-4": "lr is LEARNING_RATE here",
    "learning_rate=1e-4": "learning_rate is LEARNING_RATE here",
    "model=tiny": "model is MODEL here",
    "BATCH_SIZE=4": "BATCH_SIZE is PER_DEVICE_TRAIN_BATCH_SIZE here",
    "micro_batch_size=4": "micro_batch_size is PER_DEVICE_TRAIN_BATCH_SIZE here",
    "CUTOFF_LEN=4": "CUTOFF_LEN is MAX_LENGTH here",
    "SEQUENCE_LEN=4": "SEQUENCE_LEN is MAX_LENGTH here",
    "NUM_EPOCHS=4": "NUM_EPOCHS is NUM_TRAIN_EPOCHS here",
    "MODEL_NAME_OR_PATH=x": "MODEL_NAME_OR_PATH is MODEL here",
    "OUTPUT=x": "OUTPUT is OUT here",
    "LORA_RANK=8": "LORA_RANK is LORA_R here",
    "GRADIENT_ACCUMULATION=8": "GRADIENT_ACCUMULATION is GRADIENT_ACCUMULATION_STEPS here",
    "MAX_LENGHT=8": "sft takes no MAX_LENGHT (did you mean MAX_LENGTH?)",
    "runtime=local": "runtime is RUNTIME here",
    "XYZZY=8": "sft takes no XYZZY",
}


@pytest.mark.parametrize("typed", NAMES)
def test_a_name_that_is_none_is_answered_with_ours(typed, by_make):
    """`make sft DATASET=my.jsonl EPOCHS=3` trained the tiny model on sample data."""
    assert refused("sft", *typed.split()) == f"{NAMES[typed]}. See `make help-sft`."


FLAGS = {
    "--lr 1e-4": "--lr is --learning-rate here",
    "--epochs 3": "--epochs is --num-train-epochs here",
    "--dataset x": "--dataset is --data here",
    "--batch_size 3": "--batch-size is --per-device-train-batch-size here",
    "--max-lenght 3": "there is no --max-lenght (did you mean --max-length?).",
    "--xyzzy": "there is no --xyzzy.",
}


@pytest.mark.parametrize("typed", FLAGS)
def test_the_same_for_flags(typed, checkout):
    done = checkout.run("sft", *typed.split())
    assert (done.returncode, done.stderr) == (2, FLAGS[typed] + "\n")


def test_the_flags_of_trl_are_ours(checkout):
    assert given(checkout.run("sft", "--max_length", "8")) == ["--max_length", "8"]


def test_every_alias_is_of_an_argument_that_there_is():
    fields = {field.name for command in COMMANDS.values() for field in command.fields()}
    assert set(ALIASES) <= fields
    for recipe in ("sft", "dpo", "kto", "grpo", "ppo", "reward"):
        own = {field.name for field in COMMANDS[recipe].fields()}
        words = [word for name in own & set(ALIASES) for word in ALIASES[name].split() if word not in own]
        assert len(words) == len(set(words)), [word for word in words if words.count(word) > 1]


@pytest.mark.parametrize(("typed", "meant"), [("sfd", "sft"), ("evalute", "evaluate"), ("check_data", "check-data")])
def test_a_command_that_is_none(typed, meant, checkout):
    assert checkout.make(typed).stderr.startswith(f"there is no command {typed} (did you mean {meant}?). `make` lists")
    done = checkout.run(typed)
    assert done.returncode == 2
    assert done.stderr == f"there is no command {typed} (did you mean {meant}?). `scripts/run` lists them.\n"


def test_every_setting_is_explained_and_of_some_command():
    taken = {name for command in COMMANDS.values() for name in command.variables} | {"ARGS"}
    assert taken == set(VARIABLES)


def test_settings_of_programs_pass(checkout):
    (checkout.root / "recipes" / "sft.py").write_text("import json, os; print(json.dumps(dict(os.environ)))\n")
    typed = ["HF_HUB_OFFLINE=1", "WANDB_MODE=$(shell echo x)", "CUDA_VISIBLE_DEVICES=0"]
    environment = json.loads(checkout.make("sft", *typed).stdout)
    assert {f"{name}={environment[name]}" for name in ("HF_HUB_OFFLINE", "WANDB_MODE", "CUDA_VISIBLE_DEVICES")} == {
        *typed
    }
    assert environment["PYTHONPATH"] == f"{checkout.root}/recipes"
    assert environment["PATH"].startswith(f"{checkout.root}/.venv/bin:")


def test_what_make_was_given_is_not_given_to_a_make_inside(checkout):
    """`make test ARGS=-x` runs tests that call make."""
    (checkout.root / "recipes" / "sft.py").write_text(
        "import subprocess, sys\nclass Args:\n    seed: int = 1\nprint(subprocess.run(['make', 'dpo'], text=True, "
        "stdout=-1).stdout)\n"
    )
    assert given(checkout.make("sft", "SEED=7", "ARGS=--seed 8")) == []


# --- FROM -----------------------------------------------------------------------------------------------------------

RECORDED = {
    "model": "qwen2.5-7b", "data": "org/set", "output_dir": "outputs/first", "columns": ["prompt=the question"],
    "pad_token": None, "packing": True, "load_in_4bit": False, "learning_rate": 1e-05, "max_steps": -1,
    "report_to": [], "kl_of_old": 3,
}  # fmt: skip


@pytest.fixture
def run(checkout) -> Path:
    folder = checkout.root / "outputs" / "first"
    folder.mkdir(parents=True)
    arguments = {name: {"value": value, "from": "recipe"} for name, value in RECORDED.items()}
    (folder / "run.json").write_text(json.dumps({"recipe": "sft", "arguments": arguments}))
    return folder / "run.json"


AGAIN = ["--model", "qwen2.5-7b", "--data", "org/set", "--columns", "prompt=the question", "--packing"]
AGAIN += ["--no-load-in-4bit", "--learning-rate", "1e-05", "--max-steps=-1", "--report-to"]


@pytest.mark.parametrize("way", ["FROM", "--from", "--from=", "folder"])
def test_from_repeats_the_arguments_of_a_run_but_its_folder(way, run, checkout):
    done = {
        "FROM": lambda: checkout.make("sft", "FROM=outputs/first/run.json"),
        "--from": lambda: checkout.run("sft", "--from", "outputs/first/run.json"),
        "--from=": lambda: checkout.run("sft", "--from=outputs/first/run.json"),
        "folder": lambda: checkout.make("sft", "FROM=outputs/first"),
    }[way]()
    assert given(done) == AGAIN
    assert done.stderr.endswith("sft no longer takes kl_of_old; left out.\n")


def test_what_is_given_besides_from_overrides(run, checkout):
    words = given(
        checkout.make("sft", f"FROM={run}", "LOAD_IN_4BIT=yes", "COLUMNS=", "ARGS=--learning_rate 2 --seed 5")
    )
    rest = [word for word in AGAIN if word not in ("--no-load-in-4bit", "--columns", "prompt=the question")]
    assert words[: len(rest) - 2] == [word for word in rest if word not in ("--learning-rate", "1e-05")]
    assert sorted(words[len(rest) - 2 :]) == sorted(
        ["--load-in-4bit", "--columns", "--learning_rate", "2", "--seed", "5"]
    )


def test_from_refuses_what_is_no_run_of_this_recipe(run, checkout):
    done = checkout.make("dpo", f"FROM={run}")
    assert done.stderr.splitlines()[0] == f"FROM={run}: this is a run of sft, not of dpo"
    run.write_text("{}")
    assert checkout.run("sft", "--from", run).stderr == f"--from={run}: this is no run.json\n"
    assert "evaluate takes no FROM" in checkout.make("evaluate", f"FROM={run}").stderr
    assert checkout.run("sft", "--from").returncode == 2


def test_from_mounts_the_paths_of_the_run(run, checkout, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "my.jsonl").write_text("{}\n")
    run.write_text(run.read_text().replace("org/set", f"{tmp_path}/elsewhere/my.jsonl"))
    checkout.engine("docker")
    inside = checkout.container("sft", "--from", run)
    assert inside.mounts[f"{tmp_path}/elsewhere"] == (f"{tmp_path}/elsewhere", False)


# --- errors and exit codes ------------------------------------------------------------------------------------------


def test_make_shows_the_exit_code_in_its_last_line(checkout):
    for code in (2, 3, 75, 1):
        checkout.stub("sft", code)
        done = checkout.make("sft")
        assert done.returncode == 2  # make's own, whatever the command's
        assert done.stderr.rstrip().endswith(f"sft] Error {code}")


REFUSES = """
from common.errors import ARGUMENTS, InputError, run_command
from common.arguments import check, read_fields
from pathlib import Path
import sys
class Args:
    max_length: int = 1
    output_dir: str = ""
    packing: bool = True
def main():
    check(read_fields(Path(__file__)), sys.argv[1:])
    raise InputError("--max-length 5 x --max-length: see --output-dir=x, --no-packing, --other and `run --packing x`")
run_command(main)
"""


def test_an_error_of_a_command_names_arguments_as_the_user_did(checkout):
    (checkout.root / "recipes" / "sft.py").write_text(REFUSES)
    assert checkout.run("sft").stderr == (
        "--max-length 5 x --max-length: see --output-dir=x, --no-packing, --other and `run --packing x`\n"
    )
    assert checkout.make("sft").stderr.splitlines()[0] == (
        "MAX_LENGTH=5 x MAX_LENGTH: see OUT=x, PACKING=no, --other and `run --packing x`"
    )


def test_a_container_gets_the_spelling(checkout):
    checkout.engine("docker")
    by_make = json.loads(checkout.make("sft").stdout)["words"]
    assert by_make[by_make.index("RECIPES_SPELLING") - 1] == "--env"
    assert "RECIPES_SPELLING" not in checkout.container("sft").values("--env")


# --- slurm ----------------------------------------------------------------------------------------------------------


def test_slurm_takes_its_arguments_and_those_of_the_recipe(checkout, run):
    own = ["--recipe", "sft", "--time", "1:00:00", "--sbatch=--mem=64G"]
    words = given(
        checkout.make("slurm", "RECIPE=sft", "TIME=1:00:00", "SBATCH=--mem=64G", "MAX_LENGTH=8", "PACKING=no")
    )
    index = words.index("--")
    assert sorted(words[:index]) == sorted(own)
    assert sorted(words[index + 1 :]) == ["--max-length", "--no-packing", "8"]
    assert given(checkout.run("slurm", *own, "--", "--seed", "3")) == [*own, "--", "--seed", "3"]
    assert given(checkout.run("slurm", "--seed", "3", *own)) == [*own, "--", "--seed", "3"]
    words = given(checkout.make("slurm", "STAGES=sft,reward,ppo", "TIME=1:00:00", "SFT_ARGS=--max-steps 5", "DRY=1"))
    assert words[words.index("--") :] == ["--", "--sft-args=--max-steps 5"]
    assert {"--dry", "--stages"} <= set(words)
    words = given(checkout.make("slurm", "RECIPE=sft", "TIME=1:00:00", f"FROM={run}", "RUNTIME=docker", "IMAGE=x"))
    assert words[words.index("--") + 1 :] == AGAIN
    assert ["--runtime", "docker"] in [words[n : n + 2] for n in range(len(words))]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "slurm needs RECIPE=..., for example RECIPE=sft, or STAGES=sft,dpo,grpo"),
        (["PIPELINE=sft,dpo"], "PIPELINE is STAGES here"),
        (["RECIPE=sfd"], "RECIPE=sfd: unknown (did you mean sft?). There are sft, dpo, kto, grpo, reward, ppo."),
        (["RECIPE=sft"], "slurm needs TIME=..., for example TIME=4:00:00"),
        (["RECIPE=sft", "TIME=1:00:00", "EPOCHS=3"], "EPOCHS is NUM_TRAIN_EPOCHS here. See `make help-slurm`."),
        (["RECIPE=sft", "TIME=1:00:00", "MAX_LENGTH=x"], "MAX_LENGTH=x: expected a whole number."),
        (["STAGES=sft", "TIME=1:00:00", "FROM=x"], "FROM=x: only a recipe's run can be repeated"),
    ],
)
def test_what_slurm_refuses(typed, message, checkout):
    done = checkout.make("slurm", *typed)
    assert done.stderr.startswith(message)
    assert "Error 2" in done.stderr


# --- the rest -------------------------------------------------------------------------------------------------------


def test_clean_leaves_outputs(checkout):
    (checkout.root / "outputs").mkdir()
    (checkout.root / ".cache").mkdir()
    assert checkout.make("clean").returncode == 0
    assert not (checkout.root / ".venv").exists()
    assert not (checkout.root / ".cache").exists()
    assert (checkout.root / "outputs").exists()


def test_a_shell_is_where_the_user_is(checkout, tmp_path):
    done = checkout.run("shell", "-c", "pwd", cwd=tmp_path, RUNTIME="local")
    assert done.stdout == f"{tmp_path}\n", os.fspath(tmp_path)
