"""The named workloads: a method on a model's shape, with every number that decides how much there is to compute."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from common.lm.cards import Card
from common.plan.workload import METHODS, recipe_defaults
from common.run.files import read_object

RANK = 16  # of the LoRA adapter, as the recipes have it
AT_ONCE = 256  # completions of a rollout that are decoded together, at most
# Of the others: rows of a batch, and tokens of a completion.
ROWS, LENGTH = {"score": 1, "rollout": 64}, {"score": 512, "rollout": 256}


@dataclass(frozen=True)
class Workload:
    """What is measured. For what the fields mean see the arguments of the same names in benchmark.py."""

    model: str = "qwen2.5-7b"
    method: str = "sft"
    load_in_4bit: bool = True
    gradient_checkpointing: bool = True
    per_device_train_batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    max_length: int | None = None
    prompt_length: int = 100
    num_generations: int = 4
    ragged: bool = False

    @property
    def batch(self) -> int:
        """Rows of a micro-batch (DPO and reward: pairs); of GRPO, PPO and a rollout completions."""
        return self.per_device_train_batch_size or ROWS.get(self.method) or self._default("per_device_train_batch_size")

    @property
    def accumulation(self) -> int:
        return self.gradient_accumulation_steps or self._default("gradient_accumulation_steps") or 1

    @property
    def length(self) -> int:
        """Tokens of a row (of a pair, of each side), or of a completion where the method samples them."""
        name = "max_completion_length" if self.method in ("grpo", "ppo") else "max_length"
        return self.max_length or LENGTH.get(self.method) or self._default(name)

    def _default(self, argument: str) -> int:
        """The recipe's own value of an argument; 0 where the method is no recipe."""
        return recipe_defaults(self.method).get(argument, 0) if self.method in METHODS else 0

    def described(self, card: Card) -> str:
        """In words, for the head of a table: `sft, qwen2.5-7b, nf4, recomputation, 4 x 1 x 2048`."""
        weights = "nf4" if self.load_in_4bit and self.method != "rollout" else "16 bit"
        shape = f"{self.batch} x {self.accumulation} x {self.length}"
        if self.method == "rollout":
            shape = f"{self.batch} completions, groups of {self.num_generations}, {self.prompt_length} + {self.length}"
        elif self.method in ("grpo", "ppo"):
            shape = f"{self.batch} x {self.accumulation} completions, {self.prompt_length} + {self.length}"
        recomputed = ["recomputation" if self.gradient_checkpointing else "no recomputation"]
        words = [self.method, card.name, weights, *(recomputed if self.method in METHODS else []), f"{shape} tokens"]
        return ", ".join([*words, *(["ragged"] if self.ragged else [])])


@dataclass(frozen=True)
class Job:
    """What every contestant of a workload is given: the checkpoint, the rows, and how many steps it has to do."""

    workload: Workload
    checkpoint: Path
    folder: Path  # rows.jsonl, and of SFT the same rows as tokens.jsonl
    steps: int
    warmup: int  # steps that are left out of the figures
    logging: int  # steps from one logged loss to the next
    on_gpu: bool

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Self:
        facts = read_object(file)
        facts["workload"] = Workload(**facts["workload"])
        facts |= {name: Path(facts[name]) for name in ("checkpoint", "folder")}
        return cls(**facts)

    def rows(self, name: str) -> list[dict]:
        text = (self.folder / f"{name}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


BF16_7B = {"load_in_4bit": False, "gradient_checkpointing": False}
ONE = {"gradient_accumulation_steps": 1}
SMALL = "qwen2-1.5b"
TINY = {"model": "tiny", "load_in_4bit": False, "gradient_checkpointing": False, "gradient_accumulation_steps": 1}
SAMPLED = {**TINY, "per_device_train_batch_size": 8, "max_length": 16, "prompt_length": 16}

WORKLOADS = {
    "sft-7b-bf16": Workload(**BF16_7B, **ONE),
    "sft-7b-nf4": Workload(**ONE),
    "sft-7b-nf4-ragged": Workload(ragged=True, per_device_train_batch_size=8, **ONE),
    "dpo-7b-nf4": Workload(method="dpo", **ONE),
    "dpo-7b-nf4-half": Workload(method="dpo", prompt_length=1024, **ONE),
    "kto-7b-nf4": Workload(method="kto", **ONE),
    "reward-7b-nf4": Workload(method="reward", **ONE),
    "score-7b-nf4": Workload(method="score"),
    "grpo-1.5b": Workload(SMALL, "grpo", False, False, 16, 4, max_length=256, prompt_length=128, num_generations=8),
    "grpo-7b-nf4": Workload(method="grpo"),
    "ppo-1.5b-nf4": Workload(SMALL, "ppo", prompt_length=128),
    "rollout-1.5b": Workload(SMALL, "rollout", False, prompt_length=128, num_generations=8),
    "rollout-1.5b-256": Workload(SMALL, "rollout", False, False, 256, prompt_length=128, num_generations=8),
    "rollout-1.5b-ragged": Workload(
        SMALL, "rollout", False, False, 2048, max_length=1024, prompt_length=128, num_generations=8, ragged=True
    ),
    "rollout-7b": Workload(method="rollout", per_device_train_batch_size=32, max_length=512, prompt_length=256),
    "rollout-7b-256": Workload(method="rollout", per_device_train_batch_size=256, max_length=512, prompt_length=256),
    "sft-tiny": Workload(**TINY, max_length=64),
    "sft-tiny-ragged": Workload(**TINY, max_length=512, ragged=True),
    "dpo-tiny": Workload(**TINY, method="dpo", max_length=128),
    "kto-tiny": Workload(**TINY, method="kto", max_length=64),
    "reward-tiny": Workload(**TINY, method="reward", max_length=64),
    "score-tiny": Workload(**TINY, method="score", max_length=16),
    "grpo-tiny": Workload(**SAMPLED, method="grpo"),
    "ppo-tiny": Workload(**SAMPLED, method="ppo"),
    "rollout-tiny": Workload(**SAMPLED, method="rollout"),
}
