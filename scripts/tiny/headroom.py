"""Measure what the tiny model leaves to learn: before fine-tuning, after it, and after a short reinforcement.

A plain LoRA fine-tuning on sft.jsonl, then a plain policy gradient on arithmetic-train.jsonl, both in as few lines as
they take, with torch, transformers and peft alone: a check of the model and its data that does not lean on the recipes.
Prints a Markdown table; `--readme` also puts it at the end of the model's README. Left out: everything that a real run
needs (see recipes/).

    python scripts/tiny/headroom.py                                  # about five minutes on two cores
    python scripts/tiny/headroom.py --reinforce 0 --seed 2
"""

import argparse
import json
import re
import time
from pathlib import Path
from random import Random

import torch
from common.data.examples import Conversation
from common.data.rows import Faults
from common.lm.chat import tokenize
from common.lm.render import render_turns
from peft import LoraConfig, get_peft_model
from samples import LANGUAGES, draw, hedging, plain
from sums import Problem
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import TASKS

FORM = re.compile(r"<think>([^<]+)</think><answer>([^<]+)</answer>")
PROBLEM = re.compile(r"(\d+)\s*([-+加减]|plus|minus)\s*(\d+)")
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_hard(prompt: str) -> bool:
    found = PROBLEM.search(prompt)
    assert found, prompt  # every prompt of these data sets is a problem
    a, operation, b = found.groups()
    return Problem(int(a), "+" if operation in ("+", "plus", "加") else "-", int(b)).hard


class Student:
    """The model with its tokenizer: writes answers, learns from token masks."""

    def __init__(self, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=LAYERS, task_type="CAUSAL_LM"))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(self.device)

    def render(self, prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        return render_turns(self.tokenizer, turns, add_generation_prompt=True)

    def write(self, prompts: list[str], samples: int = 1, temperature: float = 0.0) -> list[tuple[str, bool]]:
        """(text, whether it ended by itself) for each prompt, `samples` in a row."""
        self.model.eval()
        inputs = self.tokenizer([self.render(prompt) for prompt in prompts], return_tensors="pt", padding=True)
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        with torch.no_grad():
            outputs = self.model.generate(
                **inputs.to(self.device), max_new_tokens=64, num_return_sequences=samples, **choice
            )
        written = outputs[:, inputs["input_ids"].shape[1] :]
        ended = (written == self.tokenizer.eos_token_id).any(dim=1).tolist()
        return list(zip(self.tokenizer.batch_decode(written, skip_special_tokens=True), ended, strict=True))

    def log_probabilities(self, rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Per token, shape (rows, longest - 1), with the mask of what counts; rows are (tokens, mask)."""
        longest = max(len(tokens) for tokens, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens, _ in rows], device=self.device)
        mask = torch.tensor([m + [0] * (longest - len(m)) for _, m in rows], device=self.device)[:, 1:].float()
        logits = self.model(input_ids=ids).logits[:, :-1]  # padding is on the right: nothing before it can see it
        losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return -losses, mask

    def completed(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
        before = self.tokenizer(self.render(prompt))["input_ids"]
        after = self.tokenizer(text + "<|im_end|>")["input_ids"]
        return before + after, [0] * len(before) + [1] * len(after)


def finetune(student: Student, rows: list[dict], arguments: argparse.Namespace) -> float:
    started = time.perf_counter()
    conversations = [Conversation(f"row {number}", row["messages"]) for number, row in enumerate(rows)]
    faults = Faults()
    tokens = tokenize(student.tokenizer, conversations, 1024, faults)
    examples = [(example.input_ids.tolist(), example.completion_mask.tolist()) for example in tokens]
    faults.stop()
    rng = Random(arguments.seed)
    weights = [weight for weight in student.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=arguments.lr, weight_decay=0.0)
    steps = arguments.epochs * (len(examples) // arguments.batch)
    student.model.train()
    start = 0
    for step in range(steps):
        if step % (len(examples) // arguments.batch) == 0:
            rng.shuffle(examples)
            start = 0
        optimizer.param_groups[0]["lr"] = arguments.lr * min(1.0, (step + 1) / 10) * (1 - step / steps)
        logs, mask = student.log_probabilities(examples[start : start + arguments.batch])
        start += arguments.batch
        loss = -(logs * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            print(
                f"sft step {step + 1}/{steps} loss {loss.item():.3f} {time.perf_counter() - started:.0f} s", flush=True
            )
    return time.perf_counter() - started


def answer_of(text: str, ended: bool) -> str | None:
    found = FORM.fullmatch(text.strip())
    return found.group(2) if found and ended else None


def reinforce(student: Student, rows: list[dict], arguments: argparse.Namespace) -> float:
    """Policy gradient, each step 16 problems x 8 samples; the advantage is the reward minus the mean of its group."""
    rng = Random(arguments.seed)
    weights = [weight for weight in student.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=arguments.reinforce_lr, weight_decay=0.0)
    started, rewards = time.perf_counter(), []
    for step in range(arguments.reinforce):
        batch = rng.sample(rows, 16)
        written = student.write([row["prompt"] for row in batch], 8, 1.0)
        right = [float(answer_of(*one) == batch[i // 8]["answer"]) for i, one in enumerate(written)]
        reward = torch.tensor(right, device=student.device).view(16, 8)
        advantage = (reward - reward.mean(dim=1, keepdim=True)).view(-1, 1)
        student.model.train()
        logs, mask = student.log_probabilities(
            [student.completed(batch[i // 8]["prompt"], text) for i, (text, _) in enumerate(written)]
        )
        loss = -(advantage * logs * mask).sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(reward.mean().item())
        if (step + 1) % 10 == 0:
            mean = sum(rewards[-10:]) / 10
            print(f"rl step {step + 1} reward {mean:.3f} {time.perf_counter() - started:.0f} s", flush=True)
    return time.perf_counter() - started


def measure(student: Student, data: Path, seed: int) -> dict[str, str]:
    """One column of the table."""
    share = "{:.1%}".format
    held, problems = read(data / "heldout.jsonl"), read(data / "arithmetic.jsonl")
    result = {}
    written = student.write([row["prompt"] for row in held])
    answers = [answer_of(*one) for one in written]
    result["answers in the format, greedy"] = share(sum(answer is not None for answer in answers) / len(held))
    result["ended within 64 tokens"] = share(sum(ended for _, ended in written) / len(held))
    known = [i for i, row in enumerate(held) if row["task"] not in ("sum", "difference")]
    result["facts and words right, greedy"] = share(sum(answers[i] == held[i]["answer"] for i in known) / len(known))

    hard = [i for i, row in enumerate(problems) if is_hard(row["prompt"])]
    easy = [i for i in range(len(problems)) if i not in hard]
    prompts = [row["prompt"] for row in problems]
    greedy = [answer_of(*one) == row["answer"] for one, row in zip(student.write(prompts), problems, strict=True)]
    torch.manual_seed(seed)
    sampled = []
    for i in range(0, len(problems), 40):  # in pieces, for the memory of 8 samples each
        texts = student.write(prompts[i : i + 40], 8, 1.0)
        sampled += [answer_of(*one) == problems[i + j // 8]["answer"] for j, one in enumerate(texts)]
    for name, part in (("all", range(len(problems))), ("hard", hard), ("easy", easy)):
        groups = [sampled[8 * i : 8 * i + 8] for i in part]
        result[f"arithmetic, {name}: greedy"] = share(sum(greedy[i] for i in part) / len(part))
        result[f"arithmetic, {name}: pass@1"] = share(sum(map(sum, groups)) / (8 * len(part)))
        result[f"arithmetic, {name}: pass@8"] = share(sum(map(any, groups)) / len(part))

    rng = Random("styles")
    pairs = [draw(rng, rng.choice(LANGUAGES), rng.choice(list(TASKS)), held=True, hard=False) for _ in range(128)]
    both = [style(question) for question in pairs for style in (plain, hedging)]
    with torch.no_grad():
        logs, mask = student.log_probabilities([student.completed(pairs[i // 2].prompt, t) for i, t in enumerate(both)])
    totals = (logs * mask).sum(dim=1).view(-1, 2)
    difference = totals[:, 0] - totals[:, 1]
    result["plain thought likelier than hedging"] = share((difference > 0).float().mean().item())
    result["mean log-probability, plain minus hedging"] = f"{difference.mean().item():+.2f}"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("data_samples/tiny"))
    parser.add_argument("--data", type=Path, default=Path("data_samples"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--reinforce", type=int, default=40, help="steps of policy gradient; 0 for none")
    parser.add_argument("--reinforce-lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--readme", action="store_true", help="put the table at the end of the model's README.md")
    arguments = parser.parse_args()

    student = Student(arguments.model, arguments.seed)
    columns = {"base": measure(student, arguments.data, arguments.seed)}
    seconds = finetune(student, read(arguments.data / "sft.jsonl"), arguments)
    columns[f"after SFT ({seconds:.0f} s)"] = measure(student, arguments.data, arguments.seed)
    if arguments.reinforce:
        seconds = reinforce(student, read(arguments.data / "arithmetic-train.jsonl"), arguments)
        name = f"then {arguments.reinforce} steps of policy gradient ({seconds:.0f} s)"
        columns[name] = measure(student, arguments.data, arguments.seed)

    lines = ["| held out | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in next(iter(columns.values())):
        lines.append(f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |")
    table = "\n".join(lines) + "\n"
    print(table)
    if arguments.readme:
        readme = arguments.model / "README.md"
        head = readme.read_text(encoding="utf-8").split("\n## Headroom\n")[0].rstrip()
        note = (
            "LoRA of rank 16 on the seven projections; "
            f"SFT of {arguments.epochs} epochs, batch {arguments.batch}, learning rate {arguments.lr:g}; "
            f"seed {arguments.seed}; measured by `scripts/tiny/headroom.py` on {student.device}, "
            f"{torch.get_num_threads()} threads. Hard means with a carry or a borrow."
        )
        readme.write_text(f"{head}\n\n## Headroom\n\n{note}\n\n{table}", encoding="utf-8")


if __name__ == "__main__":
    main()
