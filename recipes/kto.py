"""Kahneman-Tversky optimization (KTO): learn from completions that are marked good or bad, thumbs up and down.

    make merge ADAPTER=outputs/sft-tiny/adapter OUT=outputs/merged   first merge the stage before into the base
    make kto MODEL=outputs/merged                                    on sample feedback, a minute on two CPU cores
    make kto MODEL=qwen2.5-7b DATA=thumbs.jsonl                      an instruct model needs no stage before
    make kto MODEL=qwen2.5-7b DATA=ratings.jsonl THRESHOLD=4         a score of 4 or more is good

Data is messages, prompt and completion, ShareGPT or alpaca rows with a column `label` (true or false, 1 or 0) or
`kto_tag`, or rated completions with --threshold. Nothing has to be paired, but there must be good and bad ones. The
reference policy is the base with the adapter switched off, as in DPO: the stage before must be merged into the base.

The loss (arXiv:2402.01306) asks of each completion whether its reward, beta times the log-ratio of
policy and reference policy, is above a reference point, or below it if it is bad. That point is the KL divergence of
the two, estimated in every batch from mismatched completions: those of other prompts. So a batch has at least 2 rows,
and better 4 or more. --loss-type apo_zero_unpaired (arXiv:2408.06266) has 0 in its place.

Left out: pairs, which are for `make dpo`, several turns with a label each, images, full-parameter training.
"""

import itertools
import math
import os
import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from common import environment
from common.cli import parse
from common.data.examples import Conversation, Feedback
from common.data.feedback import LABELLED_OR_RATED, as_feedback, check_both
from common.data.hold_out import eval_count, hold_out_by
from common.data.read import read_examples
from common.data.rows import Faults, find_source
from common.errors import InputError, run_command
from common.lm.active_adapter import switch_quickly
from common.lm.chat import trainable
from common.lm.feedback import TokenFeedback, tokenize_feedback
from common.lm.hub import fetch, resolved_revision
from common.lm.load import (
    check_precision,
    choose_dtype,
    fuse_adapter,
    identify,
    in_4bit,
    keep_activations,
    load_chat_tokenizer,
)
from common.plan.fit import fit_to_gpu
from common.run.data_summary import summary
from common.run.ending import show_ending
from common.run.files import write_folder
from common.run.folder import plan_run
from common.run.ranks import is_first
from common.run.samples import Sample, show
from common.run.screen import announce, loading
from common.run.stopping import Stop

if TYPE_CHECKING:
    from peft import PeftModel

LARGEST_RATIO = 4 / 3  # of the good completions' weight in all to the bad ones'; the smallest is 1 (equation 8)
TOKEN_COLUMNS = ("prompt_ids", "completion_ids", "label")  # of TRL's data set


@dataclass(frozen=True)
class Args:
    """Every name that TRL, PEFT or transformers also has means the same here."""

    # Model, data, output.
    model: str = "tiny"
    """A model card's name (`make models`), a local directory or a hub id; it is also the reference policy."""
    data: str = str(environment.ROOT / "data_samples" / "feedback-train.jsonl")
    """A file, a folder of files or a hub dataset."""
    output_dir: str | None = None
    """The folder of the run. By default outputs/kto-MODEL-HASH: other settings, another folder."""
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""

    # How the data is read.
    format: Literal[
        "auto", "messages-label", "messages-kto-tag", "sharegpt-label", "sharegpt-kto-tag", "prompt-label",
        "prompt-kto-tag", "alpaca-label", "alpaca-kto-tag", "prompt-rating", "instruction-rating",
    ] = "auto"  # fmt: skip
    """The format of the rows; auto takes it from the columns of the first row."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question completion=answer label=thumb."""
    threshold: float | None = None
    """Of rated completions: the score from which on a completion is good."""
    chat_template_path: str | None = None
    """A .jinja file to use instead of the model's own chat template."""
    pad_token: str | None = None
    """The pad token, for a model that has none besides its end token."""
    max_length: int = 2048
    """Tokens of a prompt and a completion together; longer ones are truncated at the end."""
    max_truncated: float = 0.05
    """Stop when a larger share of the rows would be truncated."""
    eval_ratio: float = 0.0
    """Share of the prompts to hold out, with all their completions; with it the checkpoint with the lowest held-out
    loss is kept, and the run ends with a report on them."""

    # The loss.
    beta: float = 0.1
    """How strongly the loss keeps the policy near the reference policy."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """TRL's loss types for such data."""
    desirable_weight: float | None = None
    """The weight of good completions. By default such that both sides weigh about the same, the rarer one more."""
    undesirable_weight: float | None = None
    """The weight of bad completions."""
    precompute_ref_log_probs: bool = False
    """Compute the log-probabilities of the reference policy once, before training, instead of at every step."""

    # The model and the adapter.
    load_in_4bit: bool = True
    """Load the frozen base in nf4 (QLoRA); --no-load-in-4bit for 16 bit."""
    load_in_fp8: bool = False
    """Load it in fp8 instead, and multiply in fp8: the fastest for 7B and more, on Ada, Hopper or Blackwell GPUs."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 on a GPU that has it, else float16; float32 on the CPU."""
    lora_r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_target_modules: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )

    # The optimization.
    per_device_train_batch_size: int = 4
    """Rows; the reference point of the loss is estimated from so many."""
    gradient_accumulation_steps: int = 4
    num_train_epochs: float = 1.0
    max_steps: int = -1
    """Stop after so many steps; -1: --num-train-epochs decides."""
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.1
    """Steps of warm-up; below 1, a share of the run."""
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

    # Logging and checkpoints.
    logging_steps: int = 10
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
    """Held-out prompts whose completions are shown, before and after training."""
    sample_tokens: int = 128
    """Tokens of such a completion, at most."""


def main() -> None:
    args, base, origins = parse(Args, "kto", __doc__)
    stop = Stop(args.time_limit)
    check_arguments(args, origins)

    # 1. Data: read and checked completely, before anything slow is loaded.
    source = find_source(args.data)
    environment.set_variables(models=[base], sources=[source], reference=True)
    data = read_examples(source, LABELLED_OR_RATED, args.format, args.columns)
    rows = as_feedback(data.examples, args.threshold)

    # 2. The run: new, resumed, or finished already. Nothing is written yet.
    run = plan_run(
        "kto",
        base.name,
        args.output_dir,
        arguments=asdict(args),
        origins=origins,
        inputs={"data": data.identity, **identify(base, args.chat_template_path)},
    )
    if run is None:
        return

    console = loading(base.name, data.notes)
    import unsloth  # noqa: F401, I001  first, and slow: it patches what is imported after it
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import KTOConfig, KTOTrainer
    from unsloth import FastLanguageModel

    from common.run.checkpoints import CheckpointCallback, newest_checkpoint
    from common.lm.fp8 import quantize_base
    from common.lm.generate import generate
    from common.run.health.callback import HealthCallback
    from common.run.metrics import ProgressCallback, mean_loss
    from common.run.shared_steps import SharedSteps

    # 3. Tokens: rendered by the model's own chat template; the completion carries loss, the prompt does not.
    base = fetch(base)
    tokenizer, end = load_chat_tokenizer(base, args.chat_template_path, args.pad_token)
    order, faults = random.Random(args.seed), Faults()
    prompts = len({repr(row.prompt) for row in rows})  # with fewer than ten, none is held out
    held_out, rows = hold_out_by(lambda row: repr(row.prompt), rows, min(args.sample_prompts, prompts // 10), order)
    shown_rows = {repr(row.prompt): row for row in sorted(held_out, key=lambda row: row.label)}.values()  # a good one
    samples = [Sample(Conversation(row.place, row.prompt, row.tools), shown_completion(row)) for row in shown_rows]
    examples = list(tokenize_feedback(tokenizer, rows, args.max_length, faults))
    faults.stop()
    examples, notes = trainable(examples, args.max_length, args.max_truncated, tokenizer.chat_template)
    if notes:
        console.print(notes)
    prompts = len({tuple(row.prompt_ids) for row in examples})
    count = eval_count(prompts, args.eval_ratio, "prompts")
    evaluation, training = hold_out_by(lambda row: tuple(row.prompt_ids), examples, count, order)
    check_both(row.label for row in training)
    check_prompts(args, prompts - len({tuple(row.prompt_ids) for row in evaluation}))
    order.shuffle(training)  # TRL takes them in this order in every epoch: each with its mismatched completion
    weights = class_weights([row.label for row in training], args.desirable_weight, args.undesirable_weight)
    announce(base.name, f"{len(training)} rows of {args.data}", run.folder)
    console.print(weights.in_words(), soft_wrap=True)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        console.print("No GPU: adamw_torch_fused in place of 8-bit Adam.")
    with run:
        args = fit_to_gpu(args.fit, args, "kto", base, origins, run)
        # 4. The model: frozen in 4, 8 or 16 bit under a new LoRA adapter. Without it, it is the reference policy.
        dtype = choose_dtype(args.dtype)
        checkpointing = "unsloth" if args.gradient_checkpointing else False
        keep_activations(args.checkpoint_skip_layers)
        model, _ = FastLanguageModel.from_pretrained(
            base.source,
            **base.origin,  # its revision, and whether code of its own may run
            max_seq_length=args.max_length,
            dtype=dtype,
            load_in_4bit=in_4bit(args.load_in_4bit, args.load_in_fp8),
            use_gradient_checkpointing=checkpointing,
            use_exact_model_name=True,  # else Unsloth replaces a hub id by its own 4-bit copy
            random_state=args.seed,
        )
        if args.load_in_fp8:
            quantize_base(model)
        model = FastLanguageModel.get_peft_model(
            model,
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=list(args.lora_target_modules),
            use_gradient_checkpointing=checkpointing,
            random_state=args.seed,
        )
        fuse_adapter(model)
        run.update(revision=resolved_revision(base), dtype=str(dtype), machine=environment.describe_machine())
        run.update(data=summary(data, tokenizer, training, held_out, evaluation), weights=asdict(weights))

        def dataset(examples: list[TokenFeedback]) -> Dataset:
            columns = {name: [getattr(row, name) for row in examples] for name in TOKEN_COLUMNS}
            if args.loss_type == "kto":
                columns["KL_completion_ids"] = mismatched(examples, args.per_device_train_batch_size)
            return Dataset.from_dict(columns)

        def sample_completions() -> list[str]:
            FastLanguageModel.for_inference(model)
            completions = generate(model, tokenizer, [sample.prompt for sample in samples], end, args.sample_tokens)
            FastLanguageModel.for_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
            return [completion.text + ("" if completion.ended else " ...") for completion in completions]

        before = sample_completions()

        # 5. The trainer. Values that Unsloth's GPU path and TRL default differently are set here.
        class Trainer(SharedSteps, KTOTrainer):
            """KTOTrainer for tokens; it would render text again, and not with a chat template."""

            def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
                return dataset

        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
        tokens = sum(len(row.prompt_ids) + len(row.completion_ids) for row in training)
        shown = {"loss": "loss", "margin": "rewards/margins", "kl": "kl"}
        trainer = Trainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=dataset(training),
            eval_dataset=dataset(evaluation) if evaluation else None,
            callbacks=[
                ProgressCallback(run.folder / "metrics.jsonl", tokens, console, shown),
                HealthCallback(run, stop, args.stop_on_fault, data.examples),
                CheckpointCallback(run, stop, args.save_total_limit, rows=training),
            ],
            args=KTOConfig(
                output_dir=str(run.folder / "checkpoints" / "part"),  # complete checkpoints are moved out of here
                beta=args.beta,
                loss_type=args.loss_type,
                desirable_weight=weights.good,
                undesirable_weight=weights.bad,
                precompute_ref_log_probs=args.precompute_ref_log_probs,
                max_length=args.max_length,
                per_device_train_batch_size=args.per_device_train_batch_size,
                per_device_eval_batch_size=args.per_device_train_batch_size,
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
                train_sampling_strategy="sequential",  # see `order.shuffle` above
                logging_steps=args.logging_steps,
                logging_first_step=True,
                save_steps=args.save_steps,
                save_total_limit=args.save_total_limit,
                eval_strategy="steps" if evaluation else "no",
                eval_steps=args.save_steps,
                load_best_model_at_end=bool(evaluation),
                metric_for_best_model="eval_loss" if evaluation else None,
                report_to=["tensorboard", *args.report_to],
                run_name=run.folder.name,
                disable_tqdm=True,  # ProgressCallback shows the progress
                torch_empty_cache_steps=None,
            ),
        )
        # TRL copies the new adapter as a second one, "ref". It computes the same as the base alone, takes memory, and
        # breaks resuming: transformers then loads a checkpoint into "ref" and leaves the policy untrained.
        model.delete_adapter("ref")
        switch_quickly(model)
        trainer.remove_callback(PrinterCallback)  # ProgressCallback prints the same
        trainer.train(resume_from_checkpoint=newest_checkpoint(run))

        # 6. Save, and show what changed; of several ranks the first one does.
        saved = run.folder / "adapter"
        if not is_first():
            return
        with write_folder(saved) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        after = sample_completions()
        run.update(tokens=round(tokens * (trainer.state.epoch or 0)), train_loss=mean_loss(trainer.state.log_history))
        show(console, run.folder / "samples.json", samples, before, after)
        if evaluation:
            rewards = implicit_rewards(model, evaluation, tokenizer.pad_token_id, args.beta)
            run.update(report=report_on([row.label for row in evaluation], rewards))
            console.print(report_in_words(run.record["report"]), soft_wrap=True)
        show_ending(console, run, saved)


def check_arguments(args: Args, origins: dict[str, str]) -> None:
    """Raise InputError for values that the loss cannot have, or that do not go together."""
    check_precision(args, origins)
    if args.loss_type == "kto" and args.per_device_train_batch_size < 2:
        raise InputError(
            "--per-device-train-batch-size 1: KTO estimates its reference point from the completions of other rows in "
            "the batch, and a row alone would be compared with itself; give 2 or more, better 4, or --loss-type "
            "apo_zero_unpaired, which has no such estimate"
        )
    for side, weight in (("desirable", args.desirable_weight), ("undesirable", args.undesirable_weight)):
        if weight is not None and not 0 < weight < math.inf:
            raise InputError(f"--{side}-weight {weight:g}: expected a number above 0")


def check_prompts(args: Args, prompts: int) -> None:
    """Raise InputError where all rows to train on have one prompt and the loss compares prompts."""
    if args.loss_type == "kto" and prompts < 2:
        raise InputError(
            f"{args.data}: all completions to train on are of one prompt, and KTO estimates its reference point from "
            "completions of other prompts; add some, or give --loss-type apo_zero_unpaired"
        )


def shown_completion(row: Feedback) -> str:
    """A completion of the data, for the table of samples."""
    return ("" if row.label else "(bad) ") + row.completion[-1]["content"]


@dataclass(frozen=True)
class Weights:
    """How many good and bad completions there are, and what each weighs in the loss."""

    good_rows: int
    bad_rows: int
    good: float
    bad: float

    def in_words(self) -> str:
        ratio = self.good * self.good_rows / (self.bad * self.bad_rows)
        text = (
            f"{self.good_rows} good completions of weight {self.good:.4g}, {self.bad_rows} bad ones of weight "
            f"{self.bad:.4g}: the good ones weigh {ratio:.2f} times the bad ones"
        )
        return text if 0.995 <= ratio <= LARGEST_RATIO + 0.005 else f"{text}; the paper advises 1 to 1.33"


def class_weights(labels: list[bool], good: float | None, bad: float | None) -> Weights:
    """The weights of good and bad completions; those that are not given follow equation 8 of arXiv:2402.01306.

    Over all rows the good ones then weigh 1 to 4/3 times what the bad ones do. Of the two weights the smaller is 1, or
    what is given; the other is as near to 1 as the rule allows.
    """
    good_rows = sum(labels)
    bad_rows = len(labels) - good_rows
    balanced = bad_rows / good_rows  # the weight of a good one, for a bad one of 1, at which both sides weigh the same
    if good is None:
        if bad is None:
            return Weights(good_rows, bad_rows, max(1.0, balanced), max(1.0, 1 / (balanced * LARGEST_RATIO)))
        least = bad * balanced
        return Weights(good_rows, bad_rows, min(max(1.0, least), least * LARGEST_RATIO), bad)
    if bad is None:
        most = good / balanced
        bad = min(max(1.0, most / LARGEST_RATIO), most)
    return Weights(good_rows, bad_rows, good, bad)


def mismatched(rows: list[TokenFeedback], batch: int) -> list[list[int]]:
    """For each row a completion of another prompt, from which the KL divergence is estimated.

    It is that of the row before, the batch being a ring: as in TRL, where the completions of a batch stay the same as a
    set. Where that answers the same prompt too, it is the one before, and so on; for a batch of one prompt or one row,
    which TRL would compare with itself, it is sought in all rows. Where no row has another prompt, it is the
    row's own.
    """
    found = []
    for index, row in enumerate(rows):
        first = index - index % batch
        last = min(first + batch, len(rows))
        ring = [*range(index - 1, first - 1, -1), *range(last - 1, index, -1)]
        beyond = itertools.chain(range(first - 1, -1, -1), range(len(rows) - 1, last - 1, -1))
        others = (other for other in itertools.chain(ring, beyond) if rows[other].prompt_ids != row.prompt_ids)
        found.append(rows[next(others, index)].completion_ids)
    return found


def implicit_rewards(model: "PeftModel", rows: list[TokenFeedback], pad_token_id: int, beta: float) -> list[float]:
    """beta times the log-ratio of policy and reference policy, of each completion."""
    from common.lm.log_probs import score_tokens
    from unsloth import FastLanguageModel

    FastLanguageModel.for_inference(model)
    tokens = [(row.prompt_ids, row.completion_ids) for row in rows]
    policy = score_tokens(model, tokens, pad_token_id)
    with model.disable_adapter():
        reference = score_tokens(model, tokens, pad_token_id)
    return [
        beta * float(ours.log_probs.sum() - theirs.log_probs.sum())
        for ours, theirs in zip(policy, reference, strict=True)
    ]


def report_on(labels: list[bool], rewards: list[float]) -> dict[str, float | int | None]:
    """How well the rewards of held-out completions tell good from bad."""
    good = np.array([reward for label, reward in zip(labels, rewards, strict=True) if label])
    bad = np.array([reward for label, reward in zip(labels, rewards, strict=True) if not label])
    above = (good[:, None] > bad).mean() + (good[:, None] == bad).mean() / 2 if len(good) and len(bad) else None
    return {
        "good": len(good),
        "bad": len(bad),
        "reward of good": float(good.mean()) if len(good) else None,
        "reward of bad": float(bad.mean()) if len(bad) else None,
        "good above bad": None if above is None else float(above),
    }


def report_in_words(report: dict[str, float | int | None]) -> str:
    """The report as a line."""
    if report["good above bad"] is None:
        return f"Held out: {report['good']} good and {report['bad']} bad completions; nothing to tell apart"
    return (
        f"Held out: the mean reward of {report['good']} good completions is {report['reward of good']:.3f}, that of "
        f"{report['bad']} bad ones {report['reward of bad']:.3f}; of a good and a bad one the good one's is higher in "
        f"{report['good above bad']:.1%} (50 % before training)"
    )


if __name__ == "__main__":
    run_command(main)
