"""Reward model: learn from scores or preferences to give any completion a number; higher is better.

    make reward                                            the tiny model on sample scores, seconds on two CPU cores
    make reward MODEL=outputs/merged DATA=pairs.jsonl      on the base that PPO will start from
    make reward MODEL=qwen2.5-7b DATA=pairs.jsonl STAND_ALONE=yes       a separate model, for --rewards model:PATH

Rated completions (prompt or instruction, response, score) are learned by regression: the squared error of standardised
scores. Pairs (prompt, chosen, rejected, in the row formats of `make dpo`) are learned by Bradley-Terry: the number of
the chosen completion should be the larger one, -log sigmoid(chosen - rejected) (arXiv:2203.02155, section 3.5).

The recipe trains a LoRA adapter and a scalar head on the frozen base. The head reads the hidden state of a completion's
end token. PPO has the same base in memory anyway, so this reward model costs it only an adapter. With --stand-alone the
adapter is merged into a copy of the base, which any program loads as a sequence classifier with one output.

The report on held-out rows shows what the model is worth: accuracy or correlation, calibration, and whether it only
counts words.

Left out: several scores for one completion, process rewards, full-parameter training.
"""

import functools
import os
import random
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from common import environment
from common.cli import parse
from common.data.examples import Pair, Rating
from common.data.formats import PAIR_FORMATS, RATING_FORMATS
from common.data.hold_out import hold_out_share
from common.data.read import read_examples
from common.data.rows import find_source
from common.errors import InputError, run_command
from common.lm.hub import Model, contents, fetch, resolved_revision
from common.lm.load import (
    check_precision,
    choose_dtype,
    identify,
    in_4bit,
    keep_activations,
    load_chat_tokenizer,
)
from common.plan.fit import fit_to_gpu
from common.rewards.outliers import check_scores
from common.rewards.report import figures_in_training, held_out_rows, report_on, show
from common.rewards.tokens import as_tokens
from common.run.data_summary import summary
from common.run.ending import show_ending
from common.run.files import write_folder, write_jsonl
from common.run.folder import plan_run
from common.run.ranks import gather_objects, is_first
from common.run.screen import announce, loading
from common.run.stopping import Stop

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import Trainer
else:
    Trainer = object  # transformers is slow to import; main mixes RewardLoss into the real one

FORMATS = {**PAIR_FORMATS, **RATING_FORMATS}


@dataclass(frozen=True)
class Args:
    """Every name that TRL, PEFT or transformers also has means the same here."""

    # Model, data, output.
    model: str = "tiny"
    """A model card's name (`make models`), a local directory or a hub id."""
    data: str = str(environment.ROOT / "data_samples" / "scores.jsonl")
    """A file, a folder of files or a hub dataset."""
    output_dir: str | None = None
    """The folder of the run. By default outputs/reward-MODEL-HASH: other settings, another folder."""
    stand_alone: bool = False
    """Merge the adapter and save a sequence classifier instead of adapter and head."""
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""

    # How the data is read.
    format: Literal[
        "auto", "preference", "instruction-preference", "sharegpt-preference", "dialogue-preference",
        "prompt-rating", "instruction-rating",
    ] = "auto"  # fmt: skip
    """The format of the rows; auto takes it from the columns of the first row."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question response=answer score=stars."""
    chat_template_path: str | None = None
    """A .jinja file to use instead of the model's own chat template."""
    pad_token: str | None = None
    """The pad token, for a model that has none besides its end token."""
    max_length: int = 2048
    """Tokens of a prompt and a completion together; longer ones are truncated at the end."""
    max_truncated: float = 0.05
    """Stop when a larger share of the completions would be truncated, or lose a part in the chat template."""
    eval_ratio: float = 0.1
    """Share of the prompts to hold out, with all their completions, for the report."""
    eval_data: str | None = None
    """Other rows for the report, of the same kind; then nothing is held out of the data."""

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
    """Rated completions, or pairs: twice as many sequences."""
    gradient_accumulation_steps: int = 4
    num_train_epochs: float = 1.0
    max_steps: int = -1
    """Stop after so many steps; -1: --num-train-epochs decides."""
    learning_rate: float = 1e-4
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


def main() -> None:
    args, base, origins = parse(Args, "reward", __doc__)
    stop = Stop(args.time_limit)
    check_precision(args, origins)

    # 1. Data: read and checked completely, before anything slow is loaded.
    source = find_source(args.data)
    eval_source = find_source(args.eval_data) if args.eval_data else None
    environment.set_variables(models=[base], sources=[source, *([eval_source] if eval_source else [])])
    data = read_examples(source, FORMATS, args.format, args.columns)
    eval_data = read_examples(eval_source, FORMATS, args.format, args.columns) if eval_source else None
    rows: list[Pair | Rating] = data.examples
    paired = isinstance(rows[0], Pair)
    outliers = check_scores(args.data, [row for row in rows if isinstance(row, Rating)])
    held_out: list[Pair | Rating] = []
    if eval_data:
        held_out = eval_data.examples
        data.notes.extend(eval_data.notes)
        if isinstance(held_out[0], Pair) != paired:
            raise InputError(f"--eval-data {args.eval_data}: one of the two sources holds pairs, the other scores")
    elif args.eval_ratio:  # by prompt: another completion of a prompt that was trained on is no test
        prompts = list(dict.fromkeys(repr(row.prompt) for row in rows))
        drawn = set(hold_out_share(prompts, args.eval_ratio, random.Random(args.seed), "prompts")[0])
        held_out = [row for row in rows if repr(row.prompt) in drawn]
        rows = [row for row in rows if repr(row.prompt) not in drawn]
    scores = [row.score for row in rows if isinstance(row, Rating)]
    if not paired and min(scores) == max(scores):
        raise InputError(f"{args.data}: every score is {scores[0]:g}; nothing distinguishes good from bad")

    # 2. The run: new, resumed, or finished already. Nothing is written yet.
    identity = contents(base)
    run = plan_run(
        "reward",
        base.name,
        args.output_dir,
        arguments=asdict(args),
        origins=origins,
        inputs={
            "data": data.identity,
            "eval_data": eval_data.identity if eval_data else None,
            **identify(base, args.chat_template_path),
        },
    )
    if run is None:
        return

    console = loading(base.name, data.notes)
    if outliers:
        console.print(outliers, highlight=False, soft_wrap=True)
    import unsloth  # noqa: F401, I001  first, and slow: it patches what is imported after it
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from unsloth import FastLanguageModel

    from common.lm.fp8 import quantize_base
    from common.run.checkpoints import CheckpointCallback, newest_checkpoint
    from common.run.health.callback import HealthCallback
    from common.run.metrics import ProgressCallback, mean_loss
    from common.run.shared_steps import SharedSteps
    from common.lm.merge import save_classifier
    from common.lm.scalar_head import new_head, save_head, score_last

    # 3. Tokens: prompt and completion together, rendered by the model's own chat template.
    base = fetch(base)
    if args.stand_alone:
        refuse_quantised(base)
    tokenizer, _ = load_chat_tokenizer(base, args.chat_template_path, args.pad_token)

    training, truncated = as_tokens(tokenizer, rows, args.max_length, args.max_truncated, args.stand_alone)
    evaluation, also = as_tokens(tokenizer, held_out, args.max_length, args.max_truncated, args.stand_alone)
    for line in filter(None, (truncated, also)):
        console.print(line)
    kind = "bradley-terry" if paired else "regression"
    mean, std = (0.0, 1.0) if paired else (float(np.mean(scores)), float(np.std(scores)))
    facts = {"kind": kind, "base": identity, "mean": mean, "std": std}

    what = f"{len(training)} {'pairs' if paired else 'rated completions'}"
    announce(base.name, f"{what} of {args.data}, {kind}", run.folder)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        console.print("No GPU: adamw_torch_fused in place of 8-bit Adam.")
    with run:
        args = fit_to_gpu(args.fit, args, "reward", base, origins, run)
        # 4. The model: frozen in 4, 8 or 16 bit under a new LoRA adapter, and the head.
        dtype = choose_dtype(args.dtype)
        checkpointing = "unsloth" if args.gradient_checkpointing else False
        keep_activations(args.checkpoint_skip_layers)
        longest = max(len(answer) for row in [*training, *evaluation] for answer in row.answers)
        model, _ = FastLanguageModel.from_pretrained(
            base.source,
            **base.origin,  # its revision, and whether code of its own may run
            max_seq_length=longest,
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
        head = new_head(model.config.get_text_config().hidden_size, model.device)
        head.bias.requires_grad_(False)  # a sequence classifier has no bias, and no reward needs one
        model.reward_head = head  # part of the model, so that the trainer finds its weight
        model.forward = functools.partial(outputs_of, model, head)  # so that DDP adds up the gradients of its inputs
        run.update(revision=resolved_revision(base), dtype=str(dtype), machine=environment.describe_machine())
        run.update(data=summary(data, tokenizer, training, held_out))

        # 5. The trainer: transformers' own with our loss.
        class RewardTrainer(SharedSteps, RewardLoss, Trainer):
            """Trainer with our loss and head, and steps that are checked and shared by the ranks."""

        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
        tokens = sum(len(answer) for row in training for answer in row.answers)
        trainer = RewardTrainer(
            head=head,
            facts=facts,
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"answers": row.answers, "score": row.score} for row in training]),
            data_collator=functools.partial(collate, pad_token_id=tokenizer.pad_token_id, facts=facts),
            callbacks=[
                ProgressCallback(run.folder / "metrics.jsonl", tokens, console),
                HealthCallback(run, stop, args.stop_on_fault, data.examples),
                CheckpointCallback(run, stop, args.save_total_limit, rows=training),
            ],
            args=TrainingArguments(
                output_dir=str(run.folder / "checkpoints" / "part"),  # complete checkpoints are moved out of here
                remove_unused_columns=False,  # it would remove columns that the model's forward does not take
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
        trainer.remove_callback(PrinterCallback)  # ProgressCallback prints the same
        trainer.train(resume_from_checkpoint=newest_checkpoint(run))
        run.update(tokens=round(tokens * (trainer.state.epoch or 0)), train_loss=mean_loss(trainer.state.log_history))

        # 6. Save; of several ranks the first one does.
        if not is_first():
            return
        del model.reward_head, model.forward
        saved = run.folder / ("model" if args.stand_alone else "adapter")
        with write_folder(saved) as part:
            if args.stand_alone:
                save_classifier(model, head, base, part, tokenizer.pad_token_id, facts)
            else:
                model.save_pretrained(part)
                save_head(head, part, facts)
            tokenizer.save_pretrained(part)

        # 7. The report on the held-out rows.
        if evaluation:
            model.eval()
            answers = [(answer, []) for row in evaluation for answer in row.answers]
            outputs = score_last(model, head, answers, tokenizer.pad_token_id, 2 * args.per_device_train_batch_size)
            report = report_on(evaluation, outputs, facts)
            run.update(report=report)
            write_jsonl(run.folder / "held-out.jsonl", held_out_rows(evaluation, outputs))
            show(console, report)
        show_ending(console, run, saved)


class RewardLoss(Trainer):
    """A mixin of transformers' Trainer: the loss of a reward model, whose head is saved and loaded beside the adapter.

    Args:
        head: the scalar head.
        facts: what is saved with it: kind, base, mean and std of the scores.
        trainer: the arguments of Trainer.
    """

    def __init__(self, *, head: "torch.nn.Linear", facts: dict[str, Any], **trainer: Any) -> None:
        super().__init__(**trainer)
        self.head = head
        self.facts = facts
        self._metrics = {
            "train": defaultdict[str, list[Any]](list)
        }  # since the last log, where TRL's trainers have theirs

    metrics_of_rank = True
    counts = True  # of several ranks not where a rank has no rows left, see SharedSteps

    def compute_loss(self, model: "PeftModel", inputs: dict, *_: Any, **__: Any) -> "torch.Tensor":
        mask = inputs["attention_mask"]
        outputs = model(inputs["input_ids"], mask)  # (B,)
        since_log = self._metrics["train"] if self.counts else defaultdict[str, list[Any]](list)
        since_log["outputs"] += outputs.detach().unbind()
        since_log["lengths"] += mask.sum(1).unbind()
        if self.facts["kind"] == "bradley-terry":
            return bradley_terry_loss(outputs[0::2], outputs[1::2])
        since_log["scores"] += inputs["scores"].unbind()
        return regression_loss(outputs, inputs["scores"])

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._metrics["train"]:
            of_ranks = gather_objects({name: [*map(float, values)] for name, values in self._metrics["train"].items()})
            since_log = {name: [value for one in of_ranks for value in one.get(name, ())] for name in of_ranks[0]}
            logs |= figures_in_training(since_log["outputs"], since_log["lengths"], since_log.get("scores"))
            self._metrics["train"].clear()
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        from common.lm.scalar_head import save_head

        super()._save(output_dir, state_dict)
        save_head(self.head, Path(output_dir or self.args.output_dir), self.facts)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from common.lm.scalar_head import load_head

        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved, _ = load_head(Path(resume_from_checkpoint), self.head.weight.device)
        self.head.load_state_dict(saved.state_dict())


def outputs_of(model: "PeftModel", head: "torch.nn.Linear", input_ids: "torch.Tensor", mask: "torch.Tensor"):
    """The head's outputs (B,) at the last tokens of rows (B, T), padded on the right by `mask`."""
    from common.lm.hidden_states import at_last_token, last_hidden
    from common.lm.scalar_head import apply_head

    return apply_head(head, at_last_token(last_hidden(model, input_ids, mask), mask))


def collate(batch: list[dict], pad_token_id: int, facts: dict[str, Any]) -> dict[str, "torch.Tensor"]:
    """Chosen and rejected completions in turn, or rated completions with their standardised scores."""
    import torch
    from common.lm.hidden_states import pad_right

    input_ids, mask = pad_right([answer for row in batch for answer in row["answers"]], pad_token_id, "cpu")  # (B, T)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if facts["kind"] == "regression":
        inputs["scores"] = torch.tensor([(row["score"] - facts["mean"]) / facts["std"] for row in batch])  # (B,)
    return inputs


# Losses. Outputs are the head's, float32.


def bradley_terry_loss(chosen: "torch.Tensor", rejected: "torch.Tensor") -> "torch.Tensor":
    """Mean of -log sigmoid(chosen - rejected), both (B,); ln 2 when they are equal."""
    import torch

    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def regression_loss(outputs: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
    """Mean squared error of (B,) outputs; 1 when they are independent of the standardised scores."""
    return (outputs - scores).square().mean()


# A stand-alone reward model.


def refuse_quantised(base: Model) -> None:
    """Raises InputError where the base cannot be merged with, before time is spent on training."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.source, revision=base.revision, trust_remote_code=base.trusted)
    if getattr(config, "quantization_config", None):
        raise InputError(f"--stand-alone: {base.source} is stored in few bits; an adapter merges into a 16-bit base")


if __name__ == "__main__":
    run_command(main)
