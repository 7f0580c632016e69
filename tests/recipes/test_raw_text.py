"""`recipes/sft.py` on raw text, with the embeddings trained too: what it learns, saves and resumes."""

import json
import math
import re
import subprocess
import sys

import pytest
from conftest import ROOT, adapter_bytes, interrupt, read_jsonl, run_recipe
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "results.md"]
SECTIONS = [part for page in PAGES for part in re.split(r"\n(?=## )", page.read_text(encoding="utf-8"))]
TEXTS = [section[:200] for section in SECTIONS if len(section) > 100][:32]
FLAGS = ("--sample-prompts", 0, "--logging-steps", 1, "--train-embeddings")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def untied(tmp_path_factory, tokenizer):
    """A small random model whose embedding and head are two, and whose tokenizer has no chat template: its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "untied"
    torch.manual_seed(0)
    tiny = ROOT / "data_samples" / "tiny"
    config = AutoConfig.from_pretrained(tiny, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def losses(folder, key="loss"):
    return [row[key] for row in read_jsonl(folder / "metrics.jsonl") if key in row]


def test_the_loss_curve_is_that_of_a_plain_script(texts, tmp_path):
    """Step for step, embeddings at a rate of their own; references/plain_text.py has a row for each document."""
    batch = ("--per-device-train-batch-size", 8, "--gradient-accumulation-steps", 2, "--num-train-epochs", 2)
    done = run_recipe("sft", "--data", texts, "--output-dir", tmp_path / "run", *FLAGS, *batch)
    assert done.returncode == 0, done.stderr
    assert "32 documents, each ended by <|im_end|>, with loss on every token\n" in done.stdout
    command = [sys.executable, ROOT / "tests" / "references" / "plain_text.py", texts, tmp_path / "plain"]
    plain = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert plain.returncode == 0, plain.stderr
    ours, theirs = losses(tmp_path / "run"), json.loads((tmp_path / "plain" / "losses.json").read_text())
    assert len(ours) == len(theirs) == 4
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["embedding_rows_moved"] == {
        "embed_tokens": 2048,
        "lm_head": 2048,
    }


def test_perplexity_falls_on_held_out_documents_and_a_killed_run_ends_as_one_left_alone(texts, tmp_path):
    flags = ("--data", texts, *FLAGS, "--max-length", 64, "--max-steps", 12, "--eval-ratio", 0.2, "--save-steps", 4)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run_recipe("sft", "--output-dir", whole, *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r"32 documents, .*; \d+ longer than 64 tokens split, \d+ rows in all: ", done.stdout)
    held_out = losses(whole, "eval_loss")
    assert math.exp(held_out[-1]) < math.exp(held_out[0]) / 20

    assert interrupt("SIGKILL", 6, "sft", "--output-dir", cut, *flags).returncode == -9
    done = run_recipe("sft", "--output-dir", cut, *flags)
    assert done.returncode == 0, done.stderr
    assert "Resuming after step 4" in done.stdout
    assert losses(cut) == losses(whole)
    assert adapter_bytes(cut) == adapter_bytes(whole)


def test_a_model_without_a_chat_template_learns_raw_text_and_keeps_two_embeddings(untied, tmp_path):
    for number, text in enumerate(TEXTS[:12]):
        (tmp_path / f"{number:02}.txt").write_text(text, encoding="utf-8")
    flags = ("--train-embeddings", "--learning-rate", 5e-3, "--max-steps", 3, "--no-load-in-4bit")
    done = run_recipe("sft", "--model", untied, "--data", tmp_path, "--output-dir", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    (sample,) = json.loads((tmp_path / "run" / "samples.json").read_text(encoding="utf-8"))
    assert sample["prompt"] + sample["reference"] in TEXTS
    assert "Held-out documents" in done.stdout
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    head, embedding = (next(weight for name, weight in adapter.items() if leaf in name) for leaf in ("head", "embed"))
    before = load_file(untied / "model.safetensors")
    assert (head != before["lm_head.weight"]).any(dim=1).all()
    moved = (embedding != before["model.embed_tokens.weight"]).any(dim=1)
    assert 0 < moved.sum() < 2048  # only tokens that the documents hold
    figures = json.loads((tmp_path / "run" / "run.json").read_text())["embedding_rows_moved"]
    assert figures == {"embed_tokens": int(moved.sum()), "lm_head": 2048}


def test_embeddings_that_are_not_saved_end_the_run(texts, tmp_path):
    """As where a library drops them in silence: what is written then is no adapter."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Drop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'common.lm.embeddings':\n"
        "            import os, peft\n"
        "            from safetensors.torch import load_file, save_file\n"
        "            save = peft.PeftModel.save_pretrained\n"
        "            def dropping(self, folder, **options):\n"
        "                save(self, folder, **options)\n"
        "                file = os.path.join(folder, 'adapter_model.safetensors')\n"
        "                save_file({n: w for n, w in load_file(file).items() if 'lora' in n}, file)\n"
        "            peft.PeftModel.save_pretrained = dropping\n"
        "sys.meta_path.insert(0, Drop())\n"
    )
    flags = ("--data", texts, "--output-dir", tmp_path / "run", *FLAGS, "--max-steps", 1)
    done = run_recipe("sft", *flags, PYTHONPATH=str(tmp_path))
    assert done.returncode == 3, done.stderr
    assert "--train-embeddings: embed_tokens is not in the saved adapter" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "adapter").exists()
