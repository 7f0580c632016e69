"""Measure a recipe's speed and memory on the shape of a real model, with random weights and rows of full length.

    make benchmark MODEL=qwen2.5-7b                                            nf4, gradient checkpointing
    make benchmark MODEL=qwen2.5-7b ARGS="--no-load-in-4bit --no-gradient-checkpointing"
    make benchmark MODEL=qwen2.5-7b ARGS="--method grpo --steps 10 --warmup 2"
    make benchmark MODEL=qwen2-1.5b ARGS="--method ppo --steps 10 --warmup 2"
    make benchmark MODEL=qwen2.5-7b ARGS="--method score"          one completion scored by a reward model
    make benchmark MODEL=qwen2-1.5b ARGS="--method rollout"        completions sampled from a policy

The checkpoint is made from the card's architecture, so nothing is downloaded: weights decide neither speed nor memory.
Rows (for DPO a prompt with each of its completions, for GRPO and PPO a completion) are `--max-length` tokens, none
padded, so every token counted is a useful one. The recipe runs as it does for a user, and its own metrics.jsonl gives
the figures; steps before `--warmup` are left out. PPO has all four models: first a reward model is trained for one
step, as one more adapter.

Left out: models that are not Qwen2, whose classes need more than the card's numbers.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from common.cli import parse_arguments
from common.environment import ROOT
from common.errors import InputError, run_command
from common.lm.cards import Card, read_card
from common.lm.memory import BATCHES, COMPLETION_LENGTH, MAX_LENGTH

SCORED_LENGTH = 512  # tokens of the completion that `--method score` scores


@dataclass(frozen=True)
class Args:
    model: str = "qwen2.5-7b"
    method: Literal["sft", "dpo", "kto", "grpo", "ppo", "score", "rollout"] = "sft"
    load_in_4bit: bool = True
    load_in_fp8: bool = False
    gradient_checkpointing: bool = True
    per_device_train_batch_size: int | None = None
    """By default the recipe's: 4 rows, 2 pairs, 4 completions (GRPO), 8 (PPO), 64 (rollout)."""
    gradient_accumulation_steps: int | None = None
    """By default the recipe's, 4."""
    max_length: int | None = None
    """By default the recipe's: 2048, of a completion 512 (GRPO), 128 (PPO) or 256 (rollout)."""
    num_generations: int = 4
    """Completions of each prompt (GRPO, rollout)."""
    rollouts: Literal["auto", "graph", "generate"] = "auto"
    """How GRPO and PPO sample."""
    prompt_length: int = 100
    """Tokens of a prompt (GRPO and PPO), about."""
    ragged: bool = False
    """Documents of log-normal length, median 245 tokens, packed into the rows, in place of one a row."""
    steps: int = 30
    warmup: int = 10
    """Steps left out of the figures: compilation and the allocator's growth."""
    checkpoint: str | None = None
    """A folder to make the checkpoint in, or to take it from when it is there; by default a temporary one."""


def main() -> None:
    args = parse_arguments(Args, __doc__)
    card = read_card(args.model)
    batch, accumulation = BATCHES.get(args.method, (1, 1))
    batch = args.per_device_train_batch_size or batch
    accumulation = args.gradient_accumulation_steps or accumulation
    length = args.max_length or {**MAX_LENGTH, **COMPLETION_LENGTH, "score": SCORED_LENGTH, "rollout": 256}[args.method]
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(args.checkpoint or Path(scratch, args.model))
        if not (checkpoint / "config.json").exists():
            make_checkpoint(card, checkpoint)
        data = Path(scratch, "rows.jsonl")
        switches = {"load-in-4bit": args.load_in_4bit, "gradient-checkpointing": args.gradient_checkpointing}
        if args.load_in_fp8:
            del switches["load-in-4bit"]  # the recipe turns it off
        on_off = [f"--{'' if on else 'no-'}{name}" for name, on in switches.items()]
        on_off += ["--load-in-fp8"] if args.load_in_fp8 else []
        reward = Path(scratch, "reward")
        if args.method in ("ppo", "score"):
            train_reward(checkpoint, reward, on_off)
        if args.method == "rollout":
            figures = time_rollouts(checkpoint, args, args.per_device_train_batch_size or 64, length)
            print(json.dumps({"model": args.model, "method": "rollout", **figures}))
            return
        if args.method == "score":
            figures = time_scoring(checkpoint, reward, args.load_in_4bit, length)
            print(json.dumps({"model": args.model, "method": "score", **figures}))
            return
        write_rows(data, args, length, args.steps * batch * accumulation)
        output = Path(scratch, "run")
        of_method = {
            "grpo": {
                "max-completion-length": length,
                "rewards": "math",
                "num-generations": args.num_generations,
                "rollouts": args.rollouts,
            },
            "ppo": {
                "max-completion-length": length,
                "rollouts": args.rollouts,
                "reward-model": reward,
                "rollout-batch-size": batch * accumulation,
                "critic-warmup-steps": 1,
                "eval-ratio": 0,
            },
        }.get(args.method, {"max-length": length, "max-truncated": 1})
        flags = {
            "model": checkpoint,
            "data": data,
            "output-dir": output,
            "per-device-train-batch-size": batch,
            "gradient-accumulation-steps": accumulation,
            "max-steps": args.steps,
            "logging-steps": min(5, args.steps) if args.method == "sft" else 1,
            "save-steps": 1_000_000,
            "sample-prompts": 0,
            **of_method,
        }
        run_recipe(args.method, flags, on_off)
        record = json.loads((output / "run.json").read_text())
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row["step"] > args.warmup and "loss" in row]
    speeds = sorted(row["tokens_per_second"] for row in measured)
    packages = record["code"]["packages"]
    figures = {
        "model": args.model,
        "method": args.method,
        "weights": stored(args, record["dtype"].removeprefix("torch.")),
        "checkpointing": args.gradient_checkpointing,
        "rows": f"{batch} x {accumulation} x {length}" + (", packed ragged" if args.ragged else ""),
        "tokens_per_second": {"median": median(speeds), "min": speeds[0], "max": speeds[-1]},
        "memory_gib": max(row["memory_gib"] for row in measured),
        "seconds": {
            name.removeprefix("time/"): median(row[name] for row in measured)
            for name in measured[0]
            if name.startswith("time/") or name == "step_time"
        },
        "rollout": {
            name.removeprefix("rollout/"): median(row[name] for row in measured)
            for name in measured[0]
            if name.startswith("rollout/")
        },
        "device": record["machine"].get("gpu", record["machine"]["cpu"]),
        "driver": record["machine"].get("driver"),
        "versions": {name: packages[name] for name in ("torch", "triton", "transformers", "trl", "unsloth")},
    }
    print(json.dumps(figures))


def stored(args: Args, dtype: str) -> str:
    """How the base was stored."""
    return "fp8" if args.load_in_fp8 else "nf4" if args.load_in_4bit else dtype


def make_checkpoint(card: Card, folder: Path) -> None:
    """A Qwen2 checkpoint of the card's shape with random bf16 weights, and the tiny model's tokenizer."""
    if not card.name.startswith(("qwen2", "tiny")):
        raise InputError(f"{card.name}: only the qwen2 and qwen2.5 cards can be made from their numbers")
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    shape = card.architecture
    config = Qwen2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=card.context,
        tie_word_embeddings=shape.tied_embeddings,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data_samples" / "tiny").save_pretrained(folder)


def train_reward(checkpoint: Path, folder: Path, switches: list[str]) -> None:
    """A reward model as an adapter and a head on the checkpoint, after one step on two scores: for its size alone."""
    data = folder.with_suffix(".jsonl")
    rows = [{"prompt": f"What is {n}?", "response": str(n), "score": n} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = {"model": checkpoint, "data": data, "output-dir": folder, "max-steps": 1, "eval-ratio": 0}
    flags |= {"per-device-train-batch-size": 1, "gradient-accumulation-steps": 1}
    run_recipe("reward", flags, switches)


def run_recipe(recipe: str, flags: dict[str, Any], switches: list[str]) -> None:
    """Run a recipe as a user does. Where it refuses or stops, this command ends with its message and its exit code."""
    command = [sys.executable, ROOT / "recipes" / f"{recipe}.py", *switches]
    command += [word for name, value in flags.items() for word in (f"--{name}", value)]
    if code := subprocess.run([str(word) for word in command], check=False).returncode:
        sys.exit(code)


def time_scoring(checkpoint: Path, reward: Path, load_in_4bit: bool, length: int) -> dict[str, Any]:
    """Milliseconds to score one completion of `length` tokens as PPO does; 50 of them, after 10 that do not count."""
    import unsloth  # noqa: F401, I001  first
    import torch
    from unsloth import FastLanguageModel

    from common.run.metrics import memory_gib
    from common.lm.cuda_graph import RecordedPass
    from common.lm.scalar_head import load_head, score_last

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # this process may have made the checkpoint, in 16 bit
    model, _ = FastLanguageModel.from_pretrained(
        str(checkpoint),
        max_seq_length=2 * length,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        load_in_4bit=load_in_4bit,
        use_exact_model_name=True,
    )
    adapted = json.loads((reward / "adapter" / "adapter_config.json").read_text())["target_modules"]
    model = FastLanguageModel.get_peft_model(model, r=16, target_modules=adapted)  # the policy, at rest
    model.load_adapter(str(reward / "adapter"), adapter_name="reward")
    model.set_adapter("reward", inference_mode=True)
    head, _ = load_head(reward / "adapter", model.device)
    backbone = RecordedPass(model)
    times = []
    for number in range(60):
        row = ([1 + number] * 16, [2 + number] * length)
        start = time.perf_counter()
        score_last(model, head, [row], 0, backbone=backbone)  # it returns floats, so the GPU is done
        times.append(1000 * (time.perf_counter() - start))
    measured = sorted(times[10:])
    return {
        "weights": "nf4" if load_in_4bit else str(model.dtype).removeprefix("torch."),
        "tokens": length,
        "milliseconds": {"median": median(measured), "min": measured[0], "max": measured[-1]},
        "memory_gib": memory_gib(),
    }


def time_rollouts(checkpoint: Path, args: Args, rows: int, length: int) -> dict[str, Any]:
    """Tokens a second of `rows` completions of `length` tokens each, adapter merged and prompts computed anew; 5 times.

    No completion ends before `length`: what ends a completion is no token.
    """
    import torch
    from common.lm.rollout.decoder import Decoder
    from common.lm.rollout.rows import Request
    from common.lm.rollout.weights import PolicyWeights
    from common.run.metrics import memory_gib
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map=device)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    weights = PolicyWeights(get_peft_model(base, LoraConfig(r=16, target_modules=modules)), "default")
    decoder = Decoder(weights, rows, args.prompt_length + length)
    vocabulary = weights.config.vocab_size
    prompts = [tuple((7 * row + column) % vocabulary for column in range(args.prompt_length)) for row in range(rows)]
    requests = [Request(prompts[row // args.num_generations], row, length) for row in range(rows)]
    seconds, refreshes = [], []
    for _ in range(6):
        start = time.perf_counter()
        weights.refresh()
        if device == "cuda":
            torch.cuda.synchronize()
        refreshed = time.perf_counter()
        decoder.decode(requests, -1, 1.0)
        refreshes.append(refreshed - start)
        seconds.append(time.perf_counter() - start)
    speeds = sorted(rows * length / one for one in seconds[1:])
    return {
        "weights": str(dtype).removeprefix("torch."),
        "rows": f"{rows}, groups of {args.num_generations}, {args.prompt_length} + {length} tokens",
        "tokens_per_second": {"median": round(median(speeds)), "min": round(speeds[0]), "max": round(speeds[-1])},
        "refresh_milliseconds": round(1000 * median(refreshes[1:]), 2),
        "memory_gib": memory_gib(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__},
    }


def write_rows(file: Path, args: Args, length: int, rows: int) -> None:
    """Enough rows for all steps. Without `ragged` each is longer than `length`, so it is truncated to exactly that."""
    import random

    draw = random.Random(0)

    def digits(tokens: int) -> str:
        return " ".join(str(draw.randrange(10)) for _ in range(tokens // 2))  # a digit and a space, a token each

    if args.method != "sft":
        with file.open("w", encoding="utf-8") as stream:
            for number in range(rows):
                if args.method == "dpo":
                    row = {"prompt": "Continue.", "chosen": digits(2 * length), "rejected": digits(2 * length)}
                elif args.method == "kto":  # prompts differ, or there would be no mismatched completion
                    row = {"prompt": f"Continue {number}.", "completion": digits(2 * length), "label": number % 2}
                else:
                    row = {"prompt": f"What is {number} + {digits(args.prompt_length)}?", "answer": str(number)}
                stream.write(json.dumps(row) + "\n")
        return
    with file.open("w", encoding="utf-8") as stream:
        written = 0
        while written < rows * length:
            tokens = max(int(draw.lognormvariate(5.5, 0.8)), 32) if args.ragged else 2 * length
            stream.write(json.dumps({"prompt": "Continue.", "completion": digits(tokens)}) + "\n")
            written += min(tokens, length)


if __name__ == "__main__":
    run_command(main)
