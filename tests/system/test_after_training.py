"""The whole way of a newcomer on the tiny model: three stages, evaluated, exported, served."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from served import assert_text_of_transformers, serving

PROMPTS = ["What is 3 + 4?", "12 - 5 = ?", "三加四等于多少？"]
FEW = "--max-steps 4 --per-device-train-batch-size 16 --gradient-accumulation-steps 1 --max-completion-length 32"


def command(script: str, *words: object, **environment: str) -> subprocess.CompletedProcess:
    given = [sys.executable, str(ROOT / "scripts" / script), *map(str, words)]
    path = os.pathsep.join(filter(None, [str(ROOT / "recipes"), environment.pop("PYTHONPATH", "")]))
    environment = {**os.environ, **environment, "PYTHONPATH": path}
    done = subprocess.run(given, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_after_sft_dpo_and_grpo_llama_cpp_answers_with_the_text_of_transformers(tmp_path, warm_server):
    import openai

    stages = ("--sft-args=--max-steps 60", "--dpo-args=--max-steps 10", f"--grpo-args={FEW}")
    words = ("--stages", "sft,dpo,grpo", *stages, "--eval-args=--max-new-tokens 8", "--output-dir", tmp_path)
    command("pipeline.py", *words, **warm_server)
    (run,) = tmp_path.glob("grpo-*")

    shown = command("evaluate.py", "--run", run, "--samples", 2).stdout
    sections = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["sections"]
    assert sections, shown

    shown = command("export.py", "--run", run, "--format", "all", "--quant", "f16", "q4_k_m").stdout
    print(shown)  # what the quantised file differs by is reported
    assert "q4_k_m" in shown
    with serving(run) as (_, printed):
        client = openai.OpenAI(base_url=printed["base URL"], api_key="none")
        assert_text_of_transformers(client, printed["model"], run / "export" / "merged", PROMPTS)
