"""Merge an adapter into its base: a 16-bit model, which the next stage starts from and uses as its reference policy.

    make merge ADAPTER=outputs/sft-tiny-1a2b3c4d/adapter OUT=outputs/tiny-sft

The base is the one that the adapter was trained on, by the record of its run; another one is refused. Before the folder
gets its name the merge is checked: on a few prompts, base with adapter and merged model must generate the same greedy
tokens and give them the same log-probabilities, as far as 16 bit tells them apart.

Left out: several adapters at once, 4-bit or 8-bit results, the adapter of a reward model (`make reward` has
--stand-alone).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import environment
from common.cli import parse_arguments
from common.errors import InputError, MachineError, run_command
from common.lm.hub import MERGE_RECORD, Model, contents, fetch, load_tokenizer
from common.lm.load import base_of
from common.lm.render import render_turns
from common.run.files import write_folder, write_json
from common.run.screen import loading

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = ("What is 2 + 3?", "Name a colour.", "Write one sentence about water.", "二加三等于多少？")
NEW_TOKENS = 32
# Nats. Two bfloat16 computations of one model differ by less; a wrong scale or a missing layer by far more.
MEAN_DIFFERENCE, TIE = 0.05, 0.5


@dataclass(frozen=True)
class Args:
    adapter: str
    """The adapter folder of a run."""
    model: str | None = None
    """Its base, where the run that made it is not beside it; else taken from that run, and checked against it."""
    output_dir: str | None = None
    """Where the merged model goes; by default `merged`, beside the adapter."""


def main() -> None:
    args = parse_arguments(Args, __doc__)
    adapter = Path(args.adapter).expanduser()
    base = base_of(args.model, str(adapter))
    if (adapter / "head.json").is_file():
        raise InputError(f"{adapter} is a reward model, which PPO takes as it is; `make reward` can merge one itself")
    folder = Path(args.output_dir or adapter.parent / "merged").expanduser()
    inputs = {
        "card": base.card.name if base.card else None,
        "base": contents(base),
        "adapter": hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }
    if folder.exists():
        record = folder / MERGE_RECORD
        before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
        if before is None or {name: before[name] for name in inputs} != inputs:
            raise InputError(f"{folder}: holds something else; give another folder with --output-dir")
        print(f"{folder} has this merge already.")
        return

    environment.set_variables(models=[base])
    loading(base.name)
    base = fetch(base)
    check = merge(base, adapter, folder, inputs)
    print(
        f"{folder}: {check['tokens']} greedy tokens of {check['prompts']} prompts are the same with the adapter and "
        f"merged; their log-probabilities differ by {check['mean_difference']:.4f} nats in the mean"
    )


def merge(base: Model, adapter: Path, folder: Path, inputs: dict) -> dict:
    """Write `base` with `adapter` merged into it to `folder`, when the check passes; returns what the check measured.

    Raises MachineError when it does not.
    """
    import torch
    from common.lm.merge import merge_weights
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(Model(adapter.name, str(adapter.resolve()), None, base.card, local=True))
    model = AutoModelForCausalLM.from_pretrained(base.source, revision=base.revision, dtype="auto")
    if model.dtype == torch.float32:
        model = model.to(torch.bfloat16)
    model = PeftModel.from_pretrained(model.to("cuda" if torch.cuda.is_available() else "cpu"), adapter).eval()

    prompts = [prompt_ids(tokenizer, turns) for turns in check_prompts(adapter)]
    before = [greedy(model, ids) for ids in prompts]
    model = merge_weights(model)
    check = {"prompts": len(prompts), **compare(before, [log_probs(model, ids) for ids, _, _ in before], tokenizer)}

    with write_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        write_json(part / MERGE_RECORD, {**inputs, "check": check})
    return check


def check_prompts(adapter: Path) -> list[list[dict]]:
    """The prompts that the run held out, else PROMPTS; as chat messages."""
    samples = adapter.parent / "samples.json"
    if samples.is_file() and (held_out := json.loads(samples.read_text(encoding="utf-8"))):
        return [sample["prompt"] for sample in held_out]
    return [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", turns: list[dict]) -> list[int]:
    text = render_turns(tokenizer, turns, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def greedy(model: "PeftModel", prompt: list[int]) -> tuple[list[int], int, "torch.Tensor"]:
    """The prompt with its greedy continuation, the prompt's length, and `log_probs` of the whole."""
    import torch

    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        tokens = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )[0].tolist()
    return tokens, len(prompt), log_probs(model, tokens)


def log_probs(model: "PreTrainedModel", tokens: list[int]) -> "torch.Tensor":
    """(T - 1, V): the log-probabilities of each next token."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens], device=model.device)).logits[0, :-1].float().log_softmax(-1)


def compare(before: list[tuple[list[int], int, "torch.Tensor"]], after: list["torch.Tensor"], tokenizer) -> dict:
    """How the merged model differs on the adapter's greedy path. Raises MachineError where it would leave the path."""
    differences = []
    for (tokens, prompt, old), new in zip(before, after, strict=True):
        for position in range(prompt - 1, len(tokens) - 1):
            taken, likeliest = tokens[position + 1], int(new[position].argmax())
            differences.append(abs(float(new[position, taken] - old[position, taken])))
            if likeliest != taken and float(new[position, likeliest] - new[position, taken]) > TIE:
                before_it, with_adapter, merged = map(tokenizer.decode, (tokens[: position + 1], [taken], [likeliest]))
                raise MachineError(
                    f"the merged model is not the trained one: after {before_it!r} the next token is {with_adapter!r} "
                    f"with the adapter and {merged!r} merged"
                )
    mean = sum(differences) / len(differences)
    if mean > MEAN_DIFFERENCE:
        raise MachineError(
            f"the merged model is not the trained one: log-probabilities differ by {mean:.3f} nats in the mean, more "
            f"than {MEAN_DIFFERENCE}, which 16-bit rounding explains"
        )
    return {"tokens": len(differences), "mean_difference": mean, "max_difference": max(differences)}


if __name__ == "__main__":
    run_command(main)
