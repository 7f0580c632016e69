"""A plain TRL script to hold recipes/dpo.py against: no code of this repository, and no Unsloth.

TRITON_INTERPRET=1 python tests/references/plain_dpo.py MODEL PAIRS.jsonl OUTPUT_FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

base, pairs, output = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(base)


def as_text(row: dict) -> dict:
    """As the model sees it: the chat template around the prompt, the end token after the answer."""
    turns = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return {"prompt": prompt, "chosen": row["chosen"] + "<|im_end|>", "rejected": row["rejected"] + "<|im_end|>"}


model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
torch.manual_seed(42)
trainer = DPOTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(
        [as_text(json.loads(row)) for row in pairs.read_text(encoding="utf-8").splitlines()]
    ),
    peft_config=LoraConfig(
        r=16,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    ),
    args=DPOConfig(
        output_dir=str(output),
        beta=0.1,
        max_length=512,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=3e-4,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        seed=42,
        data_seed=42,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    ),
)
trainer.train()
rows = [row for row in trainer.state.log_history if "loss" in row]
(output / "losses.json").write_text(json.dumps([[row["loss"], row["rewards/margins"]] for row in rows]))
