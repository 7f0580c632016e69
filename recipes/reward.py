"""Reward model: learn from scores or preferences to give any answer a number, the higher the better.

    make reward                                            the tiny model on sample scores, seconds on two CPU cores
    make reward MODEL=outputs/merged DATA=pairs.jsonl      on the base that PPO will start from
    make reward MODEL=qwen2.5-7b DATA=pairs.jsonl ARGS=--stand-alone    a model of its own, for --rewards model:PATH

Rated answers (prompt or instruction, response, score) are learnt by regression: the squared error of standardised
scores. Pairs (prompt, chosen, rejected, in the forms of `make dpo`) are learnt by Bradley-Terry: the chosen answer's
number is to be the larger, -log sigmoid(chosen - rejected) (arXiv:2203.02155, section 3.5).

What is trained is a LoRA adapter and a scalar head on the frozen base. The head reads the hidden state of an answer's
end token. As PPO has the same base in memory anyway, this reward model costs it an adapter; with --stand-alone the
adapter is merged into a copy of the base, which any program loads as a sequence classifier with one output.

What was held out says what the model is worth: accuracy or correlation, calibration, and whether it only counts words.

Left out: several scores for one answer, process rewards, full-parameter training, several GPUs.
"""

import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from common import environment
from common.cli import parse
from common.data.examples import Conversation, Pair, Rating
from common.data.formats import PAIR_FORMATS, RATING_FORMATS, detect
from common.data.hold_out import hold_out
from common.data.read import column_map, pairs, ratings, unknown_columns
from common.data.rows import Faults, find_source, read_rows, source_sha256
from common.errors import InputError, run_command
from common.lm.chat import Example, check_truncation, end_token, set_chat_template, set_pad_token, tokenize
from common.lm.hub import Model, contents, fetch, load_tokenizer, resolved_revision
from common.run.ending import show_ending
from common.run.files import write_folder, write_json, write_jsonl
from common.run.folder import plan_run
from common.run.screen import loading
from common.run.stopping import Stop

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from rich.console import Console

BINS = 10  # of predicted probability, for the calibration error


@dataclass(frozen=True)
class Args:
    """Every name that TRL, PEFT or transformers also has means the same here."""

    # What to train, on what, and where it goes.
    model: str = "tiny"
    """A model card's name (`make models`), a local directory or a hub id."""
    data: str = str(environment.ROOT / "data_samples" / "scores.jsonl")
    """A file, a folder of files or a hub dataset."""
    output_dir: str | None = None
    """The run's folder. By default outputs/reward-MODEL-HASH, so another setting is another folder."""
    stand_alone: bool = False
    """Merge the adapter and save a sequence classifier, instead of adapter and head for the same base."""

    # How the data is read.
    format: Literal["auto", *PAIR_FORMATS, *RATING_FORMATS] = "auto"
    """The format of the rows; auto takes it from the columns of the first."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=question response=answer score=stars."""
    chat_template_path: str | None = None
    """A .jinja file to use instead of the model's own chat template."""
    pad_token: str | None = None
    """The token to pad with, where the model has none that differs from its end token."""
    max_length: int = 2048
    """Tokens of a prompt and its answer together; the rest is cut off at the end."""
    max_truncated: float = 0.05
    """Stop when a larger share of the answers would be cut."""
    eval_ratio: float = 0.1
    """Share of the prompts to hold out, with all their answers, for the report."""
    eval_data: str | None = None
    """Rows for the report from elsewhere, of the same kind; nothing is held out of the data then."""

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
    per_device_train_batch_size: int = 4
    """Rated answers, or pairs and so twice as many sequences."""
    gradient_accumulation_steps: int = 4
    num_train_epochs: float = 1.0
    max_steps: int = -1
    """Stop after so many steps, whatever the epochs say."""
    learning_rate: float = 1e-4
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


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row as the model reads it: one answer and its score, or the chosen and the rejected answer."""

    place: str
    answers: list[list[int]]  # 1 or 2 of (T,): prompt and answer, up to the end token
    lengths: list[int]  # tokens of each answer alone
    score: float | None


def main() -> None:
    args, base, origins = parse(Args, "reward", __doc__)
    stop = Stop(args.time_limit)

    # 1. Data: read and checked whole, before anything slow is loaded.
    sources = {name: find_source(name) for name in (args.data, args.eval_data) if name}
    environment.set_variables(offline=base.local and not any(isinstance(source, str) for source in sources.values()))
    rows = read(args.data, args)
    paired = isinstance(rows[0], Pair)
    held_out: list[Pair | Rating] = []
    if args.eval_data:
        held_out = read(args.eval_data, args)
        if isinstance(held_out[0], Pair) != paired:
            raise InputError(f"--eval-data {args.eval_data}: one of the two files holds pairs, the other scores")
    elif args.eval_ratio:  # by prompt: another answer to a known prompt is no test
        prompts = list(dict.fromkeys(repr(row.prompt) for row in rows))
        drawn = set(hold_out(prompts, round(len(prompts) * args.eval_ratio), random.Random(args.seed))[0])
        held_out = [row for row in rows if repr(row.prompt) in drawn]
        rows = [row for row in rows if repr(row.prompt) not in drawn]
    scores = [] if paired else [row.score for row in rows]
    if not paired and min(scores) == max(scores):
        raise InputError(f"{args.data}: every score is {scores[0]:g}; there is nothing to tell good from bad by")

    # 2. The run: a new one, one to go on with, or one that is finished. Nothing is written yet.
    contents_of = {name: source_sha256(source) or source for name, source in sources.items()}
    run = plan_run(
        "reward",
        base.name,
        args.output_dir,
        arguments=asdict(args),
        origins=origins,
        inputs={
            "data": contents_of[args.data],
            "eval_data": contents_of.get(args.eval_data),
            "base": contents(base),
        },
    )
    if run is None:
        return

    console = loading(base.name)
    import unsloth  # noqa: F401, I001  first, and slow: it changes what is imported after it
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback, Trainer, TrainingArguments
    from unsloth import FastLanguageModel, is_bfloat16_supported

    from common.run.checkpoints import CheckpointCallback, NoStepTooMany, newest_checkpoint
    from common.run.metrics import ProgressCallback, mean_loss
    from common.lm.scalar_head import apply_head, load_head, new_head
    from common.lm.hidden_states import at_last_token, last_hidden
    from common.lm.hidden_states import pad_right
    from common.lm.scalar_head import save_head, score_last

    # 3. Tokens: the model's own chat template, prompt and answer in one.
    identity = contents(base)
    base = fetch(base)
    if args.stand_alone:
        refuse_quantised(base)
    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, args.chat_template_path, base.name)
    end = end_token(tokenizer)
    set_pad_token(tokenizer, args.pad_token or (base.card.pad_token if base.card else None), end)

    training = as_tokens(tokenizer, rows, args, console)
    evaluation = as_tokens(tokenizer, held_out, args, console)
    kind = "bradley-terry" if paired else "regression"
    mean, std = (0.0, 1.0) if paired else (float(np.mean(scores)), float(np.std(scores)))
    facts = {"kind": kind, "base": identity, "mean": mean, "std": std}

    what = f"{len(training)} {'pairs' if paired else 'rated answers'}"
    console.print(f"[bold]{base.name}[/bold], {what} of {args.data}, {kind} -> [bold]{run.folder}[/bold]")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        console.print("No GPU: adamw_torch_fused in place of 8-bit Adam.")
    with run:
        # 4. The model: frozen in 4 or 16 bit under a new LoRA adapter, and the head.
        dtype = {
            "auto": (torch.bfloat16 if is_bfloat16_supported() else torch.float16) if on_gpu else torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
            "float32": torch.float32,
        }[args.dtype]
        checkpointing = "unsloth" if args.gradient_checkpointing else False
        longest = max(len(answer) for row in [*training, *evaluation] for answer in row.answers)
        model, _ = FastLanguageModel.from_pretrained(
            base.source,
            revision=base.revision,
            max_seq_length=longest,
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
        head = new_head(model.config.get_text_config().hidden_size, model.device)
        head.bias.requires_grad_(False)  # a sequence classifier has none, and no reward needs one
        model.reward_head = head  # a part of the model, so that the trainer finds its weight
        run.update(revision=resolved_revision(base), dtype=str(dtype), machine=environment.describe_machine())

        # 5. The trainer: transformers' own, with our loss; the head is saved and loaded beside the adapter.
        class RewardTrainer(NoStepTooMany, Trainer):
            def compute_loss(self, model: "PeftModel", inputs: dict, *_: Any, **__: Any) -> "torch.Tensor":
                mask = inputs["attention_mask"]
                hidden = at_last_token(last_hidden(model, inputs["input_ids"], mask), mask)  # (B, h)
                outputs = apply_head(head, hidden)  # (B,)
                if paired:
                    return bradley_terry_loss(outputs[0::2], outputs[1::2])
                return regression_loss(outputs, inputs["scores"])

            def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
                super()._save(output_dir, state_dict)
                save_head(head, Path(output_dir), facts)

            def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                saved, _ = load_head(Path(resume_from_checkpoint), head.weight.device)
                head.load_state_dict(saved.state_dict())

        def collate(batch: list[dict]) -> dict[str, "torch.Tensor"]:
            """Chosen and rejected answers in turn, or rated answers with their standardised scores."""
            answers = [answer for row in batch for answer in row["answers"]]
            input_ids, mask = pad_right(answers, tokenizer.pad_token_id, "cpu")  # (B, T)
            inputs = {"input_ids": input_ids, "attention_mask": mask}
            if not paired:
                inputs["scores"] = torch.tensor([(row["score"] - mean) / std for row in batch])  # (B,)
            return inputs

        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
        tokens = sum(len(answer) for row in training for answer in row.answers)
        trainer = RewardTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"answers": row.answers, "score": row.score} for row in training]),
            data_collator=collate,
            callbacks=[
                ProgressCallback(run.folder / "metrics.jsonl", tokens, console),
                CheckpointCallback(run, stop, args.save_total_limit),
            ],
            args=TrainingArguments(
                output_dir=str(run.folder / "checkpoints" / "part"),  # whence CheckpointCallback moves what is whole
                remove_unused_columns=False,  # it would look for their names in the model's forward
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
                disable_tqdm=True,  # ProgressCallback takes its place
                torch_empty_cache_steps=None,
            ),
        )
        trainer.remove_callback(PrinterCallback)  # ProgressCallback says it all
        trainer.train(resume_from_checkpoint=newest_checkpoint(run))
        run.update(tokens=round(tokens * (trainer.state.epoch or 0)), train_loss=mean_loss(trainer.state.log_history))

        # 6. Save.
        del model.reward_head
        saved = run.folder / ("model" if args.stand_alone else "adapter")
        with write_folder(saved) as part:
            if args.stand_alone:
                save_classifier(model, head, base, part, tokenizer.pad_token_id, facts)
            else:
                model.save_pretrained(part)
                save_head(head, part, facts)
            tokenizer.save_pretrained(part)

        # 7. What it makes of the answers that were held out.
        if evaluation:
            model.eval()
            answers = [(answer, []) for row in evaluation for answer in row.answers]
            outputs = score_last(model, head, answers, tokenizer.pad_token_id, 2 * args.per_device_train_batch_size)
            lengths = [length for row in evaluation for length in row.lengths]
            if paired:
                report = pair_report(outputs[0::2], outputs[1::2], lengths[0::2], lengths[1::2])
            else:
                predictions = [mean + std * output for output in outputs]
                report = score_report(predictions, [row.score for row in evaluation], lengths)
            run.update(report=report)
            count = 2 if paired else 1
            write_jsonl(
                run.folder / "held-out.jsonl",
                (
                    {
                        "place": row.place,
                        "outputs": outputs[count * index : count * (index + 1)],
                        "lengths": row.lengths,
                        "score": row.score,
                    }
                    for index, row in enumerate(evaluation)
                ),
            )
            show(console, report)
        show_ending(console, run, saved)


def read(name: str, args: Args) -> list[Pair] | list[Rating]:
    """The rows of a source, all pairs or all ratings, whichever the first is."""
    known = {**PAIR_FORMATS, **RATING_FORMATS}
    faults, columns = Faults(), column_map(args.columns)
    found = list(read_rows(find_source(name), faults))
    faults.stop()
    if not found:
        raise InputError(f"{name}: holds no rows")
    fields = {columns.get(column, column): value for column, value in found[0].fields.items()}
    form = detect(fields, known) if args.format == "auto" else args.format
    if form is None:
        raise InputError(f"{found[0].place}: {unknown_columns(fields, known)}")
    rows = list((pairs if form in PAIR_FORMATS else ratings)(found, faults, form, columns))
    faults.stop()
    return rows


def as_tokens(tokenizer: Any, rows: list[Pair] | list[Rating], args: Args, console: "Console") -> list[Tokens]:
    """Each row's answers after their prompt, as token ids. Raises InputError for a row that teaches nothing."""
    faults = Faults()
    answered = [row.prompt + answer for row in rows for answer in answers_of(row)]
    places = [row.place for row in rows for _ in answers_of(row)]
    tools = [row.tools for row in rows for _ in answers_of(row)]
    conversations = [Conversation(*fields) for fields in zip(places, answered, tools, strict=True)]
    examples = list(tokenize(tokenizer, conversations, args.max_length, faults))
    faults.stop()
    if truncated := check_truncation(examples, args.max_length, args.max_truncated):
        console.print(truncated)
    tokens, following = [], iter(examples)
    for row in rows:
        own = [next(following) for _ in answers_of(row)]
        spans = [answer_span(example) for example in own]
        # A sequence classifier is given the whole rendering, with what the template writes after the end token.
        ids = [
            example.input_ids[: None if args.stand_alone else stop].tolist()
            for example, (_, stop) in zip(own, spans, strict=True)
        ]
        if len(ids) == 2 and ids[0] == ids[1]:
            faults.add(row.place, f"chosen and rejected are the same in the first {args.max_length} tokens")
        score = row.score if isinstance(row, Rating) else None
        tokens.append(Tokens(row.place, ids, [stop - start for start, stop in spans], score))
    faults.stop()
    return tokens


def answers_of(row: Pair | Rating) -> list[list[dict]]:
    return [row.response] if isinstance(row, Rating) else [row.chosen, row.rejected]


def answer_span(example: Example) -> tuple[int, int]:
    """Where the last run of completion tokens begins and where it stops, the end token included."""
    marked = np.flatnonzero(example.completion_mask)
    breaks = np.flatnonzero(np.diff(marked) > 1)
    return int(marked[breaks[-1] + 1 if len(breaks) else 0]), int(marked[-1]) + 1


# Losses. Outputs are the head's, float32.


def bradley_terry_loss(chosen: "torch.Tensor", rejected: "torch.Tensor") -> "torch.Tensor":
    """Mean of -log sigmoid(chosen - rejected), both (B,); ln 2 when they are equal."""
    import torch

    return -torch.nn.functional.logsigmoid(chosen - rejected).mean()


def regression_loss(outputs: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
    """Mean squared error of (B,) outputs; 1 when they say nothing of standardised scores."""
    return (outputs - scores).square().mean()


# The report: what it says of held-out answers, and whether their length alone says it.

Report = dict[str, float | int | None]  # None where it is not defined, as a correlation of equal numbers


def pair_report(
    chosen: list[float], rejected: list[float], chosen_lengths: list[int], rejected_lengths: list[int]
) -> Report:
    """Of pairs: outputs of the model and tokens of the answers, in the same order."""
    margins = np.array(chosen) - np.array(rejected)  # (N,)
    longer = np.array(chosen_lengths) - np.array(rejected_lengths)  # (N,) tokens
    right = (margins > 0) + 0.5 * (margins == 0)
    return {
        "pairs": len(margins),
        "accuracy": _number(right.mean()),
        "loss": _number(np.logaddexp(0, -margins).mean()),
        "margin": _number(margins.mean()),
        "calibration error": calibration_error(margins),
        "chosen is longer": _mean(longer[longer != 0] > 0),
        "longer scores higher": _mean((margins * np.sign(longer))[longer != 0] > 0),
        "accuracy, chosen shorter": _mean(right[longer < 0]),
        "correlation with length": pearson([*chosen, *rejected], [*chosen_lengths, *rejected_lengths]),
    }


def score_report(predictions: list[float], scores: list[float], lengths: list[int]) -> Report:
    """Of rated answers: predictions in the units of the scores, the scores, and tokens of the answers."""
    errors = np.array(predictions) - np.array(scores)
    variance = np.var(predictions)
    covariance = np.mean((np.array(predictions) - np.mean(predictions)) * (np.array(scores) - np.mean(scores)))
    return {
        "rated answers": len(scores),
        "pearson": pearson(predictions, scores),
        "spearman": pearson(ranks(predictions), ranks(scores)),
        "error": _number(np.sqrt(np.mean(errors**2))),
        "calibration slope": _number(covariance / variance) if variance else None,
        "bias": _number(errors.mean()),
        "scores with length": pearson(scores, lengths),
        "predictions with length": pearson(predictions, lengths),
    }


def pearson(one: Any, other: Any) -> float | None:
    """Pearson's correlation; of ranks it is Spearman's."""
    one, other = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return _number(np.corrcoef(one, other)[0, 1])


def ranks(values: list[float]) -> np.ndarray:
    """The ranks of the values, from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def calibration_error(margins: np.ndarray) -> float:
    """Expected calibration error of the probability that the preferred answer is the better (arXiv:1706.04599).

    The model prefers the answer with the higher output, with probability sigmoid(|margin|), between 1/2 and 1. In each
    of BINS equal bins that probability's mean is held against how often the preference was right.
    """
    confidences = 1 / (1 + np.exp(-np.abs(margins)))  # (N,)
    right = (margins > 0) + 0.5 * (margins == 0)
    bins = np.minimum(((confidences - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(np.sum(confidences[bins == one] - right[bins == one])) for one in range(BINS)]
    return _number(sum(gaps) / len(margins))


def _mean(values: np.ndarray) -> float | None:
    return _number(values.mean()) if len(values) else None


def _number(value: Any) -> float:
    return round(float(value), 6)


MEANS = {
    "accuracy": "how often the chosen answer scores higher",
    "loss": "0.693 is a guess",
    "margin": "chosen less rejected; e to this power are the odds",
    "calibration error": "of the probability that the preferred answer is the better",
    "chosen is longer": "in the data; where far from 0.5, length alone is a good guess",
    "longer scores higher": "by the model; further from 0.5 than the line above is a bias",
    "accuracy, chosen shorter": "what is left where length misleads",
    "correlation with length": "of the scores given, with the tokens of the answer",
    "pearson": "correlation of predicted and given scores",
    "spearman": "the same of their ranks",
    "error": "root of the mean squared error, in the scores' units",
    "calibration slope": "given over predicted differences; below 1 it exaggerates",
    "bias": "mean of predicted less given",
    "scores with length": "correlation in the data, with the tokens of the answer",
    "predictions with length": "the same by the model; further from 0 is a bias",
}


def show(console: "Console", report: Report) -> None:
    from rich.table import Table

    table = Table("held out", "", "", title="The reward model on answers it has not seen")
    for name, value in report.items():
        shown = "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
        table.add_row(name, shown, MEANS.get(name, ""))
    console.print(table)
    if report["accuracy"] < 0.5 if "accuracy" in report else (report["pearson"] or 0) < 0:
        console.print("Worse than a guess: are chosen and rejected, or high and low scores, the wrong way round?")


# A stand-alone reward model.


def refuse_quantised(base: Model) -> None:
    """Raises InputError where the base cannot be merged with, before time is spent on training."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.source, revision=base.revision)
    if getattr(config, "quantization_config", None):
        raise InputError(f"--stand-alone: {base.source} is stored in few bits; an adapter merges into a 16-bit base")


def save_classifier(
    model: "PeftModel", head: "torch.nn.Linear", base: Model, folder: Path, pad_token_id: int, facts: dict
) -> None:
    """Write base, adapter and head as one AutoModelForSequenceClassification with one output, in 16 bit.

    The adapter's weights are added in 32 bit to the stored base's, not to a 4-bit copy, and rounded once.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # it says that the base has no head; ours is put in below
    classifier = AutoModelForSequenceClassification.from_pretrained(
        base.source, revision=base.revision, num_labels=1, dtype="auto"
    )
    if classifier.dtype == torch.float32:
        classifier = classifier.to(torch.bfloat16)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            weight = classifier.get_submodule(name).weight
            delta = layer.get_delta_weight("default")
            weight.data = (weight.data.float() + delta.float().to(weight.device)).to(weight.dtype)
    classifier.score.weight.data.copy_(head.weight)
    classifier.config.pad_token_id = pad_token_id  # by it the last token of a row is found
    classifier.save_pretrained(folder)
    write_json(folder / "head.json", facts)


if __name__ == "__main__":
    run_command(main)
