"""A plain TRL script to hold recipes/sft.py against: no code of this repository, and no Unsloth.

    TRITON_INTERPRET=1 python tests/references/plain_trl.py ROWS.jsonl OUTPUT_FOLDER

TRL 1.15 sends the loss through a Triton kernel, which on a CPU needs Triton's interpreter.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

rows, output = Path(sys.argv[1]), Path(sys.argv[2])
tiny = Path(__file__).parents[2] / "data_samples" / "tiny"
messages = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
torch.manual_seed(42)
model = get_peft_model(
    model,
    LoraConfig(
        r=16,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    ),
)
trainer = SFTTrainer(
    model=model,
    processing_class=AutoTokenizer.from_pretrained(tiny),
    train_dataset=Dataset.from_list([{"messages": turns} for turns in messages]),
    args=SFTConfig(
        output_dir=str(output),
        assistant_only_loss=True,  # by the generation markers of the tiny model's template
        max_length=512,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=5e-3,
        lr_scheduler_type="linear",
        warmup_steps=10,
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
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
(output / "losses.json").write_text(json.dumps(losses))
