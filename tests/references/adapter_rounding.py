"""How much of float32's progress the first steps of LoRA make in bfloat16, by PEFT and with the MLP fused.

    python tests/references/adapter_rounding.py

What an adapter adds is at first smaller than half the distance between two bfloat16 numbers. PEFT and Unsloth add it to
a product that is rounded already, where it is lost; the fused MLP adds it before rounding. Two minutes on a CPU.
"""

import copy
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from common.lm.fused_mlp import fuse_mlps

LEARNING_RATE = 1e-5
STEPS = 8
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = Qwen2Config(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=4000, tie_word_embeddings=False,
)  # fmt: skip


def losses(base: torch.nn.Module, ids: torch.Tensor, dtype: torch.dtype, fused: bool) -> list[float]:
    """The loss before each of the steps, all on the same rows."""
    torch.manual_seed(3)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=MODULES)
    model = get_peft_model(copy.deepcopy(base).to(dtype), config)
    if fused:
        fuse_mlps(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    found = []
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(SHAPE)
    rows = torch.randint(0, 500, (4, 256), generator=torch.Generator().manual_seed(1))
    for name, dtype, fused in (
        ("float32", torch.float32, False),
        ("bfloat16, PEFT", torch.bfloat16, False),
        ("bfloat16, MLP fused", torch.bfloat16, True),
    ):
        first, *rest = losses(model, rows, dtype, fused)
        print(f"{name:20} loss {first:.4f}, fallen by {[round(first - loss, 4) for loss in rest]}", flush=True)
