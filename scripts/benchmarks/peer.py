"""What the peers have in common: TRL's trainer of a method on the workload's rows, timed step by step.

The settings are those of TRL's examples; what decides the amount of computation (batch, lengths, completions, rank,
recomputation, optimizer) is the workload's, as in our recipes. Everything else is left as the library has it.
"""

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.workloads import Job

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(job: Job, model: Any, tokenizer: Any, result: Path, *, peft_config: Any = None, **settings: Any) -> None:
    """Train, and write seconds and tokens of each step and the peak memory to `result`.

    `settings` are those of the trainer's configuration that only this peer has. Without `peft_config` the model has its
    adapter already.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = make_trainer(job, model, tokenizer, peft_config, settings)
    clock = make_clock(total_tokens(job, trainer.train_dataset))
    trainer.add_callback(clock)
    trainer.train()
    write_result(result, clock.seconds[job.warmup :], clock.tokens[job.warmup :], str(next(model.parameters()).dtype))


def write_result(result: Path, seconds: list[float], tokens: list[float], dtype: str, **more: Any) -> None:
    """The figures of a contestant, for benchmark.py: of each step or pass its seconds and its useful tokens."""
    from common.run.metrics import allocated_gib, memory_gib

    facts = {"seconds": seconds, "tokens": tokens, "reserved_gib": memory_gib(), "allocated_gib": allocated_gib()}
    result.write_text(json.dumps({**facts, "dtype": dtype.removeprefix("torch."), **more}), encoding="utf-8")


def make_trainer(job: Job, model: Any, tokenizer: Any, peft_config: Any, settings: dict[str, Any]) -> Any:
    """TRL's trainer of the workload's method; Unsloth's where that was imported before."""
    import torch
    import trl
    from datasets import Dataset

    work, on_gpu = job.workload, torch.cuda.is_available()
    common: dict[str, Any] = {
        "output_dir": str(job.folder / "trainer"),
        "per_device_train_batch_size": work.batch,
        "gradient_accumulation_steps": work.accumulation,
        "max_steps": job.steps,
        "learning_rate": 2e-4 if work.method == "sft" else 5e-6,
        "warmup_steps": 5,
        "optim": "adamw_8bit" if on_gpu else "adamw_torch_fused",
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": work.gradient_checkpointing,
        "logging_steps": job.logging,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    arguments = {"model": model, "processing_class": tokenizer}
    if peft_config is not None:
        arguments["peft_config"] = peft_config
    if work.method == "sft":
        # Full rows leave nothing to pack. TRL packs under flash-attn alone, Unsloth also under torch's own: its
        # `settings` have it. Without it, a micro-batch is as many documents as would fill the packed rows.
        rows = job.rows("tokens")
        if work.ragged and "packing" not in settings:
            mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
            common["per_device_train_batch_size"] = round(work.batch * work.length / mean)
        config = trl.SFTConfig(max_length=work.length, completion_only_loss=True, **common)
        return trl.SFTTrainer(**arguments, train_dataset=Dataset.from_list(rows), args=config)
    rows = [as_turns(row) for row in job.rows("rows")]
    if work.method == "grpo":
        config = trl.GRPOConfig(
            max_completion_length=work.length, num_generations=work.num_generations, temperature=0.9, beta=0.0, **common
        )
        return trl.GRPOTrainer(**arguments, reward_funcs=spread, train_dataset=Dataset.from_list(rows), args=config)
    trainers = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }
    trainer, config = trainers[work.method]
    return trainer(**arguments, train_dataset=Dataset.from_list(rows), args=config(max_length=work.length, **common))


def as_turns(row: dict) -> dict:
    """A row in TRL's conversational form, which its trainers render with the chat template as our recipes do."""
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    return {key: [{"role": roles[key], "content": text}] if key in roles else text for key, text in row.items()}


def spread(completions: list, **_: object) -> list[float]:
    """A reward that differs within a group: what it is does not decide how much there is to compute."""
    return [len(str(completion)) % 7 / 7 for completion in completions]


def total_tokens(job: Job, dataset: Any) -> int | None:
    """Useful tokens in one pass over the prepared rows; None where the model writes them, which the trainer counts."""
    longest, columns = job.workload.length, set(dataset.column_names)
    if job.workload.method == "sft":
        return sum(map(len, dataset["input_ids"]))
    if {"prompt_ids", "chosen_ids"} <= columns:
        sides = ("chosen_ids", "rejected_ids")
        return sum(min(len(row["prompt_ids"]) + len(row[side]), longest) for row in dataset for side in sides)
    if {"prompt_ids", "completion_ids"} <= columns:
        return sum(min(len(row["prompt_ids"]) + len(row["completion_ids"]), longest) for row in dataset)
    if "chosen_ids" in columns:
        return sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in dataset)
    return None


def make_clock(total: int | None) -> Any:
    """A callback with the `seconds` and the useful `tokens` of each step, means from one logged loss to the next.

    A loss that is logged is on the host, so the GPU has finished the step.
    """
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            self.seconds: list[float] = []
            self.tokens: list[float] = []
            self.last, self.counted = time.perf_counter(), self.count(state)

        def on_log(self, args, state, control, logs, **kwargs) -> None:
            if "loss" in logs:
                now, counted = time.perf_counter(), self.count(state)
                steps = state.global_step - len(self.seconds)
                self.seconds += [(now - self.last) / steps] * steps
                self.tokens += [(counted - self.counted) / steps] * steps
                self.last, self.counted = now, counted

        def count(self, state) -> float:
            return float(state.num_input_tokens_seen) if total is None else (state.epoch or 0.0) * total

    return Clock()
