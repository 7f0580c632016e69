"""Direct preference optimization (DPO): of two answers, make the model prefer the one you chose.

    make merge ADAPTER=outputs/sft-tiny/adapter OUT=outputs/merged   the stage before becomes the base
    make dpo MODEL=outputs/merged                                    on sample pairs, half a minute on two CPU cores
    make dpo MODEL=qwen2.5-7b DATA=pairs.jsonl                       an instruct model is a base as it is
    make dpo MODEL=qwen2.5-7b DATA=pairs.jsonl ARGS="--loss-type ipo"

Data is prompt/chosen/rejected as text or messages, sharegpt pairs, or whole dialogues chosen/rejected that share their
beginning (HH). The reference is the base with the adapter switched off: no second model, the same on CPU and GPU, and
the first loss is ln 2. So the stage before must be in the base, merged; an adapter is not continued here.

The loss types are TRL's: sigmoid (DPO, arXiv:2305.18290), ipo, robust, hinge, apo_zero, sigmoid_norm (by length,
as in SimPO), nca_pair and others; several, with --loss-weights, are added (`--loss-type sigmoid sft` keeps the chosen
answers likely).

Left out: losses without a reference or without pairs (ORPO, KTO), images, full-parameter training over several GPUs.
"""

import os
import random
from dataclasses import asdict, dataclass
from typing import Literal

from common import environment
from common.cli import parse
from common.data.examples import Conversation
from common.data.hold_out import hold_out
from common.data.read import column_map, pairs
from common.data.rows import Faults, find_source, read_rows, source_sha256
from common.errors import InputError, run_command
from common.lm.chat import TokenPair, check_truncation, end_token, set_chat_template, set_pad_token, tokenize_pairs
from common.lm.hub import contents, fetch, load_tokenizer, resolved_revision
from common.run.files import write_folder
from common.run.folder import plan_run
from common.run.samples import Sample, show
from common.run.screen import loading
from common.run.stopping import Stop

Loss = Literal[
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft"),
]


@dataclass(frozen=True)
class Args:
    """Every name that TRL, PEFT or transformers also has means the same here."""

    # What to train, on what, and where it goes.
    model: str = "tiny"
    """A model card's name (`make models`), a local directory or a hub id; it is also the reference."""
    data: str = str(environment.ROOT / "data_samples" / "preferences-train.jsonl")
    """A file, a folder of files or a hub dataset."""
    output_dir: str | None = None
    """The run's folder. By default outputs/dpo-MODEL-HASH, so another setting is another folder."""

    # How the data is read.
    format: Literal["auto", "preference", "sharegpt-preference", "dialogue-preference"] = "auto"
    """The format of the rows; auto takes it from the columns of the first."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question chosen=better rejected=worse."""
    chat_template_path: str | None = None
    """A .jinja file to use instead of the model's own chat template."""
    pad_token: str | None = None
    """The token to pad with, where the model has none that differs from its end token."""
    max_length: int = 2048
    """Tokens of a prompt and its answer together; the rest is cut off at the end."""
    max_truncated: float = 0.05
    """Stop when a larger share of the pairs would be cut."""
    eval_ratio: float = 0.0
    """Share of the pairs to hold out; with it the checkpoint of the lowest held-out loss is the one kept."""

    # The loss.
    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    loss_type: tuple[Loss, ...] = ("sigmoid",)
    """One or several of TRL's loss types."""
    loss_weights: tuple[float, ...] = ()
    """A weight for each of several loss types; 1 each if not given."""
    label_smoothing: float = 0.0
    """The share of pairs believed to be the wrong way round; robust and exo_pair need it."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probabilities once, before training, instead of at every step."""

    # The model and the adapter.
    load_in_4bit: bool = True
    """The frozen base in nf4 (QLoRA); --no-load-in-4bit for 16 bit."""
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
    per_device_train_batch_size: int = 2
    """Pairs, so twice as many sequences."""
    gradient_accumulation_steps: int = 4
    num_train_epochs: float = 1.0
    max_steps: int = -1
    """Stop after so many steps, whatever the epochs say."""
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.1
    """Steps of warm-up; below 1, a share of the run."""
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
    args, base, origins = parse(Args, "dpo", __doc__)
    stop = Stop(args.time_limit)
    if args.loss_weights and len(args.loss_weights) != len(args.loss_type):
        raise InputError(
            f"--loss-weights gives {len(args.loss_weights)} weights for {len(args.loss_type)} loss types; one for each"
        )
    if "exo_pair" in args.loss_type and not args.label_smoothing:
        raise InputError("--loss-type exo_pair needs --label-smoothing above 0; its paper recommends 1e-3")

    # 1. Data: read and checked whole, before anything slow is loaded.
    faults = Faults()
    source = find_source(args.data)
    environment.set_variables(offline=base.local and not isinstance(source, str))
    rows = list(pairs(read_rows(source, faults), faults, args.format, column_map(args.columns)))
    faults.stop()
    if not rows:
        raise InputError(f"{args.data}: holds no rows")

    # 2. The run: a new one, one to go on with, or one that is finished. Nothing is written yet.
    run = plan_run(
        "dpo",
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
    from trl import DPOConfig, DPOTrainer
    from unsloth import FastLanguageModel, is_bfloat16_supported

    from common.run.checkpoints import CheckpointCallback, NoStepTooMany, newest_checkpoint
    from common.lm.generate import generate
    from common.run.metrics import ProgressCallback, mean_loss

    # 3. Tokens: the model's own chat template; the two answers carry loss, the prompt does not.
    base = fetch(base)
    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, args.chat_template_path, base.name)
    end = end_token(tokenizer)
    set_pad_token(tokenizer, args.pad_token or (base.card.pad_token if base.card else None), end)

    order = random.Random(args.seed)
    asked, rows = hold_out(rows, min(args.sample_prompts, len(rows) // 10), order)  # a handful is all trained on
    samples = [Sample(Conversation(row.place, row.prompt, row.tools), row.chosen[-1]["content"]) for row in asked]
    examples = list(tokenize_pairs(tokenizer, rows, args.max_length, faults))
    faults.stop()
    if truncated := check_truncation(examples, args.max_length, args.max_truncated):
        console.print(truncated)
    evaluation, training = hold_out(examples, round(len(examples) * args.eval_ratio), order)

    console.print(f"[bold]{base.name}[/bold], {len(training)} pairs of {args.data} -> [bold]{run.folder}[/bold]")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        console.print("No GPU: adamw_torch_fused in place of 8-bit Adam.")
    with run:
        # 4. The model: frozen in 4 or 16 bit under a new LoRA adapter. Without the adapter it is the reference.
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
            load_in_4bit=args.load_in_4bit,
            use_gradient_checkpointing=checkpointing,
            use_exact_model_name=True,  # else a hub id is swapped for Unsloth's own 4-bit copy of it
            random_state=args.seed,
        )
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

        def dataset(examples: list[TokenPair]) -> Dataset:
            columns = ("prompt_ids", "chosen_ids", "rejected_ids")
            return Dataset.from_dict({name: [getattr(example, name) for example in examples] for name in columns})

        def answers() -> list[str]:
            FastLanguageModel.for_inference(model)
            said = generate(model, tokenizer, [sample.prompt for sample in samples], end, args.sample_tokens)
            FastLanguageModel.for_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
            return [answer.text + ("" if answer.ended else " ...") for answer in said]

        before = answers()

        # 5. The trainer. Where Unsloth's GPU path and TRL have different defaults, the value is given.
        class Trainer(NoStepTooMany, DPOTrainer):
            """Takes pairs that are tokens already; DPOTrainer would render text again, and not by a chat template."""

            def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
                return dataset

        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
        tokens = sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in training)
        shown = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
        trainer = Trainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=dataset(training),
            eval_dataset=dataset(evaluation) if evaluation else None,
            callbacks=[
                ProgressCallback(run.folder / "metrics.jsonl", tokens, console, shown),
                CheckpointCallback(run, stop, args.save_total_limit),
            ],
            args=DPOConfig(
                output_dir=str(run.folder / "checkpoints" / "part"),  # whence CheckpointCallback moves what is whole
                beta=args.beta,
                loss_type=list(args.loss_type),
                loss_weights=list(args.loss_weights) or None,
                label_smoothing=args.label_smoothing,
                precompute_ref_log_probs=args.precompute_ref_log_probs,
                max_length=args.max_length,
                truncation_mode="keep_start",
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
        # TRL copies the new adapter as a second one, "ref". It computes nothing that the base alone does not, takes
        # memory, and breaks resuming: transformers then restores "ref" from a checkpoint and leaves the policy as new.
        model.delete_adapter("ref")
        trainer.remove_callback(PrinterCallback)  # ProgressCallback says it all
        trainer.train(resume_from_checkpoint=newest_checkpoint(run))

        # 6. Save, and show what changed.
        saved = run.folder / "adapter"
        with write_folder(saved) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        after = answers()
        run.update(tokens=round(tokens * (trainer.state.epoch or 0)), train_loss=mean_loss(trainer.state.log_history))
        show(console, run.folder / "samples.json", samples, before, after)
        console.print(f"Adapter in [bold]{saved}[/bold]")


if __name__ == "__main__":
    run_command(main)
