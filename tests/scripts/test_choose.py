"""`make choose`: the stages and commands for each kind of data, whether they fit, and what it does with bad input."""

import ast
import contextlib
import io
import itertools
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys

import choose
import pytest
from common.arguments import read_fields, read_words, values
from common.data.documents import DOCUMENT_FORMATS
from common.data.feedback import FEEDBACK_FORMATS
from common.data.formats import FORMATS, PAIR_FORMATS, PROBLEM_FORMATS, RATING_FORMATS
from common.data.read import as_examples, column_map
from common.data.rows import Faults, read_rows
from common.errors import InputError
from common.lm.cards import card_names, read_card
from common.lm.hub import find_model
from common.plan.memory import peak
from common.plan.search import MARGIN
from common.plan.workload import workload
from conftest import ROOT
from in_process import as_it_was, refusal
from launch.commands import COMMANDS

SCRIPT = ROOT / "scripts" / "choose.py"
SAMPLES = ROOT / "data_samples"


def run(*flags: str) -> str:
    """What the command prints, as in a process of its own and without a terminal."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, as_it_was(), contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["choose.py", *map(str, flags)])
        patch.setattr(sys, "stdin", io.StringIO())
        choose.main()
    return printed.getvalue()


def answer(*flags: str) -> dict:
    return json.loads(run("--json", *flags))


def commands(answer: dict) -> list[list[str]]:
    """Every command it gives, as the words that make gets."""
    lines = [command for stage in answer["stages"] for command in stage["commands"]]
    return [shlex.split(line) for line in [*lines, *filter(None, [answer["pipeline"]])]]


STAGES = {
    "demonstrations": "sft",
    "pairs": "dpo",
    "feedback": "kto",
    "answers": "grpo",
    "scores": "reward ppo",
    "reward-model": "ppo",
    "documents": "sft",
    "demonstrations documents": "sft sft",
    "demonstrations pairs": "sft dpo",
    "pairs demonstrations": "sft dpo",
    "demonstrations feedback": "sft kto",
    "demonstrations answers": "sft grpo",
    "pairs answers": "dpo grpo",
    "feedback answers pairs": "dpo kto grpo",
    "demonstrations scores": "sft reward ppo",
    "demonstrations reward-model": "sft ppo",
    "scores reward-model": "ppo",
    "demonstrations pairs answers": "sft dpo grpo",
    "demonstrations pairs answers scores": "sft dpo grpo reward ppo",
    "demonstrations pairs answers scores reward-model": "sft dpo grpo ppo",
}


@pytest.mark.parametrize("have", STAGES)
def test_each_kind_of_data_has_its_stage(have):
    stages, _ = choose.choose(have.split(), [], base=False)
    assert [stage.method for stage in stages] == STAGES[have].split()
    assert all(stage.reason for stage in stages)


def test_a_base_model_learns_to_answer_first():
    def methods(*have: str) -> list[str]:
        return [stage.method for stage in choose.choose(list(have), [], base=True)[0]]

    assert methods("pairs") == ["sft", "dpo"]  # from the chosen answers
    assert methods("demonstrations", "pairs") == ["sft", "dpo"]
    # Nothing to learn the form from: a note tells it, nothing is made up.
    stages, notes = choose.choose(["answers"], [], base=True)
    assert [stage.method for stage in stages] == ["grpo"]
    assert "base model" in notes[0]
    assert not any("base model" in note for note in choose.choose(["answers"], [], base=False)[1])
    assert [stage["method"] for stage in answer("--have", "pairs", "--model", "tiny", "--gpu-gib", "0")["stages"]] == [
        "sft", "dpo",
    ]  # fmt: skip
    shown = answer("--have", "pairs", "--model", "a/b", "--base", "--gpu-gib", "8")
    assert [stage["method"] for stage in shown["stages"]] == ["sft", "dpo"]


def test_the_commands_word_for_word():
    shown = answer("--have", "demonstrations", "pairs", "answers", "--model", "qwen2.5-7b", "--gpu-gib", "80")
    assert [command for stage in shown["stages"] for command in stage["commands"]] == [
        "make sft MODEL=qwen2.5-7b DATA=demonstrations.jsonl OUT=outputs/qwen2.5-7b-sft LOAD_IN_4BIT=no "
        "GRADIENT_CHECKPOINTING=no",
        "make merge ADAPTER=outputs/qwen2.5-7b-sft/adapter OUT=outputs/qwen2.5-7b-sft-merged",
        "make dpo MODEL=outputs/qwen2.5-7b-sft-merged DATA=pairs.jsonl OUT=outputs/qwen2.5-7b-dpo LOAD_IN_4BIT=no "
        "GRADIENT_CHECKPOINTING=no",
        "make merge ADAPTER=outputs/qwen2.5-7b-dpo/adapter OUT=outputs/qwen2.5-7b-dpo-merged",
        "make grpo MODEL=outputs/qwen2.5-7b-dpo-merged DATA=answers.jsonl OUT=outputs/qwen2.5-7b-grpo LOAD_IN_4BIT=no "
        "CHECKPOINT_SKIP_LAYERS=21 PER_DEVICE_TRAIN_BATCH_SIZE=8 GRADIENT_ACCUMULATION_STEPS=2",
    ]
    half = "--no-load-in-4bit --no-gradient-checkpointing"
    assert shown["pipeline"] == (
        "make pipeline STAGES=sft,dpo,grpo MODEL=qwen2.5-7b SFT_DATA=demonstrations.jsonl DPO_DATA=pairs.jsonl "
        "MATH_DATA=answers.jsonl "
        f"'SFT_ARGS={half}' 'DPO_ARGS={half}' "
        "'GRPO_ARGS=--no-load-in-4bit --checkpoint-skip-layers 21 "
        "--per-device-train-batch-size 8 --gradient-accumulation-steps 2'"
    )


def test_raw_text_comes_first_and_what_answers_follows():
    shown = answer("--have", "demonstrations", "documents", "--model", "qwen2.5-7b", "--gpu-gib", "80")
    assert [command for stage in shown["stages"] for command in stage["commands"]] == [
        "make sft MODEL=qwen2.5-7b DATA=documents.jsonl OUT=outputs/qwen2.5-7b-pretrained LOAD_IN_4BIT=no "
        "GRADIENT_CHECKPOINTING=no",
        "make merge ADAPTER=outputs/qwen2.5-7b-pretrained/adapter OUT=outputs/qwen2.5-7b-pretrained-merged",
        "make sft MODEL=outputs/qwen2.5-7b-pretrained-merged DATA=demonstrations.jsonl OUT=outputs/qwen2.5-7b-sft "
        "LOAD_IN_4BIT=no GRADIENT_CHECKPOINTING=no",
    ]
    assert shown["pipeline"] is None  # which has each method once
    assert "TRAIN_EMBEDDINGS=yes" in shown["notes"][0]


def test_the_reward_model_judges_and_is_no_base():
    shown = answer("--have", "demonstrations", "scores", "--model", "qwen2.5-7b", "--gpu-gib", "80")
    assert [command[:2] for command in commands(shown)] == [
        ["make", "sft"], ["make", "merge"], ["make", "reward"], ["make", "ppo"], ["make", "pipeline"],
    ]  # fmt: skip
    *_, reward, ppo, words = commands(shown)
    assert "MODEL=outputs/qwen2.5-7b-sft-merged" in reward
    assert "MODEL=outputs/qwen2.5-7b-sft-merged" in ppo
    assert "REWARD=outputs/qwen2.5-7b-reward" in ppo
    assert words[:5] == [
        "make",
        "pipeline",
        "STAGES=sft,reward,ppo",
        "MODEL=qwen2.5-7b",
        "SFT_DATA=demonstrations.jsonl",
    ]
    assert "REWARD_DATA=scores.jsonl" in words
    assert not any(word.startswith("PPO_DATA=") for word in words)  # PPO takes the prompts of the scores
    # A reward model that is there already is of a base of its own, which no stage before PPO may change.
    assert answer("--have", "demonstrations", "reward-model", "--model", "tiny", "--gpu-gib", "0")["pipeline"] is None


def kind_of(name: str) -> str:
    """What a sample file is for, by the name of its format."""
    kinds = {
        "demonstrations": FORMATS,
        "documents": DOCUMENT_FORMATS,
        "pairs": PAIR_FORMATS,
        "feedback": FEEDBACK_FORMATS,
        "scores": RATING_FORMATS,
        "answers": PROBLEM_FORMATS,
    }
    named = [(form, kind) for kind, forms in kinds.items() for form in forms if name.startswith(form)]
    form, kind = max(named, key=lambda pair: len(pair[0]))  # prompt-pair begins with prompt
    return "prompts" if form in ("prompt", "instruction") else kind


KNOWN = {
    "sft.jsonl": "demonstrations",
    "arithmetic.jsonl": "answers",
    "arithmetic-train.jsonl": "answers",
    "heldout.jsonl": "answers",
    "preferences.jsonl": "pairs",
    "preferences-train.jsonl": "pairs",
    "feedback-train.jsonl": "feedback",
}
FILES = {f"formats/{file.name}": kind_of(file.name) for file in sorted((SAMPLES / "formats").iterdir())}
FILES |= {name: kind for name, kind in KNOWN.items() if (SAMPLES / name).exists()}


@pytest.mark.parametrize("name", FILES)
def test_looks_at_the_samples(name):
    assert choose.look_at(str(SAMPLES / name)).kind == FILES[name]


def test_looks_at_gsm8k():
    file = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"
    if not file.exists():
        pytest.skip("no shared/data/gsm8k beside the repository")
    assert choose.look_at(str(file)).kind == "answers"


def test_an_answer_that_cannot_be_checked_is_a_demonstration(tmp_path):
    file = tmp_path / "long.jsonl"
    text = "Well, it depends on what you mean by that, for there are many ways to look at the matter. " * 3
    file.write_text(json.dumps({"question": "Why?", "answer": text}) + "\n")
    seen = choose.look_at(str(file))
    assert (seen.kind, seen.flags) == ("demonstrations", ("--columns", "prompt=question", "completion=answer"))
    rows = list(as_examples(read_rows([file], Faults()), Faults(), FORMATS, columns=column_map(seen.flags[1:])))
    assert [turn["content"] for turn in rows[0].messages] == ["Why?", text]


@pytest.mark.parametrize("name", [name for name, kind in FILES.items() if kind == "pairs"])
def test_sft_reads_the_chosen_answers_with_the_flags_given(name):
    seen = choose.look_at(str(SAMPLES / name))
    stages, notes = choose.choose(["pairs"], [seen], base=True)
    if seen.flags is None:
        assert [stage.method for stage in stages] == ["dpo"]
        assert notes
        return
    faults = Faults()
    assert stages[0].flags[0] == "--columns"
    columns = column_map(stages[0].flags[1:])
    rows = list(as_examples(read_rows([SAMPLES / name], faults), faults, FORMATS, columns=columns))
    faults.stop()
    for row in rows:
        assert row.messages[-1]["role"] == "assistant"
        turns = [json.dumps(turn) for turn in row.messages]
        assert len(set(turns)) == len(turns), "the prompt is there twice"


def test_looking_at_files_gives_the_stages_their_paths():
    shown = answer("--model", "qwen2.5-7b", "--gpu-gib", "80", "--data", SAMPLES / "arithmetic.jsonl",
                   SAMPLES / "sft.jsonl")  # fmt: skip
    assert [(stage["method"], stage["data"]) for stage in shown["stages"]] == [
        ("sft", str(SAMPLES / "sft.jsonl")), ("grpo", str(SAMPLES / "arithmetic.jsonl")),
    ]  # fmt: skip


def test_prompts_alone_teach_nothing():
    seen = choose.look_at(str(SAMPLES / "formats" / "prompt.jsonl"))
    with pytest.raises(InputError, match="prompts alone teach nothing"):
        choose.choose([seen.kind], [seen], base=False)
    stages, _ = choose.choose(["reward-model", seen.kind], [seen], base=False)
    assert [(stage.method, stage.data) for stage in stages] == [("ppo", seen.path)]


def flags_of(stage: dict) -> dict[str, str]:
    flags = stage["flags"] + [""]
    return {flag: value for flag, value in itertools.pairwise(flags) if flag.startswith("--")}


@pytest.mark.slow
@pytest.mark.parametrize("gib", [8, 24, 141])
def test_what_should_fit_fits(gib):
    for name in card_names():
        card = read_card(name)
        for method in card.methods:
            stage = choose.Stage(method, "", "")
            choose.plan_memory(stage, find_model(name), gib)
            known = read_fields(ROOT / "recipes" / f"{method}.py") or []
            changed = {given.field.name: values(given)[0] for given in read_words(known, stage.flags)}
            more = {"reward_model": "one"} if method == "ppo" else {}  # its command names one
            work, own = workload(card, method, changed | more), workload(card, method, more)
            needed = peak(card, work, gib).total
            if stage.fits:
                assert work.step_rows == own.step_rows, "another step"
                assert needed <= gib
                assert needed == pytest.approx(stage.gib)
            else:
                assert stage.gib > MARGIN * gib
                assert "does not fit" in stage.settings


def test_a_small_gpu_gets_smaller_batches_of_the_same_step():
    shown = answer("--have", "demonstrations", "pairs", "--model", "qwen2.5-7b", "--gpu-gib", "8")
    sft = shown["stages"][0]
    assert sft["fits"]
    assert flags_of(sft) == {"--per-device-train-batch-size": "1", "--gradient-accumulation-steps": "16"}
    given = dict(word.split("=", 1) for word in shlex.split(shown["pipeline"])[2:])
    assert shlex.split(given["SFT_ARGS"]) == sft["flags"]


def test_what_does_not_fit_says_what_would():
    sft = answer("--have", "demonstrations", "--model", "qwen2.5-72b", "--gpu-gib", "24")["stages"][0]
    assert sft["fits"] is False
    assert re.match(r"does not fit: 4\d\.\d GiB at the least, of 24\. Take a larger GPU", sft["settings"])
    assert sft["settings"].endswith("or a smaller model: phi-4, qwen2.5-14b, qwen2.5-32b")
    ppo = answer("--have", "reward-model", "--model", "qwen2.5-72b", "--gpu-gib", "141")["stages"][0]
    assert ppo["fits"] is False
    assert "not offered for ppo" in ppo["settings"]
    none = answer("--have", "demonstrations", "--model", "qwen2.5-7b", "--gpu-gib", "0")["stages"][0]
    assert none["fits"] is False
    assert "needs a GPU" in none["settings"]
    unknown = answer("--have", "demonstrations", "--model", "some/model", "--gpu-gib", "8")["stages"][0]
    assert unknown["fits"] is None
    assert "there is no card of the model" in unknown["settings"]


def all_answers() -> list[dict]:
    return [
        answer("--have", *have.split(), "--model", model, "--gpu-gib", gib)
        for have in ("demonstrations pairs answers", "pairs scores", "demonstrations answers reward-model")
        for model, gib in (("qwen2.5-7b", "8"), ("qwen2.5-7b", "80"), ("tiny", "0"))
    ]


@pytest.mark.slow
def test_the_commands_are_ones_there_are():
    """Each target is in the Makefile, each flag an argument of its recipe, each batch the recipe's own default."""
    for shown in all_answers():
        for _, target, *words in commands(shown):
            assert target in COMMANDS
            recipe = ROOT / "recipes" / f"{target}.py"
            if recipe.exists():  # a target that trains
                known = {"OUT", "REWARD"} | {name.upper() for name in arguments(recipe)}
                assert {word.partition("=")[0] for word in words} <= known


def arguments(recipe) -> dict[str, object]:
    """Names and defaults of a recipe's Args; None for a default that is not a plain value."""
    tree = ast.parse(recipe.read_text(encoding="utf-8"))
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    return {field.target.id: getattr(field.value, "value", None) for field in fields}


def test_a_path_arrives_as_it_is(tmp_path):
    """From the printed line, through a shell and make, to the recipe."""
    file = tmp_path / "it's $HOME, my data.jsonl"
    file.write_text('{"instruction": "Say a.", "output": "a"}\n')
    shown = answer("--data", file, "--model", "tiny", "--gpu-gib", "0")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "run").write_text('#!/bin/sh\nprintf %s "$DATA"\n')
    (tmp_path / "scripts" / "run").chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", shown["stages"][0]["commands"][0]], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={key: value for key, value in os.environ.items() if not re.match("MAKE|MFLAGS", key)},
    )  # fmt: skip
    assert done.stdout == str(file), done.stderr


def test_without_a_terminal_it_names_the_flags(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    message = refusal(choose.main, capsys)
    assert all(flag in message for flag in ("--have", "--data", "--model", "--gpu-gib"))
    message = refusal(choose.main, capsys, "--have", "pairs", "--gpu-gib", "8")
    assert "--model" in message
    assert "--have" not in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--have", "wishes", "--model", "tiny", "--gpu-gib", "0"), "--have=wishes: unknown"),
        (("--have", "pairs", "--model", "qwen2.5-7", "--gpu-gib", "0"), "did you mean qwen2.5-7b?"),
        (("--have", "pairs", "--model", "tiny", "--gpu-gib", "-1"), "--gpu-gib=-1"),
        (("--have", "pairs", "--model", "tiny", "--gpu-gib", "nan"), "--gpu-gib=nan"),
        (("--data", "no.jsonl", "--model", "tiny", "--gpu-gib", "0"), "no.jsonl: no such file"),
    ],
)
def test_bad_input_has_one_message(flags, message, capsys):
    assert message in refusal(choose.main, capsys, *flags)


def test_bad_files_are_named(tmp_path):
    for text, message in (
        ('{"a": 1}', "the columns are a, which no recipe knows"),
        ("{", "bad.jsonl:1: broken JSON"),
        ("\n", "holds no rows"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(InputError, match=re.escape(message)):
            choose.look_at(str(tmp_path / "bad.jsonl"))


def test_the_gpu_is_what_nvidia_smi_says(capsys, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    gpus = "0, one, 580.95.05, 24564, 24064\n1, another, 580.95.05, 81559, 81000\n"
    smi.write_text(f"#!/bin/sh\ncase $1 in *ecc*) exit 2;; esac\nprintf '{gpus}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert answer("--have", "demonstrations", "--model", "qwen2.5-7b")["gpu_gib"] == 23.5
    smi.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert "--gpu-gib" in refusal(choose.main, capsys, "--have", "demonstrations", "--model", "qwen2.5-7b")


@pytest.mark.slow
def test_the_interview(tmp_path):
    """On a terminal it asks for what was not given, and again when the answer makes no sense."""

    def interview(typed: bytes, *flags: str) -> tuple[str, int]:
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *flags], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": str(tmp_path)},
        )  # fmt: skip
        os.write(ours, typed)
        output = process.communicate(timeout=60)[0].decode()
        os.close(ours)
        os.close(theirs)
        return output, process.returncode

    output, code = interview(b"99\n1, 2\n\nmuch\n24\n")
    assert code == 0, output
    assert "Please give numbers from 1 to 7" in output
    assert "Please give a number, such as 24" in output
    assert "SFT -> DPO, for qwen2.5-7b with 24 GiB" in output
    output, code = interview(b"4\n", "--model", "tiny", "--gpu-gib", "0")
    assert code == 0, output
    assert "GRPO, for tiny with no GPU" in output
    assert "Which model?" not in output
    output, code = interview(b"\x04", "--gpu-gib", "0")
    assert code == 2
    assert "Traceback" not in output


def test_the_answer_is_one_screen():
    printed = run("--have", "demonstrations", "pairs", "answers", "--model", "qwen2.5-7b", "--gpu-gib", "80")
    lines = printed.splitlines()
    assert len(lines) <= 32
    assert max(len(line) for line in lines if not line.strip().startswith("make ")) <= 100
    for words in ("bring out", "add a skill", "add a skill: every right answer", " of 80 GiB", "make pipeline"):
        assert words in printed
