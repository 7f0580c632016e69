"""A run served by llama.cpp in a process of its own, and its answers beside those of transformers."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import ROOT


@contextlib.contextmanager
def serving(run: Path, *flags: str) -> Iterator[tuple[subprocess.Popen, dict[str, str]]]:
    """A server in a process of its own, and {"base URL", "model", "curl", "python"} as it prints them."""
    script = [sys.executable, ROOT / "scripts" / "serve.py", "--run", run, "--port", "0", "--quant", "f16", *flags]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            found = {}
            for line in process.stdout:
                name, _, value = line.strip().partition(" ")
                if line.startswith("  "):
                    found["base URL" if name == "base" else name] = value.removeprefix("URL").strip()
                if line.startswith("Ctrl-C"):
                    break
            assert found, process.stderr.read()
            yield process, found
        finally:
            process.kill()


def assert_text_of_transformers(client: Any, model: str, merged: Path, prompts: list[str]) -> None:
    """Compare greedy answers of `client`, an openai.OpenAI, with those that transformers generates from `merged`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    reference = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=64).choices[0]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = reference.generate(**ids, max_new_tokens=64, do_sample=False, eos_token_id=end, pad_token_id=end)
        new = tokens[0, ids["input_ids"].shape[1] :]
        assert answer.message.content == tokenizer.decode(new, skip_special_tokens=True), prompt
        assert answer.finish_reason == ("stop" if new[-1] == end else "length")
        assert "<|" not in answer.message.content
