"""A plain TRL script to hold recipes/kto.py against: no code of this repository, and no Unsloth.

TRITON_INTERPRET=1 python tests/references/plain_kto.py MODEL ROWS.jsonl OUTPUT_FOLDER

The rows (prompt, completion, label) are taken in their order. It trains once as it should be, and once with each of a
few faults planted, so that a test can see that they would show. TRL's kernel for log-probabilities takes minutes in
Triton's interpreter, so the faults have plain PyTorch in its place.
"""

import json
import sys
from pathlib import Path

import torch
import trl.trainer.utils
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

base, file, output = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(base)
rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def as_text(row: dict) -> dict:
    """As the model sees it: the chat template around the prompt, the end token after the completion."""
    turns = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return {"prompt": prompt, "completion": row["completion"] + "<|im_end|>", "label": row["label"]}


class PlainLogProbs:
    """What TRL's kernel computes: log-probabilities and entropies (N,), and the mean logits (N,)."""

    @staticmethod
    def apply(hidden, weight, bias, labels, *_):
        logits = hidden @ weight.T  # (N, V)
        log_probs = logits.log_softmax(-1)
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, labels[:, None])[:, 0], entropies, None, logits.mean(-1), None


class OwnCompletions(KTOTrainer):
    """The fault of a KL term that is estimated from the rows' own completions."""

    def _prepare_dataset(self, *arguments):
        dataset = super()._prepare_dataset(*arguments)
        return dataset.map(lambda row: {"KL_completion_ids": row["completion_ids"]})


class PromptWithLoss(KTOTrainer):
    """The fault of a missing mask."""

    def _prepare_dataset(self, *arguments):
        dataset = super()._prepare_dataset(*arguments)
        return dataset.map(
            lambda row: {
                "prompt_ids": row["prompt_ids"][:1],
                "completion_ids": row["prompt_ids"][1:] + row["completion_ids"],
            }
        )


def another_reference():
    """The base, changed a little."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    return model


def train(trainer_class=KTOTrainer, flipped=False, reference=None) -> list[list[float]]:
    """Loss, reward margin and KL of each step."""
    texts = [as_text({**row, "label": row["label"] != flipped}) for row in rows]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(42)
    trainer = trainer_class(
        model=model,
        ref_model=reference,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(texts),
        peft_config=LoraConfig(
            r=16,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        ),
        args=KTOConfig(
            output_dir=str(output),
            beta=0.1,
            desirable_weight=1.0,
            undesirable_weight=1.5,
            max_length=512,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            learning_rate=3e-3,
            lr_scheduler_type="linear",
            warmup_steps=0,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            bf16=False,
            seed=42,
            data_seed=42,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        ),
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return [[row["loss"], row["rewards/margins"], row["kl"]] for row in logged]


found = {"plain": train()}
trl.trainer.utils._ChunkedLogProbFunction = PlainLogProbs
found |= {
    "plain log-probabilities": train(),
    "labels flipped": train(flipped=True),
    "prompts with loss": train(PromptWithLoss),
    "another reference": train(reference=another_reference()),
    "own completions for the KL term": train(OwnCompletions),
}
(output / "losses.json").write_text(json.dumps(found))
