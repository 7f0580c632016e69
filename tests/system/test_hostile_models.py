"""A model's folder of somebody else runs nothing: no pickle, no module of its own, whatever argument names the folder.

The pickles planted here write a file when they are loaded. That they do is shown first: else the rest would show
nothing.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from common import environment
from common.errors import InputError, MachineError
from common.lm import network
from common.lm.adapter import check_plain
from common.lm.hub import Model, contents, fetch, find_model, load_tokenizer
from common.lm.own_code import own_code
from common.run.checkpoints import FILES, _facts, newest_checkpoint
from common.run.files import write_json
from common.run.folder import Run
from conftest import ROOT, run_recipe
from fake_hub import serve
from in_process import command, refusal

TINY = ROOT / "data_samples" / "tiny"
SHA = "c" * 40


class Bomb:
    """Unpickled, it writes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.fixture
def mark(tmp_path):
    """The file that a planted pickle writes; it is not there after the test."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists(), "a planted pickle was loaded"


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny model."""
    return shutil.copytree(TINY, tmp_path / "model")


def plant(file: Path, mark: Path, plain: bool = False) -> None:
    """Write a pickle that runs code to `file`, as torch.save does or as a plain one."""
    if plain:
        file.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save({"model.embed_tokens.weight": torch.zeros(2), "x": Bomb(mark)}, file)


@pytest.mark.parametrize("plain", [False, True])
def test_a_planted_pickle_runs_where_it_is_loaded(tmp_path, plain, monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    plant(tmp_path / "x.pt", tmp_path / "ran", plain)
    with suppress(RuntimeError):  # what it was is found out after it ran
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def alone(name):
    def change(folder, mark):
        (folder / "model.safetensors").unlink()
        plant(folder / name, mark)

    return change


def parts(folder, mark):
    alone("pytorch_model-00001-of-00001.bin")(folder, mark)
    index = {"weight_map": {"model.embed_tokens.weight": "pytorch_model-00001-of-00001.bin"}}
    write_json(folder / "pytorch_model.bin.index.json", index)


def index_of(name):
    def change(folder, mark):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        plant(folder / "evil.bin", mark)
        write_json(folder / "model.safetensors.index.json", {"weight_map": {"model.embed_tokens.weight": name}})

    return change


def named(name):
    def change(folder, mark):
        plant(folder / "adapter_model.bin", mark)
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | {"transformers_weights": name})

    return change


def other_safetensors(folder, mark):
    alone("pytorch_model.bin")(folder, mark)
    shutil.copy(TINY / "model.safetensors", folder / "consolidated.safetensors")


PICKLED = {
    "alone": (alone("pytorch_model.bin"), r"pytorch_model\.bin: the weights are a pickle, .* convert it there: python"),
    "in parts": (parts, r"pytorch_model\.bin\.index\.json: the weights are a pickle"),
    "of an adapter": (alone("adapter_model.bin"), r"adapter_model\.bin: the weights are a pickle"),
    "beside safetensors of another name": (other_safetensors, r"pytorch_model\.bin: the weights are a pickle"),
    "named by the index": (index_of("evil.bin"), r"index\.json: names 'evil\.bin'; expected \.safetensors"),
    "named by the index, outside": (index_of("../x.safetensors"), r"index\.json: names '\.\./x\.safetensors'"),
    "named by the config": (named("adapter_model.bin"), r'config\.json: names "adapter_model\.bin" as its weights'),
}


@pytest.mark.parametrize("kind", PICKLED)
def test_weights_in_a_pickle_are_refused_by_the_name_of_the_file(folder, mark, kind):
    change, message = PICKLED[kind]
    change(folder, mark)
    with pytest.raises(InputError, match=message) as caught:
        find_model(str(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "consolidated.00.pth", "weights.pkl"])
def test_a_pickle_of_another_name_is_no_weights(folder, mark, name):
    alone(name)(folder, mark)
    with pytest.raises(InputError, match=r"has no \*\.safetensors"):
        contents(find_model(str(folder)))


def test_the_command_that_the_message_shows_converts_the_file(folder, monkeypatch):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        find_model(str(folder))
    code = str(caught.value).partition('python -c "')[2].removesuffix('"')
    monkeypatch.chdir(folder)
    exec(code)
    assert contents(find_model(str(folder)))
    before, after = load_file(TINY / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_beside_safetensors_no_pickle_is_read(folder, mark):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "adapter_model.bin"):
        plant(folder / name, mark)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {"x": "pytorch_model.bin"}})
    from transformers import AutoModelForCausalLM

    model = find_model(str(folder))
    assert contents(model) == contents(find_model("tiny"))
    fetch(model)
    load_tokenizer(model)
    loaded = AutoModelForCausalLM.from_pretrained(model.source).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(TINY).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_no_library_s_load_runs_a_pickle(tmp_path, mark, monkeypatch):
    """Whatever a call of torch.load, in a library, asks for."""
    for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "1")  # so that what the command sets is put back
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    environment.set_variables()
    for plain in (False, True):
        plant(tmp_path / "x.pt", mark, plain)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            torch.load(tmp_path / "x.pt", weights_only=False)


def test_a_core_dump_would_hold_tokens_and_is_not_written():
    import resource

    environment.set_variables()
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0


def in_the_cache(monkeypatch, tmp_path, *left_out: str) -> Model:
    """A model of the hub that is in its cache, without some of its files."""
    import huggingface_hub.constants as hub

    files = tmp_path / "hub" / "models--org--x" / "snapshots" / SHA
    shutil.copytree(TINY, files)
    for name in left_out:
        (files / name).unlink()
    (tmp_path / "hub" / "models--org--x" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--x" / "refs" / "main").write_text(SHA)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(network, "DOWNLOADS", 1)
    return Model("x", "org/x", None, None, local=False)


def test_a_model_of_the_hub_with_a_pickle_alone_is_refused(tmp_path, mark, monkeypatch):
    model = in_the_cache(monkeypatch, tmp_path, "model.safetensors")
    with pytest.raises(MachineError, match="org/x: its weights are not in the cache of this machine"):
        fetch(model)
    plant(network.snapshot(model) / "pytorch_model.bin", mark)
    with pytest.raises(InputError, match=r"pytorch_model\.bin: the weights are a pickle"):
        fetch(model)
    assert not network.in_cache(model)


def test_a_model_of_the_hub_with_safetensors_is_taken(tmp_path, mark, monkeypatch):
    model = in_the_cache(monkeypatch, tmp_path)
    plant(network.snapshot(model) / "pytorch_model.bin", mark)
    assert fetch(model) == model
    assert network.in_cache(model)


def test_an_adapter_in_a_pickle_is_refused(tmp_path, mark):
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    plant(tmp_path / "adapter_model.bin", mark)
    with pytest.raises(InputError, match=r"its weights are a pickle, adapter_model\.bin"):
        check_plain(tmp_path)


# --- every command that takes a folder


RECIPES = ("sft", "dpo", "kto", "grpo", "reward", "ppo")
EVERYWHERE = {
    **{f"{name} --model": (f"recipes/{name}.py", "--model", "{model}") for name in RECIPES},
    "grpo --rewards": ("recipes/grpo.py", "--rewards", "model:{model}"),
    "ppo --rewards": ("recipes/ppo.py", "--rewards", "model:{model}"),
    "ppo --reward-model": ("recipes/ppo.py", "--reward-model", "{reward}"),
    "chat --model": ("scripts/chat.py", "--model", "{model}"),
    "chat --adapter": ("scripts/chat.py", "--model", "tiny", "--adapter", "{adapter}"),
    "chat --run": ("scripts/chat.py", "--run", "{run}"),
    "evaluate --model": ("scripts/evaluate.py", "--model", "{model}"),
    "evaluate --adapter": ("scripts/evaluate.py", "--model", "tiny", "--adapter", "{adapter}"),
    "evaluate --run": ("scripts/evaluate.py", "--run", "{run}"),
    "evaluate --reward-model": ("scripts/evaluate.py", "--reward-model", "{model}"),
    "compare --a": ("scripts/compare.py", "--a", "{model}", "--b", "tiny"),
    "compare --b": ("scripts/compare.py", "--a", "tiny", "--b", "{adapter}"),
    "compare --judge": ("scripts/compare.py", "--a", "tiny", "--b", "tiny", "--judge", "{model}"),
    "export --run": ("scripts/export.py", "--run", "{run}"),
    "export a model": ("scripts/export.py", "--run", "{model}"),
    "serve --run": ("scripts/serve.py", "--run", "{run}"),
    "serve a model": ("scripts/serve.py", "--run", "{model}"),
    "push --run": ("scripts/push.py", "--run", "{run}", "--repo", "me/x"),
    "merge --adapter": ("scripts/merge.py", "--model", "tiny", "--adapter", "{adapter}"),
    "merge --model": ("scripts/merge.py", "--model", "{model}", "--adapter", "{whole}"),
    "pipeline --model": ("scripts/pipeline.py", "--stages", "sft", "--model", "{model}"),
    "plan --model": ("scripts/plan.py", "--model", "{model}"),
    "choose --model": ("scripts/choose.py", "--data", "{data}", "--gpu-gib", "0", "--model", "{model}"),
    "check-data --model": ("scripts/check-data.py", "--data", "{data}", "--model", "{model}"),
    "distill --model": ("scripts/distill.py", "--model", "{model}", "--output", "{root}/out.jsonl"),
    "preferences --model": ("scripts/preferences.py", "--data", "{data}", "--model", "{model}", "--output", "{root}/o"),
    "test-rewards --rewards": ("scripts/test-rewards.py", "--rewards", "model:{model}", "--data", "{data}"),
}


@pytest.mark.parametrize("place", EVERYWHERE)
def test_every_command_refuses_the_pickle_that_it_is_pointed_at(place, folder, mark, tmp_path, capsys):
    alone("pytorch_model.bin")(folder, mark)
    adapter, reward, whole = tmp_path / "run" / "adapter", tmp_path / "reward", tmp_path / "whole"
    for one in (adapter, reward, whole):
        one.mkdir(parents=True)
        write_json(one / "adapter_config.json", {"peft_type": "LORA"})
        plant(one / "adapter_model.bin", mark)
    shutil.copy(TINY / "model.safetensors", whole / "adapter_model.safetensors")
    write_json(reward / "head.json", {"base": contents(find_model("tiny"))})
    write_json(
        tmp_path / "run" / "run.json",
        {
            "recipe": "sft",
            "status": "done",
            "arguments": {"model": {"value": "tiny", "from": "recipe"}},
            "matters": {"base": contents(find_model("tiny"))},
        },
    )
    file, *words = EVERYWHERE[place]
    data = ROOT / "data_samples" / "formats" / "sft-messages.jsonl"
    if not data.exists():
        data = next((ROOT / "data_samples" / "formats").glob("*.jsonl"))
    given = {
        "model": folder,
        "run": tmp_path / "run",
        "adapter": adapter,
        "reward": reward,
        "whole": whole,
        "data": data,
    }
    message = refusal(command(file).main, capsys, *(word.format(root=tmp_path, **given) for word in words))
    assert "pickle" in message
    assert "_model.bin" in message


# --- what a checkpoint holds


def checkpoint(tmp_path, step: int) -> Path:
    place = tmp_path / "run" / "checkpoints" / f"checkpoint-{step}"
    place.mkdir(parents=True)
    shutil.copy(TINY / "model.safetensors", place / "adapter_model.safetensors")
    write_json(place / "trainer_state.json", {"global_step": step})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step}, place / name)
    write_json(place / FILES, {})
    list_anew(place)
    return place


def list_anew(place: Path) -> None:
    """Write the list of a checkpoint's files for what they are now, as who changes them could."""
    (place / FILES).unlink()
    write_json(place / FILES, _facts(place))


CHECKPOINTS = {
    "optimizer.pt": "would run code: optimizer.pt is a pickle that names builtins.exec",
    "scheduler.pt": "would run code: scheduler.pt is a pickle that names",
    "rng_state.pth": "would run code: rng_state.pth is a pickle that names",
    "ppo_state.pt": "would run code: ppo_state.pt is a pickle that names",
    "critic/state.pt": "would run code: state.pt is a pickle that names",
    "adapter_model.bin": "has weights in a pickle, adapter_model.bin",
}


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_with_code_in_it_is_set_aside_and_the_one_before_taken(tmp_path, mark, capsys, name, plain):
    """Also where its list of files, with their hashes, was written anew."""
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    (second / name).parent.mkdir(exist_ok=True)
    plant(second / name, mark, plain)
    list_anew(second)
    assert newest_checkpoint(Run(tmp_path / "run", {})) == first
    printed = capsys.readouterr().out
    assert f"{second} " in printed
    if plain and name.endswith((".pt", ".pth")):
        assert "was not written by torch.save" in printed
    else:
        assert CHECKPOINTS[name] in printed
    assert (second.parent / "broken-checkpoint-2").is_dir()


@pytest.mark.slow
def test_a_run_resumes_past_planted_pickles_and_ends_as_it_would(tmp_path, mark, warm):
    out = tmp_path / "run"
    flags = ("--max-steps", 2, "--save-steps", 1, "--output-dir", out)
    assert run_recipe("sft", *flags).returncode == 0
    record = json.loads((out / "run.json").read_text())
    first, second = (out / "checkpoints" / f"checkpoint-{step}" for step in (1, 2))
    expected = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    for file in [*second.rglob("*.pt"), *second.rglob("*.pth")]:
        plant(file, mark)
    for place in (first, second):
        plant(place / "training_args.bin", mark)  # which the trainer writes, and nothing reads
        list_anew(place)
    write_json(out / "run.json", record | {"status": "stopped"})
    shutil.rmtree(out / "adapter")
    done = run_recipe("sft", *flags)
    assert done.returncode == 0, done.stderr
    assert "would run code" in done.stdout
    assert "Resuming after step 1" in done.stdout
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == expected


# --- code that a model brings


def with_code(folder: Path, file: str, names: dict) -> None:
    """Have a configuration name modules, each of which writes the file `executed` beside the folder."""
    config = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    write_json(folder / file, config | {"auto_map": names})
    for name in ("evil.py", "tok.py"):
        (folder / name).write_text(f"open({str(folder.parent / 'executed')!r}, 'w')\n")


def test_what_would_run_is_named_by_module_class_and_place(folder, mark):
    model = find_model(str(folder))
    assert own_code(model) == ""
    with_code(folder, "config.json", {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "org/other--evil.Model"})
    with_code(folder, "tokenizer_config.json", {"AutoTokenizer": ["tok.Slow", None]})
    with_code(folder, "processor_config.json", {"AutoProcessor": "tok.Processor"})
    assert own_code(model) == (
        "it needs code of its own, evil.py (Config; by config.json), org/other: evil.py (Model; by config.json), "
        "tok.py (Slow, Processor; by tokenizer_config.json, processor_config.json)"
    )


def test_a_tokenizer_of_its_own_is_named_and_not_run(folder, mark):
    with_code(folder, "tokenizer_config.json", {"AutoTokenizer": ["tok.Slow", "tok.Fast"]})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"tokenizer_class": "Slow"})
    with_code(folder, "config.json", {"AutoConfig": "evil.Config"})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"model_type": "of-nobody"})
    with pytest.raises(InputError, match=r"needs code of its own, .*tok\.py \(Slow, Fast") as caught:
        fetch(find_model(str(folder)))
    assert "\n" not in str(caught.value)


def test_a_reward_model_with_code_does_not_ask_on_the_terminal(folder, mark, monkeypatch):
    """transformers asks where no argument decides it, and this terminal answers yes."""
    from common.rewards.classifier import RewardModel

    with_code(folder, "config.json", {"AutoModelForSequenceClassification": "evil.Model", "AutoConfig": "evil.Config"})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"model_type": "gpt_neox_japanese"})  # known, and no classifier
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError):
        RewardModel(str(folder)).prepare()


def test_every_load_by_transformers_says_that_no_code_is_run_but_of_a_trusted_model():
    """Without the argument transformers asks on the terminal. The default of Unsloth and of PEFT is no."""
    import ast

    missing = []
    files = [*(ROOT / "recipes").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    for file in files:
        if file.is_relative_to(ROOT / "scripts" / "tiny") or file.is_relative_to(ROOT / "scripts" / "benchmarks"):
            continue  # they load what they made
        if ".from_pretrained(" not in (text := file.read_text(encoding="utf-8")):
            continue
        for node in ast.walk(ast.parse(text)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr == "from_pretrained" and ast.unparse(node.func.value).startswith("Auto"):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                value = given.get("trust_remote_code", "")
                if value != "False" and not value.endswith(".trusted"):  # of the model that the user named
                    missing.append(f"{file}:{node.lineno}")
    assert missing == []


def test_a_pipe_or_a_device_in_a_model_s_folder_is_refused(folder):
    (folder / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(InputError, match=r"generation_config\.json: is a pipe, a socket or a device"):
        find_model(str(folder))


@pytest.mark.slow
def test_a_dataset_that_is_a_program_is_named_and_not_run(tmp_path, mark):
    with serve({"org/rows": [{"prompt": "a", "completion": "b"}]}) as hub:
        hub.scripts["org/rows"] = f"open({str(mark)!r}, 'w')\n"
        command = [sys.executable, ROOT / "scripts" / "check-data.py", "--data", "org/rows"]
        done = subprocess.run(
            command, env=hub.environment(tmp_path / "home"), capture_output=True, text=True, check=False, timeout=100
        )
    assert done.returncode == 2, done.stderr
    assert "org/rows: the dataset is a program, rows.py in its repository, which is never run" in done.stderr
    assert "Traceback" not in done.stderr
