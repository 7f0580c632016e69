"""Unsloth as it comes on a workload: the calls of its notebooks, with the workload's batch and lengths.

    python -m benchmarks.plain_unsloth JOB.json RESULT.json [vllm]

With vllm, GRPO samples by Unsloth's own vLLM engine (fast_inference).
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # else it downloads to count users, and waits for it
from unsloth import FastLanguageModel  # noqa: I001  first: it patches what is imported after it
import torch

from benchmarks.peer import MODULES, measure
from benchmarks.workloads import RANK, Job


def main() -> None:
    job, result, vllm = Job.read(Path(sys.argv[1])), Path(sys.argv[2]), "vllm" in sys.argv[3:]
    work = job.workload
    sampled = work.method == "grpo"
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(job.checkpoint),
        max_seq_length=work.length + (2 * work.prompt_length if sampled else 0),
        dtype=None if torch.cuda.is_available() else torch.float32,
        load_in_4bit=work.load_in_4bit,
        use_exact_model_name=True,
        **({"fast_inference": True, "max_lora_rank": RANK, "gpu_memory_utilization": 0.6} if vllm else {}),
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=RANK,
        target_modules=MODULES,
        use_gradient_checkpointing="unsloth" if work.gradient_checkpointing else False,
        random_state=3407,
    )
    packing = {"packing": True} if work.method == "sft" and work.ragged else {}
    measure(job, model, tokenizer, result, **packing, **({"use_vllm": True} if vllm else {}))


if __name__ == "__main__":
    main()
