"""Proximal policy optimization (PPO) on one GPU: sample completions, score them, reinforce the better ones.

    make ppo                                                               the tiny model on sums, in minutes on a CPU
    make ppo MODEL=outputs/merged DATA=prompts.jsonl REWARD=outputs/reward     scored by a run of make reward
    make ppo MODEL=outputs/merged DATA=prompts.jsonl REWARDS="format my_rewards.py:disclaimer=0.5"
    make pipeline STAGES=reward,ppo                                        both, one after the other

The method is that of arXiv:1707.06347, for language models as in arXiv:1909.08593. `ppo_step` near the end of this file
is one step of it, in four phases; the phases follow, then the arithmetic.

The four models of PPO are one frozen base, in 4 or 16 bit, with an adapter each for policy, critic and reward model;
the reference policy is the base alone. So the stage before PPO must be merged into the base.

A reward is a reward model, or reward functions (those of GRPO, or your own in a Python file), or both, added by weight:

    def disclaimer(texts):                            # my_rewards.py, as --rewards my_rewards.py:disclaimer
        return [float("no medical advice" in text) - 2 * any(map(str.isdigit, text[:50])) for text in texts]

Without --reward-model and --rewards the reward functions are `math` and `format=0.2`, for prompts with gold answers.
Of data with scores or pairs only the prompts are used. A score in the data rates the completion beside it, not the one
that the policy samples; train a reward model on such data (make reward), which can score anything.

What other implementations do differently, and this one does so:
- The critic starts from the reward model, adapter and head, if there is one (as in summarize_from_feedback_details and
  TRL), else from the base with a head of zeros: --critic-init. At first only the critic learns: --critic-warmup-steps.
- Policy and critic have an optimizer and a learning rate each, so there is no vf_coef. Adam's betas are 0.9 and 0.999
  and its eps 1e-8 (cleanrl, summarize_from_feedback_details: 1e-5).
- Completions are sampled at --temperature with top_k 0, top_p 1 and no repetition penalty, and log-probabilities are
  those at that temperature: the policy is the distribution that was sampled from. There is no dropout.
- Scores are normalized by their running mean and standard deviation, then clipped; truncated completions lose
  --missing-eos-penalty. Rewards are not whitened, advantages are, over the whole rollout.
- The KL penalty is part of each token's reward, and a controller steers its weight: --kl-target. No entropy bonus.
- Losses are means over tokens, all of the same weight. Past --max-approx-kl, cleanrl's target_kl, an update of the
  policy is discarded and the policy learns no more from that rollout; the critic does.
- A truncated completion ends like any other: nothing is bootstrapped from the critic after it.

Left out: several completions of a prompt, rewards between the tokens, whitened rewards, an entropy bonus, sharding a
model over several GPUs.
"""

import copy
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common import environment
from common.cli import parse
from common.data.examples import Prompt
from common.data.formats import PROMPT_FORMATS
from common.data.hold_out import hold_out_share
from common.data.prompts import as_prompt, distinct, drop_long, with_system_prompt
from common.data.read import Data, read_examples
from common.data.rows import Faults, find_source, source_sha256
from common.errors import InputError, run_command
from common.lm.active_adapter import active_adapter
from common.lm.adapter import read_config
from common.lm.hidden_states import at_last_token, last_hidden, pad_right, round_up
from common.lm.hub import contents, fetch, resolved_revision
from common.lm.load import (
    attend_to_rows_as_they_are,
    choose_dtype,
    fuse_adapter,
    identify,
    keep_activations,
    load_chat_tokenizer,
)
from common.lm.log_probs import completion_log_probs, kl_estimate, masked_mean, masked_sum
from common.lm.mask import completion_segments
from common.lm.rollout.backends import check_sampling, corrects
from common.lm.rollout.correction import correction, rollout_mismatch
from common.lm.rollout.over_ranks import sample_over_ranks
from common.lm.scalar_head import apply_head, completion_values, load_head, new_head, save_head
from common.plan.fit import fit_to_gpu
from common.rewards.adapter import REWARD_FILES, find_reward_adapter, load_reward_adapter
from common.rewards.contract import check_functions, check_models
from common.rewards.specification import (
    Reward,
    check_prompts,
    describe_words,
    identities,
    load,
    reward_models,
    score_over_ranks,
)
from common.run.bad_numbers import BadSteps
from common.run.curriculum import PromptSampler
from common.run.data_summary import summary
from common.run.ending import show_ending
from common.run.files import write_folder
from common.run.folder import plan_run
from common.run.ranks import is_first, of_first, rank, sum_over_ranks, world_size
from common.run.samples import append, as_sample, forget_after, show
from common.run.screen import announce, loading
from common.run.stopping import Stop
from common.run.training_state import Learner, random_state, restore_random_state

if TYPE_CHECKING:
    import torch
    from common.lm.cuda_graph import Recorded
    from common.lm.generate import Completion
    from common.lm.rollout.rollouts import Rollouts
    from peft import PeftModel
    from rich.console import Console
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
REWARD_FUNCTIONS = ("math", "format=0.2")  # where neither --reward-model nor --rewards is given
REWARD_MODEL = "reward_model"  # its name among the rewards


@dataclass(frozen=True)
class Args:
    """Every name that TRL, PEFT or transformers also has means the same here; those of PPO are TRL's PPOConfig's."""

    # Model, data, output.
    model: str = "tiny"
    """A model card's name (`make models`), a local directory or a hub id; it is also the reference policy."""
    data: str = str(environment.ROOT / "data_samples" / "arithmetic-train.jsonl")
    """A file, a folder of files or a hub dataset: prompts, with the columns that the reward functions read."""
    output_dir: str | None = None
    """The folder of the run. By default outputs/ppo-MODEL-HASH: other settings, another folder."""
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""

    # How the data is read.
    format: Literal[
        "auto", "prompt-answer", "question-answer", "problem-answer", "problem-solution", "prompt", "instruction",
        "humaneval", "mbpp", "mbpp-text", "verl",
        "preference", "instruction-preference", "sharegpt-preference", "dialogue-preference",
        "prompt-rating", "instruction-rating",
    ] = "auto"  # fmt: skip
    """The format of the rows; auto takes it from the columns of the first row."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=problem answer=solution."""
    system_prompt: str | None = None
    """A system message before every prompt."""
    chat_template_path: str | None = None
    """A .jinja file to use instead of the model's own chat template."""
    pad_token: str | None = None
    """The pad token, for a model that has none besides its end token."""
    max_prompt_length: int = 1024
    """Tokens of a prompt; longer prompts are dropped: a truncated prompt is a different prompt."""
    max_truncated: float = 0.05
    """Stop when a larger share of the prompts would be dropped, or lose a part in the chat template."""
    eval_ratio: float = 0.05
    """Share of the prompts to hold out; completions of them are scored before and after."""

    # The reward.
    reward_model: str | None = None
    """A run of `make reward` on the same base."""
    reward_weight: float = 1.0
    """The reward model's weight beside the reward functions. Its unit is a standard deviation of its training data."""
    rewards: tuple[str, ...] | None = None
    """NAME, FILE.py:FUNCTION or model:CHECKPOINT, each with =WEIGHT; without --reward-model math format=0.2."""
    normalize_scores: bool = True
    """Subtract the running mean of the scores and divide by their running standard deviation. TRL does not."""
    score_clip: float = 10.0
    """Then clip the scores at plus and minus this."""
    missing_eos_penalty: float = 1.0
    """Then subtract this where a completion was truncated before its end token."""
    kl_coef: float = 0.05
    """Weight of the KL divergence from the reference policy, subtracted from the reward of each token."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """How KL is estimated from the sampled token (joschu.net/blog/kl-approx.html); k1 is unbiased."""
    kl_target: float | None = 6.0
    """KL in nats, of a whole completion by k1, towards which the weight is steered; None keeps the weight fixed."""
    kl_horizon: int = 10_000
    """Completions in which the weight may change by a fifth."""

    # Which prompts.
    difficulty: Literal["off", "easy", "medium", "hard"] = "off"
    """Draw prompts by the policy's last completions of them; off: every prompt once an epoch."""
    difficulty_by: Literal["entropy", "reward-spread", "pass-rate"] = "entropy"
    """The mean entropy of their tokens, the standard deviation of their scores, or the share of good scores."""

    # The loss.
    rollout_batch_size: int = 32
    """Completions in a step, one to each prompt: TRL's batch_size."""
    num_ppo_epochs: int = 4
    """Passes over the rollout of a step."""
    max_completion_length: int = 128
    """Tokens of a completion: TRL's response_length."""
    temperature: float = 0.7
    """Of sampling, and of every log-probability."""
    rollouts: Literal["auto", "graph", "vllm", "generate"] = "auto"
    """graph: our own decoder; vllm: vLLM in this process (VARIANT=cuda-vllm); auto: the first of these that can."""
    rollout_correction: Literal["off", "token"] = "off"
    """token: weigh each token's loss by min(p in training / p in sampling, 2); both are logged as rollout/..."""
    cliprange: float = 0.2
    """The clipping of the probability ratio."""
    cliprange_value: float = 0.2
    """How far a value may move from what it was when the completion was sampled."""
    gamma: float = 1.0
    lam: float = 0.95
    """Lambda of generalized advantage estimation (arXiv:1506.02438)."""
    max_approx_kl: float = 0.15
    """cleanrl's target_kl: nats a token from the policy that sampled, past which the policy is not updated further."""
    critic_init: Literal["reward", "base"] | None = None
    """The critic starts as the reward model, or as the base with a head of zeros; reward if there is a reward model."""
    critic_warmup_steps: int = 5
    """Steps at the beginning in which only the critic learns: its first advantages are noise."""

    # The model and the adapters.
    load_in_4bit: bool = True
    """Load the frozen base in nf4 (QLoRA); --no-load-in-4bit for 16 bit."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 on a GPU that has it, else float16; float32 on the CPU."""
    lora_r: int = 16
    lora_alpha: int = 16
    lora_target_modules: tuple[str, ...] = ()
    """By default those of --reward-model, else the projections of the attention."""

    # The optimization.
    per_device_train_batch_size: int = 8
    """Completions in one forward and backward pass; times the accumulation it is a minibatch, TRL's mini_batch_size."""
    gradient_accumulation_steps: int = 4
    num_train_epochs: float = 1.0
    max_steps: int = -1
    """Stop after so many steps; -1: --num-train-epochs decides."""
    learning_rate: float = 1.41e-5
    """Of the policy."""
    critic_learning_rate: float = 1e-4
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.0
    """Steps of warm-up of both learning rates; below 1, a share of the run."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: str = "adamw_8bit"
    """On the CPU, which has no 8-bit Adam, it is adamw_torch_fused."""
    gradient_checkpointing: bool = True
    """Recompute activations to save memory; a third faster without it, if they fit."""
    checkpoint_skip_layers: int = 0
    """Layers that keep their activations all the same: the more, the faster, for as long as they fit."""
    fit: Literal["off", "auto"] = "off"
    """auto: 16 bit or nf4, recomputation and micro-batch are chosen for this GPU; the batch of a step stays."""
    seed: int = 42
    full_determinism: bool = False
    """Deterministic kernels only, so that two runs on one kind of GPU have equal bits; slower. See `make verify`."""

    # What is shown and kept.
    logging_steps: int = 1
    save_steps: float = 0.1
    """A checkpoint every so many steps; below 1, a share of the run."""
    save_total_limit: int = 2
    skip_bad_steps: int = 0
    """Leave out up to so many steps whose loss or gradient is not finite; the next one ends the run."""
    oom: Literal["stop", "retry"] = "stop"
    """retry: where the memory is full, resume with half the micro-batch and twice the accumulation."""
    time_limit: str | None = None
    """Hours:minutes:seconds, as 3:55:00; then save a checkpoint and stop. The same command resumes the run."""
    stop_on_fault: bool = False
    """Stop, with a checkpoint, at the first finding about the run's health; else findings are printed only."""
    report_to: tuple[str, ...] = ()
    """wandb or trackio, besides TensorBoard, which always gets the metrics."""
    sample_prompts: int = 3
    """Held-out prompts whose completions are shown, before and after; and completions a step in samples.jsonl."""
    sample_tokens: int = 128
    """Tokens of such a completion, at most."""


def main() -> None:
    args, base, origins = parse(Args, "ppo", __doc__)
    stop = Stop(args.time_limit)
    args = with_defaults(args)

    # 1. Data and rewards: read and checked completely, before anything slow is loaded.
    source = find_source(args.data)
    environment.set_variables(models=[base, *reward_models(args.rewards or ())], sources=[source])
    os.environ.setdefault("UNSLOTH_BLOCK_COMPILE", "0")  # else it compiles anew for every adapter
    reward_functions = load(args.rewards, args.max_completion_length) if args.rewards else []
    data = read_examples(source, PROMPT_FORMATS, args.format, args.columns)
    prompts = distinct(map(as_prompt, data.examples))
    if not args.reward_model and origins["rewards"] == "recipe":
        check_gold_answers(args, data, prompts)
    faults = Faults()
    check_prompts(reward_functions, prompts, faults)
    faults.stop()
    check_functions(reward_functions, prompts, args.seed, may_be_silent=True)  # such as one that looks for a disclaimer
    if worded := describe_words(reward_functions, prompts):
        print(worded)
    reward_adapter = find_reward_adapter(args.reward_model, contents(base)) if args.reward_model else None

    # 2. The run: a new one, one to resume, or one that is finished. Nothing is written yet.
    run = plan_run(
        "ppo",
        base.name,
        args.output_dir,
        arguments=asdict(args),
        origins=origins,
        inputs={
            "data": data.identity,
            "reward_model": source_sha256([reward_adapter / name for name in REWARD_FILES if reward_adapter]),
            "reward_files": identities(reward_functions),
            **identify(base, args.chat_template_path),
        },
    )
    if run is None:
        return

    console = loading(base.name, data.notes)
    import unsloth  # noqa: F401, I001  first, and slow: it changes what is imported after it
    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments, set_seed
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
    from unsloth import FastLanguageModel

    from common.run.checkpoints import CheckpointCallback, newest_checkpoint
    from common.run.health.callback import HealthCallback
    from common.run.metrics import ProgressCallback
    from common.lm.rollout.rollouts import Rollouts

    # 3. Prompts in the model's own chat template, up to the generation prompt.
    check_models(reward_functions, prompts, args.seed, may_be_silent=True)
    base = fetch(base)
    tokenizer, end = load_chat_tokenizer(base, args.chat_template_path, args.pad_token)
    prompts = with_system_prompt(prompts, args.system_prompt)
    prompts, dropped = drop_long(tokenizer, prompts, args.max_prompt_length, args.max_truncated)
    if dropped:
        console.print(dropped)
    held_out, prompts = hold_out_share(prompts, args.eval_ratio, random.Random(args.seed), "prompts")
    steps = number_of_steps(args, len(prompts))

    announce(base.name, f"{len(prompts)} prompts of {args.data}", run.folder)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        console.print("No GPU: adamw_torch_fused in place of 8-bit Adam.")
    with run:
        args = fit_to_gpu(args.fit, args, "ppo", base, origins, run)
        # 4. The four models: one frozen base in 4 or 16 bit, under new LoRA adapters for policy and critic.
        dtype = choose_dtype(args.dtype)
        checkpointing = "unsloth" if args.gradient_checkpointing else False
        keep_activations(args.checkpoint_skip_layers)
        model, _ = FastLanguageModel.from_pretrained(
            base.source,
            **base.origin,  # its revision, and whether code of its own may run
            max_seq_length=round_up(args.max_prompt_length + max(args.max_completion_length, args.sample_tokens)),
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
            lora_dropout=0.0,  # the loss compares log-probabilities, which dropout would change
            target_modules=target_modules(args, reward_adapter),
            use_gradient_checkpointing=checkpointing,
            random_state=args.seed,
        )
        if reward_adapter and args.critic_init == "reward":
            critic_head = load_reward_adapter(model, reward_adapter, "critic", is_trainable=True)
        else:
            model.add_adapter("critic", copy.deepcopy(model.peft_config["default"]))
            critic_head = new_head(model.config.get_text_config().hidden_size, model.device)
        reward_head = load_reward_adapter(model, reward_adapter, "reward") if reward_adapter else None
        fuse_adapter(model)
        attend_to_rows_as_they_are(few_lengths=True)  # by `Rollout.take`
        FastLanguageModel.for_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
        run.update(revision=resolved_revision(base), dtype=str(dtype), machine=environment.describe_machine())
        run.update(data=summary(data, tokenizer, prompts, held_out))

        # 5. What trains the models, and the state that changes from step to step.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
        settings = TrainingArguments(
            output_dir=str(run.folder / "checkpoints" / "part"),  # CheckpointCallback moves complete checkpoints out
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
        policy_parameters = adapter_parameters(model, "default")
        critic_parameters = [*adapter_parameters(model, "critic"), *critic_head.parameters()]
        ppo = PPO(
            args=args,
            model=model,
            tokenizer=tokenizer,
            rollouts=Rollouts(model, tokenizer, end, seed=args.seed, backend=args.rollouts),
            reward_functions=reward_functions,
            reward_head=reward_head,
            critic_head=critic_head,
            policy=Learner(policy_parameters, settings, args.learning_rate, steps - args.critic_warmup_steps),
            critic=Learner(critic_parameters, settings, args.critic_learning_rate, steps),
            prompt_sampler=PromptSampler(prompts, args.difficulty, args.difficulty_by, args.seed),
            score_moments=RunningMoments(),
            kl_controller=KLController(args.kl_coef, args.kl_target, args.kl_horizon),
            bad_steps=BadSteps(run),
        )
        shown = held_out[: args.sample_prompts]
        set_seed(args.seed)
        before, scores_before = shown_completions(ppo, shown), evaluate(ppo, held_out)

        # 6. The loop, with the trainer's callbacks for logs, as in the other recipes.
        state, control = TrainerState(max_steps=steps), TrainerControl()
        set_seed(args.seed)
        if checkpoint := newest_checkpoint(run):
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            load_checkpoint(ppo, checkpoint)
        state.is_world_process_zero = is_first()
        state.compute_steps(settings, steps)
        reports = [report() for report in get_reporting_integration_callbacks(settings.report_to)]
        progress = ProgressCallback(run.folder / "metrics.jsonl", None, console, LIVE_LINE)
        health = HealthCallback(run, stop, args.stop_on_fault, data.examples)
        checkpoints = CheckpointCallback(run, stop, args.save_total_limit)
        callbacks = CallbackHandler(
            [DefaultFlowCallback(), progress, health, *reports, checkpoints], model, tokenizer, None, None
        )
        callbacks.on_train_begin(settings, state, control)
        forget_after(run.folder / "samples.jsonl", state.global_step)
        while state.global_step < steps and not control.should_training_stop:
            rollout, scores, metrics = ppo_step(ppo, state.global_step)
            write_samples(ppo, run.folder / "samples.jsonl", rollout, scores, state.global_step)
            state.global_step += 1
            episode = state.global_step * args.rollout_batch_size  # TRL's word for a prompt with its completion
            state.epoch = episode / len(prompts)
            state.num_input_tokens_seen += int(rollout.attention_mask.sum())
            callbacks.on_step_end(settings, state, control)
            if control.should_log:
                callbacks.on_log(settings, state, control, logs={**metrics, "episode": episode})
            if control.should_save:
                save_checkpoint(ppo, Path(settings.output_dir, f"checkpoint-{state.global_step}"))
                callbacks.on_save(settings, state, control)
        callbacks.on_train_end(settings, state, control)

        # 7. Save, and show what changed.
        saved = run.folder / "adapter"
        if is_first():
            with write_folder(saved) as part:
                model.save_pretrained(part, selected_adapters=["default"])
                tokenizer.save_pretrained(part)
        set_seed(args.seed)
        after, scores_after = shown_completions(ppo, shown), evaluate(ppo, held_out)
        if not is_first():
            return
        gain = {"prompts": len(held_out), "before": scores_before, "after": scores_after}
        run.update(tokens=state.num_input_tokens_seen, held_out=gain)
        show(console, run.folder / "samples.json", [as_sample(prompt) for prompt in shown], before, after)
        show_gain(console, **gain)
        show_ending(console, run, saved)


LIVE_LINE = {
    "score": "score/mean",
    "kl": "objective/kl",
    "entropy": "policy/entropy",
    "approx kl": "policy/approx_kl",
    "clip fraction": "policy/clipfrac_avg",
    "value loss": "loss/value_avg",
    "explained variance": "value/explained_variance",
    "length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
}


# Set-up.


def with_defaults(args: Args) -> Args:
    """The arguments with the defaults that depend on --reward-model. Raises InputError for values that do not fit."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if args.rollout_batch_size % batch:
        raise InputError(
            f"--rollout-batch-size {args.rollout_batch_size} must be a multiple of --per-device-train-batch-size "
            f"{args.per_device_train_batch_size} x --gradient-accumulation-steps {args.gradient_accumulation_steps}"
        )
    if args.temperature <= 0:
        raise InputError(f"--temperature {args.temperature:g} must be above 0: PPO learns from completions that differ")
    if args.critic_init == "reward" and not args.reward_model:
        raise InputError("--critic-init reward needs --reward-model, from which the critic is to start")
    if args.rewards == () and not args.reward_model:
        raise InputError("nothing rewards the completions: give --reward-model or --rewards")
    check_sampling(args.rollouts, args.rollout_correction)
    rewards = args.rewards if args.rewards is not None else () if args.reward_model else REWARD_FUNCTIONS
    return replace(args, rewards=rewards, critic_init=args.critic_init or ("reward" if args.reward_model else "base"))


def check_gold_answers(args: Args, data: Data, prompts: list[Prompt]) -> None:
    """Raise InputError where the default reward functions have no gold answer to compare with."""
    if any(prompt.answer is not None for prompt in prompts):
        return
    reward = f"make reward MODEL={args.model} DATA={args.data}"
    if isinstance(data.examples[0], Prompt):
        advice = "Give reward functions that need none, with --rewards, or a run of `make reward` with --reward-model."
    else:
        advice = (
            f"Train a reward model on these rows and give its folder as --reward-model:\n  {reward}\n"
            "Or do both with one command: make pipeline STAGES=reward,ppo. Or give reward functions with --rewards."
        )
    raise InputError(
        f"{args.data}: nothing rewards the completions: the rows ({data.row_format}) have no gold answers. {advice}"
    )


def number_of_steps(args: Args, prompts: int) -> int:
    """--max-steps, or the steps of the epochs. Raises InputError where the critic's warm-up takes them all."""
    steps = args.max_steps
    if steps < 0:
        steps = math.ceil(args.num_train_epochs * prompts / args.rollout_batch_size)
    if steps <= args.critic_warmup_steps:
        raise InputError(
            f"{steps} steps are no more than --critic-warmup-steps {args.critic_warmup_steps}: the policy would never "
            f"learn. {prompts} prompts are {prompts / args.rollout_batch_size:.1f} steps an epoch; raise "
            "--num-train-epochs or --max-steps"
        )
    return steps


def target_modules(args: Args, reward_adapter: Path | None) -> list[str]:
    """The modules that policy and critic adapt: Unsloth's kernels need all adapters of a model on the same ones.

    Raises InputError where --lora-target-modules are not those of the reward model.
    """
    wanted = args.lora_target_modules
    if reward_adapter is None:
        return list(wanted or ATTENTION)
    adapted = sorted(read_config(reward_adapter)["target_modules"])
    if wanted and sorted(wanted) != adapted:
        raise InputError(
            f"--lora-target-modules {' '.join(wanted)}: the reward model adapts {' '.join(adapted)}, and all adapters "
            "must adapt the same modules; leave the argument out to use those"
        )
    return adapted


def adapter_parameters(model: "PeftModel", name: str) -> "list[Tensor]":
    """The weights of one adapter, in the order of the model."""
    return [parameter for path, parameter in model.named_parameters() if f".{name}." in path]


# What is logged and shown.


@contextmanager
def seconds(metrics: dict[str, float], name: str) -> Iterator[None]:
    """Write how long the block took into `metrics`, with what a GPU still has to do of it."""
    import torch

    start = time.monotonic()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    metrics[name] = round(time.monotonic() - start, 3)


def step_metrics(
    ppo: "PPO", rollout: "Rollout", scores: "Scores", rewards: "Rewards", advantages: "Advantages"
) -> dict[str, float]:
    """The metrics of a rollout; `update` has those of the losses. Means are over completions, or over their tokens.

    A key that TRL has too (objective/*, val/*, episode of its PPOTrainer; completions/*, rewards/* of its GRPOTrainer)
    is the same quantity as there.
    """
    mask, completions, count = rollout.mask, rollout.completions, len(rollout)
    kl = float((rewards.kl * mask).sum(1).mean())
    ended = sum(completion.ended for completion in completions)
    metrics = {
        "objective/kl": kl,  # of a whole completion, by --kl-estimator
        "objective/kl_coef": rewards.kl_coef,
        "objective/entropy": -float(rewards.log_probs.sum(1).mean()),  # of a whole completion
        "objective/scores": sum(rewards.scores) / count,  # normalized, clipped and penalized
        "objective/non_score_reward": -rewards.kl_coef * kl,
        "objective/rlhf_reward": float(rewards.rewards.sum(1).mean()),  # the sum of the two lines above
        "policy/entropy": float(masked_mean(rewards.entropies, mask)),  # of a token's distribution, when it was sampled
        "value/mean": float(masked_mean(advantages.values, mask)),
        "value/explained_variance": float(explained_variance(advantages.values, advantages.returns, mask)),
        "completions/mean_length": sum(len(completion.completion_ids) for completion in completions) / count,
        "completions/clipped_ratio": (count - ended) / count,  # the share that was truncated
        "val/num_eos_tokens": ended,
        **ppo.rollouts.figures,
        **rollout_mismatch(completions, trained_log_probs(rollout, rewards)),
    }
    # The scores as they were given: all together, the reward model's part, the reward functions' part, and each one's.
    metrics["score/mean"], metrics["score/std"] = moments(scores.total)
    if REWARD_MODEL in scores.parts:
        given = [score for score in scores.parts[REWARD_MODEL] if score is not None]  # for every one
        metrics["score/reward_model"] = ppo.args.reward_weight * moments(given)[0]
    if ppo.reward_functions:
        metrics["score/reward_functions"] = metrics["score/mean"] - metrics.get("score/reward_model", 0.0)
    for name, values in scores.parts.items():
        applies = [value for value in values if value is not None]
        if applies:
            metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = moments(applies)
    return metrics


def explained_variance(values: "Tensor", returns: "Tensor", mask: "Tensor") -> "Tensor":
    """1 - Var(returns - values) / Var(returns) over the mask: 1 for a perfect critic, 0 for a constant one."""
    returns, errors = returns[mask], (returns - values)[mask]
    return 1 - errors.var(correction=0) / (returns.var(correction=0) + 1e-8)


def evaluate(ppo: "PPO", prompts: list[Prompt]) -> dict[str, float] | None:
    """Scores of completions sampled to held-out prompts, and their KL from the reference; None without prompts."""
    if not prompts:
        return None
    rollout = sample(ppo, prompts, "held-out")
    mean, std = moments(score(ppo, rollout).total)
    log_probs, _ = all_log_probs(ppo, rollout, "default")
    ref_log_probs, _ = all_log_probs(ppo, rollout, None)
    return {
        "score": mean,
        "score_std": std,
        "kl": float((log_probs - ref_log_probs).sum(1).mean()),
        "length": sum(len(completion.completion_ids) for completion in rollout.completions) / len(rollout),
        "truncated": sum(not completion.ended for completion in rollout.completions) / len(rollout),
    }


def shown_completions(ppo: "PPO", prompts: list[Prompt]) -> list[str]:
    """Greedy completions as text, to be shown; "..." marks a truncated one."""
    completions = sample_over_ranks(ppo.rollouts, prompts, ppo.args.sample_tokens, 0.0)
    return [completion.text + ("" if completion.ended else " ...") for completion in completions]


def show_gain(
    console: "Console", prompts: int, before: dict[str, float] | None, after: dict[str, float] | None
) -> None:
    """Print what the policy scores on the held-out prompts, if there are any, before and after training."""
    if before and after:
        console.print(
            f"{prompts} held-out prompts: score {before['score']:.3f} +- {before['score_std']:.3f} -> "
            f"{after['score']:.3f} +- {after['score_std']:.3f}, {after['kl']:.2f} nats from the reference policy"
        )


def write_samples(ppo: "PPO", file: Path, rollout: "Rollout", scores: "Scores", step: int) -> None:
    """Append the first completions of a rollout to samples.jsonl; of several ranks the first one does."""
    if is_first():
        append(file, entries(ppo, rollout, scores, step))


def entries(ppo: "PPO", rollout: "Rollout", scores: "Scores", step: int) -> Iterator[dict[str, Any]]:
    """The first completions of a rollout, for samples.jsonl."""
    for index in range(min(ppo.args.sample_prompts, len(rollout))):
        yield {
            "step": step,
            "prompt": rollout.prompts[index].prompt,
            "completion": rollout.completions[index].text,
            "ended": rollout.completions[index].ended,
            "score": scores.total[index],
            "rewards": {name: values[index] for name, values in scores.parts.items()},
            "mask": completion_segments(ppo.tokenizer, rollout.completions[index]),
        }


# Forward passes of the four models.


def log_probs_of(ppo: "PPO", *part: "Tensor") -> "tuple[Tensor, Tensor]":
    """Log-probabilities and entropies (B, C) of the completions under the active model: see `completion_log_probs`."""
    input_ids, attention_mask, start, tokens, mask = part
    return completion_log_probs(ppo.model, input_ids, attention_mask, start, tokens, mask, ppo.args.temperature)


def values_of(
    ppo: "PPO", input_ids: "Tensor", attention_mask: "Tensor", start: "Tensor", tokens: "Tensor", mask: "Tensor"
) -> "tuple[Tensor]":
    """What the critic, whose adapter must be active, expects before each token of the completions: (B, C)."""
    return (completion_values(ppo.model, ppo.critic_head, input_ids, attention_mask, start, mask),)


def rewards_of(
    ppo: "PPO", input_ids: "Tensor", attention_mask: "Tensor", start: "Tensor", tokens: "Tensor", mask: "Tensor"
) -> "tuple[Tensor]":
    """What the reward model, whose adapter must be active, gives to each completion: (B,)."""
    assert ppo.reward_head is not None
    hidden = last_hidden(ppo.model, input_ids, attention_mask)  # (B, T, h)
    return (apply_head(ppo.reward_head, at_last_token(hidden, attention_mask)),)


def all_log_probs(ppo: "PPO", rollout: "Rollout", name: str | None) -> "tuple[Tensor, Tensor]":
    """`log_probs_of` a whole rollout under the policy, "default", or the reference policy, None; no gradient."""
    import torch

    which = "log-probabilities" if name else "reference"
    with torch.no_grad(), active_adapter(ppo.model, name):
        parts = [[*map(torch.clone, run_pass(ppo, which, *part.tensors()))] for part in parts_of(ppo, rollout)]
    return stacked([part[0] for part in parts], rollout), stacked([part[1] for part in parts], rollout)


def all_values(ppo: "PPO", rollout: "Rollout") -> "Tensor":
    """`values_of` a whole rollout, (B, C), in small passes; no gradient."""
    import torch

    with torch.no_grad(), active_adapter(ppo.model, "critic"):
        parts = [run_pass(ppo, "values", *part.tensors())[0].clone() for part in parts_of(ppo, rollout)]
    return stacked(parts, rollout)


def reward_model_scores(ppo: "PPO", rollout: "Rollout") -> list[float]:
    """What the reward model gives to each completion, B numbers."""
    import torch

    with torch.no_grad(), active_adapter(ppo.model, "reward"):
        parts = [run_pass(ppo, "reward", *part.tensors())[0][:, None].clone() for part in parts_of(ppo, rollout)]
    return stacked(parts, rollout)[:, 0].tolist()


def run_pass(ppo: "PPO", name: str, *inputs: "Tensor") -> "Sequence[Tensor]":
    """What the pass of this name in PASSES computes, under the active adapter; the next one overwrites it on a GPU."""
    recorded = ppo.recorded.get(name)
    return recorded(*inputs) if recorded else PASSES[name](ppo, *inputs)


def record_passes(ppo: "PPO") -> "dict[str, Recorded]":
    """Each pass recorded as CUDA graphs when it runs; none on a CPU, and none where activations are recomputed."""
    import torch
    from common.lm.cuda_graph import Recorded
    from common.lm.rollout.gpu import memory_limit

    if ppo.args.gradient_checkpointing or not ppo.critic_head.weight.is_cuda:
        return {}
    gradients = {"policy": ppo.policy.gradients(), "critic": ppo.critic.gradients()}
    pool, half = torch.cuda.MemPool(), memory_limit() // 2  # the rest is for sampling
    return {
        name: Recorded(ppo.model, partial(work, ppo), f"PPO's pass {name}", gradients.get(name, ()), pool, half)
        for name, work in PASSES.items()
    }


def parts_of(ppo: "PPO", rollout: "Rollout") -> "Iterator[Rollout]":
    """This rank's rows of the rollout, in parts of as many completions as a training pass has."""
    for index in split(own_rows(rollout), ppo.args.per_device_train_batch_size):
        yield rollout.take(index)


def own_rows(rollout: "Rollout", index: Sequence[int] | None = None) -> list[int]:
    """Those of the rows `index`, or of all, that this rank computes: as many as other ranks do, and as long ones."""
    rows = [*range(len(rollout))] if index is None else [*index]
    if world_size() > 1:
        rows.sort(key=rollout.length)
    return rows[rank() :: world_size()]


def split(index: list[int], size: int) -> list[list[int]]:
    return [index[first : first + size] for first in range(0, len(index), size)]


def stacked(parts: "Sequence[Tensor]", rollout: "Rollout") -> "Tensor":
    """Tensors (b, c) of the parts of a rollout, those of all ranks, put together as (B, C)."""
    import torch

    columns = rollout.mask.shape[1]
    padded = [torch.nn.functional.pad(part, (0, columns - part.shape[1])) for part in parts]
    if world_size() == 1:
        return torch.cat(padded)
    whole = torch.zeros(rollout.mask.shape, device=rollout.mask.device)
    if own := own_rows(rollout):
        whole[own] = torch.cat(padded)
    return sum_over_ranks(whole)  # of which all but one add 0


# The algorithm: the records, one step of four phases, the phases, the arithmetic. A phase returns what it computes;
# what changes from step to step is in PPO. Shapes: B completions, T tokens of the longest prompt with its completion, C
# tokens of the longest completion. A column of a (B, C) tensor is one token of the completion: an action.


@dataclass
class PPO:
    """The models, what trains them, and the state that changes from step to step, which a checkpoint holds.

    One frozen base carries four models: with the adapter "default" it is the policy, with "critic" and `critic_head`
    the critic, with "reward" and `reward_head` the reward model, without an adapter the reference policy.
    """

    args: Args
    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    rollouts: "Rollouts"
    reward_functions: list[Reward]
    reward_head: "torch.nn.Linear | None"  # None without a reward model
    critic_head: "torch.nn.Linear"
    policy: Learner
    critic: Learner
    prompt_sampler: PromptSampler
    score_moments: "RunningMoments"
    kl_controller: "KLController"
    bad_steps: BadSteps
    recorded: "dict[str, Recorded]" = field(init=False)  # of PASSES those that are CUDA graphs

    def __post_init__(self) -> None:
        self.recorded = record_passes(self)
        for learner in (self.policy, self.critic):
            learner.leaves_out_bad = self.args.skip_bad_steps > 0


@dataclass(frozen=True)
class Rollout:
    """Prompts and the completions sampled to them, as text and as tensors padded on the right."""

    prompts: list[Prompt]
    completions: "list[Completion]"
    input_ids: "Tensor"  # (B, T)
    attention_mask: "Tensor"  # (B, T)
    start: "Tensor"  # (B,) the column of input_ids where the completion begins
    tokens: "Tensor"  # (B, C) of the completion
    mask: "Tensor"  # (B, C) bool; false at padding

    def __len__(self) -> int:
        return len(self.completions)

    def count(self) -> int:
        """The tokens of all completions, counted without asking the GPU, which would have to finish its work."""
        return sum(len(one.completion_ids) for one in self.completions)

    def length(self, row: int) -> int:
        """The tokens of the prompt with its completion in this row."""
        return len(self.completions[row].prompt_ids) + len(self.completions[row].completion_ids)

    def tensors(self) -> "tuple[Tensor, ...]":
        return self.input_ids, self.attention_mask, self.start, self.tokens, self.mask

    def take(self, index: list[int]) -> "Rollout":
        """The rows `index`, with no more columns of padding than they need; on a GPU in few different shapes."""
        completions = [self.completions[i] for i in index]
        longest = max(map(self.length, index))
        columns = max(len(one.completion_ids) for one in completions)
        if self.mask.is_cuda:
            longest, columns = round_up(longest), round_up(columns)
        return Rollout(
            [self.prompts[i] for i in index],
            completions,
            self.input_ids[index, :longest],
            self.attention_mask[index, :longest],
            self.start[index],
            self.tokens[index, :columns],
            self.mask[index, :columns],
        )


@dataclass(frozen=True)
class Scores:
    """What reward functions and reward model gave to each completion as a whole."""

    total: list[float]  # B, the weighted sum
    parts: dict[str, list[float | None]]  # B by name, before weighting; None where a reward function does not apply


@dataclass(frozen=True)
class Rewards:
    """The reward of each token, and what it is made of."""

    scores: list[float]  # B, normalized, clipped and penalized
    log_probs: "Tensor"  # (B, C) under the policy that sampled; 0 at padding, as all of these
    ref_log_probs: "Tensor"  # (B, C) under the reference policy
    entropies: "Tensor"  # (B, C) of the policy that sampled
    kl: "Tensor"  # (B, C) estimated from the two
    kl_coef: float
    rewards: "Tensor"  # (B, C)


@dataclass(frozen=True)
class Advantages:
    """What the critic expected, and how much better than that each token was."""

    values: "Tensor"  # (B, C) before each token
    advantages: "Tensor"  # (B, C) whitened
    returns: "Tensor"  # (B, C)


def ppo_step(ppo: PPO, number: int) -> tuple[Rollout, Scores, dict[str, float]]:
    """Step `number`, counted from 0. Returns the rollout, its scores, and the metrics of the step."""
    args, metrics = ppo.args, {}
    # Phase 1. Sample completions to prompts from the policy.
    with seconds(metrics, "time/sample"):
        rollout = sample(ppo, ppo.prompt_sampler.draw(args.rollout_batch_size), f"step {number}")
    # Phase 2. Score them, and subtract the KL divergence from the reference policy from the reward of each token.
    with seconds(metrics, "time/reward"):
        scores = score(ppo, rollout)
        if args.normalize_scores:
            ppo.score_moments.update(scores.total)
        rewards = compute_rewards(ppo, rollout, scores)
        kl = float((rewards.log_probs - rewards.ref_log_probs).sum(1).mean())  # nats in a whole completion
        ppo.kl_controller.update(kl, len(rollout))
        ppo.prompt_sampler.learn((rewards.entropies.sum(1) / rollout.mask.sum(1)).tolist(), scores.total)
    # Phase 3. Estimate how much better than the critic expected each token was.
    with seconds(metrics, "time/advantages"):
        advantages = compute_advantages(ppo, rollout, rewards)
    # Phase 4. Update policy and critic, several times on the same rollout.
    with seconds(metrics, "time/update"):
        metrics |= update(ppo, rollout, rewards, advantages, policy_learns=number >= args.critic_warmup_steps)
    ppo.bad_steps.check(number + 1, metrics, rollout.prompts, ppo.policy, ppo.critic)
    return rollout, scores, metrics | step_metrics(ppo, rollout, scores, rewards, advantages)


def sample(ppo: PPO, prompts: list[Prompt], key: str) -> Rollout:
    """Phase 1: one completion to each prompt, sampled from the policy; `key` decides the noise."""
    args = ppo.args
    completions = sample_over_ranks(ppo.rollouts, prompts, args.max_completion_length, args.temperature, key)
    return as_rollout(prompts, completions, ppo.tokenizer.pad_token_id, ppo.critic_head.weight.device)


def as_rollout(
    prompts: list[Prompt], completions: "list[Completion]", pad_token_id: int, device: "torch.device | str"
) -> Rollout:
    """Prompts and completions with their tensors, padded on the right: there no token can attend to the padding."""
    input_ids, attention_mask = pad_right([c.prompt_ids + c.completion_ids for c in completions], pad_token_id, device)
    tokens, mask = pad_right([c.completion_ids for c in completions], pad_token_id, device)
    start = attention_mask.sum(1) - mask.sum(1)
    return Rollout(prompts, completions, input_ids, attention_mask, start, tokens, mask.bool())


def score(ppo: PPO, rollout: Rollout) -> Scores:
    """Phase 2.1: score each completion as a whole; reward functions and reward model are added with their weights."""
    total: list[float] = [0.0] * len(rollout)
    parts: dict[str, list[float | None]] = {}
    if ppo.reward_functions:
        total, parts = score_over_ranks(ppo.reward_functions, rollout.prompts, rollout.completions)
    if ppo.reward_head is not None:
        given = reward_model_scores(ppo, rollout)
        parts = {**parts, REWARD_MODEL: [*given]}
        total = [t + ppo.args.reward_weight * g for t, g in zip(total, given, strict=True)]
    return Scores(total, parts)


def compute_rewards(ppo: PPO, rollout: Rollout, scores: Scores) -> Rewards:
    """Phase 2.2 to 2.5: from scores to the reward of each token.

    The log-probabilities are computed by the same pass as in `update`. Those of sampling, with its cache and its
    padding on the left, differ by more than a probability ratio of 1 can bear.
    """
    import torch

    args = ppo.args
    # 2.2 Normalize the scores by their running moments, and clip them.
    normalized = [ppo.score_moments.normalize(s) if args.normalize_scores else s for s in scores.total]
    clipped = [max(-args.score_clip, min(args.score_clip, s)) for s in normalized]
    # 2.3 Penalize completions that were truncated before their end token.
    final = [s - args.missing_eos_penalty * (not c.ended) for s, c in zip(clipped, rollout.completions, strict=True)]
    # 2.4 Estimate the KL divergence from the reference policy at each token.
    log_probs, entropies = all_log_probs(ppo, rollout, "default")
    ref_log_probs, _ = all_log_probs(ppo, rollout, None)
    kl = kl_estimate(log_probs - ref_log_probs, args.kl_estimator)  # (B, C)
    # 2.5 Reward: minus kl_coef x KL at each token, and the score at the last token.
    kl_coef = ppo.kl_controller.coef
    rewards = shaped_rewards(torch.tensor(final, device=kl.device), kl, kl_coef, rollout.mask)
    return Rewards(final, log_probs, ref_log_probs, entropies, kl, kl_coef, rewards)


def compute_advantages(ppo: PPO, rollout: Rollout, rewards: Rewards) -> Advantages:
    """Phase 3: the critic's values, advantages and returns by GAE, and the advantages whitened over the rollout.

    With --rollout-correction they are then weighted by truncated importance sampling; the critic's returns are not.
    """
    values = all_values(ppo, rollout)
    advantages, returns = gae(rewards.rewards, values, rollout.mask, ppo.args.gamma, ppo.args.lam)
    whitened = masked_whiten(advantages, rollout.mask)
    if corrects(ppo.args.rollout_correction, ppo.rollouts.backend):
        trained = trained_log_probs(rollout, rewards)
        whitened = whitened * correction(rollout.completions, trained, whitened.shape[1]).to(whitened.device)
    return Advantages(values, whitened, returns)


def trained_log_probs(rollout: Rollout, rewards: Rewards) -> "list[Tensor]":
    """The policy's log-probabilities of the tokens of each completion, (C,), computed as in training."""
    return [row[here] for row, here in zip(rewards.log_probs, rollout.mask, strict=True)]


def update(
    ppo: PPO, rollout: Rollout, rewards: Rewards, advantages: Advantages, policy_learns: bool
) -> dict[str, float]:
    """Phase 4: some epochs over the rollout in shuffled minibatches, with a step of policy and critic on each.

    Each of the two has a backward pass and an optimizer of its own, so there is no vf_coef to weigh their losses. One
    backward pass through both would run after the adapter has been switched, and gradient checkpointing would then
    recompute the policy's activations with the critic's adapter: no error, wrong gradients.
    """
    import torch

    args, learns = ppo.args, policy_learns
    stats: dict[str, list[float | Tensor]] = defaultdict(list)  # read at the end: reading waits for the GPU
    for _ in range(args.num_ppo_epochs):
        order = of_first(torch.randperm(len(rollout)).tolist())
        for minibatch in split(order, args.per_device_train_batch_size * args.gradient_accumulation_steps):
            of_policy = {}
            if learns:
                of_policy = update_policy(ppo, rollout, rewards, advantages, minibatch)
                learns = not of_policy["policy/stopped"]
            for name, value in (of_policy | update_critic(ppo, rollout, advantages, minibatch)).items():
                stats[name].append(value)
    metrics = {name: sum(map(float, values)) / len(values) for name, values in stats.items()}
    metrics |= {"lr": ppo.policy.learning_rate, "critic_lr": ppo.critic.learning_rate}
    metrics["loss"] = metrics.get("loss/policy_avg", 0.0) + metrics["loss/value_avg"]
    if policy_learns:
        ppo.policy.schedule.step()
    ppo.critic.schedule.step()
    return metrics


def update_policy(
    ppo: PPO, rollout: Rollout, rewards: Rewards, advantages: Advantages, minibatch: list[int]
) -> "dict[str, float | Tensor]":
    """Phase 4.1: one optimization step of the policy, unless it is too far from the policy that sampled."""
    args, stats = ppo.args, defaultdict[str, Any](float)
    count = rewards.log_probs.new_tensor(rollout.take(minibatch).count())  # every token weighs the same
    for index in split(own_rows(rollout, minibatch), args.per_device_train_batch_size):
        part = rollout.take(index)
        columns = part.mask.shape[1]
        targets = rewards.log_probs[index, :columns], advantages.advantages[index, :columns]
        results = run_pass(ppo, "policy", *part.tensors(), *targets, count)
        for name, value in zip(POLICY_STATS, results, strict=True):
            stats[name] += value
    stats = of_all_ranks(stats, POLICY_STATS, count)
    stopped = bool(stats["policy/approx_kl"] > args.max_approx_kl)
    gradient_norm = ppo.policy.discard() if stopped else ppo.policy.step()
    return {**stats, "policy/grad_norm": gradient_norm, "policy/stopped": float(stopped)}


def update_critic(
    ppo: PPO, rollout: Rollout, advantages: Advantages, minibatch: list[int]
) -> "dict[str, float | Tensor]":
    """Phase 4.2: one optimization step of the critic."""
    args, stats = ppo.args, defaultdict[str, Any](float)
    count = advantages.values.new_tensor(rollout.take(minibatch).count())
    with active_adapter(ppo.model, "critic"):
        for index in split(own_rows(rollout, minibatch), args.per_device_train_batch_size):
            part = rollout.take(index)
            columns = part.mask.shape[1]
            targets = advantages.values[index, :columns], advantages.returns[index, :columns]
            results = run_pass(ppo, "critic", *part.tensors(), *targets, count)
            for name, value in zip(CRITIC_STATS, results, strict=True):
                stats[name] += value
    return {**of_all_ranks(stats, CRITIC_STATS, count), "value/grad_norm": ppo.critic.step()}


def of_all_ranks(stats: "Mapping[str, float | Tensor]", names: Sequence[str], like: "Tensor") -> "dict[str, Any]":
    """Statistics of a minibatch, sums over the rows of this rank, summed over those of all; on the device of `like`."""
    import torch

    if world_size() == 1:
        return dict(stats)
    values = [torch.as_tensor(stats[name], dtype=torch.float64, device=like.device) for name in names]
    return dict(zip(names, sum_over_ranks(torch.stack(values)), strict=True))


POLICY_STATS = ("loss/policy_avg", "policy/approx_kl", "policy/clipfrac_avg", "val/ratio")
CRITIC_STATS = ("loss/value_avg", "val/clipfrac_avg")


def policy_pass(ppo: PPO, *inputs: "Tensor") -> "Sequence[Tensor]":
    """The policy's loss on one part of a minibatch of `count` tokens, and its gradient. Returns POLICY_STATS."""
    *part, old_log_probs, advantages, count = inputs
    mask = part[-1]
    log_probs, _ = log_probs_of(ppo, *part)  # (b, c)
    losses, clipped = policy_losses(log_probs, old_log_probs, advantages, ppo.args.cliprange)
    loss = (losses * mask).sum() / count
    ppo.policy.backward(loss)

    log_ratios = log_probs.detach() - old_log_probs  # (b, c)
    kl, ratios = masked_sum(kl_estimate(-log_ratios, "k3"), mask), masked_sum(log_ratios.exp(), mask)
    sums = kl, (clipped & mask).sum(), ratios
    return loss.detach().double(), *(value.double() / count for value in sums)


def critic_pass(ppo: PPO, *inputs: "Tensor") -> "Sequence[Tensor]":
    """The critic's loss on one part of a minibatch of `count` tokens, and its gradient. Returns CRITIC_STATS."""
    *part, old_values, returns, count = inputs
    mask = part[-1]
    (values,) = values_of(ppo, *part)  # (b, c)
    losses, clipped = value_losses(values, old_values, returns, ppo.args.cliprange_value)
    loss = (losses * mask).sum() / count
    ppo.critic.backward(loss)
    return loss.detach().double(), (clipped & mask).sum().double() / count


PASSES: "dict[str, Callable[..., Sequence[Tensor]]]" = {
    "log-probabilities": log_probs_of,
    "reference": log_probs_of,
    "values": values_of,
    "reward": rewards_of,
    "policy": policy_pass,
    "critic": critic_pass,
}


# The arithmetic: tensors (B, C) and a bool mask that is false at padding; no model is needed.


def shaped_rewards(scores: "Tensor", kl: "Tensor", kl_coef: float, mask: "Tensor") -> "Tensor":
    """Rewards (B, C): -kl_coef x kl at each token, and the score (B,) on top at the last token of the completion."""
    rewards = -kl_coef * kl * mask
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards: "Tensor", values: "Tensor", mask: "Tensor", gamma: float, lam: float) -> "tuple[Tensor, Tensor]":
    """Advantages and returns (B, C) by generalized advantage estimation (arXiv:1506.02438).

    delta_t = r_t + gamma V_t+1 - V_t;  A_t = delta_t + gamma lam A_t+1;  returns are A + V. After the last token the
    value is 0: a truncated completion ends there as well.
    """
    advantages = rewards.new_zeros(rewards.shape)
    next_value = next_advantage = rewards.new_zeros(len(rewards))  # (B,)
    for column in reversed(range(rewards.shape[1])):
        delta = rewards[:, column] + gamma * next_value - values[:, column]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, column]
        next_value = values[:, column] * mask[:, column]
        advantages[:, column] = next_advantage
    return advantages, (advantages + values) * mask


def masked_whiten(values: "Tensor", mask: "Tensor") -> "Tensor":
    """(B, C) shifted and scaled to mean 0 and standard deviation 1 over the mask; 0 outside."""
    centred = values - masked_mean(values, mask)
    return centred * (masked_mean(centred**2, mask) + 1e-8).rsqrt() * mask


def policy_losses(
    log_probs: "Tensor", old: "Tensor", advantages: "Tensor", cliprange: float
) -> "tuple[Tensor, Tensor]":
    """-min(ratio A, clip(ratio) A) by token, (B, C), and where clipping decides, bool (B, C).

    ratio = exp(log_probs - old). Only log_probs has a gradient.
    """
    ratios = (log_probs - old.detach()).clamp(-20, 20).exp()  # the clamp keeps a wild token from being infinite
    advantages = advantages.detach()
    plain, clipped = -advantages * ratios, -advantages * ratios.clamp(1 - cliprange, 1 + cliprange)
    return plain.maximum(clipped), clipped > plain


def value_losses(values: "Tensor", old: "Tensor", returns: "Tensor", cliprange: float) -> "tuple[Tensor, Tensor]":
    """Half the squared error by token, (B, C), and where clipping decides, bool (B, C).

    Clipping takes the value to within `cliprange` of the old one, where that makes the error larger.
    """
    old, returns = old.detach(), returns.detach()
    plain = (values - returns) ** 2
    clipped = (old + (values - old).clamp(-cliprange, cliprange) - returns) ** 2
    return plain.maximum(clipped) / 2, clipped > plain


@dataclass
class KLController:
    """The weight of the KL penalty, steered so that KL(policy || reference) stays near a target.

    It changes by a fifth in `horizon` completions at most (arXiv:1909.08593, section 2.2).
    """

    coef: float
    target: float | None  # nats in a whole completion; None keeps the weight as it is
    horizon: int

    def update(self, kl: float, count: int) -> None:
        """`kl` is the mean over `count` completions, in nats in a whole one."""
        if self.target is not None:
            error = max(-0.2, min(0.2, kl / self.target - 1))
            self.coef *= 1 + error * count / self.horizon


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


def moments(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation of these values."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


# Checkpoints: the policy's adapter at the root, the critic's and its head in a folder, all the rest in ppo_state.pt.


def save_checkpoint(ppo: PPO, folder: Path) -> None:
    """Write all that the run has to hold into `folder`, once; the trainer's state CheckpointCallback adds."""
    import torch

    if not is_first():
        return
    ppo.model.save_pretrained(folder, selected_adapters=["default", "critic"])
    save_head(ppo.critic_head, folder / "critic", {"kind": "critic"})
    rest = {
        "policy": ppo.policy.state(),
        "critic": ppo.critic.state(),
        "kl_coef": ppo.kl_controller.coef,
        "score_moments": asdict(ppo.score_moments),
        "prompt_sampler": ppo.prompt_sampler.state(),
        "random": random_state(),
    }
    torch.save(rest, folder / "ppo_state.pt")


def load_checkpoint(ppo: PPO, checkpoint: Path) -> None:
    """Put back what `save_checkpoint` wrote; of the random numbers last, for loading may draw some."""
    import torch
    from peft import load_peft_weights, set_peft_model_state_dict

    for name, folder in (("default", checkpoint), ("critic", checkpoint / "critic")):
        weights = load_peft_weights(str(folder), device=str(ppo.critic_head.weight.device))
        set_peft_model_state_dict(ppo.model, weights, adapter_name=name)
    head, _ = load_head(checkpoint / "critic", ppo.critic_head.weight.device)
    ppo.critic_head.load_state_dict(head.state_dict())
    rest = torch.load(checkpoint / "ppo_state.pt", map_location="cpu", weights_only=True)
    ppo.policy.restore(rest["policy"])
    ppo.critic.restore(rest["critic"])
    ppo.kl_controller.coef = rest["kl_coef"]
    ppo.score_moments = RunningMoments(**rest["score_moments"])
    ppo.prompt_sampler.restore(rest["prompt_sampler"])
    restore_random_state(rest["random"])


if __name__ == "__main__":
    run_command(main)
