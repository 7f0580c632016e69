"""What a run computes: a method's arguments as the planner counts them. Standard library only."""

import ast
import functools
from dataclasses import dataclass, replace
from typing import Any

from common.arguments import read_fields
from common.environment import ROOT
from common.run.ranks import batch_of_rank

METHODS = ("sft", "dpo", "kto", "grpo", "ppo", "reward")
SAMPLING = ("grpo", "ppo")  # methods that sample from the policy
SEQUENCES = {"dpo": 2, "reward": 2}  # a pair is two rows; the reference of DPO is the adapter switched off, no model
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# What the planner reads of a recipe's arguments; any of them may be given to it.
COUNTED = (
    *("load_in_4bit", "load_in_fp8", "gradient_checkpointing", "checkpoint_skip_layers", "lora_r"),
    *("lora_target_modules", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing"),
    *("train_embeddings", "max_prompt_length", "max_completion_length", "num_generations", "rollouts", "beta"),
    *("num_iterations", "rollout_batch_size", "num_ppo_epochs", "reward_model", "precompute_ref_log_probs"),
    *("num_train_epochs", "max_steps", "eval_ratio"),
)


@dataclass(frozen=True)
class Workload:
    """A run of a recipe. Lengths are in tokens; rows of DPO and reward are pairs, of GRPO and PPO completions."""

    method: str
    precision: str  # of the frozen base: "16 bit", "nf4" or "fp8"
    gradient_checkpointing: bool
    rows: int  # of a micro-batch
    accumulation: int
    length: int  # of a row: prompt and completion together
    completion: int  # of which a completion, for GRPO and PPO
    lora_r: int = 16
    attention_only: bool = False  # which projections have an adapter; else all seven
    kept_layers: int = 0  # under checkpointing: layers that keep their activations all the same
    packing: bool | None = None  # SFT packs short documents; None: not known, the larger of the two is counted
    train_embeddings: bool = False
    rollouts: str = "auto"
    generated: int = 0  # completions of a step
    group: int = 1  # of each prompt
    passes: int = 1  # optimization passes over a rollout: num_ppo_epochs, num_iterations
    reference: bool = True  # whether the reference policy is computed in each step
    reward_model: bool = False  # PPO's, an adapter on the same base
    pairs: bool = True  # reward: pairs are two sequences a row, rated completions one
    gpus: int = 1
    sharded: bool = False  # FSDP2: weights, gradients and optimizer divided among the GPUs

    @property
    def sequences(self) -> int:
        """Sequences of a micro-batch."""
        return self.rows * (SEQUENCES.get(self.method, 1) if self.pairs else 1)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.sequences * self.length

    @property
    def step_rows(self) -> int:
        """Rows of a step, of all GPUs."""
        return self.rows * self.accumulation * self.gpus

    def with_rows(self, rows: int) -> "Workload":
        """The same step in micro-batches of `rows`."""
        return replace(self, rows=rows, accumulation=self.rows * self.accumulation // rows)


@functools.cache
def recipe_defaults(method: str) -> dict[str, Any]:
    """{argument: default} of a recipe, those that the planner reads. Raises ValueError for another method."""
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    fields = read_fields(ROOT / "recipes" / f"{method}.py") or []
    defaults = {}
    for field in fields:
        if field.name in COUNTED and field.default is not None:
            defaults[field.name] = _value(field.default)
    return defaults


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Tuple):  # of starred tuples
        parts = [_value(part.value) if isinstance(part, ast.Starred) else (_value(part),) for part in node.elts]
        return tuple(word for part in parts for word in part)
    return ast.literal_eval(node)


def settings(card: Any, method: str, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """The recipe's arguments that count: its defaults, then the card's, then `given`."""
    own = {name: value for name, value in getattr(card, method, {}).items() if name in COUNTED}
    return {**recipe_defaults(method), **own, **(given or {})}


def workload(card: Any, method: str, given: dict[str, Any] | None = None, *, gpus: int = 1, **more: Any) -> Workload:
    """The run of `method` on this card's model with the arguments `given`; `more` are fields of Workload.

    The batch of a step is divided among the GPUs, as the recipes do. Raises ValueError for another method, and
    InputError where the batch does not divide.
    """
    values = settings(card, method, given)
    rows, accumulation = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    completion = values.get("max_completion_length", 0)
    length = values["max_length"] if "max_length" in values else values["max_prompt_length"] + completion
    if method == "ppo":
        accumulation = max(1, accumulation // gpus)
    else:
        rows, accumulation = batch_of_rank(rows, accumulation, gpus, keep_rows=method == "kto")
    generated = {"grpo": rows * accumulation, "ppo": values.get("rollout_batch_size", 0) // gpus}.get(method, 0)
    adapted = values.get("lora_target_modules") or ATTENTION
    reward_model = method == "ppo" and values.get("reward_model") is not None
    if reward_model:
        adapted = ("gate_proj",)  # the adapters are those of the reward model, whose recipe adapts all seven
    fp8 = bool(values.get("load_in_fp8"))
    return Workload(
        method=method,
        precision="fp8" if fp8 else "nf4" if values["load_in_4bit"] else "16 bit",
        gradient_checkpointing=values["gradient_checkpointing"],
        rows=rows,
        accumulation=accumulation,
        length=length,
        completion=completion,
        lora_r=values["lora_r"],
        attention_only=set(adapted) <= set(ATTENTION),
        kept_layers=min(values.get("checkpoint_skip_layers", 0), card.architecture.layers),
        packing=None if method == "sft" and values["packing"] else False,
        train_embeddings=values.get("train_embeddings", False),
        rollouts=values.get("rollouts", "auto"),
        generated=generated,
        group=values.get("num_generations", 1),
        passes=values.get("num_ppo_epochs", values.get("num_iterations", 1)),
        reference=not values.get("precompute_ref_log_probs", False) and values.get("beta", 1) != 0,
        reward_model=reward_model,
        gpus=gpus,
        **more,
    )
