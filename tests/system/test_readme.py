"""README and docs/: every command is run, both languages give the same ones, every link and name leads somewhere.

A page's commands run in their order in a folder of its own, which looks like the repository and holds the files that a
reader has: so what a command needs, another one of the page has made, or it is the run of SFT that README begins with.
What takes seconds runs as it stands; what trains runs on the tiny model for two steps. All commands of a page that need
unsloth run in children of one process that has imported it (warm/), as importing takes most of their time.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from common.arguments import check
from common.lm.cards import read_card
from common.plan.devices import SIZES, of_size
from common.plan.search import fit
from common.plan.workload import METHODS
from conftest import ROOT, run_recipe
from launch.commands import COMMANDS
from launch.variables import arguments

DOCS = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
CHINESE = {"README.md": "README.zh-CN.md", **{f"docs/{name}": f"docs/zh/{name}" for name in DOCS}}
PAGES = list(CHINESE)

# What another test runs, with the engine, the cluster or the hub that it needs: here make only resolves the target.
ELSEWHERE = {
    r"make (image|shell)\b.*|make check RUNTIME=docker|make sft .*OUT=/big/.*|docker .*": "tests/system/test_docker.py",
    r"make slurm-status\b.*": "tests/system/test_slurm.py",
    r"make (sft|dpo|kto|reward|grpo|ppo)\b.* GPUS=.*": "tests/system/test_several_ranks.py",
    r"make pipeline\b.*": "tests/scripts/test_pipeline.py",
    r"make watch\b.*": "tests/scripts/test_watch.py",
    r"make serve\b(?!.*COMMANDS=yes).*": "tests/scripts/test_serve.py",
    r"make push\b(?!.*DRY_RUN=yes).*": "tests/scripts/test_push.py",
    r"make pin\b.*": "tests/common/lm/test_models.py",
    r"make evaluate\b.* (TASKS|COMPARE)=.*": "tests/scripts/test_evaluate_run.py",
    r"make sft\b.* LOAD_IN_FP8=yes\b.*": "tests/system/test_gpu.py",
    r"make audit\b.* ?(ADVISORIES|UPDATE_LICENCES)=.*": "tests/scripts/test_audit.py",
    r"make (test|test-all|test-docker|test-slurm|lint|lock-check)\b.*": ".ci/run",
}
# What makes a run of each command short; a page's own value of the same name is replaced.
RECIPES = {
    "sft": "SAMPLE_PROMPTS=0",
    "dpo": "SAMPLE_PROMPTS=0",
    "kto": "SAMPLE_PROMPTS=0",
    "grpo": "SAMPLE_PROMPTS=0 NUM_GENERATIONS=4 PER_DEVICE_TRAIN_BATCH_SIZE=8 MAX_COMPLETION_LENGTH=32",
    "reward": "",
    "ppo": "SAMPLE_PROMPTS=0 ROLLOUT_BATCH_SIZE=8 PER_DEVICE_TRAIN_BATCH_SIZE=8 CRITIC_WARMUP_STEPS=1 "
    "MAX_COMPLETION_LENGTH=32 EVAL_RATIO=0.01",
}
SHORT = {
    **{recipe: f"{words} MAX_STEPS=2".split() for recipe, words in RECIPES.items()},
    "distill": ["MAX_COMPLETION_LENGTH=64"],
    "preferences": ["MAX_COMPLETION_LENGTH=64"],
    "slurm": ["DRY=1"],
}
SEARCHED_FOR = ["resume", "requeue", "multi-GPU", "hyperparameter", "LoRA", "QLoRA", "DPO", "KTO", "GRPO", "PPO"]
SEARCHED_FOR += ["reward model"]
GPU = shutil.which("nvidia-smi") is not None


class Command(NamedTuple):
    place: str  # file:line
    words: list[str]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def blocks(page: str, language: str) -> list[tuple[int, list[str]]]:
    """The code blocks of a page: the number of the first line, and the lines."""
    found, lines, first = [], (ROOT / page).read_text(encoding="utf-8").splitlines(), None
    for number, line in enumerate(lines, start=1):
        if first is None and line == f"```{language}":
            first = number + 1
        elif first is not None and line == "```":
            found.append((first, lines[first - 1 : number - 1]))
            first = None
    return found


def commands(page: str) -> list[Command]:
    return [
        Command(f"{page}:{number}", shlex.split(line, comments=True))
        for first, lines in blocks(page, "sh")
        for number, line in enumerate(lines, start=first)
        if line
    ]


def elsewhere(command: Command) -> str | None:
    return next((where for pattern, where in ELSEWHERE.items() if re.fullmatch(pattern, command.text)), None)


# --- without running anything


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_give_the_same_commands_and_functions(page):
    other = CHINESE[page]
    assert [command.words for command in commands(page)] == [command.words for command in commands(other)]
    code = [[re.sub(r"  # .*", "", line) for line in lines] for _, lines in blocks(page, "python")]
    assert code == [[re.sub(r"  # .*", "", line) for line in lines] for _, lines in blocks(other, "python")]


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_headings_and_figures(page):
    """Headings by their level; of a table every number."""

    def skeleton(name: str) -> tuple[list[str], list[list[str]]]:
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        rows = [sorted(re.findall(r"\d[\d,.]*\d|\d", line)) for line in lines if line.startswith("|")]
        return [line.split()[0] for line in lines if re.match("#+ ", line)], rows

    assert skeleton(page) == skeleton(CHINESE[page])


@pytest.mark.parametrize("page", [*PAGES, *CHINESE.values(), "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_every_link_and_every_path_leads_to_a_file(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        if not link.startswith(("http://", "https://")):
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"
    for path in re.findall(r"`((?:recipes|scripts|tests|docker|data_samples|docs|\.ci|\.github)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, f"{page}: {path}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings as GitHub makes them: lower case, hyphens for spaces, a number after a twin."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = [
        re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text, re.M)
    ]
    return {name + (f"-{twins}" if (twins := headings[:at].count(name)) else "") for at, name in enumerate(headings)}


@pytest.mark.parametrize("page", [*PAGES, *CHINESE.values(), "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_every_link_to_a_heading_leads_to_one(page):
    for link, heading in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://")):
            target = (ROOT / page).parent.joinpath(link) if link else ROOT / page
            assert heading in anchors(target), f"{page}: {link}#{heading}"


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "SECURITY.md"])
def test_the_commands_within_a_text_take_the_variables_that_they_are_given(page, monkeypatch):
    """Nothing runs. Of benchmark, whose commands stand beside the results, flags are read too."""
    monkeypatch.setattr(os, "environ", dict(os.environ))  # settings are put there
    for text in re.findall(r"`(make \S[^`]*=[^`]*)`", (ROOT / page).read_text(encoding="utf-8")):
        _, name, *words = shlex.split(text)
        if name in COMMANDS:
            fields = COMMANDS[name].fields()
            given = dict(word.split("=", 1) for word in words)
            flags = arguments(name, COMMANDS[name], fields, {key: value for key, value in given.items() if value})
            if name == "benchmark":
                check(fields, flags, name)


def test_the_names_in_the_map_of_the_code_are_in_their_files():
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs/code.md").read_text(encoding="utf-8"), re.M)
    checked = 0
    for files, names in rows:
        paths = [
            ROOT / path
            for path in re.findall(r"`((?:recipes|scripts)/[\w./-]+)`", files + names)
            if (ROOT / path).exists()
        ]
        text = "".join(
            file.read_text(encoding="utf-8")
            for path in paths
            for file in (path.rglob("*.py") if path.is_dir() else [path])
        )
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{name}\b", text), f"{name} is not in {files}"
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readme_is_one_page_with_every_other_page_and_the_words_that_newcomers_search_for(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for name in DOCS:
        assert f"docs/{'zh/' if 'zh' in page else ''}{name}" in text, name
    for word in (
        "resume",
        "requeue",
        "multi-GPU",
        "hyperparameter",
        "LoRA",
        "QLoRA",
        "DPO",
        "GRPO",
        "PPO",
        "reward model",
    ):
        assert re.search(rf"\b{word}\b", text), word
    for _, lines in blocks(page, "text"):
        assert max(map(len, lines)) <= 80, "the picture of a terminal is wider than the terminal"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_a_7b_fits_from_the_cards_that_the_readme_names(page):
    """By the plan, with rows of the default length; and no smaller card does."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = {method: int(gb) for gb, method in re.findall(r"\| (\d+) GB \| `make (\w+)` \|", text)}
    assert set(named) == set(METHODS)
    sizes = read_card("qwen2.5-7b")
    assert {method: min(gb for gb in SIZES if fit(sizes, method, of_size(gb))) for method in named} == named


def test_what_is_left_to_other_tests_is_there():
    for where in ELSEWHERE.values():
        assert (ROOT / where).is_file(), where
    texts = [command.text for page in PAGES for command in commands(page)]
    for pattern in ELSEWHERE:
        assert any(re.fullmatch(pattern, text) for text in texts) or "lint" in pattern, f"no page has {pattern}"


# --- running


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """The files that a reader has: data of each kind, a few rows of ours."""
    folder, samples = tmp_path_factory.mktemp("reader"), ROOT / "data_samples"
    for name, source, count in (
        ("my.jsonl", "sft.jsonl", 40),
        ("held-out.jsonl", "sft.jsonl", -8),
        ("pairs.jsonl", "preferences.jsonl", 16),
        ("thumbs.jsonl", "feedback-train.jsonl", 40),
        ("scores.jsonl", "scores.jsonl", 40),
        ("prompts.jsonl", "compare.jsonl", 4),
    ):
        lines = (samples / source).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count] if count > 0 else lines[count:]), encoding="utf-8")
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    with (folder / "scores.jsonl").open(
        "a", encoding="utf-8"
    ) as file:  # a second completion of each prompt, a worse one
        for row in scores:
            worse = {"response": "I do not know.", "score": row["score"] - 1}
            file.write(json.dumps({**row, **worse}, ensure_ascii=False) + "\n")
    problems = [json.loads(line) for line in (samples / "arithmetic.jsonl").read_text().splitlines()[:8]]
    rows = [{"question": row["prompt"], "answer": f"It is so.\n#### {row['answer']}"} for row in problems]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(samples / "formats" / "text.jsonl", folder / "texts.jsonl")
    return folder


@pytest.fixture
def checkout(page, reader, tmp_path) -> Path:
    """A folder like the repository, with a reader's files, the functions of README and the page, and no outputs."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for path in itertools.chain(ROOT.iterdir(), reader.iterdir()):
        if path.name not in ("outputs", ".git"):
            (folder / path.name).symlink_to(path)
    (folder / "outputs").mkdir()
    for _, lines in [*blocks("README.md", "python"), *(blocks(page, "python") if page != "README.md" else [])]:
        (name,) = re.findall(r"# (my_\w+\.py)", lines[0])
        with (folder / name).open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n\n")
    return folder


@pytest.fixture
def prepared(page, checkout, warm, request) -> Path:
    """The checkout, with the runs of README and the reward model where the page uses and does not make them."""
    texts = [command.text for command in commands(page)]
    made = {name for text in texts for name in re.findall(r"OUT=(outputs/[\w.-]+)", text)}

    def provide(name: str, source: Path) -> None:
        if name not in made and any(name in text for text in texts):
            (checkout / name).symlink_to(source)

    provide("outputs/try", request.getfixturevalue("trained")[0])
    merged = request.getfixturevalue("merged")
    provide("outputs/merged", merged)
    reward = checkout / "reward"
    if "outputs/reward" not in made and any("outputs/reward" in text for text in texts):
        done = run_recipe("reward", "--model", merged, "--output-dir", reward, "--max-steps", 2)
        assert done.returncode == 0, done.stderr
        provide("outputs/reward", reward)
    return checkout


def shortened(command: Command) -> list[str]:
    """The words to run in place of the command's: a small model for two steps, where it trains."""
    program, target, *words = command.words
    if target.startswith("help") or "--help" in words:
        return command.words
    if target in ("check", "choose", "models", "pin", "plan"):
        return command.words
    words = [re.sub(r"^(MODEL=)?qwen.*", r"\1tiny", word) for word in words]
    short = SHORT.get(target, [])
    if program != "make":  # of a flag that is given twice the last one counts
        pairs = [word.split("=") for word in short]
        return [program, target, *words, *(f"--{name.lower().replace('_', '-')}={value}" for name, value in pairs)]
    given = {word.split("=")[0] for word in short}
    return [program, target, *(word for word in words if word.split("=")[0] not in given), *short]


def run(words: list[str], checkout: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(checkout)}
    return subprocess.run(
        words, cwd=checkout, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_of_a_page_run(page, prepared):
    failed = []
    for command in commands(page):
        if elsewhere(command):
            words = [command.words[0], "-n", *command.words[1:]]
            done = run(words, prepared) if words[0] == "make" else None
        else:
            words = shortened(command)
            done = run(words, prepared)
        if done is None:
            continue
        lacks_gpu = "check" in words[:2] and "MODEL=qwen2.5-7b" in words and not GPU and "Error 3" in done.stderr
        if done.returncode and not lacks_gpu:
            failed.append(f"{command.place}: {command.text}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
            continue
        failed += [f"{command.place}: {command.text}\nleaves no {file}" for file in unwritten(command, words, prepared)]
    assert not failed, "\n\n".join(failed)


def unwritten(command: Command, words: list[str], checkout: Path) -> list[str]:
    """The files and folders that the command names as its output and that are not there."""
    if elsewhere(command) or words[1].startswith("slurm"):
        return []
    named = [word.partition("=")[2] for word in words if re.match("(OUT|HTML|JSON|FIX)=", word)]
    return [file for file in named if not (checkout / file).exists()]


# Runs that end differently: by the recipe, by what is saved, and by whose data it is.
ENDINGS = [[recipe] for recipe in RECIPES] + [["sft", "DATA=my.jsonl"], ["sft", "USE_PEFT=no"]]
ENDINGS += [["reward", "STAND_ALONE=yes"], ["reward", "DATA=my stars.jsonl", "COLUMNS=score=stars"]]


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("page", ["README.md"])
def test_the_commands_that_a_run_ends_with_run_when_pasted(checkout):
    rows = (checkout / "scores.jsonl").read_text(encoding="utf-8").replace('"score":', '"stars":')
    (checkout / "my stars.jsonl").write_text(rows, encoding="utf-8")
    pasted: dict[tuple[str, ...], str] = {}  # one of those that differ in names of folders only
    for number, words in enumerate(ENDINGS):
        done = run(["make", *words, f"OUT=outputs/run {number}", *SHORT[words[0]]], checkout)
        assert done.returncode == 0, done.stderr
        after = done.stdout.partition("\nNext:\n")[2].splitlines()
        proposed = [line for line in after if line.startswith("  ")]
        assert after[len(proposed) :] == [f"Report in outputs/run {number}/report.html"]
        assert 1 <= len(proposed) <= 3, done.stdout
        for line in proposed:
            pasted.setdefault(tuple(word.partition("=")[0] for word in shlex.split(line)), line.strip())
    assert {kind[1] for kind in pasted} == {"evaluate", "compare", "chat", "merge", "ppo"}
    short = {**SHORT, "compare": ["MAX_NEW_TOKENS=32"], "evaluate": ["MAX_NEW_TOKENS=16"]}
    for line in pasted.values():
        _, target, *_ = words = shlex.split(line)
        done = run([*words, *short.get(target, [])], checkout)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
