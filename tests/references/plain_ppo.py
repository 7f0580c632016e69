# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "trl==1.12.0",  # the last with a PPOTrainer
#     "torch==2.13.0",
#     "transformers==5.17.0",
#     "peft==0.21.2",
#     "accelerate==1.15.0",
#     "datasets==4.8.5",
#     "bitsandbytes==0.50.2",  # 8-bit Adam, on a GPU
#     "pandas",  # the trainer imports it, and TRL does not require it
# ]
# ///
"""A plain script for the PPOTrainer of TRL 1.12.0, to compare recipes/ppo.py with. It has no code of this repository.

    uv run --script plain_ppo.py --sft_model_path MODEL --reward_model_path CLASSIFIER --prompts PROMPTS.jsonl \
        --output_dir FOLDER --use_peft --learning_rate 3e-4 --total_episodes 1152 ...

It follows TRL's examples/scripts/ppo/ppo.py, and takes the arguments of its PPOConfig and ModelConfig. The value model
starts from the reward model, as there. FOLDER gets the adapter and figures.json: what every step took, the peak memory
and TRL's log.
"""

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    TrainerCallback,
    set_seed,
)
from trl import ModelConfig, get_peft_config
from trl.experimental.ppo import PPOConfig, PPOTrainer


@dataclass
class Script:
    prompts: str


script, settings, of_model = HfArgumentParser((Script, PPOConfig, ModelConfig)).parse_args_into_dataclasses()
settings.stop_token = "eos"
settings.num_sample_generations = 0
settings.save_strategy = "no"
settings.report_to = []
set_seed(settings.seed)

tokenizer = AutoTokenizer.from_pretrained(settings.sft_model_path, padding_side="left")
rows = [json.loads(row) for row in Path(script.prompts).read_text(encoding="utf-8").splitlines()]
texts = [
    tokenizer.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
    )
    for row in rows
]
policy = AutoModelForCausalLM.from_pretrained(settings.sft_model_path, dtype=of_model.dtype)
reward_model, value_model = (
    AutoModelForSequenceClassification.from_pretrained(settings.reward_model_path, num_labels=1, dtype=of_model.dtype)
    for _ in range(2)
)
if settings.gradient_checkpointing:  # the trainer leaves it to its user
    policy.gradient_checkpointing_enable()
    value_model.gradient_checkpointing_enable()

marks: list[list[float]] = []


class Clock(TrainerCallback):
    def on_train_begin(self, *_: object, **__: object) -> None:
        marks.append([time.monotonic(), time.process_time(), peak_mib()])

    on_step_end = on_train_begin


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


trainer = PPOTrainer(
    args=settings,
    processing_class=tokenizer,
    model=policy,
    ref_model=None,  # the policy without its adapter
    reward_model=reward_model,
    value_model=value_model,
    train_dataset=Dataset.from_dict({"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}),
    peft_config=get_peft_config(of_model),
    callbacks=[Clock()],
)
trainer.train()
trainer.save_model(settings.output_dir)
figures = {
    "marks": marks,
    "peak_mib": peak_mib(),
    "gpu_gib": torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None,
    "log": trainer.state.log_history,
}
Path(settings.output_dir, "figures.json").write_text(json.dumps(figures), encoding="utf-8")
