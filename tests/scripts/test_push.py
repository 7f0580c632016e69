"""make push: what goes to the hub is what was exported, private, without secrets, and confirmed byte for byte."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from common.errors import InputError, MachineError
from conftest import ROOT
from exporting.leaks import leaks
from exporting.model_card import kinds_of, model_card
from fake_hub import TOKEN, FakeHub, Repository, serve

RECORD = {
    "recipe": "sft",
    "arguments": {
        "model": {"value": "qwen2.5-0.5b", "from": "command line"},
        "data": {"value": "/home/somebody/secret project/my.jsonl", "from": "command line"},
        "output_dir": {"value": "/scratch/somebody/run", "from": "command line"},
        "learning_rate": {"value": 3e-4, "from": "command line"},
        "eval_data": {"value": "~/held/out.jsonl", "from": "command line"},
        "max_length": {"value": 1024, "from": "recipe"},
        "lora_r": {"value": 16, "from": "card"},
        "packing": {"value": True, "from": "recipe"},
    },
    "matters": {"data": "d" * 64, "base": "Qwen/Qwen2.5-0.5B-Instruct@" + "c" * 40},
    "revision": "c" * 40,
    "code": {
        "git": {"commit": "e" * 40, "dirty": False},
        "lock": {"file": "docker/cuda.lock", "sha256": "f" * 64},
        "packages": {"torch": "2.13.0"},
    },
    "data": {"rows": 1234, "format": "alpaca"},
    "status": "done",
    "loss": {"first": 2.5, "last": 1.25},
    "step": 50,
}
EVALUATION = {
    "sections": {
        "Held-out rows": {
            "title": "Held-out rows",
            "rows": 40,
            "lines": [
                {
                    "name": "loss",
                    "rows": 40,
                    "before": 2.0,
                    "after": 1.5,
                    "difference": -0.5,
                    "interval": [-0.6, -0.4],
                    "verdict": "better",
                }
            ],
        }
    }
}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with an export of all kinds; its weights are not read."""
    folder = tmp_path / "sft-qwen"
    for name in ("adapter", "export/adapter", "export/merged", "export/gguf"):
        (folder / name).mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(RECORD))
    (folder / "export" / "export.json").write_text("{}")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 16, "peft_type": "LORA"}))
    for file, content in {
        "adapter/adapter_config.json": b'{"r": 16}',
        "adapter/adapter_model.safetensors": b"adapter",
        "merged/config.json": b"{}",
        "merged/model.safetensors": b"weights",
        "gguf/sft-qwen-q8_0.gguf": b"GGUF" * 1000,
        "gguf/Modelfile": b"FROM ./sft-qwen-q8_0.gguf\n",
    }.items():
        (folder / "export" / file).write_bytes(content)
    return folder


def push(hub: FakeHub, run: Path, *flags: str, **more: str) -> subprocess.CompletedProcess:
    environment = hub.environment(run.parent / "hf") | {"HF_TOKEN": TOKEN} | more
    environment.pop("HF_HUB_OFFLINE", None)
    script = [sys.executable, ROOT / "scripts" / "push.py", "--run", run, "--repo", "me/my-model", *flags]
    return subprocess.run(script, env=environment, capture_output=True, text=True, check=False, timeout=120)


# --- the card -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "library", "relation"),
    [
        (["adapter/adapter_model.safetensors"], "peft", "adapter"),
        (["merged/model-00001-of-00002.safetensors"], "transformers", "finetune"),
        (["gguf/a-q4_k_m.gguf", "gguf/Modelfile"], "gguf", "quantized"),
    ],
)
def test_a_card_tells_the_hub_what_it_is_and_has_no_place_of_this_machine(run, files, library, relation):
    from huggingface_hub import ModelCard

    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    text = model_card(run, files, "me/my-model")
    header = ModelCard(text).data.to_dict()
    assert header["library_name"] == library
    assert header["base_model_relation"] == relation
    assert header["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert header["license"] == "apache-2.0"
    assert yaml.safe_load(text.split("---")[1]) == header
    assert "somebody" not in text
    assert "/scratch" not in text
    assert "~/" not in text
    assert "More Information" not in text
    for fact in ("c" * 40, "d" * 64, "e" * 40, "1,234 rows", "`my.jsonl`", "Apache-2.0", "2.5", "1.25"):
        assert fact in text, fact
    assert "| `--learning-rate` | `0.0003` |" in text
    assert "`--lora-r`" in text
    assert "--packing" not in text
    assert "make sft MODEL=qwen2.5-0.5b DATA=my.jsonl LEARNING_RATE=0.0003" in text
    assert "| loss | 2 | 1.5 | -0.5 (-0.6 to -0.4) | better |" in text


def test_kinds_show_in_the_names_of_files():
    assert kinds_of(["adapter/adapter_model.safetensors", "merged/a.safetensors", "gguf/b-f16.gguf", "x.json"]) == {
        "adapter": "adapter",
        "merged": "merged",
        "gguf": "gguf/b-f16.gguf",
    }


def test_the_card_of_a_base_without_a_hub_names_its_hash(run):
    record = RECORD | {"matters": {"data": "d" * 64, "base": "b" * 64}, "revision": None}
    record["arguments"] = RECORD["arguments"] | {
        "model": {"value": "/home/somebody/models/mine", "from": "command line"}
    }
    (run / "run.json").write_text(json.dumps(record))
    text = model_card(run, ["adapter/adapter_model.safetensors"])
    assert "base_model" not in text.split("---")[1]
    assert "`mine`" in text
    assert "b" * 64 in text
    assert "somebody" not in text


@pytest.mark.slow
def test_the_adapter_of_a_run_has_the_card_of_its_run_and_not_the_form_of_peft(trained):
    from huggingface_hub import ModelCard

    text = (trained[0] / "adapter" / "README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.to_dict()["library_name"] == "peft"
    assert "More Information Needed" not in text
    assert str(ROOT) not in text
    assert str(trained[0].parent) not in text
    for fact in ("`tiny`", "`sft.jsonl`", "loss, first step", "make sft"):
        assert fact in text, fact
    assert not [
        file for file in trained[0].rglob("README.md") if "More Information" in file.read_text(encoding="utf-8")
    ]


# --- what may not leave ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"token": "hf_' + "x" * 34 + '"}', "a token of Hugging Face"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ('{"base": "/home/me/models/secret"}', "/home/me/models/secret"),
        (f'{{"base": "{ROOT}/outputs"}}', str(ROOT)),
    ],
)
def test_secrets_and_local_paths_are_found(tmp_path, content, reason):
    file = tmp_path / "config.json"
    file.write_text(content)
    assert any(reason in leak for leak in leaks(file, "config.json"))
    assert "x" * 34 not in str(leaks(file, "config.json"))  # a message does not repeat the secret


def test_a_secret_across_two_pieces_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("exporting.leaks.PIECE", 1000)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b" " * 980 + b"hf_" + b"x" * 34 + b" " * 3000)
    assert leaks(file, "model.safetensors")


def test_a_url_and_the_words_of_a_vocabulary_are_no_places(tmp_path):
    (tmp_path / "README.md").write_text("https://huggingface.co/home/page and a/tmp/b")
    (tmp_path / "tokenizer.json").write_text('{"/usr/local": 1, "/tmp/x": 2}')
    assert not leaks(tmp_path / "README.md", "README.md")
    assert not leaks(tmp_path / "tokenizer.json", "tokenizer.json")


# --- the upload -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_exported_arrives_whole_and_private(run):
    with serve({}) as hub:
        dry = push(hub, run, "--format", "gguf", "--dry-run")
        assert dry.returncode == 0, dry.stderr
        assert "gguf of" in dry.stdout
        assert "4.0 kB  sft-qwen-q8_0.gguf" in dry.stdout
        assert "Nothing was sent" in dry.stdout
        assert hub.requests == []
        done = push(hub, run, "--format", "gguf")
        assert done.returncode == 0, done.stderr
        model = hub.models["me/my-model"]
        assert model.private
        assert model.commits == ["Upload the gguf of sft-qwen"]
        assert set(model.files) == {"README.md", "sft-qwen-q8_0.gguf", "Modelfile"}
        assert model.files["sft-qwen-q8_0.gguf"] == b"GGUF" * 1000
        assert b"ollama create sft-qwen -f Modelfile" in model.files["README.md"]
        assert "all 3 files, byte for byte" in done.stdout
        assert "/me/my-model/commit/" in done.stdout
        hub.models["me/my-model"].files["old.txt"] = b"old"
        hub.broken = "Modelfile"
        broken = push(hub, run, "--format", "gguf")
        assert broken.returncode == 3
        assert "Modelfile: the hub has another file" in broken.stderr


@pytest.mark.slow
def test_what_cannot_be_pushed_is_refused_in_one_message(run):
    with serve({}) as hub:
        hub.models["me/my-model"] = Repository(private=False)
        public = push(hub, run, "--format", "merged")
        assert public.returncode == 2
        assert "is there already and public" in public.stderr
        wrong = push(hub, run, "--format", "merged", "--no-private", HF_TOKEN="hf_" + "b" * 34)
        assert wrong.returncode == 3
        assert "the token may not write there" in wrong.stderr
        nobody = push(hub, run, "--format", "merged", HF_TOKEN="")
        assert nobody.returncode == 3
        assert "hf auth login" in nobody.stderr
        assert hub.models["me/my-model"].files == {}
    gone = push(hub, run, "--format", "merged")
    assert gone.returncode == 3
    assert "cannot be reached" in gone.stderr
    for done in (public, wrong, nobody, gone):
        assert "Traceback" not in done.stderr


def test_what_no_export_has_proved_is_not_pushed(run, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import push as command

    assert command.what_to_push(run, "gguf") == ("gguf", run / "export" / "gguf")
    (run / "export" / "export.json").unlink()
    with pytest.raises(InputError, match="make export"):
        command.what_to_push(run, "gguf")
    assert command.what_to_push(run, None) == ("adapter", run / "adapter")
    (run / "adapter" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(InputError, match="pickle"):
        command.files_of(run / "adapter")
    shutil.rmtree(run / "adapter")
    with pytest.raises(InputError, match="no adapter yet"):
        command.what_to_push(run, "adapter")


def test_an_error_without_a_text_is_one_message_too(monkeypatch):
    """As httpx raises it where a connection is lost."""
    import httpx
    import push as command
    from huggingface_hub import HfApi

    def lost(*_: object, **__: object) -> None:
        raise httpx.ReadError("")

    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(HfApi, "repo_exists", lost)
    with pytest.raises(MachineError, match=r"me/my-model: cannot be reached: ReadError\n"):
        command.push({}, command.Args("run", "me/my-model"), "message")
