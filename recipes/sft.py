"""Supervised fine-tuning (SFT): teach a model to answer the way your examples do.

    make sft                                        the embedded tiny model on sample data, a minute on two CPU cores
    make sft MODEL=qwen2.5-7b DATA=my.jsonl         QLoRA on one GPU
    make sft MODEL=qwen2.5-7b DATA=my.jsonl ARGS="--no-load-in-4bit --no-gradient-checkpointing"
    torchrun --nproc-per-node 8 recipes/sft.py ...  on 8 GPUs, each with a batch of its own (`make slurm` does so)

Data is alpaca, sharegpt, messages, prompt/completion or ChatML text, in JSON Lines, a JSON array, CSV, Parquet, a
folder of them or a hub dataset. Only what the assistant says carries loss, its end token included.

Left out: images, sharding a model over several GPUs, continued pre-training on raw text.
"""

import os
import random
from dataclasses import asdict, dataclass
from typing import Literal

from common import environment
from common.cli import parse
from common.data.hold_out import hold_out
from common.data.read import column_map, conversations
from common.data.rows import Faults, find_source, read_rows, source_sha256
from common.errors import InputError, run_command
from common.lm.chat import Example, check_truncation, end_token, set_chat_template, set_pad_token, tokenize
from common.lm.hub import contents, fetch, load_tokenizer, resolved_revision
from common.run.files import write_folder
from common.run.folder import plan_run
from common.run.samples import as_samples, show
from common.run.screen import loading
from common.run.stopping import Stop


@dataclass(frozen=True)
class Args:
    """Every name that TRL, PEFT or transformers also has means the same here."""

    # What to train, on what, and where it goes.
    model: str = "tiny"
    """A model card's name (`make models`), a local directory or a hub id."""
    data: str = str(environment.ROOT / "data_samples" / "sft.jsonl")
    """A file, a folder of files or a hub dataset."""
    output_dir: str | None = None
    """The run's folder. By default outputs/sft-MODEL-HASH, so another setting is another folder."""

    # How the data is read.
    format: Literal["auto", "messages", "sharegpt", "prompt-completion", "alpaca", "chatml-text"] = "auto"
    """The format of the rows; auto takes it from the columns of the first."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question completion=answer."""
    chat_template_path: str | None = None
    """A .jinja file to use instead of the model's own chat template."""
    pad_token: str | None = None
    """The token to pad with, where the model has none that differs from its end token."""
    max_length: int = 2048
    """Tokens of a row, prompt and answer together; the rest is cut off at the end."""
    max_truncated: float = 0.05
    """Stop when a larger share of the rows would be cut."""
    packing: bool = True
    """Fill each row of the batch with several documents. Off where attention cannot keep them apart: on the CPU."""
    eval_ratio: float = 0.0
    """Share of the rows to hold out; with it the checkpoint of the lowest held-out loss is the one kept."""

    # The model and the adapter.
    load_in_4bit: bool = True
    """The frozen base in nf4 (QLoRA); --no-load-in-4bit for 16 bit."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: bfloat16 on a GPU that has it, else float16; float32 on the CPU."""
    use_peft: bool = True
    """Train a LoRA adapter; --no-use-peft trains every weight."""
    lora_r: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    lora_target_modules: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )

    # The optimization.
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 4
    num_train_epochs: float = 3.0
    max_steps: int = -1
    """Stop after so many steps, whatever the epochs say."""
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: str = "adamw_8bit"
    """On the CPU, which has no 8-bit Adam, adamw_torch_fused takes its place."""
    gradient_checkpointing: bool = True
    """Recompute activations to save memory; a third faster without, where they fit."""
    seed: int = 42

    # What is shown and kept.
    logging_steps: int = 10
    save_steps: float = 0.1
    """A checkpoint every so many steps; below 1, a share of the run."""
    save_total_limit: int = 2
    time_limit: str | None = None
    """Hours:minutes:seconds, as 3:55:00, after which the run ends with a checkpoint, to be gone on with."""
    report_to: tuple[str, ...] = ()
    """wandb or trackio, besides TensorBoard, which is always written."""
    sample_prompts: int = 3
    """Prompts held out and answered before and after."""
    sample_tokens: int = 128
    """The longest such answer."""


def main() -> None:
    args, base, origins = parse(Args, "sft", __doc__)
    stop = Stop(args.time_limit)

    # 1. Data: read and checked whole, before anything slow is loaded.
    faults = Faults()
    source = find_source(args.data)
    environment.set_variables(offline=base.local and not isinstance(source, str))
    rows = list(conversations(read_rows(source, faults), faults, args.format, column_map(args.columns)))
    faults.stop()
    if not rows:
        raise InputError(f"{args.data}: holds no rows")

    # 2. The run: a new one, one to go on with, or one that is finished. Nothing is written yet.
    run = plan_run(
        "sft",
        base.name,
        args.output_dir,
        arguments=asdict(args),
        origins=origins,
        inputs={"data": source_sha256(source) or source, "base": contents(base)},
    )
    if run is None:
        return

    console = loading(base.name)
    import unsloth  # noqa: F401, I001  first, and slow: it changes what is imported after it
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel, is_bfloat16_supported

    from common.run.checkpoints import CheckpointCallback, NoStepTooMany, newest_checkpoint
    from common.lm.generate import generate
    from common.run.metrics import ProgressCallback, mean_loss

    # 3. Tokens: the model's own chat template, and a mask of what the assistant says.
    base = fetch(base)
    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, args.chat_template_path, base.name)
    end = end_token(tokenizer)
    set_pad_token(tokenizer, args.pad_token or (base.card.pad_token if base.card else None), end)

    order = random.Random(args.seed)
    asked, rows = hold_out(rows, min(args.sample_prompts, len(rows) // 10), order)  # a handful is all trained on
    samples = as_samples(asked)
    examples = list(tokenize(tokenizer, rows, args.max_length, faults))
    faults.stop()
    if truncated := check_truncation(examples, args.max_length, args.max_truncated):
        console.print(truncated)
    evaluation, training = hold_out(examples, round(len(examples) * args.eval_ratio), order)

    console.print(f"[bold]{base.name}[/bold], {len(training)} rows of {args.data} -> [bold]{run.folder}[/bold]")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        console.print("No GPU: rows are padded, not packed; adamw_torch_fused in place of 8-bit Adam.")
    with run:
        # 4. The model: frozen in 4 or 16 bit under a LoRA adapter, or trained whole.
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
            max_seq_length=args.max_length,
            dtype=dtype,
            load_in_4bit=args.load_in_4bit and args.use_peft,
            full_finetuning=not args.use_peft,
            use_gradient_checkpointing=checkpointing,
            use_exact_model_name=True,  # else a hub id is swapped for Unsloth's own 4-bit copy of it
            random_state=args.seed,
        )
        if args.use_peft:
            model = FastLanguageModel.get_peft_model(
                model,
                r=args.lora_r,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                target_modules=list(args.lora_target_modules),
                use_gradient_checkpointing=checkpointing,
                random_state=args.seed,
            )
        run.update(revision=resolved_revision(base), dtype=str(dtype), machine=environment.describe_machine())

        def dataset(examples: list[Example]) -> Dataset:
            columns = ("input_ids", "completion_mask")
            return Dataset.from_dict({name: [getattr(example, name) for example in examples] for name in columns})

        def answers() -> list[str]:
            FastLanguageModel.for_inference(model)
            said = generate(model, tokenizer, [sample.prompt for sample in samples], end, args.sample_tokens)
            FastLanguageModel.for_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
            return [answer.text + ("" if answer.ended else " ...") for answer in said]

        before = answers()

        # 5. The trainer. Where Unsloth's GPU path and TRL have different defaults, the value is given.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
        tokens = sum(len(example.input_ids) for example in training)
        full = tokens > 0.95 * len(training) * args.max_length  # such rows leave packing nothing to do

        class Trainer(NoStepTooMany, SFTTrainer):
            """TRL's, and what every recipe needs to be gone on with."""

        trainer = Trainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=dataset(training),
            eval_dataset=dataset(evaluation) if evaluation else None,
            callbacks=[
                ProgressCallback(run.folder / "metrics.jsonl", tokens, console),
                CheckpointCallback(run, stop, args.save_total_limit),
            ],
            args=SFTConfig(
                output_dir=str(run.folder / "checkpoints" / "part"),  # whence CheckpointCallback moves what is whole
                completion_only_loss=True,  # the loss reads our completion_mask
                max_length=args.max_length,
                packing=args.packing and on_gpu and not full,
                packing_strategy="bfd",  # whole documents, so that none is cut in two
                padding_free=False if full else None,  # None: Unsloth drops padding; full rows it compiles by block
                eval_packing=False,
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
                disable_tqdm=True,  # ProgressCallback takes its place
                torch_empty_cache_steps=None,
            ),
        )
        trainer.remove_callback(PrinterCallback)  # ProgressCallback says it all
        trainer.train(resume_from_checkpoint=newest_checkpoint(run))

        # 6. Save, and show what changed. Of several processes, which all have the same weights, the first does.
        if not environment.is_first_process():
            return
        saved = run.folder / ("adapter" if args.use_peft else "model")
        with write_folder(saved) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        after = answers()
        run.update(tokens=round(tokens * (trainer.state.epoch or 0)), train_loss=mean_loss(trainer.state.log_history))
        show(console, run.folder / "samples.json", samples, before, after)
        console.print(f"{'Adapter' if args.use_peft else 'Model'} in [bold]{saved}[/bold]")


if __name__ == "__main__":
    run_command(main)
