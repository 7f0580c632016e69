"""Supervised fine-tuning (SFT): train a model to answer as your examples do.

    make sft                                        the tiny model on sample data, one to three minutes on two CPU cores
    make sft MODEL=qwen2.5-7b DATA=my.jsonl         QLoRA on one GPU
    make sft MODEL=qwen2.5-7b DATA=my.jsonl LOAD_IN_4BIT=no GRADIENT_CHECKPOINTING=no
    make sft MODEL=qwen2.5-7b DATA=my.jsonl GPUS=8  a process for each GPU, which divide the batch of a step
    make sft MODEL=qwen2.5-7b DATA=texts TRAIN_EMBEDDINGS=yes          continued pre-training on raw text

Data is alpaca, sharegpt, messages, prompt/completion or ChatML text, in JSON Lines, a JSON array, CSV, Parquet, a
folder of them or a hub dataset. Only the turns of the assistant carry loss, their end tokens included.

Raw text, in a column `text` or in .txt files, is for continued pre-training: every token carries loss, each document
ends with the tokenizer's end token, and one longer than --max-length is split into several rows.

Left out: images.
"""

import os
import random
from dataclasses import asdict, dataclass
from typing import Literal

from common import environment
from common.cli import parse
from common.data.examples import Document
from common.data.formats import SFT_FORMATS
from common.data.hold_out import hold_out, hold_out_share
from common.data.read import read_examples
from common.data.rows import Faults, find_source
from common.errors import InputError, run_command
from common.lm.chat import Example, tokenize, trainable
from common.lm.documents import count_documents, tokenize_documents
from common.lm.hub import fetch, resolved_revision
from common.lm.load import (
    attend_to_rows_as_they_are,
    check_precision,
    choose_dtype,
    fuse_adapter,
    identify,
    in_4bit,
    keep_activations,
    load_chat_tokenizer,
    load_text_tokenizer,
)
from common.lm.sharded import whole_weights
from common.plan.fit import fit_to_gpu
from common.run.data_summary import summary
from common.run.ending import show_ending
from common.run.files import write_folder
from common.run.folder import plan_run
from common.run.ranks import is_first
from common.run.samples import as_samples, show
from common.run.screen import announce, loading
from common.run.stopping import Stop


@dataclass(frozen=True)
class Args:
    """Every name that TRL, PEFT or transformers also has means the same here."""

    # Model, data, output.
    model: str = "tiny"
    """A model card's name (`make models`), a local directory or a hub id."""
    data: str = str(environment.ROOT / "data_samples" / "sft.jsonl")
    """A file, a folder of files or a hub dataset."""
    output_dir: str | None = None
    """The folder of the run. By default outputs/sft-MODEL-HASH: other settings, another folder."""
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""

    # How the data is read.
    format: Literal["auto", "messages", "sharegpt", "prompt-completion", "alpaca", "chatml-text", "text"] = "auto"
    """The format of the rows; auto takes it from the first row."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question completion=answer."""
    chat_template_path: str | None = None
    """A .jinja file to use instead of the model's own chat template."""
    pad_token: str | None = None
    """The pad token, for a model that has none besides its end token."""
    max_length: int = 2048
    """Tokens of a row, prompt and completion together; longer rows are truncated at the end, documents are split."""
    max_truncated: float = 0.05
    """Stop when a larger share of the rows would be truncated, or lose a part in the chat template."""
    packing: bool = True
    """Put several documents into each row of a batch. Off on the CPU, where attention cannot keep them apart."""
    eval_ratio: float = 0.0
    """Share of the rows to hold out; with it the checkpoint with the lowest held-out loss is kept."""

    # The model and the adapter.
    load_in_4bit: bool = True
    """Load the frozen base in nf4 (QLoRA); --no-load-in-4bit for 16 bit."""
    load_in_fp8: bool = False
    """Load it in fp8 instead, and multiply in fp8: the fastest for 7B and more, on Ada, Hopper or Blackwell GPUs."""
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
    train_embeddings: bool = False
    """Train the input embedding and the output head too, in full: for words or a language new to the model."""

    # The optimization.
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 4
    num_train_epochs: float = 3.0
    max_steps: int = -1
    """Stop after so many steps; -1: --num-train-epochs decides."""
    learning_rate: float = 2e-4
    embedding_learning_rate: float | None = None
    """That of --train-embeddings; by default a fifth of --learning-rate. Two to ten times smaller is usual."""
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 10
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
    sharded: bool = False
    """With several GPUs: divide the model among them (FSDP2), for one that does not fit a single GPU."""
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
    args, base, origins = parse(Args, "sft", __doc__)
    stop = Stop(args.time_limit)

    # 1. Data: read and checked completely, before anything slow is loaded.
    source = find_source(args.data)
    environment.set_variables(models=[base], sources=[source], sharded=args.sharded)
    data = read_examples(source, SFT_FORMATS, args.format, args.columns)
    raw_text = isinstance(data.examples[0], Document)
    check_arguments(args, origins)

    # 2. The run: new, resumed, or finished already. Nothing is written yet.
    run = plan_run(
        "sft",
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
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    from common.run.checkpoints import CheckpointCallback, newest_checkpoint
    from common.lm.embeddings import EmbeddingRate, check_saved, embedding_modules, train_in_float32
    from common.lm.fp8 import quantize_base
    from common.lm.generate import generate
    from common.run.health.callback import HealthCallback
    from common.run.metrics import ProgressCallback, mean_loss
    from common.run.shared_steps import SharedSteps

    # 3. Tokens: by the model's own chat template, with loss on the turns of the assistant; documents as they are.
    base = fetch(base)
    if raw_text:
        tokenizer, end = load_text_tokenizer(base, args.chat_template_path, args.pad_token)
    else:
        tokenizer, end = load_chat_tokenizer(base, args.chat_template_path, args.pad_token)

    order, faults = random.Random(args.seed), Faults()
    held_out, rows = hold_out(data.examples, min(args.sample_prompts, len(data.examples) // 10), order)
    samples = as_samples(held_out)
    if raw_text:  # a document is held out whole, and may be several rows
        parts = (held_out, *hold_out_share(rows, args.eval_ratio, order))
        _, evaluation, training = (list(tokenize_documents(tokenizer, part, args.max_length, faults)) for part in parts)
        faults.stop()
        notes = count_documents([*training, *evaluation], args.max_length, end)
    else:
        examples = list(tokenize(tokenizer, rows, args.max_length, faults))
        faults.stop()
        examples, notes = trainable(examples, args.max_length, args.max_truncated, tokenizer.chat_template)
        evaluation, training = hold_out_share(examples, args.eval_ratio, order)
    if notes:
        console.print(notes, soft_wrap=True)
    announce(base.name, f"{len(training)} rows of {args.data}", run.folder)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        console.print("No GPU: rows are padded, not packed; adamw_torch_fused in place of 8-bit Adam.")
    with run:
        args = fit_to_gpu(args.fit, args, "sft", base, origins, run)
        # 4. The model: frozen in 4, 8 or 16 bit under a LoRA adapter, or all weights trained.
        dtype = choose_dtype(args.dtype)
        checkpointing = "unsloth" if args.gradient_checkpointing else False
        keep_activations(args.checkpoint_skip_layers)
        if args.train_embeddings:  # Unsloth's own kind moves the base's embeddings to a file beside the base
            checkpointing = args.gradient_checkpointing
        model, _ = FastLanguageModel.from_pretrained(
            base.source,
            **base.origin,  # its revision, and whether code of its own may run
            max_seq_length=args.max_length,
            dtype=dtype,
            load_in_4bit=in_4bit(args.load_in_4bit, args.load_in_fp8) and args.use_peft,
            full_finetuning=not args.use_peft,
            use_gradient_checkpointing=checkpointing,
            use_exact_model_name=True,  # else Unsloth replaces a hub id by its own 4-bit copy
            random_state=args.seed,
        )
        if args.load_in_fp8:
            quantize_base(model)
        if args.use_peft:
            model = FastLanguageModel.get_peft_model(
                model,
                r=args.lora_r,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                target_modules=list(args.lora_target_modules),
                use_gradient_checkpointing=checkpointing,
                random_state=args.seed,
                **(embedding_modules(model) if args.train_embeddings else {}),
            )
            fuse_adapter(model, args.sharded)
            train_in_float32(model)  # the embeddings; of adapters PEFT does the same
        run.update(revision=resolved_revision(base), dtype=str(dtype), machine=environment.describe_machine())
        run.update(data=summary(data, tokenizer, training, held_out, evaluation))

        def dataset(examples: list[Example]) -> Dataset:
            columns = ("input_ids", "completion_mask")
            return Dataset.from_dict({name: [getattr(example, name) for example in examples] for name in columns})

        def sample_completions() -> list[str]:
            FastLanguageModel.for_inference(model)
            completions = generate(model, tokenizer, [sample.prompt for sample in samples], end, args.sample_tokens)
            FastLanguageModel.for_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
            return [completion.text + ("" if completion.ended else " ...") for completion in completions]

        before = sample_completions()

        # 5. The trainer. Values that Unsloth's GPU path and TRL default differently are set here.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
        tokens = sum(len(example.input_ids) for example in training)
        full = tokens > 0.95 * len(training) * args.max_length  # then there is nothing to pack
        attend_to_rows_as_they_are(few_lengths=full)

        class Trainer(SharedSteps, EmbeddingRate, SFTTrainer):
            """SFTTrainer with steps shared by the ranks, and a learning rate of their own for the embeddings."""

            embedding_learning_rate = args.embedding_learning_rate or args.learning_rate / 5

        trainer = Trainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=dataset(training),
            eval_dataset=dataset(evaluation) if evaluation else None,
            callbacks=[
                ProgressCallback(run.folder / "metrics.jsonl", tokens, console),
                HealthCallback(run, stop, args.stop_on_fault, data.examples),
                CheckpointCallback(run, stop, args.save_total_limit, rows=training),
            ],
            args=SFTConfig(
                output_dir=str(run.folder / "checkpoints" / "part"),  # complete checkpoints are moved out of here
                completion_only_loss=True,  # the loss uses our completion_mask
                max_length=args.max_length,
                packing=args.packing and on_gpu and not full,
                packing_strategy="bfd",  # whole documents: none is split
                padding_free=False if full else None,  # None: Unsloth drops padding; it compiles full rows by block
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
                disable_tqdm=True,  # ProgressCallback shows the progress
                torch_empty_cache_steps=None,
            ),
        )
        trainer.remove_callback(PrinterCallback)  # ProgressCallback prints the same
        trainer.train(resume_from_checkpoint=newest_checkpoint(run))

        # 6. Save, and show what changed; of several ranks the first one does.
        saved = run.folder / ("adapter" if args.use_peft else "model")
        weights = whole_weights(model)  # None, unless they are sharded
        after = sample_completions()
        if not is_first():
            return
        with write_folder(saved) as part:
            model.save_pretrained(part, state_dict=weights)
            tokenizer.save_pretrained(part)
            if args.train_embeddings:
                run.update(embedding_rows_moved=check_saved(part, model))
        run.update(tokens=round(tokens * (trainer.state.epoch or 0)), train_loss=mean_loss(trainer.state.log_history))
        show(console, run.folder / "samples.json", samples, before, after)
        show_ending(console, run, saved)


def check_arguments(args: Args, origins: dict[str, str]) -> None:
    """Raises InputError for arguments that do not go together."""
    check_precision(args, origins)
    if args.load_in_fp8 and not args.use_peft:
        raise InputError("--load-in-fp8 is for a frozen base, and --no-use-peft trains it; leave one of the two out")
    if args.train_embeddings and not args.use_peft:
        raise InputError("--train-embeddings: --no-use-peft trains every weight already; leave one of the two out")
    if args.embedding_learning_rate is not None and not args.train_embeddings:
        raise InputError("--embedding-learning-rate needs --train-embeddings")
    if args.embedding_learning_rate is not None and not args.embedding_learning_rate > 0:
        raise InputError(f"--embedding-learning-rate {args.embedding_learning_rate:g}: expected more than 0")


if __name__ == "__main__":
    run_command(main)
