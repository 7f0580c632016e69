"""What the user permits, and nothing else: code of the models that --trust-remote-code names, pickles by --load-pickle.

The models here have code that leaves a mark when it runs, and pickles with which torch would run code.
"""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from common.cli import permit
from common.errors import ARGUMENTS, InputError
from common.lm import own_code
from common.lm.hub import Model, base_sha256, contents, fetch, find_model, load_tokenizer, trust
from common.lm.model_files import allow_pickles
from common.run.files import write_json
from common.run.folder import plan_run
from conftest import ROOT, run_recipe
from in_process import command, refusal
from launch.commands import COMMANDS
from launch.repeat import repeat
from safetensors.torch import load_file
from transformers import dynamic_module_utils

TINY = ROOT / "data_samples" / "tiny"
COMMIT = "c" * 40
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def nothing_permitted(monkeypatch, tmp_path):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # of another test's folder
    monkeypatch.setattr(own_code, "RUNS", runs := {})
    monkeypatch.setattr("common.run.folder.RUNS", runs)
    yield
    trust(())
    allow_pickles(False)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "executed"


def with_code(folder: Path, mark: Path) -> Path:
    """The tiny model as a kind that transformers does not know, whose modules add a letter to the file `mark`."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    names["AutoModelForSequenceClassification"] = "modeling_own.OwnForSequenceClassification"
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names}
    write_json(folder / "config.json", config | own)
    leave = f"open({str(mark)!r}, 'a').write('x')\n"
    (folder / "configuration_own.py").write_text(
        f"from transformers import Qwen2Config\n{leave}class OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification\n"
        "from .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnForSequenceClassification(Qwen2ForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    return folder


@pytest.fixture
def own(tmp_path, mark):
    return with_code(tmp_path / "own", mark)


# --- code of a model


def test_code_runs_where_the_model_is_named_and_is_printed_before(own, mark, capsys):
    with pytest.raises(InputError, match=r"needs code of its own, configuration_own\.py"):
        fetch(find_model(str(own)))
    assert not mark.exists()
    trust([str(own)])
    model = fetch(find_model(str(own)))
    printed = capsys.readouterr().out
    assert mark.exists()
    files = {file.name: base_sha(file) for file in sorted(own.glob("*.py"))}
    assert {"own": files} == own_code.RUNS
    assert [*files] == ["configuration_own.py", "modeling_own.py"]
    assert printed == f"{own}: runs code of its own, as --trust-remote-code says: " + (
        ", ".join(f"{name} (sha256 {sha256})" for name, sha256 in files.items()) + "\n"
    )
    assert load_tokenizer(model)


def base_sha(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_second_model_of_a_command_is_not_trusted_by_the_way(own, tmp_path, mark):
    from common.rewards.classifier import RewardModel

    other = with_code(tmp_path / "reward", tmp_path / "executed-too")
    trust([str(own)])
    fetch(find_model(str(own)))
    with pytest.raises(InputError, match=r"reward: cannot be loaded: it needs code of its own"):
        RewardModel(str(other)).prepare()
    assert not (tmp_path / "executed-too").exists()
    trust([])
    mark.unlink()
    with pytest.raises(InputError, match="needs code of its own"):
        fetch(find_model(str(own)))
    assert not mark.exists()


def test_a_name_by_another_path_is_the_same_folder(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(own)
    trust(["./link"])
    assert find_model("own/").trusted
    assert not find_model("tiny").trusted


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/x", r"org/x: the code of a hub model may change; .* --trust-remote-code=org/x@ and its 40 digits"),
        ("org/x@main", r"org/x@main: the code of a hub model may change"),
        ("{own}@" + COMMIT, "a folder has no commit"),
        ("nothing", "no model 'nothing'"),
    ],
)
def test_a_name_that_could_be_other_code_tomorrow_is_refused(own, name, message):
    with pytest.raises(InputError, match=message):
        trust([name.format(own=own)])
    assert own_code.TRUSTED == {}


def test_a_hub_model_is_trusted_at_the_commit_that_is_named(tmp_path):
    trust([f"org/x@{COMMIT}"])
    assert find_model("org/x") == Model("x", "org/x", COMMIT, None, local=False, trusted=True)
    run = plan_run("sft", "x", str(tmp_path / "run"), {}, {}, {"base": contents(find_model("org/x"))})
    assert run
    assert run.record["matters"]["own_code"] == [COMMIT]


def test_code_of_a_hub_model_runs_from_the_cache_without_a_network(tmp_path, mark, monkeypatch, capsys):
    import huggingface_hub.constants as hub
    from common.lm.network import in_cache

    snapshot = tmp_path / "hub" / "models--org--x" / "snapshots" / COMMIT
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with_code(snapshot, mark)
    with pytest.raises(InputError, match=f"if you trust them: --trust-remote-code=org/x@{COMMIT}|This command never"):
        fetch(Model("x", "org/x", COMMIT, None, local=False))
    trust([f"org/x@{COMMIT}"])
    model = find_model("org/x")
    assert in_cache(model)
    assert not mark.exists()
    fetch(model)
    assert mark.exists()
    assert capsys.readouterr().out.startswith("org/x: runs code of its own")
    for file in snapshot.glob("*.py"):
        file.unlink()
    assert not in_cache(model)  # it was downloaded before anybody trusted it


def test_a_name_of_no_model_of_the_command_is_refused(own):
    trust([str(own)])
    with pytest.raises(InputError, match=f"--trust-remote-code {own}: this command loads no such model"):
        own_code.check_trusted([find_model("tiny")])
    own_code.check_trusted([find_model("tiny"), find_model(str(own))])
    own_code.check_trusted([find_model("tiny")])  # of a part of the command


def test_code_of_another_repository_or_none_at_all_is_refused(own, mark, tmp_path):
    config = json.loads((own / "config.json").read_text())
    write_json(own / "config.json", config | {"auto_map": {"AutoConfig": "org/other--configuration_own.OwnConfig"}})
    trust([str(own)])
    with pytest.raises(InputError, match="names code of another repository, org/other, which --trust-remote-code does"):
        fetch(find_model(str(own)))
    write_json(own / "config.json", config | {"auto_map": {"AutoConfig": "gone.OwnConfig"}})
    with pytest.raises(InputError, match=r"lacks gone\.py, which its auto_map names"):
        fetch(find_model(str(own)))
    plain = shutil.copytree(TINY, tmp_path / "plain")
    trust([str(plain)])
    with pytest.raises(InputError, match="has no code of its own"):
        fetch(find_model(str(plain)))
    assert not mark.exists()


def test_of_a_processor_s_parts_none_may_name_another_repository(own):
    """The library reads each part of processor_config.json, and a file for video, as a configuration of its own."""
    other = {"auto_map": {"AutoImageProcessor": "org/other--images.OwnProcessor"}}
    trust([str(own)])
    for file, config in (
        ("processor_config.json", {"image_processor": other}),
        ("video_preprocessor_config.json", other),
    ):
        write_json(own / file, config)
        with pytest.raises(InputError, match="names code of another repository, org/other"):
            own_code.announce_code(find_model(str(own)))
        (own / file).unlink()


@pytest.mark.parametrize("place", ["absolute", "linked"])
def test_code_that_lies_outside_the_folder_is_not_run_unprinted(own, tmp_path, mark, place):
    hidden = tmp_path / "hidden" / "deep"
    hidden.mkdir(parents=True)
    shutil.move(own / "configuration_own.py", hidden / "other.py")
    (own / "linked").symlink_to(hidden.parent)
    module = {"absolute": str(hidden / "other"), "linked": "linked/deep/other"}[place]
    config = json.loads((own / "config.json").read_text())
    write_json(own / "config.json", config | {"auto_map": {"AutoConfig": f"{module}.OwnConfig"}})
    trust([str(own)])
    with pytest.raises(InputError, match=f"lacks {module}.py, which its auto_map names"):
        fetch(find_model(str(own)))
    assert not mark.exists()


def test_code_for_generating_is_printed_behind_a_link_too(own, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "generate.py").write_text("def generate(model, **_): ...\n")
    (own / "custom_generate").symlink_to(tmp_path / "other")
    assert "custom_generate/generate.py" in own_code.code_files(own)


@pytest.mark.parametrize("config", [True, False], ids=["beside a config.json", "alone"])
def test_trust_in_an_adapter_of_the_hub_is_no_trust_in_the_base_that_it_names(tmp_path, mark, monkeypatch, config):
    """The library would load the base with the trust that was given to the adapter's name."""
    import huggingface_hub.constants as hub

    base, printed = with_code(tmp_path / "base", mark), tmp_path / "printed"
    snapshot = with_code(tmp_path / "hub" / "models--org--x" / "snapshots" / COMMIT, printed)
    write_json(snapshot / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": str(base)})
    if not config:
        (snapshot / "config.json").unlink()
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trust([f"org/x@{COMMIT}"])
    if config:
        with pytest.raises(InputError, match="org/x: is an adapter, and --trust-remote-code would reach its base"):
            fetch(find_model("org/x"))
    else:
        assert not fetch(find_model("org/x")).trusted  # what nobody has seen does not run
    assert not mark.exists()
    assert not printed.exists()


@pytest.mark.parametrize("weights", [True, False])
def test_all_code_of_a_hub_model_is_here_before_any_runs(tmp_path, monkeypatch, weights):
    """The library fetches a file that is not here when it imports it, and nobody has read that."""
    from huggingface_hub.utils import filter_repo_objects

    there = ["config.json", "model.safetensors", "modeling_own.py", "custom_generate/generate.py", "onnx/model.onnx"]
    here = set()

    def download(source, *, revision, allow_patterns, ignore_patterns=None):
        here.update(filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("common.lm.model_files.fetch_weights", lambda *_, **__: None)
    monkeypatch.setattr("common.lm.network.is_offline", lambda: False)
    monkeypatch.setattr("common.lm.hub.check_kind", lambda _: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    trust([f"org/x@{COMMIT}"])
    fetch(find_model("org/x"), weights)
    assert here == set(there[:4] if weights else [there[0], *there[2:4]])


def test_code_that_changes_after_it_was_printed_does_not_run(own, tmp_path, mark):
    from transformers import AutoModelForCausalLM

    trust([str(own)])
    model = fetch(find_model(str(own)))
    with (own / "modeling_own.py").open("a") as stream:
        stream.write(f"open({str(tmp_path / 'changed')!r}, 'w')\n")
    with pytest.raises(
        InputError, match=r"modeling_own\.py \(sha256 .*was not printed before would run; it was changed"
    ):
        AutoModelForCausalLM.from_pretrained(model.source, **model.origin)
    assert not (tmp_path / "changed").exists()
    trust([str(own)])
    AutoModelForCausalLM.from_pretrained(fetch(find_model(str(own))).source, **model.origin)
    assert (tmp_path / "changed").exists()


@pytest.mark.parametrize("what", ["a base", "another repository", "for generating"])
def test_what_a_library_would_run_by_a_model_s_trust_has_to_be_printed_too(own, tmp_path, mark, what):
    """The last lock, for what no look at the files has found."""
    from transformers import AutoConfig, AutoModelForCausalLM

    other, ran = with_code(tmp_path / "other", tmp_path / "ran"), tmp_path / "ran"
    trust([str(own)])
    model = fetch(find_model(str(own)))
    if what == "for generating":
        (own / "custom_generate").mkdir()
        (own / "custom_generate" / "generate.py").write_text(f"open({str(ran)!r}, 'w')\ndef generate(**_): ...\n")
        with pytest.raises(InputError, match=r"generate\.py \(sha256 .*was not printed before"):
            AutoModelForCausalLM.from_pretrained(model.source, **model.origin)
    elif what == "another repository":
        config = json.loads((own / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": f"{other}--configuration_own.OwnConfig"}
        write_json(own / "config.json", config)
        with pytest.raises(InputError, match=r"configuration_own\.py \(sha256 .*was not printed before"):
            AutoConfig.from_pretrained(model.source, **model.origin)
    else:
        with pytest.raises(InputError, match=r"configuration_own\.py \(sha256 .*was not printed before"):
            AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True)
    assert not ran.exists()


def test_a_hub_model_may_name_its_own_repository(tmp_path, mark, monkeypatch):
    import huggingface_hub.constants as hub

    snapshot = with_code(tmp_path / "hub" / "models--org--x" / "snapshots" / COMMIT, mark)
    config = json.loads((snapshot / "config.json").read_text())
    config["auto_map"] = {name: f"org/x--{kind}" for name, kind in config["auto_map"].items()}
    write_json(snapshot / "config.json", config)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trust([f"org/x@{COMMIT}"])
    fetch(find_model("org/x"))
    assert mark.exists()


def test_a_trusted_model_is_its_code_too(own):
    untrusted = contents(find_model(str(own)))
    trust([str(own)])
    before = contents(find_model(str(own)))
    with (own / "modeling_own.py").open("a") as stream:
        stream.write("# another line\n")
    assert len({untrusted, before, contents(find_model(str(own)))}) == 3


def test_a_run_json_permits_nothing(own, tmp_path, mark, capsys):
    """Neither to the commands that load the base of a run, nor by FROM, nor to verify."""
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    write_json(folder / "adapter" / "adapter_config.json", {"peft_type": "LORA"})
    shutil.copy(TINY / "model.safetensors", folder / "adapter" / ADAPTER)
    trust([str(own)])
    arguments = {"model": str(own), "trust_remote_code": [str(own)], "load_pickle": True, "seed": 3}
    record = {
        "recipe": "sft",
        "status": "done",
        "arguments": {name: {"value": value, "from": "command line"} for name, value in arguments.items()},
        "matters": {"base": contents(find_model(str(own)))},
    }
    write_json(folder / "run.json", record)
    for file, *words in (
        ("scripts/chat.py", "--run", folder),
        ("scripts/merge.py", "--adapter", folder / "adapter"),
        ("scripts/evaluate.py", "--run", folder),
        ("scripts/distill.py", "--adapter", folder / "adapter", "--output", tmp_path / "x.jsonl"),
        ("scripts/compare.py", "--a", folder / "adapter", "--b", "tiny"),
    ):
        message = refusal(command(file).main, capsys, *words)
        assert f"if you trust them: --trust-remote-code={own}" in message, file
    for file in ("scripts/export.py", "scripts/serve.py"):
        ARGUMENTS.clear()  # of the command before, in this process
        assert "This command never runs code of a model" in refusal(command(file).main, capsys, "--run", folder)
    words = repeat("sft", COMMANDS["sft"].fields(), [f"--from={folder / 'run.json'}"])
    assert words[-2:] == ["--seed", "3"]
    assert not [word for word in words if "trust" in word]
    assert not mark.exists()


def test_vllm_is_refused_with_code_of_a_model(own, capsys):
    words = ("--model", own, "--trust-remote-code", own, "--rollouts", "vllm")
    assert "--rollouts=vllm runs no code of a model" in refusal(command("recipes/grpo.py").main, capsys, *words)


def test_every_command_that_loads_a_model_has_both_arguments():
    """Those that only read sizes, copy files or hand words on have none."""
    others = {"plan", "choose", "check", "models", "pin", "pipeline", "benchmark", "slurm", "exec", "push", "audit"}
    loads = {"model", "adapter", "base", "reward_model", "rewards", "a", "strong", "run"}
    lacks = set()
    for name, one in COMMANDS.items():
        fields = {field.name for field in one.fields()}
        if fields & loads and name not in others and not {"load_pickle", "trust_remote_code"} <= fields:
            lacks.add(name)
    # report, watch and repro read records; export and serve never run code; verify starts a recipe
    assert lacks == {"report", "watch", "repro", "export", "serve", "verify"}
    assert "load_pickle" in {field.name for field in COMMANDS["export"].fields()}


# --- pickles


class Bomb:
    """Unpickled, it writes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def as_pickle(folder: Path, parts: int = 1, **more: object) -> Path:
    """A copy of the tiny model with its weights in one or more pickles."""
    shutil.copytree(TINY, folder)
    (folder / "model.safetensors").unlink()
    weights = load_file(TINY / "model.safetensors")
    if parts == 1:
        torch.save(weights | more, folder / "pytorch_model.bin")
        return folder
    index = {}
    for part in range(parts):
        names = list(weights)[part::parts]
        index |= dict.fromkeys(names, f"pytorch_model-{part + 1:05}-of-{parts:05}.bin")
        torch.save({name: weights[name] for name in names}, folder / index[names[0]])
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": index})
    return folder


@pytest.mark.parametrize("parts", [1, 2])
def test_weights_in_a_pickle_are_read_where_the_user_says_so_and_named(tmp_path, parts, capsys):
    from transformers import AutoModelForCausalLM

    folder = as_pickle(tmp_path / "model", parts)
    with pytest.raises(InputError, match="the weights are a pickle"):
        find_model(str(folder))
    allow_pickles(True)
    model = find_model(str(folder))
    assert contents(model) not in (contents(find_model("tiny")), "")
    fetch(model)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(file) for file in sorted(folder.glob("*.bin"))]
    assert all("tensors are read from a pickle, by weights_only (sha256 " in line for line in lines)
    loaded = AutoModelForCausalLM.from_pretrained(model.source, trust_remote_code=False).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in load_file(TINY / "model.safetensors").items())


def test_other_weights_in_the_pickle_are_another_base(tmp_path):
    allow_pickles(True)
    folder = as_pickle(tmp_path / "model", 2)
    before = base_sha256(folder)
    file = folder / "pytorch_model-00002-of-00002.bin"
    whole = torch.load(file, weights_only=True)
    torch.save({name: value + 1 for name, value in whole.items()}, file)
    assert base_sha256(folder) != before
    file.unlink()
    with pytest.raises(InputError, match=r"lacks pytorch_model-00002-of-00002\.bin, which pytorch_model\.bin\.index"):
        contents(find_model(str(folder)))


def hostile(folder: Path, mark: Path) -> None:
    torch.save(load_file(TINY / "model.safetensors") | {"x": Bomb(mark)}, folder / "pytorch_model.bin")


def hostile_plain(folder: Path, mark: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))


def hostile_part(folder: Path, mark: Path) -> None:
    (folder / "pytorch_model.bin").rename(folder / "evil.pkl")
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {"x": "evil.pkl"}})


def whole_model(folder: Path, mark: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), folder / "pytorch_model.bin")


def no_weights(folder: Path, mark: Path) -> None:
    torch.save({"step": 3}, folder / "pytorch_model.bin")


def damaged(folder: Path, mark: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")


HOSTILE = {
    "names code": (hostile, r"pytorch_model\.bin: is a pickle with more than tensors: it names exec, which"),
    "a plain pickle": (hostile_plain, r"pytorch_model\.bin: is a pickle with more than tensors, which would run"),
    "another file by the index": (hostile_part, r"names 'evil\.pkl'; expected pytorch_model-\*\.bin"),
    "a whole module": (whole_model, r"more than tensors: it names torch\.nn\.modules\.linear\.Linear"),
    "no weights": (no_weights, "is no weights of a model; expected a tensor for each name"),
    "damaged": (damaged, r"pytorch_model\.bin: (is a pickle with more than tensors|was not written by torch\.save)"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_of_more_than_tensors_is_refused_all_the_same(tmp_path, mark, kind):
    change, message = HOSTILE[kind]
    folder = as_pickle(tmp_path / "model")
    change(folder, mark)
    allow_pickles(True)
    with pytest.raises(InputError, match=message) as caught:
        fetch(find_model(str(folder)))
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_a_pickle_beside_weights_that_the_configuration_names_is_not_read(tmp_path, mark, capsys):
    folder = shutil.copytree(TINY, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "own.safetensors")
    write_json(
        folder / "config.json",
        json.loads((folder / "config.json").read_text()) | {"transformers_weights": "own.safetensors"},
    )
    before = base_sha256(folder)
    hostile(folder, mark)
    assert contents(fetch(find_model(str(folder)))) == before
    assert capsys.readouterr().out == ""


def test_an_adapter_s_pickle_is_read_by_no_argument(tmp_path, mark):
    folder = as_pickle(tmp_path / "model")
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")
    allow_pickles(True)
    with pytest.raises(InputError, match=r"adapter_model\.bin: the weights are a pickle"):
        find_model(str(folder))


def test_a_permission_ends_with_the_command(tmp_path):
    class Args:
        load_pickle, trust_remote_code = True, ()

    folder = as_pickle(tmp_path / "model")
    permit(Args)
    find_model(str(folder))
    permit(object())
    with pytest.raises(InputError, match="the weights are a pickle"):
        find_model(str(folder))


# --- the real recipes


@pytest.mark.slow
def test_a_run_on_a_model_with_code_trains_merges_and_is_continued(own, tmp_path, mark, warm):
    out, trusts = tmp_path / "run", ("--trust-remote-code", own)
    train = ("--model", own, "--max-steps", 1, "--sample-tokens", 4, "--output-dir", out)
    done = run_recipe("sft", *train)
    assert (done.returncode, mark.exists()) == (2, False), done.stderr
    assert f"if you trust them: --trust-remote-code={own}" in done.stderr
    done = run_recipe("sft", *train, *trusts)
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    record = json.loads((out / "run.json").read_text())
    assert record["own_code"] == {"own": own_code.code_files(own)}
    merged = tmp_path / "merged"
    done = run_recipe("../scripts/merge", "--adapter", out / "adapter", "--output-dir", merged, *trusts)
    assert done.returncode == 0, done.stderr
    assert own_code.code_files(merged).keys() == own_code.code_files(own).keys()
    done = run_recipe("../scripts/chat", "--model", merged, "--prompt", "Hello", "--max-new-tokens", 4, *trusts)
    assert (done.returncode, "loads no such model" in done.stderr) == (2, True)  # the merged one is another model
    trusts = ("--trust-remote-code", merged)
    done = run_recipe("../scripts/chat", "--model", merged, "--prompt", "Hello", "--max-new-tokens", 4, *trusts)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_code_that_a_library_kept_of_the_commit_is_not_what_runs(tmp_path, mark):
    """transformers never compares what it keeps with the model's files, which are what was printed."""
    home, stale = tmp_path / "home", tmp_path / "stale"
    snapshot = with_code(home / "hub" / "models--org--x" / "snapshots" / COMMIT, mark)
    kept = home / "modules" / "transformers_modules" / "org" / "x" / COMMIT
    kept.mkdir(parents=True)
    for file in snapshot.glob("*.py"):
        (kept / file.name).write_text(file.read_text().replace(str(mark), str(stale)))
    data = ROOT / "data_samples" / "sft.jsonl"
    words = ("--model", "org/x", "--trust-remote-code", f"org/x@{COMMIT}", "--data", data)
    places = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
    done = run_recipe("../scripts/check-data", *words, **places)
    assert "org/x: runs code of its own" in done.stdout, done.stderr
    assert (mark.exists(), stale.exists()) == (True, False)


@pytest.mark.slow
def test_a_run_from_a_pickle_is_the_run_from_safetensors(tmp_path, mark, warm):
    folder = as_pickle(tmp_path / "model")
    train = ("--max-steps", 1, "--sample-tokens", 4)
    for model, out in ((TINY, "safe"), (folder, "pickled")):
        allowed = ["--load-pickle"] if model == folder else []
        done = run_recipe("sft", "--model", model, *train, "--output-dir", tmp_path / out, *allowed)
        assert done.returncode == 0, done.stderr
    assert "tensors are read from a pickle" in done.stdout
    first, second = ((tmp_path / out / "adapter" / ADAPTER).read_bytes() for out in ("safe", "pickled"))
    assert first == second
    hostile(folder, mark)
    done = run_recipe("grpo", "--model", folder, *train, "--load-pickle", "--output-dir", tmp_path / "hostile")
    assert done.returncode == 2, done.stderr
    assert "it names exec, which would run when it is loaded" in done.stderr
    assert not mark.exists()
    assert not (tmp_path / "hostile").exists()
