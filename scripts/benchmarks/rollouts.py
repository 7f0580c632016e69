"""Sample a workload's completions: by our decoder, by transformers' or Unsloth's generate, or by vLLM.

    python -m benchmarks.rollouts ours|trl|unsloth|vllm JOB.json RESULT.json

No completion ends before its length. The policy is a base in 16 bit with a LoRA adapter of rank 16: ours merges it anew
before each pass and computes all prompts, generate applies it in each layer, and vLLM has it merged already.
"""

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peer import MODULES, write_result
from benchmarks.workloads import AT_ONCE, RANK, Job, Workload

PASSES = 6  # of which the first, which compiles and allocates, is left out
ENOUGH = 120.0  # seconds behind which no further pass begins, once one is measured: generate takes minutes for some


def main() -> None:
    contestant, job, result = sys.argv[1], Job.read(Path(sys.argv[2])), Path(sys.argv[3])
    start = {"ours": ours, "trl": generate, "unsloth": unsloth_generate, "vllm": vllm}[contestant]
    sample, facts = start(job)
    tokens = sum(lengths(job.workload))
    seconds: list[float] = []
    while len(seconds) < PASSES and (len(seconds) < 2 or sum(seconds) < ENOUGH):
        started = time.perf_counter()
        sample()
        seconds.append(time.perf_counter() - started)
    measured = seconds[1:]
    write_result(result, measured, [tokens] * len(measured), facts.pop("dtype", "bfloat16"), **facts)


def prompts(work: Workload, vocabulary: int) -> list[tuple[int, ...]]:
    """The tokens of the prompt of each completion; those of a group have the same."""
    groups = range((work.batch + work.num_generations - 1) // work.num_generations)
    # The vocabulary of the tiny tokenizer, in every shape, and none of its special tokens.
    tokens = [
        tuple(10 + (7 * group + column) % min(vocabulary - 10, 1000) for column in range(work.prompt_length))
        for group in groups
    ]
    return [tokens[row // work.num_generations] for row in range(work.batch)]


def lengths(work: Workload) -> list[int]:
    """Tokens of each completion: all the same, or log-normal with a mean of about 256, at least 8."""
    if not work.ragged:
        return [work.length] * work.batch
    draw = random.Random(0)
    return [min(max(int(draw.lognormvariate(5.2, 0.85)), 8), work.length) for _ in range(work.batch)]


def ours(job: Job) -> tuple[Callable[[], object], dict[str, Any]]:
    import torch
    from common.lm.rollout.decoder import Decoder
    from common.lm.rollout.rows import Request
    from common.lm.rollout.weights import PolicyWeights

    model, device = policy(job)
    weights = PolicyWeights(model, "default")
    decoder = Decoder(weights, min(job.workload.batch, AT_ONCE), job.workload.prompt_length + job.workload.length)
    rows = zip(prompts(job.workload, weights.config.vocab_size), lengths(job.workload), strict=True)
    requests = [Request(prompt, row, limit) for row, (prompt, limit) in enumerate(rows)]
    refreshes: list[float] = []
    facts: dict[str, Any] = {"dtype": str(weights.dtype), "refresh_seconds": refreshes}

    def sample() -> None:
        started = time.perf_counter()
        weights.refresh()
        if device == "cuda":
            torch.cuda.synchronize()
        refreshes.append(time.perf_counter() - started)
        decoder.decode(requests, -1, 1.0)  # what ends a completion is no token

    return sample, facts


def policy(job: Job) -> tuple[Any, str]:
    """The policy as transformers and PEFT have it, and its device."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=dtype, device_map=device)
    return get_peft_model(base, LoraConfig(r=RANK, target_modules=MODULES)), device


def generate(job: Job) -> tuple[Callable[[], object], dict[str, Any]]:
    model, device = policy(job)
    return by_generate(job, model.eval(), device)


def unsloth_generate(job: Job) -> tuple[Callable[[], object], dict[str, Any]]:
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    from unsloth import FastLanguageModel  # noqa: I001  first: it patches what is imported after it
    import torch

    on_gpu = torch.cuda.is_available()
    model, _ = FastLanguageModel.from_pretrained(
        str(job.checkpoint),
        max_seq_length=job.workload.prompt_length + job.workload.length,
        dtype=None if on_gpu else torch.float32,
        load_in_4bit=False,
        use_exact_model_name=True,
    )
    model = FastLanguageModel.get_peft_model(model, r=RANK, target_modules=MODULES)
    FastLanguageModel.for_inference(model)
    return by_generate(job, model, "cuda" if on_gpu else "cpu")


def by_generate(job: Job, model: Any, device: str) -> tuple[Callable[[], object], dict[str, Any]]:
    """A batch runs until its longest completion ends, so rows of like length are put together."""
    import torch

    work = job.workload
    rows = sorted(zip(lengths(work), prompts(work, model.config.vocab_size), strict=True))
    batches = [rows[first : first + AT_ONCE] for first in range(0, len(rows), AT_ONCE)]

    def sample() -> None:
        for batch in batches:
            longest = batch[-1][0]
            ids = torch.tensor([prompt for _, prompt in batch], device=device)
            with torch.no_grad():
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    top_k=0,
                    min_new_tokens=longest,
                    max_new_tokens=longest,
                    pad_token_id=0,
                )
        if device == "cuda":
            torch.cuda.synchronize()

    return sample, {"dtype": str(model.dtype)}


def vllm(job: Job) -> tuple[Callable[[], object], dict[str, Any]]:
    """With its prefix cache, which the prompts of a group share; it is emptied before each pass, as by new weights."""
    from transformers import AutoConfig
    from vllm import LLM, SamplingParams

    work = job.workload
    engine = LLM(
        model=str(job.checkpoint),
        dtype="bfloat16",
        max_model_len=work.prompt_length + work.length,
        max_num_seqs=min(work.batch, AT_ONCE),
        gpu_memory_utilization=0.6,
        enable_prefix_caching=True,
    )
    vocabulary = AutoConfig.from_pretrained(job.checkpoint).vocab_size
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts(work, vocabulary)]
    settings = [
        SamplingParams(temperature=1.0, ignore_eos=True, min_tokens=limit, max_tokens=limit, detokenize=False)
        for limit in lengths(work)
    ]

    def sample() -> None:
        engine.reset_prefix_cache()
        engine.generate(inputs, settings, use_tqdm=False)

    return sample, {"dtype": "bfloat16"}


if __name__ == "__main__":
    main()
