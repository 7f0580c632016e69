"""Compare recipes/ppo.py with the PPOTrainer of TRL 1.12.0: same base, prompts, reward model and settings.

    make sft; make merge; make reward MODEL=MERGED ARGS="--lora-target-modules q_proj k_proj v_proj o_proj"
    python tests/references/compare_ppo.py --base MERGED --reward RUN --seeds 42 1 2 --learning-rates 1e-3 3e-3 1e-2
    python tests/references/compare_ppo.py --random-weights qwen2-1.5b --steps 5   speed and memory of a true shape

The recipe runs first, with its own defaults or those of the model's card, once for each of --critic-inits; TRL gets the
values in its run.json. TRL also gets the reward model merged into a sequence classifier, since it takes no other, and
each of --learning-rates in turn: there policy and value model share one; the recipe's is its default. One function
samples and scores held-out prompts for both, at the temperature of training.

TRL has an environment of its own, made by uv from the head of plain_ppo.py. Where nothing can be fetched,
--trl-python names a Python that has it: `env PYTHONPATH=/wheels/trl-1.12.0:... python3`.

A line of the table is a run. The score of all steps is the mean of the scores of everything sampled in training: of two
runs that end alike, the one that learned sooner has more. Time is that of the steps, without start-up: seconds on the
clock and of processor time; with --random-weights without the first step either. Memory is what the GPU's allocator
reserved, else the peak resident memory, and the resident memory before the first step. A run that has its figures.json
is not repeated.
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from common.environment import ROOT
from common.errors import InputError, run_command
from common.lm.cards import read_card
from common.lm.hub import find_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SAMPLES = ROOT / "data_samples"
# Arguments that both have under the same name.
SAME = "num_ppo_epochs kl_coef kl_estimator cliprange cliprange_value gamma lam temperature missing_eos_penalty lora_r"
SAME += " lora_alpha per_device_train_batch_size gradient_checkpointing lr_scheduler_type weight_decay seed"
COMPLETIONS = 2  # to each held-out prompt


@dataclass(frozen=True)
class Args:
    base: str | None = None
    """The merged model of the stage before."""
    reward: str | None = None
    """A run of `make reward` on it."""
    random_weights: str | None = None
    """Instead of both: a card's name. A checkpoint of its shape is made, and a reward model in one step."""
    prompts: str = str(SAMPLES / "arithmetic-train.jsonl")
    held_out: str = str(SAMPLES / "arithmetic.jsonl")
    output_dir: str = str(ROOT / "outputs" / "compare-ppo")
    seeds: tuple[int, ...] = (42,)
    critic_inits: tuple[Literal["reward", "base"], ...] = ("reward",)
    """What the recipe's critic starts from."""
    learning_rates: tuple[float, ...] = (1e-3,)
    """TRL's."""
    steps: int = -1
    """By default the card's."""
    recipe_args: str = ""
    """More flags of recipes/ppo.py, the same for all its runs."""
    trl_args: str = ""
    """More flags of tests/references/plain_ppo.py, the same for all its runs."""
    trl_python: str | None = None


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    os.environ["HF_HUB_OFFLINE"] = "1"  # all is on this disk
    output = Path(args.output_dir)
    if bool(args.random_weights) == bool(args.base and args.reward):
        raise InputError("give --base and --reward, or --random-weights")
    if args.random_weights:
        base, reward = make_models(args.random_weights, output)
    else:
        base, reward = Path(args.base), Path(args.reward)
    classifier = output / "classifier"
    if not classifier.exists():
        merge_reward_model(base, reward, classifier)
    trl = shlex.split(args.trl_python) if args.trl_python else uv_run()

    runs: dict[str, Path] = {}
    for seed in args.seeds:  # in turn, so that a busy hour of the machine falls on all
        for critic_init in args.critic_inits:
            runs[f"recipe, critic from {critic_init}, seed {seed}"] = ours = output / f"recipe-{critic_init}-{seed}"
            if not (ours / "figures.json").exists():
                run_recipe(args, base, reward, ours, seed, critic_init)
        for rate in args.learning_rates:
            runs[f"TRL at {rate:g}, seed {seed}"] = theirs = output / f"trl-{rate:g}-{seed}"
            if not (theirs / "figures.json").exists():
                run_trl(args, trl, base, classifier, ours, theirs, rate)
    print_table(runs, bool(args.random_weights), None if args.random_weights else (base, reward, args.held_out))


def make_models(card: str, output: Path) -> tuple[Path, Path]:
    """A checkpoint of random weights of the card's shape, and a reward model on it, to measure speed and memory."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from benchmark import make_checkpoint
    from common.lm.load import load_chat_tokenizer

    base, reward = output / card, output / "reward"
    if not base.exists():
        make_checkpoint(read_card(card), base)
        tokenizer, _ = load_chat_tokenizer(find_model(str(base)))
        tokenizer.save_pretrained(base)  # now with the chat template, for TRL
    command = [sys.executable, ROOT / "recipes" / "reward.py", "--model", base, "--output-dir", reward]
    call([*command, "--max-steps", 1, "--eval-ratio", 0, "--lora-target-modules", *ATTENTION])
    return base, reward


def merge_reward_model(base: Path, reward: Path, folder: Path) -> None:
    """Write base, adapter and head as one sequence classifier, which reads the same token as the head.

    `make reward STAND_ALONE=yes` makes one that scores whole dialogues: it reads what the chat template writes after
    the end token, which TRL does not put there.
    """
    from common.lm.scalar_head import load_head
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    head, _ = load_head(reward / "adapter", "cpu")
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="auto")
    merged = PeftModel.from_pretrained(policy, reward / "adapter").merge_and_unload()
    classifier.model.load_state_dict(merged.model.state_dict())
    classifier.score.weight.data.copy_(head.weight)
    classifier.config.pad_token_id = AutoTokenizer.from_pretrained(base).pad_token_id
    classifier.save_pretrained(folder)


def uv_run() -> list[str]:
    """uv, to run a script in the environment that its head describes."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from install import environment, index, uv

    index.use_pip_settings()
    program = uv.find()
    _, links = environment.choose("", program)
    if links:
        os.environ["UV_FIND_LINKS"] = links
    return [program, "run", "--python", sys.executable, "--script"]


def run_recipe(args: Args, base: Path, reward: Path, run: Path, seed: int, critic_init: str) -> None:
    flags = {"model": base, "reward-model": reward, "data": args.prompts, "output-dir": run, "seed": seed}
    flags |= {"critic-init": critic_init}
    flags |= {"max-steps": args.steps} if args.steps > 0 else {}
    flags |= {"critic-warmup-steps": 0} if args.random_weights else {}  # those steps do half the work
    flags |= {"eval-ratio": 0, "sample-prompts": 0, "save-steps": 1_000_000}  # TRL does none of these either
    command = [sys.executable, ROOT / "tests" / "references" / "clock_ppo.py", run.with_suffix(".json")]
    call(
        [*command, *(word for name, value in flags.items() for word in (f"--{name}", value)), *args.recipe_args.split()]
    )
    run.with_suffix(".json").rename(run / "figures.json")


def run_trl(args: Args, trl: list[str], base: Path, classifier: Path, ours: Path, theirs: Path, rate: float) -> None:
    """TRL with the settings of the recipe's run, in 16 bit if that had a GPU, and a learning rate of its own."""
    record = json.loads((ours / "run.json").read_text())
    own = {name: argument["value"] for name, argument in record["arguments"].items()}
    steps = len(json.loads((ours / "figures.json").read_text())["marks"]) - 1
    on_gpu = "gpu" in record["machine"]
    flags = {name: own[name] for name in SAME.split()}
    flags |= {
        "sft_model_path": base,
        "reward_model_path": classifier,
        "prompts": args.prompts,
        "output_dir": theirs,
        "use_peft": True,
        "learning_rate": rate,
        "total_episodes": own["rollout_batch_size"] * steps,
        "gradient_accumulation_steps": own["rollout_batch_size"] // own["per_device_train_batch_size"],
        "response_length": own["max_completion_length"],
        "optim": own["optim"] if on_gpu else "adamw_torch_fused",
        "dtype": "bfloat16" if on_gpu else "float32",
        "bf16": on_gpu,
        "logging_steps": 1,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    words += ["--lora_target_modules", *(own["lora_target_modules"] or ATTENTION)]
    call([*trl, ROOT / "tests" / "references" / "plain_ppo.py", *words, *args.trl_args.split()])


def call(command: list) -> None:
    print(shlex.join(map(str, command)), flush=True)
    subprocess.run([str(word) for word in command], check=True)


def print_table(runs: dict[str, Path], skip_first: bool, task: tuple[Path, Path, str] | None) -> None:
    """A row for each run, in Markdown; with a task also the score of held-out completions, and their KL divergence."""
    scores = score_runs(list(runs.values()), *task) if task else {}
    print(
        "| run | score before → after | of all steps | KL, nats | seconds | processor seconds | a step | peak memory "
        "| at the start |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, run in runs.items():
        figures = json.loads((run / "figures.json").read_text())
        marks = figures["marks"]
        clock, processor, _ = (last - first for first, last in zip(marks[skip_first], marks[-1], strict=True))
        steps = len(marks) - 1 - skip_first
        memory = f"{figures['gpu_gib']:.2f} GiB" if figures["gpu_gib"] else f"{figures['peak_mib']:.0f} MiB"
        score, kl = "", ""
        if task:
            (before, _), (after, nats) = scores[None], scores[run]
            score, kl = f"{before:.3f} → {after:.3f}", f"{nats:.2f}"
        print(
            f"| {name} | {score} | {mean_score(run, figures):.3f} | {kl} | {clock:.1f} | {processor:.1f} "
            f"| {clock / steps:.2f} | {memory} | {marks[0][2]:.0f} MiB |"
        )


def mean_score(run: Path, figures: dict) -> float:
    """The mean over all steps of what the sampled completions scored; both log every step."""
    if metrics := figures.get("log"):
        scores = [row["objective/scores"] for row in metrics if "objective/scores" in row]
    else:
        rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        scores = [row["score/mean"] for row in map(json.loads, rows) if "score/mean" in row]
    return sum(scores) / len(scores)


def score_runs(runs: list[Path], base: Path, reward: Path, held_out: str) -> dict[Path | None, tuple[float, float]]:
    """For the base (None) and each run: the mean score of completions sampled to the held-out prompts, and their KL
    divergence from the base, in nats in a completion.
    """
    import torch
    from common.data.examples import Conversation
    from common.lm.active_adapter import active_adapter
    from common.lm.generate import generate
    from common.lm.load import load_chat_tokenizer
    from common.lm.log_probs import completion_log_probs
    from common.lm.scalar_head import load_head, score_last
    from peft import PeftModel
    from ppo import as_rollout
    from transformers import AutoModelForCausalLM, set_seed

    record = json.loads((runs[0] / "run.json").read_text())
    longest, temperature = (record["arguments"][name]["value"] for name in ("max_completion_length", "temperature"))
    tokenizer, end = load_chat_tokenizer(find_model(str(base)))
    rows = [json.loads(row)["prompt"] for row in Path(held_out).read_text(encoding="utf-8").splitlines()]
    prompts = [Conversation("", [{"role": "user", "content": row}]) for row in rows * COMPLETIONS]
    head, _ = load_head(reward / "adapter", "cpu")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, runs[0] / "adapter")
    model.load_adapter(str(reward / "adapter"), "reward")

    figures = {}
    for number, run in enumerate([None, *runs]):
        name = None
        if run:
            name = f"run-{number}"
            model.load_adapter(str(run / "adapter" if (run / "adapter").exists() else run), name)
        set_seed(0)
        with active_adapter(model, name):
            completions = generate(model, tokenizer, prompts, end, longest, temperature, batch_size=100)
        with active_adapter(model, "reward"):
            texts = [(completion.prompt_ids, completion.completion_ids) for completion in completions]
            scores = score_last(model, head, texts, tokenizer.pad_token_id, 50)
        kl = 0.0
        for first in range(0, len(completions), 50):
            part = as_rollout([], completions[first : first + 50], tokenizer.pad_token_id, model.device)
            inputs = part.input_ids, part.attention_mask, part.start, part.tokens, part.mask
            with torch.no_grad(), active_adapter(model, name):
                log_probs, _ = completion_log_probs(model, *inputs, temperature)
            with torch.no_grad(), active_adapter(model, None):
                ref_log_probs, _ = completion_log_probs(model, *inputs, temperature)
            kl += float((log_probs - ref_log_probs).sum())
        figures[run] = sum(scores) / len(scores), kl / len(completions)
    return figures


if __name__ == "__main__":
    run_command(main)
