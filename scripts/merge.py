"""Merge an adapter into its base: a 16-bit model, which the next stage starts from and uses as its reference policy.

    make merge ADAPTER=outputs/sft-tiny-1a2b3c4d/adapter OUT=outputs/tiny-sft

The base is the one that the adapter was trained on, by the record of its run; another one is refused. What PEFT can
merge (LoRA with DoRA and its other settings, embeddings that were trained or added, other kinds of adapters) is merged
as PEFT does, and the rest is refused by name.

Before the folder gets its name the merge is checked, in 32 bit and before rounding: every layer, and the
log-probabilities after a few prompts, must change as they do under the adapter. The file must hold what was merged.

Left out: several adapters at once, 4-bit or 8-bit results, the adapter of a reward model (`make reward` has
--stand-alone).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import environment
from common.cli import parse_arguments
from common.errors import InputError, MachineError, run_command
from common.lm.adapter import CONFIG, WEIGHTS, check_base
from common.lm.hub import MERGE_RECORD, READS_TEXT, TOKENIZER_FILES, Model, contents, fetch, load_tokenizer
from common.lm.load import base_of
from common.lm.render import render_turns
from common.memory_limits import free_memory
from common.run.files import read_object, write_folder, write_json
from common.run.samples import read_samples
from common.run.screen import loading

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = ("What is 2 + 3?", "Name a colour.", "Write one sentence about water.", "二加三等于多少？")
PROMPT_TOKENS, NEW_TOKENS, COMPARED = 256, 32, 64  # of a prompt, after it, and of both, at most
# The part of the adapter's change of the log-probabilities that a merge may lose or add; and nats, for an adapter that
# changes next to nothing. In 32 bit, before rounding; where only 16 bit fit into the memory, rounding hides more.
# docs/stages.md has what right and wrong merges measure.
CHANGE = {"float32": 5e-4, "bfloat16": 0.2, "float16": 0.1}
NOISE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.05}


@dataclass(frozen=True)
class Args:
    adapter: str
    """The adapter folder of a run, or any that PEFT wrote."""
    model: str | None = None
    """Its base, where the run that made it is not beside it; else taken from that run, and checked against it."""
    output_dir: str | None = None
    """Where the merged model goes; by default `merged`, beside the adapter."""
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""


def main() -> None:
    args = parse_arguments(Args, __doc__)
    adapter = Path(args.adapter).expanduser()
    if (adapter / "head.json").is_file():
        raise InputError(f"{adapter} is a reward model, which PPO takes as it is; `make reward` can merge one itself")
    base = base_of(args.model, str(adapter), to_merge=True)
    folder = Path(args.output_dir or adapter.parent / "merged").expanduser()
    inputs = identify(base, adapter)
    if folder.exists():
        record = folder / MERGE_RECORD
        before = read_object(record) if record.is_file() else None
        if before is None or {name: before.get(name) for name in inputs} != inputs:
            raise InputError(f"{folder}: holds something else; give another folder with --output-dir")
        print(f"{folder} has this merge already.")
        return

    environment.set_variables(models=[base])
    loading(base.name)
    base = fetch(base)
    check = merge(base, adapter, folder, inputs)
    print(
        f"{folder}: checked in {check['dtype']} on {check['tokens']} tokens of {check['prompts']} prompts. The merged "
        f"model changes the log-probabilities as the adapter does, but for {check['error']:.2g} of the change (and "
        f"{check['layer_error']:.2g} in a layer at most); rounding to 16 bit moves them by {check['rounding']:.2g} nats"
    )


def identify(base: Model, adapter: Path) -> dict[str, str | None]:
    """What a merge is made of, for its record: `settings` are the adapter's scale and the tokenizer beside it."""
    with (adapter / WEIGHTS).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    settings = hashlib.sha256()
    for name in sorted((CONFIG, *READS_TEXT)):
        if (adapter / name).is_file():
            settings.update(f"{name} {hashlib.sha256((adapter / name).read_bytes()).hexdigest()}\n".encode())
    card = base.card.name if base.card else None
    return {"card": card, "base": contents(base), "adapter": sha256, "settings": settings.hexdigest()}


def merge(base: Model, adapter: Path, folder: Path, inputs: dict) -> dict:
    """Write `base` with `adapter` merged into it to `folder`, when the check passes; returns what the check measured.

    Raises InputError where the adapter does not fit the base, and MachineError where the check does not pass.
    """
    import torch
    from common.lm.merge import check_finite, check_written, merge_weights, put_on, stop_at
    from transformers import AutoModelForCausalLM

    tokenizer, tokens = load_tokenizers(base, adapter)
    model = AutoModelForCausalLM.from_pretrained(
        base.source, revision=base.revision, dtype="auto", trust_remote_code=base.trusted
    )
    check_base(model, base.source)
    if getattr(model.config, "quantization_config", None):
        raise InputError(f"{base.source} is stored in few bits; an adapter merges into a 16-bit base")
    stored = torch.bfloat16 if model.dtype == torch.float32 else model.dtype
    model = put_on(widen(model), adapter, tokens)

    paths = [greedy(model, prompt_ids(tokenizer, turns)) for turns in check_prompts(adapter)]
    trained = [log_probs(model, ids) for ids in paths]
    with model.disable_adapter():
        frozen = [log_probs(model, ids) for ids in paths]
    model, layer_error = merge_weights(model)
    exact = [log_probs(model, ids) for ids in paths]
    dtype = str(model.dtype).removeprefix("torch.")
    error = compare(frozen, trained, exact, dtype)

    cast(model, stored)
    check_finite(model)
    check = {"prompts": len(paths), "tokens": sum(map(len, exact)), "dtype": dtype, "error": error}
    with write_folder(folder) as part:
        stop_at(model, tokenizer)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        check_written(model, part)
        cast(model, getattr(torch, dtype))
        rounded = [log_probs(model, ids) for ids in paths]
        check |= {"layer_error": layer_error, "rounding": distance(exact, rounded)}
        write_json(part / MERGE_RECORD, {**inputs, "check": check})
    return check


def load_tokenizers(base: Model, adapter: Path) -> tuple["PreTrainedTokenizerBase", int | None]:
    """The tokenizer in the adapter's folder, else the base's; and its size where tokens were added.

    The size is 0 where none were added to the base's tokenizer, and None where the adapter's folder holds none.
    """
    if not any((adapter / name).is_file() for name in TOKENIZER_FILES):
        print(f"{adapter} holds no tokenizer: the merged model gets that of {base.source}.")
        return load_tokenizer(base), None
    own = load_tokenizer(Model(adapter.name, str(adapter.resolve()), None, base.card, local=True))
    return own, len(own) if len(own) > len(load_tokenizer(base)) else 0


def widen(model: "PreTrainedModel") -> "PreTrainedModel":
    """`model` in 32 bit, on a GPU if it fits there, else on the CPU; where it fits neither, as it is stored."""
    import torch

    needed = 1.3 * 4 * model.num_parameters()  # bytes, with the adapter and what a pass over a short text needs
    if torch.cuda.is_available() and needed < torch.cuda.mem_get_info()[0]:
        return model.to("cuda", torch.float32)
    free = free_memory()
    if free is None or needed - model.get_memory_footprint() < free[0]:
        return model.to(torch.float32)
    print(f"32 bit need {needed / 2**30:.0f} GiB, more than is free: each layer is checked in 32 bit, the whole in 16.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def cast(model: "PreTrainedModel", dtype: "torch.dtype") -> None:
    """Change the dtype of the weights alone: what is computed from the config, such as rotary angles, stays exact."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def check_prompts(adapter: Path) -> list[list[dict]]:
    """The prompts that the run held out, else PROMPTS; as chat messages."""
    if held_out := read_samples(adapter.parent):
        return [sample["prompt"] for sample in held_out]
    return [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", turns: list[dict]) -> list[int]:
    """The tokens of a prompt, as a chat where the tokenizer has a template for one."""
    if not tokenizer.chat_template:
        return tokenizer(turns[-1]["content"])["input_ids"][-PROMPT_TOKENS:]
    text = render_turns(tokenizer, turns, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"][-PROMPT_TOKENS:]


def greedy(model: "PeftModel", prompt: list[int]) -> list[int]:
    """The prompt with its greedy continuation."""
    import torch

    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )[0].tolist()


def log_probs(model: "PreTrainedModel", tokens: list[int]) -> "torch.Tensor":
    """(COMPARED or fewer, V): the log-probabilities of every token after each of the last ones, on the CPU."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens], device=model.device)).logits  # (1, T, V)
    return logits[0, -COMPARED:].float().log_softmax(-1).cpu()


def distance(one: list["torch.Tensor"], other: list["torch.Tensor"]) -> float:
    """The root mean square of the differences of log-probabilities, in nats; each token counts by its probability."""
    import torch

    a, b = torch.cat(one), torch.cat(other)  # (N, V)
    return float((a.exp() * (a - b) ** 2).sum(-1).mean().sqrt())


def compare(
    frozen: list["torch.Tensor"], trained: list["torch.Tensor"], merged: list["torch.Tensor"], dtype: str
) -> float:
    """What the merged model's log-probabilities differ by, as a share of what the adapter changes in the base's.

    Raises MachineError where that is more than two computations of the same in `dtype` differ by.
    """
    change, wrong = distance(trained, frozen), distance(trained, merged)
    if not wrong <= CHANGE[dtype] * change + NOISE[dtype]:  # also where one is not a number
        raise MachineError(
            f"the merged model is not the trained one: its log-probabilities differ by {wrong:.2g} nats from those "
            f"with the adapter, which itself changes them by {change:.2g} nats"
        )
    return wrong / change if change else 0.0


if __name__ == "__main__":
    run_command(main)
