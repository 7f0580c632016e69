"""Group relative policy optimization (GRPO): sample several completions of each prompt, and reward the right ones.

    make grpo                                                        the tiny model on two-number arithmetic
    make grpo MODEL=outputs/merged DATA=gsm8k.jsonl                  problems with gold answers
    make grpo MODEL=qwen2.5-7b DATA=gsm8k.jsonl REWARDS="math format=0.2 my_rewards.py:shorter=0.1"
    make test-rewards DATA=gsm8k.jsonl                               do the rewards measure what they should?

Data is prompt/answer or question/answer (as GSM8K has it), with the prompt's tools in a column `tools`; other columns
reach the reward functions under their names. A reward is a name of common/rewards/specification.py, FILE.py:FUNCTION or
model:CHECKPOINT, with =WEIGHT; they are added up. Before a run each must pass the reward contract on rows of the data.

The advantage of a completion is its reward relative to the mean of its group, the completions of the same prompt
(arXiv:2402.03300). A group whose rewards are all equal teaches nothing: the live line has the share of such groups as
`flat`, and --refill replaces them.

The reference policy is the base with the adapter switched off, so the stage before must be merged into the base. With
--beta 0, the default, the loss has no KL term; the KL that is shown is then measured on a few completions a step.

Left out: running the tools that a completion calls, several turns, sharding a model over several GPUs.
"""

import math
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from common import environment
from common.cli import parse
from common.data.examples import Prompt
from common.data.formats import PROBLEM_FORMATS
from common.data.hold_out import hold_out
from common.data.prompts import drop_long, with_system_prompt
from common.data.read import read_examples
from common.data.rows import Faults, find_source
from common.errors import InputError, run_command
from common.lm.active_adapter import active_adapter
from common.lm.hub import fetch, resolved_revision
from common.lm.load import (
    choose_dtype,
    fuse_adapter,
    identify,
    keep_activations,
    load_chat_tokenizer,
)
from common.lm.mask import completion_segments
from common.lm.packed_check import trust_longer_batches
from common.lm.rollout.backends import check_sampling, corrects
from common.lm.rollout.correction import correction, rollout_mismatch
from common.lm.rollout.over_ranks import of_rank, sample_over_ranks, score_tokens_over_ranks
from common.plan.fit import fit_to_gpu
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
from common.run.data_summary import summary
from common.run.ending import show_ending
from common.run.files import write_folder
from common.run.folder import plan_run
from common.run.ranks import gather_objects, is_first, world_size
from common.run.samples import append, as_sample, forget_after, show
from common.run.screen import announce, loading
from common.run.stopping import Stop

if TYPE_CHECKING:
    import torch
    from common.lm.generate import Completion
    from common.lm.log_probs import Scored
    from common.lm.rollout.backends import Correction
    from common.lm.rollout.rollouts import Rollouts
    from trl import GRPOTrainer
else:
    GRPOTrainer = object  # trl is slow to import; main mixes GroupSampling into the real one


MEASURED = 4  # completions of a step whose KL divergence and rollout's log-probabilities are measured


@dataclass(frozen=True)
class Args:
    """Every name that TRL, PEFT or transformers also has means the same here."""

    # Model, data, output.
    model: str = "tiny"
    """A model card's name (`make models`), a local directory or a hub id; it is also the reference policy."""
    data: str = str(environment.ROOT / "data_samples" / "arithmetic-train.jsonl")
    """A file, a folder of files or a hub dataset."""
    output_dir: str | None = None
    """The folder of the run. By default outputs/grpo-MODEL-HASH: other settings, another folder."""
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""

    # How the data is read.
    format: Literal[
        "auto", "prompt-answer", "question-answer", "problem-answer", "problem-solution", "prompt", "instruction",
        "humaneval", "mbpp", "mbpp-text", "verl",
    ] = "auto"  # fmt: skip
    """The format of the rows; auto takes it from the columns of the first row."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=problem answer=solution."""
    system_prompt: str | None = None
    """A system message before every prompt, for a model that no SFT stage has taught the format of an answer."""
    chat_template_path: str | None = None
    """A .jinja file to use instead of the model's own chat template."""
    pad_token: str | None = None
    """The pad token, for a model that has none besides its end token."""
    max_prompt_length: int = 1024
    """Tokens of a prompt; longer prompts are dropped: a truncated prompt is a different prompt."""
    max_truncated: float = 0.05
    """Stop when a larger share of the prompts would be dropped, or lose a part in the chat template."""

    # The rewards.
    rewards: tuple[str, ...] = ("math", "format=0.2")
    """NAME, FILE.py:FUNCTION or model:CHECKPOINT, each with =WEIGHT if it is not 1."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide an advantage by the standard deviation of its group, of the batch, or by nothing (Dr. GRPO)."""
    difficulty: Literal["off", "easy", "medium", "hard", "auto"] = "off"
    """Measure the prompts with the model first and train on these only; auto: all but those that teach nothing."""
    difficulty_by: Literal["pass-rate", "entropy"] = "pass-rate"
    """The share of completions with at least half of the first reward's best score, or their entropy."""
    difficulty_prompts: int = 512
    """Prompts to measure, and to choose from."""
    refill: int = 0
    """How often, in one step, groups whose rewards are all equal are replaced by groups of other prompts."""

    # The loss.
    num_generations: int = 4
    """Completions of each prompt: the group."""
    max_completion_length: int = 512
    temperature: float = 0.9
    beta: float = 0.0
    """Weight of the KL divergence from the reference policy in the loss; 0 leaves it out."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """How the losses of tokens are averaged; dapo: over all tokens of the batch."""
    epsilon: float = 0.2
    """Clipping of the probability ratio; has an effect only with --num-iterations above 1."""
    epsilon_high: float | None = None
    """Its upper bound, if it differs from the lower one."""
    num_iterations: int = 1
    """Optimization steps on the same completions."""
    mask_truncated_completions: bool = False
    """Leave truncated completions out of the loss."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """The probability ratio of each token, or of the whole completion (GSPO, arXiv:2507.18071)."""
    rollouts: Literal["auto", "graph", "vllm", "generate"] = "auto"
    """graph: our own decoder; vllm: vLLM in this process (VARIANT=cuda-vllm); auto: the first of these that can."""
    rollout_correction: Literal["off", "token"] = "off"
    """token: weigh each token's loss by min(p in training / p in sampling, 2); both are logged as rollout/..."""

    # The model and the adapter.
    load_in_4bit: bool = True
    """Load the frozen base in nf4 (QLoRA); --no-load-in-4bit for 16 bit."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 on a GPU that has it, else float16; float32 on the CPU."""
    lora_r: int = 16
    lora_alpha: int = 16
    lora_target_modules: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )

    # The optimization.
    per_device_train_batch_size: int = 4
    """Completions in one pass; times --gradient-accumulation-steps a multiple of --num-generations."""
    gradient_accumulation_steps: int = 4
    num_train_epochs: float = 1.0
    max_steps: int = -1
    """Stop after so many steps; -1: --num-train-epochs decides."""
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.1
    """Steps of warm-up; below 1, a share of the run."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: str = "adamw_8bit"
    """On the CPU, which has no 8-bit Adam, it is adamw_torch_fused."""
    gradient_checkpointing: bool = True
    """Recompute activations to save memory; a third faster without it, if they fit."""
    share_prompts: bool = False
    """Keep groups together in training, so that Unsloth on a GPU can compute a prompt once for its completions."""
    checkpoint_skip_layers: int = 0
    """Layers that keep their activations all the same: the more, the faster, for as long as they fit."""
    fit: Literal["off", "auto"] = "off"
    """auto: 16 bit or nf4, recomputation and micro-batch are chosen for this GPU; the batch of a step stays."""
    seed: int = 42
    full_determinism: bool = False
    """Deterministic kernels only, so that two runs on one kind of GPU have equal bits; slower. See `make verify`."""

    # Logging and checkpoints.
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
    """Held-out prompts whose completions are shown, before and after training; and the completions of each step that
    are written to samples.jsonl."""
    sample_tokens: int = 128
    """Tokens of a completion of a held-out prompt, at most."""


def main() -> None:
    args, base, origins = parse(Args, "grpo", __doc__)
    stop = Stop(args.time_limit)
    check_groups(args)
    check_loss(args)

    # 1. Data and rewards: read and checked completely, before anything slow is loaded.
    source = find_source(args.data)
    environment.set_variables(models=[base, *reward_models(args.rewards)], sources=[source])
    os.environ.setdefault("UNSLOTH_BLOCK_COMPILE", "0")  # else it compiles anew for rows of every other length
    data = read_examples(source, PROBLEM_FORMATS, args.format, args.columns)
    rewards, faults = load(args.rewards, args.max_completion_length), Faults()
    check_prompts(rewards, data.examples, faults)
    faults.stop()
    check_functions(rewards, data.examples, args.seed)
    if worded := describe_words(rewards, data.examples):
        print(worded)

    # 2. The run: new, resumed, or finished already. Nothing is written yet.
    run = plan_run(
        "grpo",
        base.name,
        args.output_dir,
        arguments=asdict(args),
        origins=origins,
        inputs={"data": data.identity, "reward_files": identities(rewards), **identify(base, args.chat_template_path)},
    )
    if run is None:
        return

    console = loading(base.name, data.notes)
    import unsloth  # noqa: F401, I001  first, and slow: it changes what is imported after it
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer
    from unsloth import FastLanguageModel

    from common.lm.rollout.rollouts import Rollouts
    from common.run.checkpoints import CheckpointCallback, newest_checkpoint
    from common.run.curriculum import select
    from common.run.health.callback import HealthCallback
    from common.run.metrics import ProgressCallback, mean_loss
    from common.run.steps import CheckedSteps

    check_models(rewards, data.examples, args.seed)

    # 3. Prompts: rendered by the model's own chat template, up to the generation prompt.
    base = fetch(base)
    tokenizer, end = load_chat_tokenizer(base, args.chat_template_path, args.pad_token)
    tokenizer.eos_token = end  # for TRL a completion that ends with another token is truncated
    prompts = with_system_prompt(data.examples, args.system_prompt)
    prompts, dropped = drop_long(tokenizer, prompts, args.max_prompt_length, args.max_truncated)
    if dropped:
        console.print(dropped)
    order = random.Random(args.seed)  # with fewer than ten prompts, none is held out
    held_out, prompts = hold_out(prompts, min(args.sample_prompts, len(prompts) // 10), order)

    announce(base.name, f"{len(prompts)} prompts of {args.data}", run.folder)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        console.print("No GPU: adamw_torch_fused in place of 8-bit Adam.")
    with run:
        args = fit_to_gpu(args.fit, args, "grpo", base, origins, run)
        # 4. The model: frozen in 4 or 16 bit under a new LoRA adapter. Without the adapter it is the reference policy.
        dtype = choose_dtype(args.dtype)
        checkpointing = "unsloth" if args.gradient_checkpointing else False
        keep_activations(args.checkpoint_skip_layers)
        model, _ = FastLanguageModel.from_pretrained(
            base.source,
            **base.origin,  # its revision, and whether code of its own may run
            max_seq_length=args.max_prompt_length + args.max_completion_length,
            dtype=dtype,
            load_in_4bit=args.load_in_4bit,
            use_gradient_checkpointing=checkpointing,
            use_exact_model_name=True,  # else Unsloth replaces a hub id by its own 4-bit copy
            random_state=args.seed,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=0.0,  # the loss compares log-probabilities, which dropout would change
            target_modules=list(args.lora_target_modules),
            use_gradient_checkpointing=checkpointing,
            random_state=args.seed,
        )
        fuse_adapter(model)
        run.update(revision=resolved_revision(base), dtype=str(dtype), machine=environment.describe_machine())
        run.update(data=summary(data, tokenizer, prompts, held_out))

        rollouts = Rollouts(model, tokenizer, end, seed=args.seed, backend=args.rollouts)

        def sample_completions() -> list[str]:
            completions = rollouts.sample(held_out, args.sample_tokens, 0.0)
            return [completion.text + ("" if completion.ended else " ...") for completion in completions]

        before = sample_completions()

        # 5. The prompts to train on: all, or those of a difficulty that is measured with this model.
        if args.difficulty != "off":
            if len(prompts) > args.difficulty_prompts:
                prompts = order.sample(prompts, args.difficulty_prompts)
            measures = measure_difficulty(prompts, args, rollouts, rewards, model, tokenizer.pad_token_id)
            prompts = [prompts[index] for index in select(measures, args.difficulty, args.difficulty_by)]
            console.print(f"{len(prompts)} of {len(measures)} prompts are {args.difficulty} by {args.difficulty_by}")

        # 6. The trainer. Values that Unsloth's GPU path and TRL default differently are set here.
        class Trainer(GroupSampling, CheckedSteps, GRPOTrainer):
            """GRPOTrainer with our sampling and scoring, and checked steps."""

        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func warns that it may change; TRL is pinned
        rows = {"prompt": [prompt.prompt for prompt in prompts], "index": [*range(len(prompts))]}
        trainer = Trainer(
            prompts=prompts,
            rollouts=rollouts,
            rollout_correction=args.rollout_correction,
            share_prompts=args.share_prompts,
            refill=args.refill,
            samples=run.folder / "samples.jsonl",
            samples_a_step=args.sample_prompts,
            model=model,
            processing_class=tokenizer,
            reward_funcs=list(rewards),
            rollout_func=rollout,
            train_dataset=Dataset.from_dict(rows),
            callbacks=[
                ProgressCallback(run.folder / "metrics.jsonl", None, console, live_line(rewards)),
                HealthCallback(run, stop, args.stop_on_fault, data.examples),
                CheckpointCallback(run, stop, args.save_total_limit, every=args.num_iterations),
            ],
            args=GRPOConfig(
                output_dir=str(run.folder / "checkpoints" / "part"),  # complete checkpoints are moved out of here
                num_generations=args.num_generations,
                max_completion_length=args.max_completion_length,
                temperature=args.temperature,
                beta=args.beta,
                loss_type=args.loss_type,
                scale_rewards=args.scale_rewards,
                reward_weights=[reward.weight for reward in rewards],
                epsilon=args.epsilon,
                epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
                num_iterations=args.num_iterations,
                mask_truncated_completions=args.mask_truncated_completions,
                importance_sampling_level=args.importance_sampling_level,
                use_vllm=False,
                per_device_train_batch_size=args.per_device_train_batch_size,
                gradient_accumulation_steps=args.gradient_accumulation_steps,
                num_train_epochs=args.num_train_epochs,
                max_steps=args.max_steps,
                learning_rate=args.learning_rate,
                lr_scheduler_type=args.lr_scheduler_type,
                warmup_steps=args.warmup_steps,
                weight_decay=args.weight_decay,
                max_grad_norm=args.max_grad_norm,
                optim=args.optim if on_gpu else "adamw_torch_fused",
                bf16=dtype == torch.bfloat16,
                fp16=dtype == torch.float16,
                gradient_checkpointing=args.gradient_checkpointing,
                seed=args.seed,
                data_seed=args.seed,
                logging_steps=args.logging_steps,
                logging_first_step=True,
                save_steps=args.save_steps,
                save_total_limit=args.save_total_limit,
                report_to=["tensorboard", *args.report_to],
                run_name=run.folder.name,
                disable_tqdm=True,  # ProgressCallback shows the progress
                torch_empty_cache_steps=None,
            ),
        )
        if "ref" in model.peft_config:  # TRL's copy of the new adapter, with --beta: see dpo.py
            model.delete_adapter("ref")
        trainer.remove_callback(PrinterCallback)  # ProgressCallback prints the same
        checkpoint = newest_checkpoint(run)
        forget_after(run.folder / "samples.jsonl", run.record["step"])
        trainer.train(resume_from_checkpoint=checkpoint)

        # 7. Save, and show what changed; in the first rank, for all have the same weights.
        if not is_first():
            return
        saved = run.folder / "adapter"
        with write_folder(saved) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        after = sample_completions()
        run.update(tokens=trainer.state.num_input_tokens_seen, train_loss=mean_loss(trainer.state.log_history))
        show(console, run.folder / "samples.json", [as_sample(prompt) for prompt in held_out], before, after)
        show_ending(console, run, saved)


def check_groups(args: Args) -> None:
    """Raise InputError unless a step holds whole groups of at least two completions."""
    completions = args.per_device_train_batch_size * args.gradient_accumulation_steps
    of_all = f" x {world_size()} processes, each with whole groups" if world_size() > 1 else ""
    if completions % (args.num_generations * world_size()) or args.num_generations < 2:
        raise InputError(
            f"--per-device-train-batch-size {args.per_device_train_batch_size} x --gradient-accumulation-steps "
            f"{args.gradient_accumulation_steps} is {completions} completions a step, which must be a multiple of "
            f"--num-generations {args.num_generations}{of_all}, and that at least 2"
        )


def check_loss(args: Args) -> None:
    """Raise InputError for settings of the loss that do not fit each other."""
    if args.importance_sampling_level == "sequence" and args.loss_type != "grpo":
        raise InputError(
            f"--importance-sampling-level=sequence with --loss-type={args.loss_type} would weigh a completion by its "
            "length, but its ratio is one number for all its tokens: give --loss-type=grpo"
        )
    check_sampling(args.rollouts, args.rollout_correction, args.importance_sampling_level)


class GroupSampling(GRPOTrainer):
    """A mixin of TRL's GRPOTrainer: samples by our `Rollouts` and scores by our rewards; a group is scored once.

    Args:
        prompts: what to train on; the `index` column of the trainer's data set points into it.
        rollouts: sample from the policy.
        rollout_correction: whether advantages are weighted by how likely the policy in training finds each token.
        share_prompts: whether the completions of a group stay side by side in training.
        refill: how often, in one step, flat groups are replaced by groups of other prompts.
        samples: the file that `samples_a_step` completions of each step are appended to.
        trl: the arguments of GRPOTrainer.
    """

    def __init__(
        self,
        *,
        prompts: list[Prompt],
        rollouts: "Rollouts",
        rollout_correction: "Correction",
        share_prompts: bool,
        refill: int,
        samples: Path,
        samples_a_step: int,
        **trl: Any,
    ) -> None:
        super().__init__(**trl)
        self.prompts = prompts
        self.rollouts = rollouts
        self.rollout_correction = rollout_correction
        self.share_prompts = share_prompts
        self.refill = refill
        self.samples = samples
        self.samples_a_step = samples_a_step
        self.own_metrics: dict[str, list[float]] = defaultdict(list)  # of this rank's rows, in this step

    def _prepare_inputs(self, generation_batch: list[dict]) -> dict:
        """As TRL's; with --share-prompts without its shuffle, since Unsloth looks for a prompt in rows side by side.

        The completions of a step are all in the same optimizer step, so their order has no effect on it.
        """
        from trl.trainer.utils import split_tensor_dict

        if not self.share_prompts:
            return super()._prepare_inputs(generation_batch)
        passes = self.args.steps_per_generation
        if self._step % (passes * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = split_tensor_dict(self._generate_and_score_completions(generation_batch), passes)
        return self._buffered_inputs[self._step % passes]

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        """As TRL's, for the rows of this rank. Every rank has the batch of all: see `Batch`."""
        drawn = [self.prompts[index] for part in gather_objects([row["index"] for row in inputs]) for index in part]
        self.batch = Batch.of(self.reward_funcs, drawn, self._sampled(drawn, 0))
        for attempt in range(self.refill):
            flat = flat_groups(self.batch.totals, self.num_generations)
            if not flat:
                break
            fresh = random.Random(f"{self.args.seed} {self.state.global_step} {attempt}")
            others = [self.prompts[fresh.randrange(len(self.prompts))] for _ in flat]
            replaced = [index for group in flat for index in range(group.start, group.stop)]
            drawn = [prompt for prompt in others for _ in range(self.num_generations)]
            self.batch.replace(replaced, Batch.of(self.reward_funcs, drawn, self._sampled(drawn, 1 + attempt)))
        own = [{"prompt": prompt.prompt} for prompt in of_rank(self.batch.prompts)]
        output = super()._generate_and_score_completions(own)
        whole = corrects(self.rollout_correction, self.rollouts.backend)
        scored = self._score(self.batch.completions if whole else self.batch.completions[:MEASURED])
        if self.beta == 0:  # else TRL measures it, for the loss
            kl = self._measure_kl(self.batch.completions[:MEASURED], scored[:MEASURED])
            self._metrics["train"]["measured_kl"].append(kl)
        trained = [one.log_probs for one in scored]
        for name, value in rollout_mismatch(self.batch.completions, trained).items():
            self._metrics["train"][name].append(value)
        if whole:
            width = output["completion_ids"].shape[1]
            weights = correction(of_rank(self.batch.completions), of_rank(trained), width)
            weights = weights.to(output["advantages"].device)
            output["advantages"] = output["advantages"].view(-1, 1) * weights  # (B, T)
        return output

    def compute_loss(self, *args: Any, **kwargs: Any) -> "torch.Tensor":
        """As TRL's, with metrics of this rank's own rows, which `_get_grad_norm` puts together for all ranks.

        Unsloth gathers each of them in each micro-batch, where every rank then waits for the slowest one. For the loss
        itself it would gather only with an entropy mask, which this recipe does not have. The means of TRL's own loss,
        which is that of the CPU, are still of all ranks: it adds up sums and tokens.
        """
        metrics, self._metrics["train"] = self._metrics["train"], self.own_metrics
        self.accelerator.gather = own_rows
        try:
            loss = super().compute_loss(*args, **kwargs)
        finally:
            del self.accelerator.gather  # which uncovers that of its class
            self._metrics["train"] = metrics
        trust_longer_batches(self.model)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, which calls it after the last micro-batch of a step, before anything is logged or saved."""
        for name, values in of_all_ranks(gather_objects(dict(self.own_metrics))).items():
            self._metrics["train"][name].extend(values)
        self.own_metrics.clear()
        return super()._get_grad_norm(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As TRL's; without a KL term in the loss, the KL that is logged is the measured one."""
        metrics = self._metrics["train"]
        if self.beta == 0:
            metrics.pop("kl", None)  # Unsloth's: a 0 for each micro-batch
            if "measured_kl" in metrics:
                metrics["kl"] = metrics.pop("measured_kl")
        super().log(logs, *args, **kwargs)

    def places(self, batches: list) -> list[str]:
        """file:line of the prompts of this step."""
        return [prompt.place for prompt in self.batch.prompts]

    def _sampled(self, prompts: list[Prompt], attempt: int) -> "list[Completion]":
        key = f"step {self.state.global_step} attempt {attempt}"
        completions = sample_over_ranks(self.rollouts, prompts, self.max_completion_length, self.temperature, key)
        for name, value in self.rollouts.figures.items():
            self._metrics["train"][name].append(value)
        return completions

    def _score(self, completions: "list[Completion]") -> "list[Scored]":
        pad = self.processing_class.pad_token_id
        return score_tokens_over_ranks(self.model, completions, pad, self.temperature)

    def _calculate_rewards(self, inputs: list, prompts: list, *_: object) -> "torch.Tensor":
        """The scores (B, rewards) of all ranks, NaN where a reward does not apply; and some of it to samples.jsonl."""
        import torch

        batch = self.batch
        # Not TRL's frac_reward_zero_std, which does not count a deviation of 1e-7 from adding equal floats as zero.
        flat = len(flat_groups(batch.totals, self.num_generations)) * self.num_generations / len(batch.totals)
        self._metrics["train"]["flat"].append(flat)
        written = range(min(self.samples_a_step, len(batch.totals)))
        if is_first():
            append(self.samples, ({"step": self.state.global_step, **self._entry(index)} for index in written))
        columns = [[torch.nan if score is None else score for score in scores] for scores in batch.scores.values()]
        return torch.tensor(columns, dtype=torch.float32, device=self.accelerator.device).T

    def _entry(self, index: int) -> dict[str, Any]:
        """A completion as a line of samples.jsonl, with the tokens that carry loss."""
        completion = self.batch.completions[index]
        trains = completion.ended or not self.mask_truncated_completions
        return {
            **self.batch.entry(index),
            "mask": completion_segments(self.processing_class, completion, trains),
        }

    def _measure_kl(self, completions: "list[Completion]", policy: "list[Scored]") -> float:
        """The KL divergence from the reference policy, by token, estimated as k3 (joschu.net/blog/kl-approx.html)."""
        import torch
        from common.lm.log_probs import kl_estimate

        with active_adapter(self.model, None):
            reference = self._score(completions)
        log_ratios = torch.cat([p.log_probs - r.log_probs for p, r in zip(policy, reference, strict=True)])
        return float(kl_estimate(log_ratios, "k3").mean())


def own_rows(tensor: "torch.Tensor") -> "torch.Tensor":
    """In place of a `gather`: what this rank has, copied from its GPU once for all that is read of it."""
    return tensor.cpu()


def of_all_ranks(parts: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """One dictionary of metrics from those of the ranks, each with a number per micro-batch: their mean, min or max.

    A NaN is of a micro-batch without a token that counts, and stays only where all ranks have one.
    """
    metrics = {}
    for name in parts[0]:
        put_together = {"min": min, "max": max}.get(name[-3:], fmean)
        of_batches = zip(*(part[name] for part in parts), strict=True)
        valid = [[value for value in values if not math.isnan(value)] for values in of_batches]
        metrics[name] = [put_together(values) if values else math.nan for values in valid]
    return metrics


def rollout(prompts: list, trainer: GroupSampling) -> dict:
    """What TRL takes as generated: the completions that the trainer has sampled, those of this rank."""
    completions = of_rank(trainer.batch.completions)
    return {
        "prompt_ids": [completion.prompt_ids for completion in completions],
        "completion_ids": [completion.completion_ids for completion in completions],
        "logprobs": None,  # the policy has not changed since sampling: TRL computes them
    }


@dataclass
class Batch:
    """The completions of a step, in groups: of each one its prompt, its total reward, and its score by every reward.

    Where there are several ranks, each samples and scores a share, and has the batch of all: what is made of it, such
    as the groups to replace, is then the same everywhere, and as with one process. A rank trains on its share.
    """

    prompts: list[Prompt]
    completions: "list[Completion]"
    totals: list[float]
    scores: dict[str, list[float | None]]

    @classmethod
    def of(cls, rewards: list[Reward], prompts: list[Prompt], completions: "list[Completion]") -> "Batch":
        return cls(prompts, completions, *score_over_ranks(rewards, prompts, completions))

    def replace(self, indices: list[int], other: "Batch") -> None:
        """Put the completions of `other` at `indices`."""
        for source, index in enumerate(indices):
            self.prompts[index] = other.prompts[source]
            self.completions[index] = other.completions[source]
            self.totals[index] = other.totals[source]
            for name, scores in other.scores.items():
                self.scores[name][index] = scores[source]

    def entry(self, index: int) -> dict[str, Any]:
        """A completion as a line of samples.jsonl."""
        prompt, completion = self.prompts[index], self.completions[index]
        return {
            "prompt": prompt.prompt,
            **({"tools": prompt.tools} if prompt.tools else {}),
            "completion": completion.text,
            "ended": completion.ended,
            "answer": prompt.answer,
            "reward": self.totals[index],
            "rewards": {name: scores[index] for name, scores in self.scores.items()},
        }


def flat_groups(totals: list[float], size: int) -> list[slice]:
    """The groups whose rewards are all equal, so that no completion is better than another."""
    groups = [slice(first, first + size) for first in range(0, len(totals), size)]
    return [group for group in groups if max(totals[group]) - min(totals[group]) < 1e-6]


def measure_difficulty(
    prompts: list[Prompt], args: Args, rollouts: "Rollouts", rewards: list[Reward], model: Any, pad_token_id: int
) -> list[float]:
    """The pass rate or the entropy of each prompt, on --num-generations completions of it by this model."""
    from common.run.curriculum import group_means, pass_rates

    repeated = [prompt for prompt in prompts for _ in range(args.num_generations)]
    completions = sample_over_ranks(rollouts, repeated, args.max_completion_length, args.temperature, "difficulty")
    if args.difficulty_by == "pass-rate":
        _, scores = score_over_ranks(rewards, repeated, completions)
        return pass_rates(scores[rewards[0].name], args.num_generations)
    scored = score_tokens_over_ranks(model, completions, pad_token_id)
    entropies = [float(one.entropies.mean()) for one in scored]
    return group_means(entropies, args.num_generations)


def live_line(rewards: list[Reward]) -> dict[str, str | tuple[str, str]]:
    """What the screen shows, as {name: key in TRL's log}; of each reward function the mean and the spread."""
    parts = {reward.name: (f"rewards/{reward.name}/mean", f"rewards/{reward.name}/std") for reward in rewards}
    return {
        "reward": "reward",
        **parts,
        "flat": "flat",
        "length": "completions/mean_length",
        "truncated": "completions/clipped_ratio",
        "kl": "kl",
        "entropy": "entropy",
    }


if __name__ == "__main__":
    run_command(main)
