"""Proximal policy optimization (PPO) on one card: sample answers, score them, and move towards the better ones.

    make ppo                                                        the tiny model; a reward model of sample scores
    make ppo MODEL=outputs/merged DATA=prompts.jsonl REWARD=outputs/reward     scored by a run of make reward
    make ppo MODEL=outputs/merged DATA=prompts.jsonl ARGS="--rewards format my_rules.py:polite=0.5"
    make ppo MODEL=qwen2-1.5b DATA=scores.jsonl                     trains a reward model on the scores first

The four models of PPO are one frozen base, in 4 or 16 bit: with the adapter "default" on it is the policy, with
"critic" and a scalar head the critic, with "reward" and its head the reward model, with none the reference. So the
stage before must be in the base, merged. The method is that of arXiv:1707.06347 for language models as in
arXiv:1909.08593, in the phases of section "The phases" below; the arithmetic under it has shapes and no model.

A reward is a reward model, or rules (the functions of GRPO, or your own in a Python file), or both, added with weights:

    from common.rewards.builtin import text_of                     # my_rules.py, as --rewards my_rules.py:disclaimer

    def disclaimer(completions):
        return [float("no medical advice" in text_of(said)) - 2 * any(map(str.isdigit, text_of(said)[:50]))
                for said in completions]

Data is prompts, alone or with the columns that the rules read; or scores, or pairs. A score that stands in the data
rates the answer that stands beside it, not the one that the policy has just sampled: it never rewards a rollout. Scores
and pairs train a reward model (recipes/reward.py), which can score anything; their prompts are what PPO samples from.

Left out: several answers to a prompt at once, rewards between the tokens, vLLM, several GPUs.
"""

import copy
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common import environment
from common.cli import parse
from common.data.examples import Conversation, Prompt
from common.data.formats import PAIR_FORMATS, PROMPT_FORMATS, RATING_FORMATS, detect
from common.data.hold_out import hold_out
from common.data.prompts import distinct
from common.data.read import column_map, prompts
from common.data.rows import Faults, find_source, read_rows, source_sha256
from common.errors import STOPPED, InputError, Stopped, run_command
from common.lm.chat import end_token, set_chat_template, set_pad_token
from common.lm.hub import contents, fetch, load_tokenizer, resolved_revision
from common.rewards.adapter import find_reward_adapter
from common.rewards.contract import check_contract
from common.rewards.specification import Reward, check_prompts, load, score_completions
from common.run.curriculum import PromptSampler
from common.run.ending import show_ending
from common.run.files import write_folder
from common.run.folder import plan_run
from common.run.samples import Sample, show
from common.run.screen import loading
from common.run.stopping import Stop

if TYPE_CHECKING:
    import torch
    from common.lm.cuda_graph import RecordedPass
    from common.lm.generate import Completion
    from peft import PeftModel
    from rich.console import Console
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, TrainingArguments

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
REWARD_FILES = ("adapter_model.safetensors", "head.safetensors")
REWARD_MODEL = "reward_model"  # its name among the rewards
CHUNK = 128  # tokens whose logits are in memory at once: 78 MB in 32 bit for a vocabulary of 152,000


@dataclass(frozen=True)
class Args:
    """Every name that TRL, PEFT or transformers also has means the same here; those of PPO are TRL's of its own."""

    # What to train, on what, and where it goes.
    model: str = "tiny"
    """A model card's name (`make models`), a local directory or a hub id; it is also the reference."""
    data: str = str(environment.ROOT / "data_samples" / "scores.jsonl")
    """A file, a folder of files or a hub dataset."""
    output_dir: str | None = None
    """The run's folder. By default outputs/ppo-MODEL-HASH, so another setting is another folder."""

    # How the data is read.
    format: Literal["auto", *PROMPT_FORMATS] = "auto"
    """The format of the rows; auto takes it from the columns of the first."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=problem answer=solution."""
    system_prompt: str | None = None
    """A system message before every prompt."""
    chat_template_path: str | None = None
    """A .jinja file to use instead of the model's own chat template."""
    pad_token: str | None = None
    """The token to pad with, where the model has none that differs from its end token."""
    max_prompt_length: int = 1024
    """Tokens of a prompt; one that is longer is left out, for half a prompt is another one."""
    max_truncated: float = 0.05
    """Stop when a larger share of the prompts would be left out."""
    eval_ratio: float = 0.05
    """Share of the prompts to hold out; answers to them are scored before and after."""

    # The reward.
    reward_model: str | None = None
    """A run of `make reward` on the same base. Without one, scores or pairs in the data train one first."""
    reward_weight: float = 1.0
    """Its weight beside the rules; 0 does without a reward model. Its unit is a standard deviation of its data."""
    rewards: tuple[str, ...] = ()
    """The rules: NAME, FILE.py:FUNCTION or model:CHECKPOINT, each with =WEIGHT if it is not 1."""
    normalize_scores: bool = True
    """Take the running mean off the scores and divide them by their running standard deviation."""
    score_clip: float = 10.0
    """Then cut them off at plus and minus this."""
    missing_eos_penalty: float = 1.0
    """Then take this off where an answer was cut off before its end token."""
    kl_coef: float = 0.05
    """Weight of the KL divergence from the reference, taken off the reward of each token."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How that is estimated from the sampled token (joschu.net/blog/kl-approx.html); k1 is unbiased."""
    kl_target: float | None = 6.0
    """Nats of KL divergence in a whole answer that the weight is steered to; None keeps the weight as it is."""
    kl_horizon: int = 10_000
    """Episodes in which the weight may change by a fifth."""

    # Which prompts.
    difficulty: Literal["off", "easy", "medium", "hard"] = "off"
    """Draw prompts by what the policy itself last showed on them; off: every prompt once an epoch."""
    difficulty_by: Literal["entropy", "reward-spread", "pass-rate"] = "entropy"
    """The entropy of the tokens of the answers, the spread of their scores, or the share of good scores."""

    # The loss.
    rollout_batch_size: int = 32
    """Episodes, a prompt and its sampled answer, in each step."""
    num_ppo_epochs: int = 4
    """Passes over the episodes of a step."""
    max_completion_length: int = 128
    temperature: float = 0.7
    """Of sampling, and of every log-probability: the policy is the distribution that was sampled from."""
    cliprange: float = 0.2
    """The clipping of the probability ratio."""
    cliprange_value: float = 0.2
    """How far a value may move from what it was when the episode was sampled."""
    gamma: float = 1.0
    lam: float = 0.95
    """Lambda of generalized advantage estimation (arXiv:1506.02438)."""
    max_approx_kl: float = 0.15
    """The policy stops learning from a step's episodes once it is so far, in nats a token, from what sampled them."""
    critic_warmup_steps: int = 5
    """Steps at the beginning in which only the critic learns, for its first advantages are noise."""

    # The model and the adapters.
    load_in_4bit: bool = True
    """The frozen base in nf4 (QLoRA); --no-load-in-4bit for 16 bit."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 on a GPU that has it, else float16; float32 on the CPU."""
    lora_r: int = 16
    lora_alpha: int = 16
    lora_target_modules: tuple[str, ...] = ()
    """By default those of the reward model that is given, else the attention's projections."""

    # The optimization.
    per_device_train_batch_size: int = 8
    """Episodes in one pass; times the accumulation it is the episodes of an optimization step."""
    gradient_accumulation_steps: int = 4
    num_train_epochs: float = 1.0
    max_steps: int = -1
    """Stop after so many steps, whatever the epochs say."""
    learning_rate: float = 1.41e-5
    """Of the policy."""
    critic_learning_rate: float = 1e-4
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.0
    """Steps of warm-up of both learning rates; below 1, a share of the run."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: str = "adamw_8bit"
    """On the CPU, which has no 8-bit Adam, adamw_torch_fused takes its place."""
    gradient_checkpointing: bool = True
    """Recompute activations to save memory; a third faster without, where they fit."""
    seed: int = 42

    # What is shown and kept.
    logging_steps: int = 1
    save_steps: float = 0.1
    """A checkpoint every so many steps; below 1, a share of the run."""
    save_total_limit: int = 2
    time_limit: str | None = None
    """Hours:minutes:seconds, as 3:55:00, after which the run ends with a checkpoint, to be gone on with."""
    report_to: tuple[str, ...] = ()
    """wandb or trackio, besides TensorBoard, which is always written."""
    sample_prompts: int = 3
    """Held-out prompts to show answers to, before and after; and as many episodes of each step go to samples.jsonl."""
    sample_tokens: int = 128
    """The longest answer to show."""


def main() -> None:
    args, base, origins = parse(Args, "ppo", __doc__)
    stop = Stop(args.time_limit)
    if args.rollout_batch_size % (args.per_device_train_batch_size * args.gradient_accumulation_steps):
        raise InputError(
            f"--rollout-batch-size {args.rollout_batch_size} must be a multiple of --per-device-train-batch-size "
            f"{args.per_device_train_batch_size} x --gradient-accumulation-steps {args.gradient_accumulation_steps}"
        )
    if args.temperature <= 0:
        raise InputError(f"--temperature {args.temperature:g} must be above 0: PPO learns from answers that differ")

    # 1. Data and rewards: read and checked whole, before anything slow is loaded.
    faults = Faults()
    source = find_source(args.data)
    rules = load(args.rewards, args.max_completion_length) if args.rewards else []
    environment.set_variables(offline=base.local and not isinstance(source, str) and all(rule.local for rule in rules))
    os.environ.setdefault("UNSLOTH_BLOCK_COMPILE", "0")  # every adapter, and none, would be compiled anew
    found = list(read_rows(source, faults))
    columns = column_map(args.columns)
    rows = distinct(prompts(found, faults, args.format, columns))
    faults.stop()
    if not rows:
        raise InputError(f"{args.data}: holds no rows")
    if rules:
        check_prompts(rules, rows, faults)
        faults.stop()
        check_contract(rules, rows, args.seed, may_be_silent=True)  # no answer that is tried may need a disclaimer

    form = detect({columns.get(name, name): value for name, value in found[0].fields.items()}, PROMPT_FORMATS)
    rated = {**PAIR_FORMATS, **RATING_FORMATS}
    train_reward_model = bool(args.reward_weight) and not args.reward_model and form in rated
    if not (rules or train_reward_model or (args.reward_model and args.reward_weight)):
        raise InputError(
            f"{args.data}: nothing rewards the answers: it is {form}. Give --reward-model, a run of `make reward` on "
            "this base, or --rewards; or data with scores or pairs, on which a reward model is trained first"
        )
    identity = contents(base)
    reward_adapter = find_reward_adapter(args.reward_model, identity) if args.reward_model else None
    reward_files = [reward_adapter / name for name in REWARD_FILES] if reward_adapter else []

    # 2. The run: a new one, one to go on with, or one that is finished. Nothing is written yet.
    run = plan_run(
        "ppo",
        base.name,
        args.output_dir,
        arguments=asdict(args),
        origins=origins,
        inputs={
            "data": source_sha256(source) or source,
            "base": identity,
            "reward_model": source_sha256(reward_files),
            "reward_files": [source_sha256([rule.file]) for rule in rules if rule.file],
        },
    )
    if run is None:
        return

    console = loading(base.name)
    import unsloth  # noqa: F401, I001  first, and slow: it changes what is imported after it
    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments, set_seed
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
    from unsloth import FastLanguageModel, is_bfloat16_supported

    from common.run.checkpoints import CheckpointCallback, newest_checkpoint
    from common.lm.generate import Completion, generate as answer_prompts
    from common.run.metrics import ProgressCallback
    from common.lm.cuda_graph import RecordedPass
    from common.lm.scalar_head import load_head, new_head

    # 3. Prompts: the model's own chat template, up to where it goes on.
    base = fetch(base)
    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, args.chat_template_path, base.name)
    end = end_token(tokenizer)
    set_pad_token(tokenizer, args.pad_token or (base.card.pad_token if base.card else None), end)

    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    rows = [replace(row, prompt=[*system, *row.prompt]) for row in rows]
    rows = fitting(tokenizer, rows, args, console)
    held_out, rows = hold_out(rows, round(len(rows) * args.eval_ratio), random.Random(args.seed))
    asked = held_out[: args.sample_prompts]
    samples = [Sample(Conversation(row.place, row.prompt, row.tools), row.answer or "") for row in asked]
    steps = args.max_steps
    if steps < 0:
        steps = math.ceil(args.num_train_epochs * len(rows) / args.rollout_batch_size)
    if steps <= args.critic_warmup_steps:
        raise InputError(
            f"{steps} steps are no more than --critic-warmup-steps {args.critic_warmup_steps}: the policy would never "
            f"learn. {len(rows)} prompts are {len(rows) / args.rollout_batch_size:.1f} steps an epoch; raise "
            "--num-train-epochs, or --max-steps"
        )

    console.print(f"[bold]{base.name}[/bold], {len(rows)} prompts of {args.data} -> [bold]{run.folder}[/bold]")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        console.print("No GPU: adamw_torch_fused in place of 8-bit Adam.")
    with run:
        if train_reward_model:
            console.print(f"No reward model is given, and the data is {form}: one is trained on it first.")
            reward_adapter = train_reward(args, run.folder, stop)

        # 4. The four models: one frozen base in 4 or 16 bit, under new LoRA adapters for policy and critic.
        dtype = {
            "auto": (torch.bfloat16 if is_bfloat16_supported() else torch.float16) if on_gpu else torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
            "float32": torch.float32,
        }[args.dtype]
        checkpointing = "unsloth" if args.gradient_checkpointing else False
        model, _ = FastLanguageModel.from_pretrained(
            base.source,
            revision=base.revision,
            max_seq_length=args.max_prompt_length + max(args.max_completion_length, args.sample_tokens),
            dtype=dtype,
            load_in_4bit=args.load_in_4bit,
            use_gradient_checkpointing=checkpointing,
            use_exact_model_name=True,  # else a hub id is swapped for Unsloth's own 4-bit copy of it
            random_state=args.seed,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=0.0,  # the loss compares log-probabilities, which dropout would move
            target_modules=target_modules(args, reward_adapter),
            use_gradient_checkpointing=checkpointing,
            random_state=args.seed,
        )
        model.add_adapter("critic", copy.deepcopy(model.peft_config["default"]))
        critic_head = new_head(model.config.get_text_config().hidden_size, model.device)
        reward_head = None
        if reward_adapter:
            model.load_adapter(str(reward_adapter), adapter_name="reward")
            reward_head, _ = load_head(reward_adapter, model.device)
        FastLanguageModel.for_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
        run.update(revision=resolved_revision(base), dtype=str(dtype), machine=environment.describe_machine())

        def sample(rows: list[Prompt], max_new_tokens: int, temperature: float) -> list[Completion]:
            FastLanguageModel.for_inference(model)
            conversations = [Conversation(row.place, row.prompt, row.tools) for row in rows]
            said = answer_prompts(model, tokenizer, conversations, end, max_new_tokens, temperature, batch_size=128)
            FastLanguageModel.for_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
            return said

        def shown_answers() -> list[str]:
            return [said.text + ("" if said.ended else " ...") for said in sample(asked, args.sample_tokens, 0.0)]

        # 5. What learns, and what every phase shares.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
        settings = TrainingArguments(
            output_dir=str(run.folder / "checkpoints" / "part"),  # whence CheckpointCallback moves what is whole
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.lr_scheduler_type,
            warmup_steps=args.warmup_steps,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            optim=args.optim if on_gpu else "adamw_torch_fused",
            fp16=dtype == torch.float16,
            logging_steps=args.logging_steps,
            logging_first_step=True,
            save_steps=args.save_steps,
            report_to=["tensorboard", *args.report_to],
            run_name=run.folder.name,
            seed=args.seed,
        )
        critic_parameters = [*adapter_parameters(model, "critic"), *critic_head.parameters()]
        ppo = PPO(
            args=args,
            model=model,
            pad_token_id=tokenizer.pad_token_id,
            sample=sample,
            rules=rules,
            reward_head=reward_head,
            reward_backbone=RecordedPass(model),
            critic_head=critic_head,
            policy=Learner(
                adapter_parameters(model, "default"), settings, args.learning_rate, steps - args.critic_warmup_steps
            ),
            critic=Learner(critic_parameters, settings, args.critic_learning_rate, steps),
            kl_coef=args.kl_coef,
            scores=RunningMoments(),
            prompts=PromptSampler(rows, args.difficulty, args.difficulty_by, args.seed),
        )
        set_seed(args.seed)
        before, quality_before = shown_answers(), assess(ppo, held_out)

        # 6. The loop, with the trainer's callbacks for logs, as in the other recipes.
        state, control = TrainerState(max_steps=steps), TrainerControl()
        set_seed(args.seed)
        if checkpoint := newest_checkpoint(run):
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            load_checkpoint(ppo, checkpoint)
        state.compute_steps(settings, steps)
        reports = [report() for report in get_reporting_integration_callbacks(settings.report_to)]
        progress = ProgressCallback(run.folder / "metrics.jsonl", None, console, LIVE_LINE)
        checkpoints = CheckpointCallback(run, stop, args.save_total_limit)
        flow = [DefaultFlowCallback(), progress, *reports, checkpoints]
        callbacks = CallbackHandler(flow, model, tokenizer, None, None)
        callbacks.on_train_begin(settings, state, control)
        forget_after(run.folder / "samples.jsonl", state.global_step)
        while state.global_step < steps and not control.should_training_stop:
            stats: dict[str, float] = {}
            with seconds(stats, "time/generate"):
                episodes = generate(ppo)
            with seconds(stats, "time/reward"):
                stats |= compute_reward(ppo, episodes)
            with seconds(stats, "time/advantages"):
                stats |= compute_advantages(ppo, episodes)
            with seconds(stats, "time/step"):
                stats |= step(ppo, episodes, state.global_step)
            keep_samples(run.folder / "samples.jsonl", episodes, args.sample_prompts, state.global_step)

            state.global_step += 1
            state.epoch = state.global_step * args.rollout_batch_size / len(rows)
            state.num_input_tokens_seen += int(episodes.attention_mask.sum())
            callbacks.on_step_end(settings, state, control)
            if control.should_log:
                callbacks.on_log(settings, state, control, logs=stats)
            if control.should_save:
                save_checkpoint(ppo, Path(settings.output_dir, f"checkpoint-{state.global_step}"))
                callbacks.on_save(settings, state, control)
        callbacks.on_train_end(settings, state, control)

        # 7. Save, and show what changed.
        saved = run.folder / "adapter"
        with write_folder(saved) as part:
            model.save_pretrained(part, selected_adapters=["default"])
            tokenizer.save_pretrained(part)
        set_seed(args.seed)
        after, quality_after = shown_answers(), assess(ppo, held_out)
        run.update(
            tokens=state.num_input_tokens_seen,
            held_out={"prompts": len(held_out), "before": quality_before, "after": quality_after},
        )
        show(console, run.folder / "samples.json", samples, before, after)
        if held_out:
            was, now = quality_before, quality_after
            console.print(
                f"{len(held_out)} held-out prompts: score {was['score']:.3f} +- {was['score_std']:.3f} -> "
                f"{now['score']:.3f} +- {now['score_std']:.3f}, {now['kl']:.2f} nats from the reference"
            )
        show_ending(console, run, saved)


LIVE_LINE = {
    "score": "score/mean",
    "kl": "objective/kl",
    "entropy": "objective/entropy",
    "approx kl": "policy/approx_kl",
    "clip fraction": "policy/clip_fraction",
    "value loss": "value/loss",
    "explained variance": "value/explained_variance",
    "length": "response/length",
    "truncated": "response/no_end",
}


# The phases. Each may be changed by itself; what one finds out it writes into the episodes, for those after it.


@dataclass
class Episodes:
    """What was asked and answered, as text and as tensors, padded on the right: B episodes, T tokens each at most, C of
    them the answer's at most. A column of the (B, C) tensors is a token of the answer: the action.
    """

    rows: list[Prompt]
    answers: "list[Completion]"
    input_ids: "Tensor"  # (B, T)
    attention_mask: "Tensor"  # (B, T)
    start: "Tensor"  # (B,) the column of input_ids where the answer begins
    tokens: "Tensor"  # (B, C) the answer's
    mask: "Tensor"  # (B, C) bool; false at padding
    # compute_reward
    log_probs: "Tensor | None" = None  # (B, C) of the policy that sampled
    ref_log_probs: "Tensor | None" = None  # (B, C) of the reference
    rewards: "Tensor | None" = None  # (B, C)
    scores: list[float] = field(default_factory=list)  # B, before they are normalized
    parts: dict[str, list[float | None]] = field(default_factory=dict)  # B by reward, before weighting
    # compute_advantages
    values: "Tensor | None" = None  # (B, C) of the critic, before each token
    advantages: "Tensor | None" = None  # (B, C)
    returns: "Tensor | None" = None  # (B, C)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: list[int]) -> "Episodes":
        """The episodes `index`, with no more columns of padding than they need."""
        width = {"T": int(self.attention_mask[index].sum(1).max()), "C": int(self.mask[index].sum(1).max())}
        taken = {"rows": [self.rows[i] for i in index], "answers": [self.answers[i] for i in index]}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not hasattr(value, "shape"):
                continue
            columns = width["T"] if entry.name in ("input_ids", "attention_mask") else width["C"]
            taken[entry.name] = value[index] if value.dim() == 1 else value[index, :columns]
        return Episodes(**taken)


@dataclass
class PPO:
    """What the phases share: the models, what learns, and every number that a checkpoint has to hold."""

    args: Args
    model: "PeftModel"
    pad_token_id: int
    sample: "Callable[[list[Prompt], int, float], list[Completion]]"
    rules: list[Reward]
    reward_head: "torch.nn.Linear | None"
    reward_backbone: "RecordedPass"
    critic_head: "torch.nn.Linear"
    policy: "Learner"
    critic: "Learner"
    kl_coef: float
    scores: "RunningMoments"
    prompts: PromptSampler


def generate(ppo: PPO) -> Episodes:
    """Phase 1: draw prompts and let the policy answer them."""
    rows = ppo.prompts.draw(ppo.args.rollout_batch_size)
    said = ppo.sample(rows, ppo.args.max_completion_length, ppo.args.temperature)
    return as_episodes(rows, said, ppo.pad_token_id, ppo.critic_head.weight.device)


def compute_reward(ppo: PPO, episodes: Episodes) -> dict[str, float]:
    """Phase 2: score each answer as a whole, and take the KL divergence from the reference off at each token.

    The log-probabilities are computed anew, by the same pass as in `step`: those of sampling, with its cache and its
    padding on the left, differ by more than a ratio of 1 can bear.
    """
    import torch

    args, mask = ppo.args, episodes.mask
    score_episodes(ppo, episodes)
    normalized = episodes.scores
    if args.normalize_scores:
        ppo.scores.update(episodes.scores)
        normalized = [ppo.scores.normalize(score) for score in episodes.scores]
    final = [
        max(-args.score_clip, min(args.score_clip, score)) - args.missing_eos_penalty * (not said.ended)
        for score, said in zip(normalized, episodes.answers, strict=True)
    ]
    episodes.log_probs, entropies = all_log_probs(ppo, episodes, "default")
    episodes.ref_log_probs, _ = all_log_probs(ppo, episodes, "reference")
    log_ratios = episodes.log_probs - episodes.ref_log_probs  # (B, C)
    penalty = kl_estimate(log_ratios, args.kl_estimator)
    episodes.rewards = shaped_rewards(torch.tensor(final, device=mask.device), penalty, ppo.kl_coef, mask)

    kl = float((log_ratios * mask).sum(1).mean())
    kl_coef = ppo.kl_coef
    if args.kl_target is not None:
        ppo.kl_coef = steered(ppo.kl_coef, kl, args.kl_target, len(episodes), args.kl_horizon)
    lengths = [len(said.completion_ids) for said in episodes.answers]
    ppo.prompts.learn((entropies.sum(1) / mask.sum(1)).tolist(), episodes.scores)
    return {
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/entropy": float(masked_mean(entropies, mask)),
        "objective/reward": float(episodes.rewards.sum(1).mean()),
        **score_figures(ppo, episodes),
        "score/normalized": sum(final) / len(final),
        "response/length": sum(lengths) / len(lengths),
        "response/no_end": sum(not said.ended for said in episodes.answers) / len(episodes),
    }


def compute_advantages(ppo: PPO, episodes: Episodes) -> dict[str, float]:
    """Phase 3: what the critic expected before each token, and how much better than that it went."""
    import torch

    args, mask = ppo.args, episodes.mask
    with torch.no_grad(), adapter(ppo.model, "critic"):
        episodes.values = in_parts(episodes, args, lambda part: values_of(ppo.model, ppo.critic_head, part))
    advantages, episodes.returns = gae(episodes.rewards, episodes.values, mask, args.gamma, args.lam)
    episodes.advantages = masked_whiten(advantages, mask)
    return {
        "value/mean": float(masked_mean(episodes.values, mask)),
        "value/explained_variance": float(explained_variance(episodes.values, episodes.returns, mask)),
    }


def step(ppo: PPO, episodes: Episodes, number: int) -> dict[str, float]:
    """Phase 4: move policy and critic, a few times over the same episodes. `number` counts the steps from 0.

    Each has a backward pass and an optimizer of its own. One backward pass through both would run after the adapter has
    been switched, and gradient checkpointing would then recompute the policy's activations with the critic's adapter:
    no error, wrong gradients.
    """
    import torch

    args = ppo.args
    learns = number >= args.critic_warmup_steps
    figures: dict[str, list[float]] = defaultdict(list, {"loss": [] if learns else [0.0]})
    for _ in range(args.num_ppo_epochs):
        order = torch.randperm(len(episodes)).tolist()
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        for first in range(0, len(order), size):
            batch = [
                episodes.take(order[i : i + args.per_device_train_batch_size])
                for i in range(first, first + size, args.per_device_train_batch_size)
            ]
            if learns:
                of_policy = update_policy(ppo, batch)
                learns = not of_policy["policy/stopped"]
                for name, value in of_policy.items():
                    figures[name].append(value)
            for name, value in update_critic(ppo, batch).items():
                figures[name].append(value)
    rates = {"learning_rate": ppo.policy.learning_rate, "critic/learning_rate": ppo.critic.learning_rate}
    if number >= args.critic_warmup_steps:
        ppo.policy.schedule.step()
    ppo.critic.schedule.step()
    return {name: sum(values) / len(values) for name, values in figures.items()} | rates


def update_policy(ppo: PPO, batch: list[Episodes]) -> dict[str, float]:
    """One optimization step of the policy on `batch`, a pass for each of its parts; none if it has moved too far."""
    args, figures = ppo.args, defaultdict(float)
    count = int(sum(part.mask.sum() for part in batch))  # a token weighs the same, whatever part it is in
    for part in batch:
        log_probs, _ = log_probs_of(ppo.model, part, args.temperature)  # (B, C)
        losses = policy_losses(log_probs, part.log_probs, part.advantages, args.cliprange)
        loss = (losses * part.mask).sum() / count
        ppo.policy.backward(loss)

        log_ratios = (log_probs.detach() - part.log_probs)[part.mask]  # (N,)
        ratios = log_ratios.exp()
        figures["loss"] += float(loss.detach())
        figures["policy/approx_kl"] += float(kl_estimate(-log_ratios, "k3").sum()) / count
        figures["policy/clip_fraction"] += float(((ratios - 1).abs() > args.cliprange).sum()) / count
        figures["policy/ratio"] += float(ratios.sum()) / count
    stopped = figures["policy/approx_kl"] > args.max_approx_kl
    gradient_norm = ppo.policy.discard() if stopped else ppo.policy.step()
    return {**figures, "policy/grad_norm": gradient_norm, "policy/stopped": float(stopped)}


def update_critic(ppo: PPO, batch: list[Episodes]) -> dict[str, float]:
    """One optimization step of the critic on `batch`, as `update_policy`."""
    args, figures = ppo.args, defaultdict(float)
    count = int(sum(part.mask.sum() for part in batch))
    with adapter(ppo.model, "critic"):
        for part in batch:
            values = values_of(ppo.model, ppo.critic_head, part)  # (B, C)
            losses = value_losses(values, part.values, part.returns, args.cliprange_value)
            loss = (losses * part.mask).sum() / count
            ppo.critic.backward(loss)
            moved = (values.detach() - part.values).abs() > args.cliprange_value
            figures["value/loss"] += float(loss.detach())
            figures["value/clip_fraction"] += float((moved & part.mask).sum()) / count
    return {**figures, "value/grad_norm": ppo.critic.step()}


# What the phases ask of the models.


@contextmanager
def adapter(model: "PeftModel", name: str) -> Iterator[None]:
    """Within the block the model is "critic", "reward" or "reference"; outside, and as "default", the policy.

    A block holds the forward pass and its backward pass, or neither: see `step`.
    """
    if name == "reference":
        with model.disable_adapter():
            yield
        return
    # Only the active adapter takes gradients, and the reward model's takes none.
    model.set_adapter(name, inference_mode=name == "reward")
    try:
        yield
    finally:
        model.set_adapter("default")


def as_episodes(rows: list[Prompt], said: "list[Completion]", pad_token_id: int, device: "torch.device") -> Episodes:
    """Prompts and answers as tensors. On the right no token sees the padding, with or without a mask."""
    import torch
    from common.lm.hidden_states import pad_right

    input_ids, attention_mask = pad_right([a.prompt_ids + a.completion_ids for a in said], pad_token_id, device)
    tokens, mask = pad_right([answer.completion_ids for answer in said], pad_token_id, device)
    start = torch.tensor([len(answer.prompt_ids) for answer in said], device=device)
    return Episodes(rows, said, input_ids, attention_mask, start, tokens, mask.bool())


def states_before(hidden: "Tensor", start: "Tensor", columns: int) -> "Tensor":
    """Of hidden states (B, T, h) those that each token of the answer was predicted from, a column before it: (B, C, h).

    `start` (B,) is the column where the answer begins. Past the answer's end the states mean nothing.
    """
    offsets = start.new_ones(columns).cumsum(0) - 2  # -1, 0, 1, ...
    index = (start[:, None] + offsets).clamp(max=hidden.shape[1] - 1)  # (B, C)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))


def log_probs_of(model: "PeftModel", episodes: Episodes, temperature: float) -> "tuple[Tensor, Tensor]":
    """Log-probability of each token of the answers, and the entropy (without gradient) it was drawn at: (B, C), nats.

    Zeros at padding. Logits are computed of the answers only, CHUNK tokens at a time, and again in the backward pass:
    whole they would take more memory than everything else.
    """
    import torch
    from common.lm.hidden_states import last_hidden
    from torch.utils.checkpoint import checkpoint

    causal, mask = model.get_base_model(), episodes.mask
    to_logits = causal.get_output_embeddings()
    cap = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2 has one

    def score(states: "Tensor", tokens: "Tensor") -> "Tensor":
        logits = to_logits(states.to(to_logits.weight.dtype)).float()  # (N, V)
        logits = (logits / cap).tanh() * cap if cap else logits
        return torch.stack(token_log_probs(logits, tokens, temperature))  # (2, N)

    hidden = last_hidden(model, episodes.input_ids, episodes.attention_mask)  # (B, T, h)
    states = states_before(hidden, episodes.start, mask.shape[1])[mask]  # (N, h)
    tokens = episodes.tokens[mask]  # (N,)
    parts = [
        checkpoint(score, some, taken, use_reentrant=False)
        for some, taken in zip(states.split(CHUNK), tokens.split(CHUNK), strict=True)
    ]
    log_probs, entropies = torch.cat(parts, 1)  # (N,) each
    zeros = log_probs.new_zeros(mask.shape)
    return zeros.masked_scatter(mask, log_probs), zeros.masked_scatter(mask, entropies.detach())


def values_of(model: "PeftModel", head: "torch.nn.Linear", episodes: Episodes) -> "Tensor":
    """What the critic expects before each token of the answers: (B, C), 0 at padding. Its adapter must be active."""
    from common.lm.hidden_states import last_hidden
    from common.lm.scalar_head import apply_head

    hidden = last_hidden(model, episodes.input_ids, episodes.attention_mask)  # (B, T, h)
    return apply_head(head, states_before(hidden, episodes.start, episodes.mask.shape[1])) * episodes.mask


def all_log_probs(ppo: PPO, episodes: Episodes, name: str) -> "tuple[Tensor, Tensor]":
    """`log_probs_of` all the episodes by the policy, "default", or by the reference; without gradient."""
    import torch

    with torch.no_grad(), adapter(ppo.model, name):
        both = in_parts(
            episodes, ppo.args, lambda part: torch.stack(log_probs_of(ppo.model, part, ppo.args.temperature), -1)
        )
    return both[..., 0], both[..., 1]


def in_parts(episodes: Episodes, args: Args, compute: "Callable[[Episodes], Tensor]") -> "Tensor":
    """`compute` (b, c, ...) for as many episodes at a time as a training pass has, put together as (B, C, ...)."""
    import torch

    parts = []
    for first in range(0, len(episodes), args.per_device_train_batch_size):
        index = [*range(first, min(first + args.per_device_train_batch_size, len(episodes)))]
        part = compute(episodes.take(index))
        missing = episodes.mask.shape[1] - part.shape[1]
        parts.append(torch.cat([part, part.new_zeros(len(index), missing, *part.shape[2:])], 1))
    return torch.cat(parts)


def score_episodes(ppo: PPO, episodes: Episodes) -> None:
    """Fill in `scores` and `parts`: the weighted sum of reward model and rules, and what each of them gave."""
    from common.lm.scalar_head import score_last

    episodes.scores, episodes.parts = [0.0] * len(episodes), {}
    if ppo.rules:
        episodes.scores, episodes.parts = score_completions(ppo.rules, episodes.rows, episodes.answers)
    if ppo.reward_head is not None and ppo.args.reward_weight:
        texts = [(said.prompt_ids, said.completion_ids) for said in episodes.answers]
        with adapter(ppo.model, "reward"):
            batch_size = ppo.args.per_device_train_batch_size
            given = score_last(ppo.model, ppo.reward_head, texts, ppo.pad_token_id, batch_size, ppo.reward_backbone)
        episodes.parts = {**episodes.parts, REWARD_MODEL: given}
        episodes.scores = [s + ppo.args.reward_weight * g for s, g in zip(episodes.scores, given, strict=True)]


def score_figures(ppo: PPO, episodes: Episodes) -> dict[str, float]:
    """What the log says of the scores: all together, the reward model's part, the rules' part, and each one's own."""
    mean, std = moments(episodes.scores)
    figures = {"score/mean": mean, "score/std": std}
    if REWARD_MODEL in episodes.parts:
        figures["score/model"] = ppo.args.reward_weight * moments(episodes.parts[REWARD_MODEL])[0]
    if ppo.rules:
        figures["score/rules"] = mean - figures.get("score/model", 0.0)
    for name, values in episodes.parts.items():
        known = [value for value in values if value is not None]  # None: the rule does not apply to that row
        if known:
            figures[f"rewards/{name}/mean"], figures[f"rewards/{name}/std"] = moments(known)
    return figures


def assess(ppo: PPO, rows: list[Prompt]) -> dict[str, float] | None:
    """What sampled answers to these prompts score, and how far from the reference they are; None for no prompts."""
    if not rows:
        return None
    said = ppo.sample(rows, ppo.args.max_completion_length, ppo.args.temperature)
    episodes = as_episodes(rows, said, ppo.pad_token_id, ppo.critic_head.weight.device)
    score_episodes(ppo, episodes)
    log_probs, _ = all_log_probs(ppo, episodes, "default")
    ref_log_probs, _ = all_log_probs(ppo, episodes, "reference")
    mean, std = moments(episodes.scores)
    return {
        "score": mean,
        "score_std": std,
        "kl": float((log_probs - ref_log_probs).sum(1).mean()),
        "length": sum(len(answer.completion_ids) for answer in said) / len(said),
        "no_end": sum(not answer.ended for answer in said) / len(said),
    }


# What is carried from step to step.


class Learner:
    """Parameters that are trained together: their optimizer, their learning rate, and their gradient's bounds.

    The list of parameters is made once. PEFT switches requires_grad with the adapter, so it says nothing about them.
    """

    def __init__(
        self, parameters: "list[Tensor]", settings: "TrainingArguments", learning_rate: float, steps: int
    ) -> None:
        import torch
        from transformers import Trainer, get_scheduler

        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(settings)
        self.parameters = parameters
        self.optimizer = optimizer(
            parameters, **{**options, "lr": learning_rate, "weight_decay": settings.weight_decay}
        )
        self.schedule = get_scheduler(
            settings.lr_scheduler_type, self.optimizer, settings.get_warmup_steps(steps), steps
        )
        self.scaler = torch.amp.GradScaler(enabled=settings.fp16)  # in float16 small gradients would vanish
        self.max_grad_norm = settings.max_grad_norm

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def backward(self, loss: "Tensor") -> None:
        self.scaler.scale(loss).backward()

    def step(self) -> float:
        """Clip the gradient, move, forget the gradient; the norm it had before."""
        import torch

        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return float(norm)

    def discard(self) -> float:
        """Forget the gradient; 0, the norm of no move."""
        self.optimizer.zero_grad()
        return 0.0

    def state(self) -> dict[str, Any]:
        parts = {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def restore(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far, by the parallel update of Chan, Golub and LeVeque (1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    def update(self, values: list[float]) -> None:
        mean, std = moments(values)
        count, apart = self.count + len(values), mean - self.mean
        self.squares += std**2 * len(values) + apart**2 * self.count * len(values) / count
        self.mean += apart * len(values) / count
        self.count = count

    def normalize(self, value: float) -> float:
        return (value - self.mean) / (math.sqrt(self.squares / self.count) + 1e-8)


def steered(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The next weight of the KL divergence: a fifth up or down in `horizon` episodes at most (arXiv:1909.08593, 2.2).

    `kl` and `target` are nats in a whole answer.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)


def moments(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, of these values and no more."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


# The arithmetic. (B, C): episodes by tokens of the answer, a bool mask false at padding; no model is needed.


def masked_mean(values: "Tensor", mask: "Tensor") -> "Tensor":
    """Mean of the values (B, C) where the mask is true: a scalar."""
    return (values * mask).sum() / mask.sum()


def masked_whiten(values: "Tensor", mask: "Tensor") -> "Tensor":
    """(B, C) moved and scaled to mean 0 and standard deviation 1 over the mask; 0 outside."""
    centred = values - masked_mean(values, mask)
    return centred * (masked_mean(centred**2, mask) + 1e-8).rsqrt() * mask


def token_log_probs(logits: "Tensor", tokens: "Tensor", temperature: float) -> "tuple[Tensor, Tensor]":
    """Log-probability of each token (N,) under softmax(logits / temperature), and that distribution's entropy: (N,).

    `logits` are (N, V) float32. In nats. The entropy has no gradient.
    """
    log_probs = (logits / temperature).log_softmax(-1)  # (N, V)
    without_gradient = log_probs.detach()
    entropies = -(without_gradient.exp() * without_gradient).sum(-1)
    return log_probs.gather(-1, tokens[:, None])[:, 0], entropies


def kl_estimate(log_ratios: "Tensor", kind: str) -> "Tensor":
    """KL(p || q) from tokens drawn from p, log_ratios = log p - log q, any shape; joschu.net/blog/kl-approx.html.

    k1 is unbiased and may be negative, k2 is biased and has less variance, k3 is unbiased and never negative.
    """
    if kind == "k1":
        return log_ratios
    if kind == "k2":
        return log_ratios**2 / 2
    return (-log_ratios).exp() - 1 + log_ratios


def shaped_rewards(scores: "Tensor", penalty: "Tensor", kl_coef: float, mask: "Tensor") -> "Tensor":
    """Rewards (B, C): -kl_coef x penalty at each token, and the score (B,) at the answer's last token on top."""
    rewards = -kl_coef * penalty * mask
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards: "Tensor", values: "Tensor", mask: "Tensor", gamma: float, lam: float) -> "tuple[Tensor, Tensor]":
    """Advantages and returns (B, C) by generalized advantage estimation; after the last token there is nothing.

    delta_t = r_t + gamma V_t+1 - V_t;  A_t = delta_t + gamma lam A_t+1;  returns are A + V.
    """
    advantages = rewards.new_zeros(rewards.shape)
    next_value = next_advantage = rewards.new_zeros(len(rewards))  # (B,)
    for column in reversed(range(rewards.shape[1])):
        delta = rewards[:, column] + gamma * next_value - values[:, column]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, column]
        next_value = values[:, column] * mask[:, column]
        advantages[:, column] = next_advantage
    return advantages, (advantages + values) * mask


def policy_losses(log_probs: "Tensor", old: "Tensor", advantages: "Tensor", cliprange: float) -> "Tensor":
    """-min(ratio A, clip(ratio) A) by token, (B, C); ratio = exp(log_probs - old). Only log_probs has a gradient."""
    ratios = (log_probs - old.detach()).clamp(-20, 20).exp()  # the clamp keeps a wild token from being infinite
    advantages = advantages.detach()
    return (-advantages * ratios).maximum(-advantages * ratios.clamp(1 - cliprange, 1 + cliprange))


def value_losses(values: "Tensor", old: "Tensor", returns: "Tensor", cliprange: float) -> "Tensor":
    """Half the squared error, or that of the value clipped to `cliprange` about the old one if it is larger; (B, C)."""
    old, returns = old.detach(), returns.detach()
    clipped = old + (values - old).clamp(-cliprange, cliprange)
    return ((values - returns) ** 2).maximum((clipped - returns) ** 2) / 2


def explained_variance(values: "Tensor", returns: "Tensor", mask: "Tensor") -> "Tensor":
    """1 - Var(returns - values) / Var(returns) over the mask: 1 for a perfect critic, 0 for a constant one."""
    returns, errors = returns[mask], (returns - values)[mask]
    return 1 - errors.var(correction=0) / (returns.var(correction=0) + 1e-8)


# Before the run, and beside it.


def target_modules(args: Args, reward_adapter: Path | None) -> list[str]:
    """The modules that policy and critic adapt. Unsloth's kernels want all adapters of a model on the same ones.

    Raises InputError where the reward model's are others than --lora-target-modules.
    """
    wanted = args.lora_target_modules
    if reward_adapter is None:
        return list(wanted or ATTENTION)
    config = json.loads((reward_adapter / "adapter_config.json").read_text(encoding="utf-8"))
    its_own = config["target_modules"]
    if wanted and set(wanted) != set(its_own):
        raise InputError(
            f"--lora-target-modules {' '.join(wanted)}: the reward model adapts {' '.join(sorted(its_own))}, and all "
            "adapters must adapt the same; leave the flag out to take those"
        )
    return sorted(its_own)


def train_reward(args: Args, run_folder: Path, stop: Stop) -> Path:
    """Run recipes/reward.py on the same model and data, in a process of its own; its adapter. Exits as it does."""
    folder = run_folder / "reward"
    command = [sys.executable, str(Path(__file__).with_name("reward.py")), "--output-dir", str(folder)]
    command += ["--model", args.model, "--data", args.data, "--format", args.format, "--dtype", args.dtype]
    command += ["--load-in-4bit" if args.load_in_4bit else "--no-load-in-4bit", "--seed", str(args.seed)]
    command += ["--lora-target-modules", *(args.lora_target_modules or ATTENTION)]
    command += ["--columns", *args.columns] if args.columns else []
    for flag, value in (("--chat-template-path", args.chat_template_path), ("--pad-token", args.pad_token)):
        command += [flag, value] if value else []
    with stop.noted_only():
        code = stop.wait(subprocess.Popen(command), run_folder)
    if code == STOPPED or stop.requested:
        raise Stopped(stop.requested or "its own stop", "while the reward model was trained")
    if code:
        sys.exit(code)
    return folder / "adapter"


def fitting(tokenizer: "PreTrainedTokenizerBase", rows: list[Prompt], args: Args, console: "Console") -> list[Prompt]:
    """The prompts of at most --max-prompt-length tokens; InputError when --max-truncated or more are longer."""
    texts = [
        tokenizer.apply_chat_template(row.prompt, tools=row.tools, tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= args.max_prompt_length]
    if len(kept) < len(rows):
        share = 1 - len(kept) / len(rows)
        line = f"{len(rows) - len(kept)} of {len(rows)} prompts ({share:.1%}) are longer than {args.max_prompt_length}"
        if share > args.max_truncated:
            raise InputError(f"{line} tokens, the longest {max(lengths)}: raise --max-prompt-length or --max-truncated")
        console.print(f"{line} tokens and left out")
    return kept


def adapter_parameters(model: "PeftModel", name: str) -> "list[Tensor]":
    """The weights of one adapter, in the order of the model."""
    return [parameter for path, parameter in model.named_parameters() if f".{name}." in path]


@contextmanager
def seconds(stats: dict[str, float], name: str) -> Iterator[None]:
    """Write how long the block took into `stats`."""
    start = time.monotonic()
    yield
    stats[name] = round(time.monotonic() - start, 3)


def keep_samples(file: Path, episodes: Episodes, count: int, number: int) -> None:
    """Append some of the episodes of step `number` to a JSON Lines file."""
    with file.open("a", encoding="utf-8") as stream:
        for index in range(min(count, len(episodes))):
            said = episodes.answers[index]
            entry = {
                "step": number,
                "prompt": episodes.rows[index].prompt,
                "completion": said.text,
                "ended": said.ended,
                "score": episodes.scores[index],
                "rewards": {name: values[index] for name, values in episodes.parts.items()},
            }
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def forget_after(file: Path, number: int) -> None:
    """Drop the rows of `keep_samples` that a resumed run does again: those of step `number` and later."""
    if file.exists():
        rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(row for row in rows if json.loads(row)["step"] < number), encoding="utf-8")


# Checkpoints: the policy's adapter at the root, the critic's and its head in a folder, all the rest in ppo_state.pt.


def save_checkpoint(ppo: PPO, folder: Path) -> None:
    """Write all that the run has to hold into `folder`; the trainer's state CheckpointCallback adds."""
    import numpy as np
    import torch
    from common.lm.scalar_head import save_head

    ppo.model.save_pretrained(folder, selected_adapters=["default", "critic"])
    save_head(ppo.critic_head, folder / "critic", {"kind": "critic"})
    of_numpy = np.random.get_state(legacy=False)
    of_numpy["state"]["key"] = of_numpy["state"]["key"].tolist()
    rest = {
        "policy": ppo.policy.state(),
        "critic": ppo.critic.state(),
        "kl_coef": ppo.kl_coef,
        "scores": asdict(ppo.scores),
        "prompts": ppo.prompts.state(),
        "random": {
            "python": random.getstate(),
            "numpy": of_numpy,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
    }
    torch.save(rest, folder / "ppo_state.pt")


def load_checkpoint(ppo: PPO, checkpoint: Path) -> None:
    """Put back what `save_checkpoint` wrote; of the random numbers last, for loading may draw some."""
    import numpy as np
    import torch
    from common.lm.scalar_head import load_head
    from peft import load_peft_weights, set_peft_model_state_dict

    for name, folder in (("default", checkpoint), ("critic", checkpoint / "critic")):
        weights = load_peft_weights(str(folder), device=str(ppo.critic_head.weight.device))
        set_peft_model_state_dict(ppo.model, weights, adapter_name=name)
    head, _ = load_head(checkpoint / "critic", ppo.critic_head.weight.device)
    ppo.critic_head.load_state_dict(head.state_dict())
    rest = torch.load(checkpoint / "ppo_state.pt", map_location="cpu", weights_only=True)
    ppo.policy.restore(rest["policy"])
    ppo.critic.restore(rest["critic"])
    ppo.kl_coef = rest["kl_coef"]
    ppo.scores = RunningMoments(**rest["scores"])
    ppo.prompts.restore(rest["prompts"])
    of_numpy = rest["random"]["numpy"]
    of_numpy["state"]["key"] = np.array(of_numpy["state"]["key"], dtype=np.uint32)
    random.setstate(rest["random"]["python"])
    np.random.set_state(of_numpy)
    torch.set_rng_state(rest["random"]["torch"])
    if rest["random"]["cuda"]:
        torch.cuda.set_rng_state_all(rest["random"]["cuda"])


if __name__ == "__main__":
    run_command(main)
