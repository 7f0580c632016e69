"""Measure a recipe's speed and memory on a model's true shape, with random weights and rows of full length.

    make benchmark MODEL=qwen2.5-7b                                            nf4, gradient checkpointing
    make benchmark MODEL=qwen2.5-7b ARGS="--no-load-in-4bit --no-gradient-checkpointing"
    make benchmark MODEL=qwen2.5-7b ARGS="--method grpo --max-length 512 --steps 10 --warmup 2"

The checkpoint is made on the spot from the card's architecture, so nothing is downloaded: weights decide neither speed
nor memory. Rows (for DPO: a prompt with each of its answers; for GRPO: an answer) are `--max-length` tokens long, none
padded, so every token counted is a useful one. The recipe is run as a user runs it; what is reported comes from its own
metrics.jsonl, steps before `--warmup` left out.

Left out: models that are not Qwen2, whose classes need more than the card's numbers.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import tyro
from common.errors import InputError, run_command
from common.models import Card, read_card


@dataclass(frozen=True)
class Args:
    model: str = "qwen2.5-7b"
    method: Literal["sft", "dpo", "grpo"] = "sft"
    load_in_4bit: bool = True
    gradient_checkpointing: bool = True
    per_device_train_batch_size: int | None = None
    """By default the recipe's: 4 rows, 2 pairs, 4 answers."""
    gradient_accumulation_steps: int | None = None
    """By default the recipe's, 4."""
    max_length: int = 2048
    ragged: bool = False
    """Documents of log-normal length, median 245 tokens, packed into the rows, in place of one a row."""
    steps: int = 30
    warmup: int = 10
    """Steps left out of the figures: compilation and the allocator's growth."""
    checkpoint: str | None = None
    """A folder to make the checkpoint in, or to take it from when it is there; by default a temporary one."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    card = read_card(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(args.checkpoint or Path(scratch, args.model))
        if not (checkpoint / "config.json").exists():
            make_checkpoint(card, checkpoint)
        data = Path(scratch, "rows.jsonl")
        batch = args.per_device_train_batch_size or {"sft": 4, "dpo": 2, "grpo": 4}[args.method]
        accumulation = args.gradient_accumulation_steps or 4
        write_rows(data, args, args.steps * batch * accumulation)
        output = Path(scratch, "run")
        switches = {"load-in-4bit": args.load_in_4bit, "gradient-checkpointing": args.gradient_checkpointing}
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
            **(
                {"max-completion-length": args.max_length, "rewards": "math"}
                if args.method == "grpo"
                else {"max-length": args.max_length, "max-truncated": 1}
            ),
        }
        command = [sys.executable, ROOT / "recipes" / f"{args.method}.py"]
        command += [f"--{'' if on else 'no-'}{name}" for name, on in switches.items()]
        command += [word for name, value in flags.items() for word in (f"--{name}", value)]
        subprocess.run([str(word) for word in command], check=True)
        record = json.loads((output / "run.json").read_text())
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if row["step"] > args.warmup and "loss" in row]
    speeds = sorted(row["tokens_per_second"] for row in measured)
    packages = record["code"]["packages"]
    figures = {
        "model": args.model,
        "method": args.method,
        "weights": "nf4" if args.load_in_4bit else record["dtype"].removeprefix("torch."),
        "checkpointing": args.gradient_checkpointing,
        "rows": f"{batch} x {accumulation} x {args.max_length}" + (", packed ragged" if args.ragged else ""),
        "tokens_per_second": {"median": median(speeds), "min": speeds[0], "max": speeds[-1]},
        "memory_gib": max(row["memory_gib"] for row in measured),
        "device": record["machine"].get("gpu", record["machine"]["cpu"]),
        "driver": record["machine"].get("driver"),
        "versions": {name: packages[name] for name in ("torch", "triton", "transformers", "trl", "unsloth")},
    }
    print(json.dumps(figures))


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


def write_rows(file: Path, args: Args, rows: int) -> None:
    """Enough rows for all steps. Without `ragged` each is longer than max_length, and so is cut to exactly that."""
    import random

    draw = random.Random(0)

    def digits(tokens: int) -> str:
        return " ".join(str(draw.randrange(10)) for _ in range(tokens // 2))  # a digit and a space, a token each

    if args.method != "sft":
        length = 2 * args.max_length
        with file.open("w", encoding="utf-8") as stream:
            for number in range(rows):
                dpo = {"prompt": "Go on.", "chosen": digits(length), "rejected": digits(length)}
                grpo = {"prompt": f"What is {number} + {digits(100)}?", "answer": str(number)}
                stream.write(json.dumps(dpo if args.method == "dpo" else grpo) + "\n")
        return
    with file.open("w", encoding="utf-8") as stream:
        written = 0
        while written < rows * args.max_length:
            tokens = max(int(draw.lognormvariate(5.5, 0.8)), 32) if args.ragged else 2 * args.max_length
            stream.write(json.dumps({"prompt": "Go on.", "completion": digits(tokens)}) + "\n")
            written += min(tokens, args.max_length)


if __name__ == "__main__":
    run_command(main)
