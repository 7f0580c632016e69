"""How near a base in fp8 comes to one in float32, with bfloat16 and nf4 beside it; a minute for tiny on a GPU.

    python tests/references/compare_fp8.py data_samples/tiny
    python tests/references/compare_fp8.py FOLDER_OF_A_CHECKPOINT --steps 15 --batch 4

Of each precision: the divergence of its token distributions from float32's (KL, in nats a token), how often the
likeliest token is the same, the cosine of an adapter's gradient, the loss of a few steps of LoRA, and what the adapter
so trained makes of held-out rows on the 16-bit base. Rows are the texts of data_samples/sft.jsonl, without a template.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"  # as for packed rows; compiling whole layers takes longer than the rest

import unsloth  # noqa: F401, I001  first
import torch
from transformers import AutoTokenizer
from unsloth import FastLanguageModel

from common.lm.fp8 import quantize_base

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = ("float32", "bfloat16", "fp8", "nf4")
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(path: str, precision: str, length: int):
    """The base in a precision under a LoRA adapter, and the adapter's weights by name."""
    model, _ = FastLanguageModel.from_pretrained(
        path,
        max_seq_length=length,
        dtype=torch.bfloat16 if DEVICE == "cuda" and precision != "float32" else torch.float32,
        load_in_4bit=precision == "nf4",
        use_gradient_checkpointing=False,
        use_exact_model_name=True,
    )
    if precision == "fp8":
        quantize_base(model)
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=0.0, target_modules=SEVEN, use_gradient_checkpointing=False
    )
    return model, {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def rows_of(length: int) -> torch.Tensor:
    """Rows (N, length) of tokens, shuffled."""
    tokenizer, ids = AutoTokenizer.from_pretrained(ROOT / "data_samples" / "tiny"), []
    for line in (ROOT / "data_samples" / "sft.jsonl").read_text(encoding="utf-8").splitlines():
        text = "\n".join(message["content"] for message in json.loads(line)["messages"])
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))].to(DEVICE)


def loss_of(model, ids: torch.Tensor, precision: str) -> torch.Tensor:
    mixed = DEVICE == "cuda" and precision != "float32"
    with torch.autocast(DEVICE, torch.bfloat16) if mixed else contextlib.nullcontext():
        return model(input_ids=ids, labels=ids).loss


def put(adapter: dict, values: dict) -> None:
    with torch.no_grad():
        for name, weight in adapter.items():
            weight.copy_(values[name])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), 0))


def held_out_loss(model, held_out: torch.Tensor, batch: int, precision: str) -> float:
    with torch.no_grad():
        losses = [loss_of(model, part, precision) for part in held_out.split(batch)]
    return float(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    rows = rows_of(args.length)
    held_out, training = rows[: 2 * args.batch], rows[2 * args.batch :]
    start, expected, gradients, trained, base_16 = {}, None, {}, {}, None
    for precision in PRECISIONS:
        model, adapter = load(args.model, precision, args.length)
        if not start:
            own = torch.Generator().manual_seed(1)
            for name, weight in adapter.items():
                scale = weight.shape[1] ** -0.5 if "lora_A" in name else 0.01
                start[name] = torch.randn(weight.shape, generator=own) * scale
        # 1. The base's distributions.
        model.eval()
        with torch.no_grad(), model.disable_adapter():
            logits = [model(input_ids=part).logits.float().log_softmax(-1) for part in held_out.split(args.batch)]
        found = torch.cat(logits)
        expected = found.cpu() if expected is None else expected
        wanted = expected.to(DEVICE)
        figures = {
            "kl": float((wanted.exp() * (wanted - found)).sum(-1).mean()),
            "same_likeliest": float((wanted.argmax(-1) == found.argmax(-1)).float().mean()),
        }
        del logits, found, wanted
        # 2. The gradient of one adapter.
        FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
        put(adapter, start)
        loss_of(model, held_out[: args.batch], precision).backward()
        gradients[precision] = {name: weight.grad.float().cpu().flatten() for name, weight in adapter.items()}
        pairs = [(gradients[precision][name], gradients["float32"][name]) for name in adapter]
        figures["gradient_cosine"] = cosine(*(torch.cat(side) for side in zip(*pairs, strict=True)))
        figures["least_of_a_matrix"] = min(cosine(*pair) for pair in pairs)
        # 3. A few steps from the usual start, where the adapter changes nothing.
        put(adapter, {name: weight * ("lora_A" in name) for name, weight in start.items()})
        optimizer, losses = torch.optim.AdamW(adapter.values(), lr=args.learning_rate, weight_decay=0.0), []
        optimizer.zero_grad()
        for step in range(args.steps):
            first = step * args.batch % (len(training) - args.batch)
            loss = loss_of(model, training[first : first + args.batch], precision)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapter.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        figures["losses"] = [round(loss, 4) for loss in losses[:: max(1, args.steps // 6)]]
        figures["loss_of_last_10"] = sum(losses[-10:]) / len(losses[-10:])
        figures["held_out"] = held_out_loss(model, held_out, args.batch, precision)
        trained[precision] = {name: weight.detach().clone() for name, weight in adapter.items()}
        print(precision, json.dumps(figures), flush=True)
        if precision == "bfloat16":
            base_16 = (model, adapter)
        del model, adapter, optimizer
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    # 4. What merging and evaluating do: every adapter on the 16-bit base.
    for precision, weights in trained.items():
        put(base_16[1], weights)
        loss = held_out_loss(base_16[0], held_out, args.batch, "bfloat16")
        print(f"held-out loss on the 16-bit base, adapter trained on {precision}: {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
