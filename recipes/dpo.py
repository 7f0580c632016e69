"""Direct preference optimization (DPO): train a model to prefer the chosen one of two completions.

    make merge ADAPTER=outputs/sft-tiny/adapter OUT=outputs/merged   first merge the stage before into the base
    make dpo MODEL=outputs/merged                                    on sample pairs, half a minute on two CPU cores
    make dpo MODEL=qwen2.5-7b DATA=pairs.jsonl                       an instruct model needs no stage before
    make dpo MODEL=qwen2.5-7b DATA=pairs.jsonl LOSS_TYPE=ipo

Data is prompt/chosen/rejected as text or messages, sharegpt pairs, or whole dialogues chosen/rejected that begin with
the same turns (HH). The reference policy is the base with the adapter switched off: no second model, the same on CPU
and GPU, and the first loss is ln 2. So the stage before must be merged into the base; training cannot continue from an
adapter.

The loss types are TRL's: sigmoid (DPO, arXiv:2305.18290), ipo, robust, hinge, apo_zero, sigmoid_norm (by length,
as in SimPO), nca_pair and others; several are added with --loss-weights (`--loss-type sigmoid sft` keeps the chosen
completions likely).

Left out: losses without a reference policy or without pairs (ORPO, KTO), images, full-parameter training over several
GPUs.
"""

import os
import random
from dataclasses import asdict, dataclass
from typing import Literal

from common import environment
from common.cli import parse
from common.data.examples import Conversation
from common.data.formats import PAIR_FORMATS
from common.data.hold_out import hold_out, hold_out_share
from common.data.read import read_examples
from common.data.rows import Faults, find_source
from common.errors import InputError, run_command
from common.lm.active_adapter import switch_quickly
from common.lm.chat import TokenPair, tokenize_pairs, trainable
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

Loss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
    "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Every name that TRL, PEFT or transformers also has means the same here."""

    # Model, data, output.
    model: str = "tiny"
    """A model card's name (`make models`), a local directory or a hub id; it is also the reference policy."""
    data: str = str(environment.ROOT / "data_samples" / "preferences-train.jsonl")
    """A file, a folder of files or a hub dataset."""
    output_dir: str | None = None
    """The folder of the run. By default outputs/dpo-MODEL-HASH: other settings, another folder."""
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run: a folder, or org/name@COMMIT of the hub. It can do all that you can."""

    # How the data is read.
    format: Literal["auto", "preference", "instruction-preference", "sharegpt-preference", "dialogue-preference"] = (
        "auto"
    )
    """The format of the rows; auto takes it from the columns of the first row."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question chosen=better rejected=worse."""
    chat_template_path: str | None = None
    """A .jinja file to use instead of the model's own chat template."""
    pad_token: str | None = None
    """The pad token, for a model that has none besides its end token."""
    max_length: int = 2048
    """Tokens of a prompt and a completion together; longer ones are truncated at the end."""
    max_truncated: float = 0.05
    """Stop when a larger share of the pairs would be truncated, or lose a part in the chat template."""
    eval_ratio: float = 0.0
    """Share of the pairs to hold out; with it the checkpoint with the lowest held-out loss is kept."""

    # The loss.
    beta: float = 0.1
    """How strongly the loss keeps the policy near the reference policy."""
    loss_type: tuple[Loss, ...] = ("sigmoid",)
    """One or several of TRL's loss types."""
    loss_weights: tuple[float, ...] = ()
    """A weight for each of several loss types; 1 if not given."""
    label_smoothing: float = 0.0
    """The share of pairs in which chosen and rejected may be swapped; robust and exo_pair need it."""
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
    per_device_train_batch_size: int = 2
    """Pairs; twice as many sequences."""
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
    share_prompts: bool = False
    """Compute what chosen and rejected begin with once for both, in batches that gain by it; the loss is the same."""
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
    args, base, origins = parse(Args, "dpo", __doc__)
    stop = Stop(args.time_limit)
    check_precision(args, origins)
    if args.loss_weights and len(args.loss_weights) != len(args.loss_type):
        raise InputError(
            f"--loss-weights gives {len(args.loss_weights)} weights for {len(args.loss_type)} loss types; give one each"
        )
    if "exo_pair" in args.loss_type and not args.label_smoothing:
        raise InputError("--loss-type exo_pair needs --label-smoothing above 0; its paper recommends 1e-3")

    # 1. Data: read and checked completely, before anything slow is loaded.
    source = find_source(args.data)
    environment.set_variables(models=[base], sources=[source], reference=True)
    data = read_examples(source, PAIR_FORMATS, args.format, args.columns)

    # 2. The run: new, resumed, or finished already. Nothing is written yet.
    run = plan_run(
        "dpo",
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
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from unsloth import FastLanguageModel

    from common.run.checkpoints import CheckpointCallback, newest_checkpoint
    from common.lm.fp8 import quantize_base
    from common.lm.generate import generate
    from common.lm.shared_prompts import PairCollator, share_prompts
    from common.run.health.callback import HealthCallback
    from common.run.metrics import ProgressCallback, mean_loss
    from common.run.shared_steps import SharedSteps

    # 3. Tokens: rendered by the model's own chat template; the two completions carry loss, the prompt does not.
    base = fetch(base)
    tokenizer, end = load_chat_tokenizer(base, args.chat_template_path, args.pad_token)

    order, faults = random.Random(args.seed), Faults()
    # With fewer than ten rows, none is held out.
    held_out, rows = hold_out(data.examples, min(args.sample_prompts, len(data.examples) // 10), order)
    samples = [Sample(Conversation(row.place, row.prompt, row.tools), row.chosen[-1]["content"]) for row in held_out]
    examples = list(tokenize_pairs(tokenizer, rows, args.max_length, faults))
    faults.stop()
    examples, notes = trainable(examples, args.max_length, args.max_truncated, tokenizer.chat_template)
    if notes:
        console.print(notes)
    evaluation, training = hold_out_share(examples, args.eval_ratio, order)

    announce(base.name, f"{len(training)} pairs of {args.data}", run.folder)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        console.print("No GPU: adamw_torch_fused in place of 8-bit Adam.")
    with run:
        args = fit_to_gpu(args.fit, args, "dpo", base, origins, run)
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
        run.update(data=summary(data, tokenizer, training, held_out, evaluation))

        def dataset(examples: list[TokenPair]) -> Dataset:
            columns = ("prompt_ids", "chosen_ids", "rejected_ids")
            return Dataset.from_dict({name: [getattr(example, name) for example in examples] for name in columns})

        def sample_completions() -> list[str]:
            FastLanguageModel.for_inference(model)
            completions = generate(model, tokenizer, [sample.prompt for sample in samples], end, args.sample_tokens)
            FastLanguageModel.for_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
            return [completion.text + ("" if completion.ended else " ...") for completion in completions]

        before = sample_completions()

        # 5. The trainer. Values that Unsloth's GPU path and TRL default differently are set here.
        class Trainer(SharedSteps, DPOTrainer):
            """DPOTrainer for pairs of tokens; it would render text again, and not with a chat template."""

            def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
                return dataset

        collate = DataCollatorForPreference(tokenizer.pad_token_id, args.max_length, truncation_mode="keep_start")
        if args.share_prompts and (reason := share_prompts(model, args.max_length)):
            console.print(f"Prompts are computed once for each completion: {reason}.")
        elif args.share_prompts:
            collate = PairCollator(collate)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
        tokens = sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in training)
        shown = {"loss": "loss", "margin": "rewards/margins", "accuracy": "rewards/accuracies"}
        trainer = Trainer(
            model=model,
            processing_class=tokenizer,
            data_collator=collate,
            train_dataset=dataset(training),
            eval_dataset=dataset(evaluation) if evaluation else None,
            callbacks=[
                ProgressCallback(run.folder / "metrics.jsonl", tokens, console, shown),
                HealthCallback(run, stop, args.stop_on_fault, data.examples),
                CheckpointCallback(run, stop, args.save_total_limit, rows=training),
            ],
            args=DPOConfig(
                output_dir=str(run.folder / "checkpoints" / "part"),  # complete checkpoints are moved out of here
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
        show_ending(console, run, saved)


if __name__ == "__main__":
    run_command(main)
