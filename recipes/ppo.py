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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
from common.lm.hidden_states import pad_right
from common.lm.hub import contents, fetch, load_tokenizer, resolved_revision
from common.lm.log_probs import completion_log_probs, kl_estimate, masked_mean
from common.lm.scalar_head import completion_values, load_head, new_head, save_head, score_last
from common.rewards.adapter import find_reward_adapter, load_reward_adapter
from common.rewards.contract import check_contract
from common.rewards.specification import Reward, check_prompts, load, score_completions
from common.run.curriculum import PromptSampler
from common.run.files import write_folder
from common.run.folder import plan_run
from common.run.samples import Sample, show
from common.run.stopping import Stop
from common.run.training_state import Learner, random_state, restore_random_state

if TYPE_CHECKING:
    import torch
    from common.lm.cuda_graph import RecordedPass
    from common.lm.generate import Completion
    from peft import PeftModel
    from rich.console import Console
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
REWARD_FILES = ("adapter_model.safetensors", "head.safetensors")
REWARD_MODEL = "reward_model"  # its name among the rewards


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
    critic_init: Literal["reward", "base"] = "base"
    """What the critic starts from."""
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

    environment.quiet_loggers()
    import unsloth  # noqa: F401, I001  first, and slow: it changes what is imported after it
    import torch
    from rich.console import Console
    from transformers import TrainerControl, TrainerState, TrainingArguments, set_seed
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
    from unsloth import FastLanguageModel, is_bfloat16_supported

    from common.run.checkpoints import CheckpointCallback, newest_checkpoint
    from common.run.progress import ProgressCallback
    from common.lm.cuda_graph import RecordedPass

    # 3. Prompts: the model's own chat template, up to where it goes on.
    base = fetch(base)
    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, args.chat_template_path, base.name)
    end = end_token(tokenizer)
    set_pad_token(tokenizer, args.pad_token or (base.card.pad_token if base.card else None), end)
    console = Console()

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
        reward_head = load_reward_adapter(model, reward_adapter, "reward") if reward_adapter else None
        if args.critic_init == "reward":
            critic_head = load_reward_adapter(model, reward_adapter, "critic", is_trainable=True)
        else:
            model.add_adapter("critic", copy.deepcopy(model.peft_config["default"]))
            critic_head = new_head(model.config.get_text_config().hidden_size, model.device)
        FastLanguageModel.for_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
        run.update(revision=resolved_revision(base), dtype=str(dtype), machine=environment.describe_machine())

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
            tokenizer=tokenizer,
            end=end,
            reward_functions=rules,
            reward_head=reward_head if args.reward_weight else None,
            reward_backbone=RecordedPass(model),
            critic_head=critic_head,
            policy=Learner(
                adapter_parameters(model, "default"), settings, args.learning_rate, steps - args.critic_warmup_steps
            ),
            critic=Learner(critic_parameters, settings, args.critic_learning_rate, steps),
            prompt_sampler=PromptSampler(rows, args.difficulty, args.difficulty_by, args.seed),
            score_moments=RunningMoments(),
            kl_controller=KLController(args.kl_coef, args.kl_target, args.kl_horizon),
        )
        set_seed(args.seed)
        before, quality_before = shown_answers(ppo, asked), evaluate(ppo, held_out)

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
            rollout, scores, stats = ppo_step(ppo, state.global_step)
            keep_samples(run.folder / "samples.jsonl", rollout, scores, args.sample_prompts, state.global_step)

            state.global_step += 1
            episode = state.global_step * args.rollout_batch_size  # a prompt with its completion, TRL's word
            state.epoch = episode / len(rows)
            state.num_input_tokens_seen += int(rollout.attention_mask.sum())
            callbacks.on_step_end(settings, state, control)
            if control.should_log or state.global_step == steps:
                callbacks.on_log(settings, state, control, logs={**stats, "episode": episode})
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
        after, quality_after = shown_answers(ppo, asked), evaluate(ppo, held_out)
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
        console.print(f"Adapter in [bold]{saved}[/bold]")


LIVE_LINE = {
    "score": "score/mean",
    "kl": "objective/kl",
    "entropy": "policy/entropy",
    "approx kl": "policy/approx_kl",
    "clipped": "policy/clipfrac_avg",
    "value loss": "loss/value_avg",
    "explained": "value/explained_variance",
    "length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
}


# Set-up and logging.


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
    if code == STOPPED or stop.told:
        raise Stopped(stop.told or "its own stop", "while the reward model was trained")
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


def keep_samples(file: Path, rollout: "Rollout", scores: "Scores", count: int, number: int) -> None:
    """Append some of the completions of step `number` to a JSON Lines file."""
    with file.open("a", encoding="utf-8") as stream:
        for index in range(min(count, len(rollout))):
            completion = rollout.completions[index]
            entry = {
                "step": number,
                "prompt": rollout.prompts[index].prompt,
                "completion": completion.text,
                "ended": completion.ended,
                "score": scores.total[index],
                "rewards": {name: values[index] for name, values in scores.parts.items()},
            }
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def forget_after(file: Path, number: int) -> None:
    """Drop the rows of `keep_samples` that a resumed run does again: those of step `number` and later."""
    if file.exists():
        rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(row for row in rows if json.loads(row)["step"] < number), encoding="utf-8")


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
    }
    # The scores as they were given: all together, the reward model's part, the reward functions' part, and each one's.
    metrics["score/mean"], metrics["score/std"] = moments(scores.total)
    if REWARD_MODEL in scores.parts:
        metrics["score/reward_model"] = ppo.args.reward_weight * moments(scores.parts[REWARD_MODEL])[0]
    if ppo.reward_functions:
        metrics["score/reward_functions"] = metrics["score/mean"] - metrics.get("score/reward_model", 0.0)
    for name, values in scores.parts.items():
        applies = [value for value in values if value is not None]
        if applies:
            metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = moments(applies)
    return metrics


def evaluate(ppo: "PPO", prompts: list[Prompt]) -> dict[str, float] | None:
    """Scores of completions sampled to held-out prompts, and their KL from the reference; None without prompts."""
    if not prompts:
        return None
    rollout = sample(ppo, prompts)
    mean, std = moments(score(ppo, rollout).total)
    log_probs, _ = all_log_probs(ppo, rollout, "default")
    ref_log_probs, _ = all_log_probs(ppo, rollout, "reference")
    return {
        "score": mean,
        "score_std": std,
        "kl": float((log_probs - ref_log_probs).sum(1).mean()),
        "length": sum(len(completion.completion_ids) for completion in rollout.completions) / len(rollout),
        "no_end": sum(not completion.ended for completion in rollout.completions) / len(rollout),
    }


def as_rollout(
    prompts: list[Prompt], completions: "list[Completion]", pad_token_id: int, device: "torch.device | str"
) -> "Rollout":
    """Prompts and completions with their tensors."""
    import torch

    input_ids, attention_mask = pad_right([c.prompt_ids + c.completion_ids for c in completions], pad_token_id, device)
    tokens, mask = pad_right([completion.completion_ids for completion in completions], pad_token_id, device)
    start = torch.tensor([len(completion.prompt_ids) for completion in completions], device=device)
    return Rollout(prompts, completions, input_ids, attention_mask, start, tokens, mask.bool())


def shown_answers(ppo: "PPO", prompts: list[Prompt]) -> list[str]:
    """Greedy completions as text, to be shown; "..." marks a truncated one."""
    completions = complete(ppo, prompts, ppo.args.sample_tokens, 0.0)
    return [completion.text + ("" if completion.ended else " ...") for completion in completions]


# The four models: which one runs, and what the phases ask of them.


@contextmanager
def active_adapter(model: "PeftModel", name: str) -> Iterator[None]:
    """Within the block the model is the "critic", the "reward" model or the "reference" policy, outside it the policy.

    A block holds a forward pass and its backward pass, or neither: see `update`.
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


def complete(ppo: "PPO", prompts: list[Prompt], max_new_tokens: int, temperature: float) -> "list[Completion]":
    """One completion to each prompt from the policy; greedy at temperature 0."""
    from common.lm.generate import generate
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(ppo.model)
    conversations = [Conversation(row.place, row.prompt, row.tools) for row in prompts]
    completions = generate(
        ppo.model, ppo.tokenizer, conversations, ppo.end, max_new_tokens, temperature, batch_size=128
    )
    FastLanguageModel.for_training(ppo.model, use_gradient_checkpointing=ppo.args.gradient_checkpointing)
    return completions


def log_probs_of(ppo: "PPO", part: "Rollout") -> "tuple[Tensor, Tensor]":
    """Log-probabilities and entropies (B, C) of the completions under the active model: see `completion_log_probs`."""
    inputs = part.input_ids, part.attention_mask, part.start, part.tokens, part.mask
    return completion_log_probs(ppo.model, *inputs, ppo.args.temperature)


def values_of(ppo: "PPO", part: "Rollout") -> "Tensor":
    """What the critic, whose adapter must be active, expects before each token of the completions: (B, C)."""
    return completion_values(ppo.model, ppo.critic_head, part.input_ids, part.attention_mask, part.start, part.mask)


def all_log_probs(ppo: "PPO", rollout: "Rollout", name: str) -> "tuple[Tensor, Tensor]":
    """`log_probs_of` a whole rollout under the policy, "default", or the "reference", in small passes; no gradient."""
    import torch

    with torch.no_grad(), active_adapter(ppo.model, name):
        parts = [log_probs_of(ppo, part) for part in passes(ppo, rollout)]
    log_probs, entropies = zip(*parts, strict=True)
    return stacked(log_probs, rollout), stacked(entropies, rollout)


def all_values(ppo: "PPO", rollout: "Rollout") -> "Tensor":
    """`values_of` a whole rollout, (B, C), in small passes; no gradient."""
    import torch

    with torch.no_grad(), active_adapter(ppo.model, "critic"):
        return stacked([values_of(ppo, part) for part in passes(ppo, rollout)], rollout)


def reward_model_scores(ppo: "PPO", rollout: "Rollout") -> list[float]:
    """What the reward model gives to each completion, B numbers."""
    texts = [(completion.prompt_ids, completion.completion_ids) for completion in rollout.completions]
    size = ppo.args.per_device_train_batch_size
    with active_adapter(ppo.model, "reward"):
        return score_last(ppo.model, ppo.reward_head, texts, ppo.tokenizer.pad_token_id, size, ppo.reward_backbone)


def passes(ppo: "PPO", rollout: "Rollout") -> "Iterator[Rollout]":
    """The rollout in parts of as many completions as a training pass has."""
    for index in split([*range(len(rollout))], ppo.args.per_device_train_batch_size):
        yield rollout.take(index)


def split(index: list[int], size: int) -> list[list[int]]:
    return [index[first : first + size] for first in range(0, len(index), size)]


def stacked(parts: "Sequence[Tensor]", rollout: "Rollout") -> "Tensor":
    """Tensors (b, c) of the parts of a rollout, put together as (B, C)."""
    import torch

    columns = rollout.mask.shape[1]
    return torch.cat([torch.nn.functional.pad(part, (0, columns - part.shape[1])) for part in parts])


# The algorithm. `ppo_step` is one step of it: four phases, each of which returns what it computes, and the three
# states that change from step to step. Below it the phases in order, then the arithmetic, which knows no model.
# Shapes: B completions, T tokens of the longest prompt with its completion, C tokens of the longest completion. A
# column of a (B, C) tensor is one token of the completion: the action.


@dataclass
class PPO:
    """The models, what trains them, and the states that change from step to step. A checkpoint holds all that changes.

    One frozen base carries four models: with the adapter "default" it is the policy, with "critic" and `critic_head`
    the critic, with "reward" and `reward_head` the reward model, without an adapter the reference policy.
    """

    args: Args
    model: "PeftModel"
    tokenizer: "PreTrainedTokenizerBase"
    end: str  # the token that ends a completion
    reward_functions: list[Reward]
    reward_head: "torch.nn.Linear | None"  # None without a reward model
    reward_backbone: "RecordedPass"
    critic_head: "torch.nn.Linear"
    policy: Learner
    critic: Learner
    prompt_sampler: PromptSampler
    score_moments: "RunningMoments"
    kl_controller: "KLController"


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

    def take(self, index: list[int]) -> "Rollout":
        """The rows `index`, with no more columns of padding than they need."""
        longest, columns = int(self.attention_mask[index].sum(1).max()), int(self.mask[index].sum(1).max())
        return Rollout(
            [self.prompts[i] for i in index],
            [self.completions[i] for i in index],
            self.input_ids[index, :longest],
            self.attention_mask[index, :longest],
            self.start[index],
            self.tokens[index, :columns],
            self.mask[index, :columns],
        )


@dataclass(frozen=True)
class Scores:
    """What the reward model and the reward functions gave to each completion as a whole."""

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
    """What the critic expected, and how much better than that each token turned out."""

    values: "Tensor"  # (B, C) before each token
    advantages: "Tensor"  # (B, C) whitened
    returns: "Tensor"  # (B, C)


def ppo_step(ppo: PPO, number: int) -> tuple[Rollout, Scores, dict[str, float]]:
    """Step `number`, from 0: the rollout, its scores, and the metrics of the step."""
    args, stats = ppo.args, {}
    # Phase 1. Sample completions to prompts from the policy.
    with seconds(stats, "time/sample"):
        rollout = sample(ppo, ppo.prompt_sampler.draw(args.rollout_batch_size))
    # Phase 2. Score them, and take the KL divergence from the reference policy off the reward of each token.
    with seconds(stats, "time/reward"):
        scores = score(ppo, rollout)
        if args.normalize_scores:
            ppo.score_moments.update(scores.total)
        rewards = compute_rewards(ppo, rollout, scores)
        kl = float((rewards.log_probs - rewards.ref_log_probs).sum(1).mean())  # nats in a whole completion
        ppo.kl_controller.update(kl, len(rollout))
        ppo.prompt_sampler.learn((rewards.entropies.sum(1) / rollout.mask.sum(1)).tolist(), scores.total)
    # Phase 3. Estimate how much better than the critic's expectation each token turned out.
    with seconds(stats, "time/advantages"):
        advantages = compute_advantages(ppo, rollout, rewards)
    # Phase 4. Update policy and critic, several times on the same rollout.
    with seconds(stats, "time/update"):
        stats |= update(ppo, rollout, rewards, advantages, policy_learns=number >= args.critic_warmup_steps)
    return rollout, scores, stats | step_metrics(ppo, rollout, scores, rewards, advantages)


# Phase 1: sample.


def sample(ppo: PPO, prompts: list[Prompt]) -> Rollout:
    """One completion to each prompt, sampled from the policy, and both as tensors.

    They are padded on the right: there no token can attend to the padding, with or without an attention mask.
    """
    completions = complete(ppo, prompts, ppo.args.max_completion_length, ppo.args.temperature)
    return as_rollout(prompts, completions, ppo.tokenizer.pad_token_id, ppo.critic_head.weight.device)


# Phase 2: scores and rewards.


def score(ppo: PPO, rollout: Rollout) -> Scores:
    """2.1 Score each completion as a whole: reward functions and reward model, added with their weights."""
    total, parts = [0.0] * len(rollout), {}
    if ppo.reward_functions:
        total, parts = score_completions(ppo.reward_functions, rollout.prompts, rollout.completions)
    if ppo.reward_head is not None:
        given = reward_model_scores(ppo, rollout)
        parts = {**parts, REWARD_MODEL: given}
        total = [t + ppo.args.reward_weight * g for t, g in zip(total, given, strict=True)]
    return Scores(total, parts)


def compute_rewards(ppo: PPO, rollout: Rollout, scores: Scores) -> Rewards:
    """2.2 to 2.5: from scores to the reward of each token.

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
    ref_log_probs, _ = all_log_probs(ppo, rollout, "reference")
    kl = kl_estimate(log_probs - ref_log_probs, args.kl_estimator)  # (B, C)
    # 2.5 Reward: minus kl_coef x KL at each token, and the score at the last token.
    kl_coef = ppo.kl_controller.coef
    rewards = shaped_rewards(torch.tensor(final, device=kl.device), kl, kl_coef, rollout.mask)
    return Rewards(final, log_probs, ref_log_probs, entropies, kl, kl_coef, rewards)


# Phase 3: advantages.


def compute_advantages(ppo: PPO, rollout: Rollout, rewards: Rewards) -> Advantages:
    """3.1 values of the critic, 3.2 advantages and returns by GAE, 3.3 advantages whitened over the rollout."""
    values = all_values(ppo, rollout)
    advantages, returns = gae(rewards.rewards, values, rollout.mask, ppo.args.gamma, ppo.args.lam)
    return Advantages(values, masked_whiten(advantages, rollout.mask), returns)


# Phase 4: update.


def update(
    ppo: PPO, rollout: Rollout, rewards: Rewards, advantages: Advantages, policy_learns: bool
) -> dict[str, float]:
    """Several epochs over the rollout, in shuffled minibatches; policy and critic take one step on each.

    Each of the two has a backward pass and an optimizer of its own, so there is no vf_coef to weigh their losses. One
    backward pass through both would run after the adapter has been switched, and gradient checkpointing would then
    recompute the policy's activations with the critic's adapter: no error, wrong gradients.
    """
    import torch

    args, learns = ppo.args, policy_learns
    stats: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.num_ppo_epochs):
        order = torch.randperm(len(rollout)).tolist()
        for minibatch in split(order, args.per_device_train_batch_size * args.gradient_accumulation_steps):
            of_policy = {}
            if learns:
                of_policy = update_policy(ppo, rollout, rewards, advantages, minibatch)
                learns = not of_policy["policy/stopped"]
            for name, value in (of_policy | update_critic(ppo, rollout, advantages, minibatch)).items():
                stats[name].append(value)
    metrics = {name: sum(values) / len(values) for name, values in stats.items()}
    metrics |= {"lr": ppo.policy.learning_rate, "critic_lr": ppo.critic.learning_rate}
    metrics["loss"] = metrics.get("loss/policy_avg", 0.0) + metrics["loss/value_avg"]
    if policy_learns:
        ppo.policy.schedule.step()
    ppo.critic.schedule.step()
    return metrics


def update_policy(
    ppo: PPO, rollout: Rollout, rewards: Rewards, advantages: Advantages, minibatch: list[int]
) -> dict[str, float]:
    """4.1 One optimization step of the policy, unless it has moved too far from the policy that sampled."""
    args, stats = ppo.args, defaultdict(float)
    count = int(rollout.mask[minibatch].sum())  # every token weighs the same, whichever pass it is in
    for index in split(minibatch, args.per_device_train_batch_size):
        part = rollout.take(index)
        columns = part.mask.shape[1]
        old_log_probs = rewards.log_probs[index, :columns]
        log_probs, _ = log_probs_of(ppo, part)  # (b, c)
        losses, clipped = policy_losses(
            log_probs, old_log_probs, advantages.advantages[index, :columns], args.cliprange
        )
        loss = (losses * part.mask).sum() / count
        ppo.policy.backward(loss)

        log_ratios = (log_probs.detach() - old_log_probs)[part.mask]  # (N,)
        stats["loss/policy_avg"] += float(loss.detach())
        stats["policy/approx_kl"] += float(kl_estimate(-log_ratios, "k3").sum()) / count
        stats["policy/clipfrac_avg"] += float((clipped & part.mask).sum()) / count
        stats["val/ratio"] += float(log_ratios.exp().sum()) / count
    stopped = stats["policy/approx_kl"] > args.max_approx_kl
    gradient_norm = 0.0
    if stopped:
        ppo.policy.discard()
    else:
        gradient_norm = ppo.policy.step()
    return {**stats, "policy/grad_norm": gradient_norm, "policy/stopped": float(stopped)}


def update_critic(ppo: PPO, rollout: Rollout, advantages: Advantages, minibatch: list[int]) -> dict[str, float]:
    """4.2 One optimization step of the critic."""
    args, stats = ppo.args, defaultdict(float)
    count = int(rollout.mask[minibatch].sum())
    with active_adapter(ppo.model, "critic"):
        for index in split(minibatch, args.per_device_train_batch_size):
            part = rollout.take(index)
            columns = part.mask.shape[1]
            old_values, returns = advantages.values[index, :columns], advantages.returns[index, :columns]
            values = values_of(ppo, part)  # (b, c)
            losses, clipped = value_losses(values, old_values, returns, args.cliprange_value)
            loss = (losses * part.mask).sum() / count
            ppo.critic.backward(loss)
            stats["loss/value_avg"] += float(loss.detach())
            stats["val/clipfrac_avg"] += float((clipped & part.mask).sum()) / count
    return {**stats, "value/grad_norm": ppo.critic.step()}


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


def explained_variance(values: "Tensor", returns: "Tensor", mask: "Tensor") -> "Tensor":
    """1 - Var(returns - values) / Var(returns) over the mask: 1 for a perfect critic, 0 for a constant one."""
    returns, errors = returns[mask], (returns - values)[mask]
    return 1 - errors.var(correction=0) / (returns.var(correction=0) + 1e-8)


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
    """Write all that the run has to hold into `folder`; the trainer's state CheckpointCallback adds."""
    import torch

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
