"""Secrets planted in the environment, in URLs, in a token's file and in words of errors are in nothing that is left.

Slurm's and Docker's ways are in test_slurm.py and test_launcher.py, those of an image's build in test_image.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common.errors import printable, secret_values, without_secrets
from common.run.folder import plan_run
from conftest import ROOT, run_recipe

MARK = "PLANT3D"  # in every secret, and in nothing else
SECRETS = {
    "HF_TOKEN": f"hf_{MARK}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "WANDB_API_KEY": f"{MARK}0123456789abcdef0123456789abcdef",
    "OPENAI_API_KEY": f"sk-{MARK}bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
    "MY_REWARD_SECRET": f"word {MARK} of mine",
    "HTTPS_PROXY": f"http://me:{MARK}@proxy.invalid:3128",
    "HF_ENDPOINT": f"https://me:{MARK}@mirror.invalid",
}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A home, a folder for temporary files and a working directory, in an environment full of secrets."""
    for name in ("home", "tmp", "work"):
        (tmp_path / name).mkdir()
    token = tmp_path / "home" / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text(f"hf_{MARK}cccccccccccccccccccccccccccccccc")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def found_in(folder: Path) -> list[str]:
    """The files below a folder that hold a planted secret, but the token's own."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert files
    return [str(file) for file in files if file.name != "token" and MARK.encode() in file.read_bytes()]


def script(name: str, *words: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / f"{name}.py", *map(str, words)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


# A user's reward file that reaches a server with a key: its error has the key and the URL in its words.
REWARD = """
import os
def fine(texts):
    return [float(len(text)) for text in texts]
def broken(texts):
    raise RuntimeError(f"{os.environ['HF_ENDPOINT']}/score refused {os.environ['OPENAI_API_KEY']} and "
                       f"{os.environ['MY_REWARD_SECRET']}")
"""
SMALL = ("--max-steps", 2, "--per-device-train-batch-size", 4)
RECIPES = {
    "sft": SMALL,
    "dpo": SMALL,
    "kto": SMALL,
    "reward": SMALL,
    "grpo": ("--max-steps", 1, "--max-completion-length", 8, "--rewards", "reward.py:fine"),
    "ppo": (
        *("--max-steps", 2, "--max-completion-length", 8, "--rewards", "reward.py:fine", "--rollout-batch-size", 8),
        *("--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 2, "--critic-warmup-steps", 1),
    ),
}


@pytest.mark.slow
def test_no_planted_secret_is_in_what_recipes_and_commands_print_or_write(planted, warm):
    work = planted / "work"
    (work / "reward.py").write_text(REWARD)
    printed = {}
    for recipe, flags in RECIPES.items():
        printed[recipe] = run_recipe(recipe, *flags, "--output-dir", work / recipe, cwd=work)
    run = work / "sft"
    for name, words in {
        "merge": ("--adapter", run / "adapter"),
        "report": ("--run", run, work / "dpo"),
        "chat": ("--run", run, "--prompt", "hello", "--max-new-tokens", 4),
        "evaluate": ("--run", run, "--no-general", "--max-new-tokens", 8),
        "push": ("--run", run, "--repo", "me/x", "--dry-run"),
        "check-data": ("--data", ROOT / "data_samples" / "sft.jsonl", "--html", work / "data.html"),
        "slurm/submit": ("--recipe", "sft", "--time", "1:00:00", "--dry", "--output-dir", work / "slurm"),
    }.items():
        without = {"HF_ENDPOINT": ""} if name == "slurm/submit" else {}  # a script with a password in it is refused
        printed[name] = script(name, *words, **without)
    codes = {name: done.returncode for name, done in printed.items()}
    assert codes == dict.fromkeys(codes, 0), [done.stderr[-600:] for done in printed.values() if done.returncode]

    # The same where things go wrong: in the words of somebody else's error, and by a signal that leaves a core.
    printed["broken reward"] = run_recipe(
        "grpo", *RECIPES["grpo"][:-1], "reward.py:broken", "--output-dir", work / "broken", cwd=work
    )
    assert "refused $OPENAI_API_KEY and $MY_REWARD_SECRET" in printed["broken reward"].stderr
    assert printed["broken reward"].returncode == 2
    printed["secret as an argument"] = run_recipe("sft", "--model", SECRETS["HF_TOKEN"], "--output-dir", work / "arg")
    assert printed["secret as an argument"].returncode == 2
    assert "the value of HF_TOKEN is on the command line" in printed["secret as an argument"].stderr
    for name, done in printed.items():
        assert MARK not in done.stdout + done.stderr, name
    assert found_in(planted) == []
    for name in ("run.json", "metrics.jsonl", "samples.jsonl", "report.html", "README.md"):
        assert list(work.rglob(name)), f"no {name} was looked into"


BUGS = {
    "its message": "raise RuntimeError(os.environ['HF_ENDPOINT'] + ' ' + os.environ['OPENAI_API_KEY'])",
    "its cause": "\n    try: int(os.environ['HF_TOKEN'])\n    except ValueError as e: raise KeyError('x') from e",
    "a known token": "raise RuntimeError('hf_PLANT3Dddddddddddddddddddddddddddddd')",
    "a thread": "import threading; threading.Thread(target=lambda: int(os.environ['HF_TOKEN'])).start()",
    "the machine": "raise OSError(30, 'Read-only file system', os.environ['OPENAI_API_KEY'])",
}


@pytest.mark.parametrize("where", BUGS)
def test_a_traceback_has_no_secret(where, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    code = f"import os\nfrom common.errors import *\ndef main():\n    {BUGS[where]}\nrun_command(main)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "recipes")},
    )  # fmt: skip
    assert ("Traceback" in done.stderr) == (where != "the machine")
    assert MARK not in done.stdout + done.stderr
    assert "***" in done.stderr or "$" in done.stderr


def test_a_run_that_fails_records_no_secret(tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["sft.py", "--data", SECRETS["HF_ENDPOINT"]])
    words = f"{SECRETS['HF_ENDPOINT']} refused {SECRETS['OPENAI_API_KEY']}"
    run = plan_run("sft", "x", str(tmp_path / "run"), {}, {}, {})
    with pytest.raises(RuntimeError), run:
        raise RuntimeError(words)
    record = (tmp_path / "run" / "run.json").read_text()
    assert "refused $OPENAI_API_KEY" in record
    assert found_in(tmp_path) == []


def test_what_is_secret_by_its_name(monkeypatch, tmp_path):
    for name in list(os.environ):
        monkeypatch.delenv(name)
    (tmp_path / "token").touch()
    secret = {
        "HF_TOKEN": "hf_12345678", "AWS_SECRET_ACCESS_KEY": "/abcdefgh/x", "DB_PASSWORD": "passw0rd!",
        "APIKEY": "k" * 9 + "1", "my_api_key": "lower-case-1",
    }  # fmt: skip
    others = {
        "HF_TOKEN_PATH": "/no/such/token", "SSL_KEY": str(tmp_path / "token"), "TOKENIZER": "qwen2.5-7b",
        "KEYRING_DIR": "somewhere", "KEY": "short", "JUDGE_KEY": "HF_TOKEN", "MAX_TOKENS": "12345678",
    }  # fmt: skip
    for name, value in {**secret, **others}.items():
        monkeypatch.setenv(name, value)
    assert secret_values() == secret
    text = without_secrets("hf_12345678 /abcdefgh/x/y qwen2.5-7b https://me:pw@host/x k")
    assert text == "$HF_TOKEN $AWS_SECRET_ACCESS_KEY/y qwen2.5-7b https://***@host/x k"


def test_what_a_terminal_would_obey_is_written_out():
    assert printable("a\x1b[2Jb\rc\x07\u202ed\udcff\x9b") == "a\\x1b[2Jb\\rc\\x07\\u202ed\\udcff\\x9b"
    plain = "ä 中文 ✓ 🦥\n\ttab"
    assert printable(plain) == plain


def test_no_build_argument_and_no_layer_of_the_image_holds_a_secret():
    """An ARG and an ENV stay in the history of an image; secrets are mounted for one RUN."""
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    names = [
        name for line in re.findall(r"^\s*(?:ARG|ENV)\s+(.*)", text, re.MULTILINE) for name in re.findall(r"\w+", line)
    ]
    assert not [name for name in names if re.search("TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY", name, re.IGNORECASE)]
    assert "--mount=type=secret" in text
