"""What tests of several files need: the recipes run as a user runs them, and the tokenizer of the tiny model."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from filelock import FileLock
from launch.commands import VARIABLES

ROOT = Path(__file__).parents[1]
# The libraries' compiled code and the locks' marks are the same for all tests; everything else a run writes is its own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A test that calls make is a user at the prompt, not a part of the `make test` it runs in, whose settings do not hold.
for variable in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS", "RECIPES_GIVEN", "RECIPES_SPELLING", *VARIABLES):
    if variable != "TEST_DOCKER":
        os.environ.pop(variable, None)
# And it runs in this environment, whatever images this machine has. The tests of containers say otherwise themselves.
os.environ["RUNTIME"] = "local"
# Where Python may write no compiled code, as in many images, each of the hundreds of processes that tests start would
# compile torch and transformers again, 8 of the 16 s that unsloth takes to import. Tests keep it in .cache.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(ROOT / ".cache" / "compiled" / "python")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
# Several processes of tests on few cores: threads that wait for each other would wait for the other process too.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def run_recipe(
    recipe: str, *flags: str, cwd: Path = ROOT, seconds: float = 550, **environment: str
) -> subprocess.CompletedProcess:
    """Run recipes/RECIPE.py in a process of its own, output and errors caught; `seconds` fit a busy machine."""
    command = [sys.executable, ROOT / "recipes" / f"{recipe}.py", *map(str, flags)]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=seconds
    )


def slowdown(work: Callable[[int], object], small: int, large: int) -> float:
    """How many times the processor time of `work(small)` that of `work(large)` is, by the quickest of three of each.

    What an absolute time would say of this machine and its load, this says of the code: 4 times the input of linear
    work takes 4 times as long, of quadratic work 16 times.
    """
    times = {small: [], large: []}
    for _ in range(3):
        for size, taken in times.items():
            started = time.process_time()
            work(size)
            taken.append(time.process_time() - started)
    return min(times[large]) / min(times[small])


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def interrupt(way: str, step: int, recipe: str, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a recipe to whose run `way` happens in its step `step`: see tests/system/interrupt.py."""
    script = [ROOT / "tests" / "system" / "interrupt.py", way, step, ROOT / "recipes" / f"{recipe}.py"]
    command = [sys.executable, *map(str, [*script, *flags])]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a run's adapter: two processes that train the same must write the same."""
    return {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()}


def in_two_ranks(task: Callable[[int, Path], None], folder: Path, **environment: str) -> None:
    """Call `task(rank, folder)` in two processes, forks of this one, that are the ranks of a run, by gloo."""
    processes = [
        multiprocessing.get_context("fork").Process(target=_as_rank, args=(task, rank, folder, environment))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    ended = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # where one waits for the other in vain
    assert ended == [0, 0]


def _as_rank(task: Callable[[int, Path], None], rank: int, folder: Path, environment: dict[str, str]) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)  # a fork has none of the threads that this process computed with, and would wait for them
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # set_variables sets "true", and a batch would wait for threads, too
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **environment}
    patience = timedelta(seconds=float(environment.get("RANKS_TIMEOUT", 60)))
    distributed.init_process_group(
        "gloo", timeout=patience, rank=rank, world_size=2, init_method=f"file://{folder}/store"
    )
    task(rank, folder)


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data_samples" / "tiny")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, tokenizer):
    """A reward model of the tiny model's size, with random weights: its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("models") / "reward"
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "data_samples" / "tiny", num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.score.weight.data.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def unsloth_first(tmp_path):
    """The environment of a process that ends with 99 when it imports transformers before unsloth."""
    folder = tmp_path / "unsloth-first"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'transformers' and 'unsloth' not in sys.modules:\n"
        "            print('transformers before unsloth', file=sys.stderr, flush=True)\n"
        "            os._exit(99)\n"
        "sys.meta_path.insert(0, Watch())\n"
    )
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="session")
def warm_server(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment in which a command that imports unsloth is a child of a process that has: see system/warm."""
    folder, address = ROOT / "tests" / "system" / "warm", tmp_path_factory.mktemp("warm") / "socket"
    with subprocess.Popen([sys.executable, folder / "server.py", address], stdout=subprocess.PIPE, text=True) as server:
        assert "ready\n" in iter(server.stdout.readline, ""), "the server has ended"
        yield {"PYTHONPATH": str(folder), "WARM_SERVER": str(address)}
        server.terminate()


@pytest.fixture
def warm(warm_server, monkeypatch) -> dict[str, str]:
    """All that this test starts runs in that environment; what fixtures of the session start does not."""
    for name, value in warm_server.items():
        monkeypatch.setenv(name, value)
    return warm_server


def shared(tmp_path_factory) -> Path:
    """A folder that all processes of this run of pytest have in common, however many pytest-xdist has started."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The run that a newcomer's `make sft` is, and what it prints."""
    folder = shared(tmp_path_factory) / "sft"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            done = run_recipe("sft", "--output-dir", folder / "run")
            assert done.returncode == 0, done.stderr
            (folder / "stdout").write_text(done.stdout, encoding="utf-8")
    return folder / "run", (folder / "stdout").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def merged(trained):
    """That run's adapter merged into its base: where the next stage starts."""
    folder, _ = trained
    with FileLock(f"{folder}.lock"):
        command = [sys.executable, ROOT / "scripts" / "merge.py", "--adapter", folder / "adapter"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
    return folder / "merged"


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    """That run exported, in all formats, by a gate that let it pass."""
    import export as command
    from exporting.merged import find_trained

    folder = shared(tmp_path_factory) / "exported"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            command.export(find_trained(str(trained[0])), folder, "all", ["f16", "q8_0", "q4_k_m"])
    return folder
