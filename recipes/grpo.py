"""Group relative policy optimization (GRPO) on math: sample several answers to each problem, reward the right ones.

    make grpo                                                        the tiny model on two-number arithmetic
    make grpo MODEL=outputs/merged DATA=gsm8k.jsonl                  problems with gold answers
    make grpo MODEL=qwen2.5-7b DATA=gsm8k.jsonl ARGS="--rewards math format=0.2 my_rewards.py:shorter=0.1"
    make test-rewards DATA=gsm8k.jsonl                               do the rewards mean what they should?

Data is prompt/answer or question/answer (as GSM8K has it); other columns reach the reward functions under their names.
A reward is a name of common/rewards/specification.py or FILE.py:FUNCTION, with =WEIGHT; they are added. Before a run
every one of them is held to the reward contract on rows of the data. An answer's advantage is its reward against the
mean of the answers to the same problem (arXiv:2402.03300), so a group whose rewards are all the same teaches nothing:
the live line has their share as `flat`, and --refill puts other problems in their place.

The reference is the base with the adapter switched off, so the stage before must be in the base, merged. With --beta 0,
the default, no KL term holds the policy to it; the KL shown is then measured on a few answers a step, never trained on.

Left out: tools, several turns, vLLM, several GPUs.
"""

import json
import os
import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from common import environment
from common.cli import parse
from common.data.examples import Conversation, Prompt
from common.data.hold_out import hold_out
from common.data.read import column_map, problems
from common.data.rows import Faults, find_source, read_rows, source_sha256
from common.errors import InputError, run_command
from common.lm.chat import end_token, set_chat_template, set_pad_token
from common.lm.hub import contents, fetch, load_tokenizer, resolved_revision
from common.rewards.contract import check_contract
from common.rewards.specification import Reward, check_prompts, load, score_completions
from common.run.ending import show_ending
from common.run.files import write_folder
from common.run.folder import plan_run
from common.run.samples import Sample, show
from common.run.screen import loading
from common.run.stopping import Stop

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Args:
    """Every name that TRL, PEFT or transformers also has means the same here."""

    # What to train, on what, and where it goes.
    model: str = "tiny"
    """A model card's name (`make models`), a local directory or a hub id; it is also the reference."""
    data: str = str(environment.ROOT / "data_samples" / "arithmetic-train.jsonl")
    """A file, a folder of files or a hub dataset."""
    output_dir: str | None = None
    """The run's folder. By default outputs/grpo-MODEL-HASH, so another setting is another folder."""

    # How the data is read.
    format: Literal[
        "auto", "prompt-answer", "question-answer", "problem-answer", "problem-solution", "prompt", "instruction"
    ] = "auto"
    """The format of the rows; auto takes it from the columns of the first."""
    columns: tuple[str, ...] = ()
    """Columns under another name: prompt=problem answer=solution."""
    system_prompt: str | None = None
    """A system message before every problem, for a model that no SFT stage has taught the form of an answer."""
    chat_template_path: str | None = None
    """A .jinja file to use instead of the model's own chat template."""
    pad_token: str | None = None
    """The token to pad with, where the model has none that differs from its end token."""
    max_prompt_length: int = 1024
    """Tokens of a problem; one that is longer is left out, for half a problem is another one."""
    max_truncated: float = 0.05
    """Stop when a larger share of the problems would be left out."""

    # The rewards.
    rewards: tuple[str, ...] = ("math", "format=0.2")
    """NAME or FILE.py:FUNCTION, each with =WEIGHT if it is not 1."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What an advantage is divided by: the spread of its group, of the batch, or nothing (Dr. GRPO)."""
    difficulty: Literal["off", "easy", "medium", "hard", "auto"] = "off"
    """Measure the problems on the model first and train on these only; auto: all but those that teach nothing."""
    difficulty_by: Literal["pass-rate", "entropy"] = "pass-rate"
    """The share of answers that the first reward gives at least half of its best, or the entropy of the answers."""
    difficulty_prompts: int = 512
    """How many problems to measure; what is trained on is taken from them."""
    refill: int = 0
    """How often, in one step, groups whose rewards are all the same are replaced by other problems."""

    # The loss.
    num_generations: int = 4
    """Answers to each problem: the group."""
    max_completion_length: int = 512
    temperature: float = 0.9
    beta: float = 0.0
    """Weight of the KL divergence from the reference; 0 leaves it out."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "dapo"
    """How token losses are averaged; dapo: over all tokens of the batch."""
    epsilon: float = 0.2
    """The clipping of the probability ratio; only with several iterations is there anything to clip."""
    epsilon_high: float | None = None
    """Its upper side; as the lower one if not given."""
    num_iterations: int = 1
    """Optimization steps on the same answers."""
    mask_truncated_completions: bool = False
    """Leave answers that were cut off out of the loss."""

    # The model and the adapter.
    load_in_4bit: bool = True
    """The frozen base in nf4 (QLoRA); --no-load-in-4bit for 16 bit."""
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
    """Answers in one pass; times the accumulation it is the answers of a step, a multiple of --num-generations."""
    gradient_accumulation_steps: int = 4
    num_train_epochs: float = 1.0
    max_steps: int = -1
    """Stop after so many steps, whatever the epochs say."""
    learning_rate: float = 1e-5
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
    logging_steps: int = 1
    save_steps: float = 0.1
    """A checkpoint every so many steps; below 1, a share of the run."""
    save_total_limit: int = 2
    time_limit: str | None = None
    """Hours:minutes:seconds, as 3:55:00, after which the run ends with a checkpoint, to be gone on with."""
    report_to: tuple[str, ...] = ()
    """wandb or trackio, besides TensorBoard, which is always written."""
    sample_prompts: int = 3
    """Problems held out and answered before and after; and as many sampled answers of each step go to samples.jsonl."""
    sample_tokens: int = 128
    """The longest answer to a held-out problem."""


def main() -> None:
    args, base, origins = parse(Args, "grpo", __doc__)
    stop = Stop(args.time_limit)
    answers_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if answers_a_step % args.num_generations or args.num_generations < 2:
        raise InputError(
            f"--per-device-train-batch-size {args.per_device_train_batch_size} x --gradient-accumulation-steps "
            f"{args.gradient_accumulation_steps} is {answers_a_step} answers a step, which must be a multiple of "
            f"--num-generations {args.num_generations}, and that at least 2"
        )

    # 1. Data and rewards: read and checked whole, before anything slow is loaded.
    faults = Faults()
    source = find_source(args.data)
    environment.set_variables(offline=base.local and not isinstance(source, str))
    rows = list(problems(read_rows(source, faults), faults, args.format, column_map(args.columns)))
    faults.stop()
    if not rows:
        raise InputError(f"{args.data}: holds no rows")
    rewards = load(args.rewards, args.max_completion_length)
    check_prompts(rewards, rows, faults)
    faults.stop()
    check_contract(rewards, rows, args.seed)

    # 2. The run: a new one, one to go on with, or one that is finished. Nothing is written yet.
    run = plan_run(
        "grpo",
        base.name,
        args.output_dir,
        arguments=asdict(args),
        origins=origins,
        inputs={
            "data": source_sha256(source) or source,
            "base": contents(base),
            "reward_files": [source_sha256([reward.file]) for reward in rewards if reward.file],
        },
    )
    if run is None:
        return

    console = loading(base.name)
    import unsloth  # noqa: F401, I001  first, and slow: it changes what is imported after it
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer
    from unsloth import FastLanguageModel, is_bfloat16_supported

    from common.run.checkpoints import CheckpointCallback, NoStepTooMany, newest_checkpoint
    from common.run.curriculum import choose, group_means, pass_rates
    from common.lm.generate import Completion, generate
    from common.lm.log_probs import score_tokens
    from common.run.metrics import ProgressCallback, mean_loss

    # 3. Prompts: the model's own chat template, up to where it goes on.
    base = fetch(base)
    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, args.chat_template_path, base.name)
    end = end_token(tokenizer)
    set_pad_token(tokenizer, args.pad_token or (base.card.pad_token if base.card else None), end)
    tokenizer.eos_token = end  # TRL takes an answer that ends otherwise for one that was cut off

    system = [{"role": "system", "content": args.system_prompt}] if args.system_prompt else []
    rows = [Prompt(row.place, [*system, *row.prompt], row.answer, row.fields, row.tools) for row in rows]
    rows = fitting(tokenizer, rows, args, console)
    order = random.Random(args.seed)
    asked, rows = hold_out(rows, min(args.sample_prompts, len(rows) // 10), order)
    samples = [Sample(Conversation(row.place, row.prompt, row.tools), row.answer or "") for row in asked]

    console.print(f"[bold]{base.name}[/bold], {len(rows)} problems of {args.data} -> [bold]{run.folder}[/bold]")
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
            max_seq_length=args.max_prompt_length + args.max_completion_length,
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
            target_modules=list(args.lora_target_modules),
            use_gradient_checkpointing=checkpointing,
            random_state=args.seed,
        )
        run.update(revision=resolved_revision(base), dtype=str(dtype), machine=environment.describe_machine())

        def sample(prompts: list[list[dict]], max_new_tokens: int, temperature: float) -> list[Completion]:
            FastLanguageModel.for_inference(model)
            conversations = [Conversation("", prompt) for prompt in prompts]
            said = generate(model, tokenizer, conversations, end, max_new_tokens, temperature, batch_size=128)
            FastLanguageModel.for_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
            return said

        def answers() -> list[str]:
            said = sample([sample.prompt.messages for sample in samples], args.sample_tokens, 0.0)
            return [answer.text + ("" if answer.ended else " ...") for answer in said]

        before = answers()

        # 5. Which problems: all, or those of the wanted difficulty for this very model.
        if args.difficulty != "off":
            rows = rows if len(rows) <= args.difficulty_prompts else order.sample(rows, args.difficulty_prompts)
            asked = [row for row in rows for _ in range(args.num_generations)]
            said = sample([row.prompt for row in asked], args.max_completion_length, args.temperature)
            if args.difficulty_by == "pass-rate":
                _, parts = score_completions(rewards, asked, said)
                measures = pass_rates(parts[rewards[0].name], args.num_generations)
            else:
                spans = [(answer.prompt_ids, answer.completion_ids) for answer in said]
                entropies = [float(s.entropies.mean()) for s in score_tokens(model, spans, tokenizer.pad_token_id)]
                measures = group_means(entropies, args.num_generations)
            rows = [rows[index] for index in choose(measures, args.difficulty, args.difficulty_by)]
            console.print(f"{len(rows)} of {len(measures)} problems are {args.difficulty} by {args.difficulty_by}")

        # 6. The trainer. Where Unsloth's GPU path and TRL have different defaults, the value is given.
        class Trainer(NoStepTooMany, GRPOTrainer):
            """Samples by our `generate`, as PPO does; scores by our rewards; replaces groups that teach nothing."""

            def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
                drawn = [rows[row["index"]] for row in inputs]
                self.said = sample([row.prompt for row in drawn], args.max_completion_length, args.temperature)
                for attempt in range(args.refill):
                    totals, _ = score_completions(rewards, drawn, self.said)
                    flat = flat_groups(totals, args.num_generations)
                    fresh = random.Random(f"{args.seed} {self.state.global_step} {attempt}")
                    for group in flat:
                        drawn[group] = [rows[fresh.randrange(len(rows))]] * args.num_generations
                    again = [index for group in flat for index in range(group.start, group.stop)]
                    prompts = [drawn[index].prompt for index in again]
                    said = sample(prompts, args.max_completion_length, args.temperature)
                    for index, answer in zip(again, said, strict=True):
                        self.said[index] = answer
                self.drawn = drawn
                batch = super()._generate_and_score_completions([{"prompt": row.prompt} for row in drawn])
                if args.beta == 0:  # else TRL measures it, for the loss
                    self._metrics["train"]["kl"].append(self.measure_kl(self.said[:4]))
                return batch

            def _calculate_rewards(self, inputs: list, prompts: list, *_: object) -> torch.Tensor:
                totals, parts = score_completions(rewards, self.drawn, self.said)
                # Not TRL's frac_reward_zero_std: a spread of 1e-7, from adding equal floats, is not zero to it.
                flat = len(flat_groups(totals, args.num_generations)) * args.num_generations / len(totals)
                self._metrics["train"]["flat"].append(flat)
                shown = min(args.sample_prompts, len(totals))
                with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as stream:
                    for index in range(shown):
                        entry = {
                            "step": self.state.global_step,
                            "prompt": self.drawn[index].prompt,
                            "completion": self.said[index].text,
                            "ended": self.said[index].ended,
                            "answer": self.drawn[index].answer,
                            "reward": totals[index],
                            "rewards": {name: values[index] for name, values in parts.items()},
                        }
                        stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
                columns = [[torch.nan if value is None else value for value in values] for values in parts.values()]
                return torch.tensor(columns, dtype=torch.float32, device=self.accelerator.device).T  # (N, rewards)

            def measure_kl(self, said: list[Completion]) -> float:
                """The KL divergence from the reference, by token, estimated as k3 (joschu.net/blog/kl-approx.html)."""
                spans = [(answer.prompt_ids, answer.completion_ids) for answer in said]
                policy = score_tokens(model, spans, tokenizer.pad_token_id)
                with model.disable_adapter():
                    reference = score_tokens(model, spans, tokenizer.pad_token_id)
                ratios = torch.cat([r.log_probs - p.log_probs for p, r in zip(policy, reference, strict=True)])
                return float((ratios.exp() - 1 - ratios).mean())

        def rollout(prompts: list, trainer: Trainer) -> dict:
            return {
                "prompt_ids": [answer.prompt_ids for answer in trainer.said],
                "completion_ids": [answer.completion_ids for answer in trainer.said],
                "logprobs": None,  # the policy has not moved since: TRL takes its own
            }

        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func warns that it may change; TRL is pinned
        trainer = Trainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=list(rewards),
            rollout_func=rollout,
            train_dataset=Dataset.from_dict(
                {"prompt": [row.prompt for row in rows], "index": [*range(len(rows))]},
            ),
            callbacks=[
                ProgressCallback(run.folder / "metrics.jsonl", None, console, live_line(rewards)),
                CheckpointCallback(run, stop, args.save_total_limit, every=args.num_iterations),
            ],
            args=GRPOConfig(
                output_dir=str(run.folder / "checkpoints" / "part"),  # whence CheckpointCallback moves what is whole
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
                disable_tqdm=True,  # ProgressCallback takes its place
                torch_empty_cache_steps=None,
            ),
        )
        if "ref" in model.peft_config:  # TRL's copy of the new adapter, with --beta: see dpo.py
            model.delete_adapter("ref")
        trainer.remove_callback(PrinterCallback)  # ProgressCallback says it all
        trainer.train(resume_from_checkpoint=newest_checkpoint(run))

        # 7. Save, and show what changed.
        saved = run.folder / "adapter"
        with write_folder(saved) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
        after = answers()
        run.update(tokens=trainer.state.num_input_tokens_seen, train_loss=mean_loss(trainer.state.log_history))
        show(console, run.folder / "samples.json", samples, before, after)
        show_ending(console, run, saved)


def fitting(tokenizer: "PreTrainedTokenizerBase", rows: list[Prompt], args: Args, console: "Console") -> list[Prompt]:
    """The problems of at most --max-prompt-length tokens; InputError when --max-truncated or more are longer."""
    texts = [tokenizer.apply_chat_template(r.prompt, tokenize=False, add_generation_prompt=True) for r in rows]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= args.max_prompt_length]
    if len(kept) < len(rows):
        share = 1 - len(kept) / len(rows)
        line = f"{len(rows) - len(kept)} of {len(rows)} problems ({share:.1%}) are longer than {args.max_prompt_length}"
        if share > args.max_truncated:
            raise InputError(f"{line} tokens, the longest {max(lengths)}: raise --max-prompt-length or --max-truncated")
        console.print(f"{line} tokens and left out")
    return kept


def flat_groups(totals: list[float], size: int) -> list[slice]:
    """The groups whose rewards are all the same, so that no answer is better than another."""
    groups = [slice(first, first + size) for first in range(0, len(totals), size)]
    return [group for group in groups if max(totals[group]) - min(totals[group]) < 1e-6]


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
