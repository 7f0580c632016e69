"""Plain transformers and PEFT on raw text, to hold recipes/sft.py against: no code of this repository, Unsloth or TRL.

    python tests/references/plain_text.py ROWS.jsonl OUTPUT_FOLDER

Each `text` and the end token is a row of its own, with loss on all of it; the embedding, which the tiny model shares
with its head, is trained at a rate of its own.
"""

import json
import math
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, get_scheduler

rows, output = Path(sys.argv[1]), Path(sys.argv[2])
tiny = Path(__file__).parents[2] / "data_samples" / "tiny"
tokenizer = AutoTokenizer.from_pretrained(tiny)
texts = [json.loads(line)["text"] for line in rows.read_text(encoding="utf-8").splitlines()]
data = [{"ids": tokenizer(text + tokenizer.eos_token)["input_ids"]} for text in texts]
model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
torch.manual_seed(42)
projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(
    model,
    LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=projections,
        task_type="CAUSAL_LM",
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    ),
)
weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
lora = [weight for name, weight in weights.items() if "lora" in name]
embedding = [weight for name, weight in weights.items() if "lora" not in name]
groups = [{"params": lora, "lr": 5e-3}, {"params": embedding, "lr": 1e-3}]
optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
steps = 2 * math.ceil(len(data) / 16)


def collate(batch: list[dict]) -> dict:
    longest = max(len(row["ids"]) for row in batch)
    padded = [row["ids"] + [tokenizer.pad_token_id] * (longest - len(row["ids"])) for row in batch]
    labels = [row["ids"] + [-100] * (longest - len(row["ids"])) for row in batch]
    mask = [[int(label != -100) for label in row] for row in labels]
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


trainer = Trainer(
    model=model,
    train_dataset=data,
    data_collator=collate,
    optimizers=(optimizer, get_scheduler("linear", optimizer, 10, steps)),
    args=TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        max_grad_norm=1.0,
        remove_unused_columns=False,
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
