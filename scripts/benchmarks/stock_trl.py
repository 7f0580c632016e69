"""Stock TRL + PEFT on a workload: transformers' model, bitsandbytes' nf4 where ours is nf4, PyTorch's own attention.

    python -m benchmarks.stock_trl JOB.json RESULT.json [vllm]

With vllm, GRPO samples by a vLLM engine in this process. On a CPU TRL's Triton kernels need TRITON_INTERPRET=1.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from benchmarks.peer import MODULES, measure
from benchmarks.workloads import RANK, Job


def main() -> None:
    job, result, vllm = Job.read(Path(sys.argv[1])), Path(sys.argv[2]), "vllm" in sys.argv[3:]
    classifier = job.workload.method == "reward"
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    tokenizer = AutoTokenizer.from_pretrained(job.checkpoint)
    model = (AutoModelForSequenceClassification if classifier else AutoModelForCausalLM).from_pretrained(
        job.checkpoint,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": 0} if on_gpu else None,
        quantization_config=quantization if job.workload.load_in_4bit else None,
        **({"num_labels": 1} if classifier else {}),
    )
    model.config.use_cache = False
    model.config.pad_token_id = tokenizer.pad_token_id
    adapter = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=MODULES,
        task_type="SEQ_CLS" if classifier else "CAUSAL_LM",
        modules_to_save=["score"] if classifier else None,
    )
    settings = {"use_vllm": True, "vllm_mode": "colocate"} if vllm else {}
    measure(job, model, tokenizer, result, peft_config=adapter, **settings)


if __name__ == "__main__":
    main()
