"""Make what all contestants of a workload share: the checkpoint, and rows that fill their batches.

    python -m benchmarks.prepare JOB.json

A process of its own, so that nothing of it stays on the GPU.
"""

import json
import random
import sys
from pathlib import Path

from common.data.formats import SFT_FORMATS
from common.data.read import read_examples
from common.data.rows import Faults, find_source
from common.errors import run_command
from common.lm.cards import read_card

from benchmarks.checkpoint import make_checkpoint
from benchmarks.workloads import Job, Workload

PROMPT = "Continue."
TEMPLATE_TOKENS = 64  # at most, that a chat template adds to a prompt and its completion


def main() -> None:
    job = Job.read(Path(sys.argv[1]))
    if not (job.checkpoint / "config.json").exists():
        make_checkpoint(read_card(job.workload.model), job.checkpoint)
    rows = text_rows(job.workload, job.steps * job.workload.batch * job.workload.accumulation)
    write(job.folder / "rows.jsonl", rows)
    if job.workload.method == "sft":
        write(job.folder / "tokens.jsonl", token_rows(job))


def text_rows(workload: Workload, count: int) -> list[dict]:
    """`count` rows for the recipe. A row of SFT or DPO is longer than the workload's length, so it is truncated to it.

    Ragged ones are as many as fill `count` rows when they are packed.
    """
    draw, length = random.Random(0), workload.length

    def digits(tokens: int) -> str:
        return " ".join(str(draw.randrange(10)) for _ in range(tokens // 2))  # a digit and a space, a token each

    if workload.method == "sft" and workload.ragged:
        rows, tokens = [], 0
        while tokens < count * length:
            rows.append({"prompt": PROMPT, "completion": digits(max(int(draw.lognormvariate(5.5, 0.8)), 32))})
            tokens += min(len(rows[-1]["completion"]) + 1, length)
        return rows
    if workload.method == "sft":
        return [{"prompt": PROMPT, "completion": digits(2 * length)} for _ in range(count)]
    if workload.method == "dpo":
        prompts = [digits(min(workload.prompt_length, length // 2)) for _ in range(count)]
        return [{"prompt": one, "chosen": digits(2 * length), "rejected": digits(2 * length)} for one in prompts]
    if workload.method == "kto":  # prompts differ, or there would be no mismatched completion
        return [
            {"prompt": f"Continue {number}.", "completion": digits(2 * length), "label": bool(number % 2)}
            for number in range(count)
        ]
    if workload.method == "reward":  # TRL drops what is too long
        fill = max(length - TEMPLATE_TOKENS, 8)
        return [{"prompt": PROMPT, "chosen": digits(fill), "rejected": digits(fill)} for _ in range(count)]
    prompt = workload.prompt_length
    return [{"prompt": f"What is {number} + {digits(prompt)}?", "answer": str(number)} for number in range(count)]


def token_rows(job: Job) -> list[dict]:
    """The rows of SFT as the recipe tokenizes them: input_ids and the mask of what carries loss."""
    from common.lm.chat import tokenize
    from transformers import AutoTokenizer

    faults = Faults()
    examples = read_examples(find_source(str(job.folder / "rows.jsonl")), SFT_FORMATS, "auto", ()).examples
    tokenizer = AutoTokenizer.from_pretrained(job.checkpoint)
    rows = [
        {"input_ids": row.input_ids.tolist(), "completion_mask": row.completion_mask.tolist()}
        for row in tokenize(tokenizer, examples, job.workload.length, faults)
    ]
    faults.stop()
    return rows


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
