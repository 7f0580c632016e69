"""A plain TRL script to hold recipes/grpo.py against: no code of this repository, and no Unsloth.

    TRITON_INTERPRET=1 python tests/references/plain_grpo.py MODEL PROBLEMS.jsonl ANSWERS.jsonl OUTPUT_FOLDER

ANSWERS.jsonl holds what the recipe sampled, [[prompt_ids, completion_ids], ...] a step; here it is not sampled again.
"""

import json
import re
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

base, problems, output = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[4])
answers = iter([json.loads(line) for line in Path(sys.argv[3]).read_text(encoding="utf-8").splitlines()])
rows = [json.loads(row) for row in problems.read_text(encoding="utf-8").splitlines()]
tokenizer = AutoTokenizer.from_pretrained(base)


def replay(prompts: list, trainer: GRPOTrainer) -> dict:
    sampled = next(answers)
    for prompt, (prompt_ids, _) in zip(prompts, sampled, strict=True):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert tokenizer(text)["input_ids"] == prompt_ids, "another prompt than the recipe sampled for"
    return {"prompt_ids": [p for p, _ in sampled], "completion_ids": [c for _, c in sampled], "logprobs": None}


def right(completions: list, answer: list, **_: object) -> list[float]:
    found = [re.search("<answer>(.*?)</answer>", completion[0]["content"]) for completion in completions]
    return [float(bool(f) and f[1].strip() == gold) for f, gold in zip(found, answer, strict=True)]


model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
torch.manual_seed(42)
trainer = GRPOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=right,
    rollout_func=replay,
    train_dataset=Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in rows]
    ),
    peft_config=LoraConfig(
        r=16,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    ),
    args=GRPOConfig(
        output_dir=str(output),
        num_generations=4,
        max_completion_length=64,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        max_steps=4,
        learning_rate=1e-3,
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
(output / "steps.json").write_text(json.dumps([[row["loss"], row["grad_norm"], row["reward"]] for row in rows]))
