"""Whatever is kept is keyed by all that it depends on: each part of each key is changed, and what was kept is not used.

docs/code.md lists what is kept. Hashes of files are in tests/common/lm/test_models.py, graphs and the sampler's copy of
the weights in tests/common/lm/rollout and tests/system/test_gpu.py.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import serve
from common import environment
from common.data.rows import source_sha256
from common.environment import COMPILED, code_sha256, compiled_code
from common.errors import InputError
from common.lm import hub
from common.lm import load as loading
from common.lm.adapter import WEIGHTS
from common.lm.hub import READS_TEXT, Model, contents, fetch, find_model
from common.rewards import user_file
from common.rewards.adapter import REWARD_FILES
from common.rewards.specification import identities, load
from common.run import replay
from common.run.folder import plan_run
from conftest import ROOT
from export import identify_weights
from exporting.merged import find_trained
from install import converter, installed, overlay
from merge import identify
from stages import steps

TINY = ROOT / "data_samples" / "tiny"
CONFIG = "adapter_config.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return shutil.copytree(TINY, tmp_path / "base")


@pytest.fixture
def run(tmp_path: Path, base: Path) -> Path:
    """The folder of a finished run on that base, with an adapter that nothing loads."""
    folder = tmp_path / "run"
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": str(base)}
    (adapter / CONFIG).write_text(json.dumps(settings))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(base / name, adapter)
    record = {
        "recipe": "sft",
        "arguments": {"model": {"value": str(base)}},
        "matters": {"base": contents(find_model(str(base)))},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def add(file: Path, text: str = " ") -> None:
    file.write_bytes((file.read_bytes() if file.exists() else b"") + text.encode())


def assert_each_changes(key: Callable[[], object], changes: dict[str, Callable[[], object]]) -> None:
    """Every change gives a key that was not there before."""
    seen = [key()]
    assert key() == seen[0]  # nothing changed
    for what, change in changes.items():
        change()
        assert key() not in seen, what
        seen.append(key())


# --- runs, and what a checkpoint is


def test_a_model_is_its_weights_its_config_and_all_that_reads_text(base):
    weights = base / "model.safetensors"

    def other_weights() -> None:
        whole = bytearray(weights.read_bytes())
        whole[-1] ^= 1
        weights.write_bytes(whole)

    changes = {name: lambda name=name: add(base / name) for name in ("config.json", *READS_TEXT)}
    assert_each_changes(lambda: contents(find_model(str(base))), {"weights": other_weights, **changes})


@pytest.mark.parametrize("changed", ["a template", "a learning rate", "data", "the lock"])
def test_a_run_is_not_resumed_when_something_that_matters_has_changed(base, tmp_path, changed, monkeypatch):
    def plan(rate: float = 1e-4, data: str = "a"):
        inputs = {"data": data, "base": contents(find_model(str(base)))}
        arguments = {"learning_rate": rate}
        return plan_run("sft", "base", str(tmp_path / "run"), arguments, {"learning_rate": "recipe"}, inputs)

    with plan() as begun:
        begun.update(step=1)
    assert plan() is None  # finished, and known
    if changed == "a template":
        add(base / "chat_template.jinja")
    if changed == "the lock":
        monkeypatch.setattr(environment, "installed_lock", lambda: {"file": "docker/x.lock", "sha256": "0" * 64})
    with pytest.raises(InputError):
        plan(rate=2e-4 if changed == "a learning rate" else 1e-4, data="b" if changed == "data" else "a")


FILES = {
    "the user's chat template": "template.jinja",
    "settings of sampling": "base/generation_config.json",
    "weights of a reward model": f"reward/{WEIGHTS}",
    "its head, from which a critic starts": "reward/head.safetensors",
    "its scale": "reward/adapter_config.json",
    "a reward file": "rewards.py",
    "what a reward file imports": "words_beside.py",
    "a classifier as reward": "scorer/config.json",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FILES)
def test_each_file_that_a_run_reads_is_part_of_what_it_is(base, tmp_path, what, monkeypatch):
    """Neither resume nor verify takes a run for another one."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which a reward file's folder is added
    for name in FILES.values():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    shutil.copytree(TINY, tmp_path / "scorer", dirs_exist_ok=True)
    (tmp_path / "rewards.py").write_text("import words_beside\ndef length(texts):\n    return [0.0 for _ in texts]\n")

    def inputs() -> dict:
        user_file._import.cache_clear()
        sys.modules.pop("words_beside", None)
        rewards = load([f"{tmp_path / 'rewards.py'}:length", f"model:{tmp_path / 'scorer'}"], 8)
        found = find_model(str(base))
        return {
            "reward_model": source_sha256([tmp_path / "reward" / name for name in REWARD_FILES]),
            "reward_files": identities(rewards),
            **loading.identify(found, str(tmp_path / "template.jinja")),
        }

    def plan(now: dict):
        arguments = {"chat_template_path": str(tmp_path / "template.jinja")}
        return plan_run("ppo", "base", str(tmp_path / "run"), arguments, dict.fromkeys(arguments, "recipe"), now)

    before = inputs()
    with plan(before) as begun:
        begun.update(step=1)
    assert plan(inputs()) is None  # finished, and known
    with (tmp_path / FILES[what]).open("a") as stream:
        stream.write("\n")
    now = inputs()
    assert [name for name in now if now[name] != before[name]] != []
    with pytest.raises(InputError, match="holds a run with other settings"):
        plan(now)
    with pytest.raises(InputError, match="is not what the run read"):
        replay.Replay(1, {"matters": before}).check({}, now)


def test_a_chat_template_is_the_same_wherever_it_is(base, tmp_path):
    for name in ("a.jinja", "b.jinja"):
        (tmp_path / name).write_text("{{ messages }}")
    found = find_model(str(base))
    assert loading.identify(found, str(tmp_path / "a.jinja")) == loading.identify(found, str(tmp_path / "b.jinja"))


def test_a_resumed_run_keeps_the_commit_with_which_it_began(tmp_path, monkeypatch):
    """The hub's main branch may have moved since."""
    monkeypatch.setattr(hub, "RESUMED", pinned := {})
    monkeypatch.setattr("common.run.folder.RESUMED", pinned)
    monkeypatch.setattr(hub, "check_kind", lambda _: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = Model("x", "org/x", None, None, local=False)
    plan = ("sft", "x", str(tmp_path / "run"), {}, {}, {"data": "a", "base": contents(model)})
    assert fetch(model).revision is None
    with contextlib.suppress(KeyError), plan_run(*plan) as begun:
        begun.update(revision="c" * 40)
        raise KeyError
    plan_run(*plan)
    assert fetch(model).revision == "c" * 40
    assert fetch(dataclasses.replace(model, source="org/other")).revision is None


# --- compiled code


def test_compiled_code_is_keyed_by_all_versions_the_device_and_the_processor(monkeypatch, tmp_path):
    versions = dict.fromkeys(COMPILED, "1.0")
    facts = {"python": "3.11.1", "libc": ("glibc", "2.36"), "cpu": "a cpu", "device": "a gpu"}
    monkeypatch.setattr(environment, "_version", versions.get)
    monkeypatch.setattr(environment.platform, "python_version", lambda: facts["python"])
    monkeypatch.setattr(environment.platform, "libc_ver", lambda: facts["libc"])
    monkeypatch.setattr(environment, "_cpu_name", lambda: facts["cpu"])
    monkeypatch.setattr(environment, "_device", lambda: facts["device"])
    changes = {name: lambda name=name: versions.update({name: "1.1"}) for name in COMPILED}
    others = {"python": "3.12.1", "libc": ("glibc", "2.41"), "cpu": "an older cpu", "device": "another gpu"}
    changes |= {name: lambda name=name: facts.update({name: others[name]}) for name in others}
    changes["place"] = lambda: monkeypatch.setenv("COMPILED_CODE", str(tmp_path))
    assert_each_changes(compiled_code, changes)
    assert {"torch", "triton", "transformers", "trl", "peft", "unsloth", "unsloth_zoo", "vllm"} <= set(COMPILED)


# --- merged copies and exports


def changes_of(base: Path, run: Path) -> dict[str, Callable[[], object]]:
    adapter = run / "adapter"
    return {
        "adapter": lambda: add(adapter / "adapter_model.safetensors"),
        "scale": lambda: (adapter / CONFIG).write_text((adapter / CONFIG).read_text().replace("16", "32")),
        "tokenizer of the adapter": lambda: add(adapter / "tokenizer.json"),
        "template of the adapter": lambda: add(adapter / "chat_template.jinja"),
        "template of the base": lambda: add(base / "chat_template.jinja"),
    }


def test_a_merged_copy_is_of_its_base_its_adapter_its_scale_and_its_tokenizer(base, run):
    assert_each_changes(lambda: identify(find_model(str(base)), run / "adapter"), changes_of(base, run))


@pytest.mark.parametrize("what", ["adapter", "scale", "tokenizer of the adapter", "template of the adapter"])
def test_an_export_of_other_weights_is_not_served(base, run, what):
    export = run / "export"
    for name in ("gguf/run-f16.gguf", "merged/config.json"):
        (export / name).parent.mkdir(parents=True, exist_ok=True)
        (export / name).write_text("{}")
    (export / "export.json").write_text(json.dumps({"weights": identify_weights(find_trained(str(run)))}))
    served = serve.Served(run, run / "adapter", "run", 512)
    assert (list(serve.ggufs(served)), served.merged) == (["f16"], export / "merged")
    changes_of(base, run)[what]()
    assert (serve.ggufs(served), served.merged) == ({}, None)


# --- a pipeline's stages and evaluations


def test_a_stage_is_keyed_by_its_words_its_data_its_models_and_the_lock(base, run, tmp_path, monkeypatch):
    given = {"words": ["--beta", "0.1"], "lock": "a"}
    data, template = tmp_path / "data.jsonl", tmp_path / "own.jinja"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    template.write_text("x")
    monkeypatch.setattr(steps, "installed_lock", lambda: given["lock"])

    def key() -> str:
        words = [*given["words"], f"--chat-template-path={template}"]
        return steps.address("dpo", words, str(data), find_model(str(base)), run / "adapter")

    assert_each_changes(
        key,
        {
            "words": lambda: given.update(words=["--beta", "0.2"]),
            "a file that the words name": lambda: add(template),
            "data": lambda: add(data, data.read_text()),
            "tokenizer": lambda: add(base / "tokenizer.json"),
            "the reward model": lambda: add(run / "adapter" / "adapter_model.safetensors"),
            "its scale": lambda: add(run / "adapter" / CONFIG),
            "the lock": lambda: given.update(lock="b"),
        },
    )


def test_an_evaluation_is_keyed_by_its_model_its_rows_its_words_and_the_code(base, run, tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    given = {"words": ["--seed", "1"], "code": "a"}
    made = []
    monkeypatch.setattr(steps, "code_sha256", lambda *_: given["code"])

    def run_now(what: str, command: list[str], plan: object) -> None:
        written = Path(command[command.index("--json") + 1])
        made.append(written.name)
        written.write_text("{}")

    monkeypatch.setattr(steps, "run", run_now)

    def key() -> int:
        """How many evaluations were made so far, this one included."""
        plan = steps.Plan(tmp_path, [], [], given["words"], None)
        words = ["--model", str(base), "--reward-model", str(run / "adapter")]
        steps.measure("evaluate", words, [str(rows)], tmp_path / "stage", plan)
        return len(made)

    assert_each_changes(
        key,
        {
            "rows": lambda: add(rows, rows.read_text()),
            "words": lambda: given.update(words=["--seed", "2"]),
            "the model's template": lambda: add(base / "chat_template.jinja"),
            "the adapter": lambda: add(run / "adapter" / "adapter_model.safetensors"),
            "the code": lambda: given.update(code="b"),
        },
    )


def test_code_is_the_same_wherever_it_is_and_differs_with_any_file(tmp_path, monkeypatch):
    (tmp_path / "scripts" / "part").mkdir(parents=True)
    (tmp_path / "scripts" / "one.py").write_text("1")
    (tmp_path / "scripts" / "part" / "two.py").write_text("2")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    places = ("scripts/one.py", "scripts/part")
    assert_each_changes(
        lambda: code_sha256(*places),
        {
            "a file": lambda: add(tmp_path / "scripts" / "one.py"),
            "a file of a folder": lambda: add(tmp_path / "scripts" / "part" / "two.py"),
            "another file": lambda: add(tmp_path / "scripts" / "part" / "three.py"),
        },
    )


# --- what the installer keeps


def test_the_converter_is_keyed_by_its_source_and_by_what_is_kept_of_it(tmp_path, monkeypatch):
    (tmp_path / "docker").mkdir()
    pins = tmp_path / "docker" / "sources.txt"
    pins.write_text(f"llama-cpp-python==0.3.36 --hash=sha256:{'a' * 64}\n")
    for module in (installed, converter.sources):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(installed, "CONVERTER", tmp_path / "converter")
    monkeypatch.setattr(converter, "CONVERTER", tmp_path / "converter")
    monkeypatch.setattr(converter, "CACHE", tmp_path / "cache")
    unpacked = []

    def unpack(target: Path, version: str) -> None:
        unpacked.append(target.name)
        target.mkdir(parents=True)
        (target / "source.sha256").write_text(installed.converter_mark())

    monkeypatch.setattr(converter, "unpack", unpack)

    def key() -> int:
        converter.ensure()
        assert installed.has_converter()
        return len(unpacked)

    other = installed.re.compile("LICENSE")
    assert_each_changes(
        key,
        {
            "the source": lambda: pins.write_text(pins.read_text().replace("a" * 64, "b" * 64)),
            "what is kept": lambda: monkeypatch.setattr(installed, "KEPT", other),
        },
    )


def test_the_overlay_of_lm_eval_is_keyed_by_python_and_its_lock(tmp_path, monkeypatch):
    lock = tmp_path / "lm-eval.lock"
    lock.write_text("a==1\n")
    monkeypatch.setattr(overlay, "LOCK", lock)
    monkeypatch.setattr(overlay.sys, "version_info", (3, 11, 7, "final", 0))
    assert_each_changes(
        overlay.folder,
        {
            "the lock": lambda: add(lock, "b==2\n"),
            "Python": lambda: monkeypatch.setattr(overlay.sys, "version_info", (3, 12, 1, "final", 0)),
        },
    )
    assert hashlib.sha256(lock.read_bytes()).hexdigest()[:12] in overlay.folder().name
