"""Train stage after stage, SFT, DPO, KTO, GRPO, a reward model and PPO, and report what each of them gained.

    make pipeline                                                     sft,dpo,grpo: the tiny model on sample data
    make pipeline STAGES=sft,reward,ppo MODEL=qwen2.5-7b SFT_DATA=chats.jsonl REWARD_DATA=scores.jsonl
    make pipeline STAGES=sft,grpo MODEL=qwen2.5-7b SFT_DATA=chats.jsonl MATH_DATA=gsm8k.jsonl
    make pipeline DPO_ARGS="--beta 0.2"                               runs DPO and the stages after it again, not SFT

Each policy is merged into a 16-bit base, the merge is checked (scripts/merge.py), and the next stage starts from it. A
reward model is an adapter on the base that it was trained on, so it comes directly before PPO, which starts from the
same base. Without one PPO has its reward functions.

Each policy is evaluated on held-out data, the model before the first stage too; of a reward model it is the accuracy or
the correlation, and of PPO besides the score of its own held-out prompts, before and after. Held out are the files of
EVAL_DATA. Without them it is a twentieth of the prompts of every data set, at most 200: the same ones each time, chosen
by a hash. A prompt that is held out of one stage is held out of all.

Every stage has a folder of its own, STAGE-HASH in the pipeline's folder. The hash is over all that decides the outcome:
data, arguments, the weights of the base, lock. So a finished stage is not run again, another setting runs that stage
and those after it, and the same command resumes a pipeline that was interrupted.

Left out: stages side by side, a choice among several models, a reward model for GRPO.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common.arguments import shell_words
from common.cli import parse_arguments
from common.data.examples import Pair, Rating
from common.data.hold_out import hold_out_prompts
from common.errors import InputError, run_command
from common.lm.hub import find_model
from common.run.stopping import Stop
from stages.chain import SAMPLES, stage_data, stage_names, stage_of, stage_words
from stages.report import write_report
from stages.steps import Plan, StepFailed, run_stage, start_from

DATA = ("sft_data", "dpo_data", "kto_data", "math_data", "reward_data", "ppo_data")  # the arguments that name data
SAMPLES_HELD_OUT = ("heldout.jsonl", "preferences.jsonl", "arithmetic.jsonl")
RATINGS_HELD_OUT = "scores-heldout.jsonl"
# The user's own data has no answer pattern that is known, and its answers may be longer than 64 tokens.
OWN_DATA_EVAL_ARGS = ("--answer-pattern", "", "--max-new-tokens", "512")


@dataclass(frozen=True)
class Args:
    stages: str = "sft,dpo,grpo"
    """The stages in their order, each once: sft first, reward last or directly before ppo."""
    until: str | None = None
    """End after this stage of them: a job on a cluster is one stage."""
    model: str = "tiny"
    """What the first stage starts from: a model card's name, a local directory or a hub id."""
    sft_data: str | None = None
    """Conversations to imitate. Where no data is given at all, every stage has its sample data."""
    dpo_data: str | None = None
    """Preference pairs."""
    kto_data: str | None = None
    """Completions that are marked good or bad, or scores with --kto-args="--threshold 4"."""
    math_data: str | None = None
    """Prompts with gold answers, for GRPO; and for PPO without a reward model, where it has no --ppo-data."""
    reward_data: str | None = None
    """Scores or preference pairs, for the reward model; PPO after it takes its prompts, where it has no --ppo-data."""
    ppo_data: str | None = None
    """Prompts for PPO."""
    eval_data: tuple[str, ...] = ()
    """Held-out questions with answers, pairs, conversations or scores, in one file or several; else taken from the
    data."""
    output_dir: str | None = None
    """The pipeline's folder; by default outputs/pipeline-MODEL."""
    sft_args: str = ""
    """More arguments for recipes/sft.py, all in one: --sft-args="--max-steps 50"."""
    dpo_args: str = ""
    """More arguments for recipes/dpo.py."""
    kto_args: str = ""
    """More arguments for recipes/kto.py."""
    grpo_args: str = ""
    """More arguments for recipes/grpo.py."""
    reward_args: str = ""
    """More arguments for recipes/reward.py."""
    ppo_args: str = ""
    """More arguments for recipes/ppo.py."""
    eval_args: str = ""
    """More arguments for scripts/evaluate.py, which runs after every stage."""
    time_limit: str | None = None
    """Hours:minutes:seconds, as 3:55:00, after which the stage stops with a checkpoint; the same command resumes."""


def main() -> int | None:
    args = parse_arguments(Args, __doc__)
    stop = Stop(args.time_limit)
    names = stage_names(args.stages)
    if args.until and args.until not in names:
        raise InputError(f"--until {args.until}: expected one of the stages {args.stages}.")
    model = find_model(args.model)
    for name in names:
        if model.card and name not in model.card.methods:
            raise InputError(f"{args.model} is not offered for {name}, only for {', '.join(model.card.methods)}.")
    folder = Path(args.output_dir or f"outputs/pipeline-{model.name}").expanduser()

    # 1. Arguments and data of every stage, read and checked; and the prompts that none of them may train on.
    stages = {name: stage_of(name, names) for name in names}
    arguments = {name: stage_words(name, stages[name], getattr(args, f"{name}_args")) for name in names}
    sources = {name: getattr(args, name) for name in DATA}
    own_data = any(sources.values())
    data = {name: stage_data(name, stages[name], arguments[name][1], sources) for name in names}
    samples = [*SAMPLES_HELD_OUT, *([RATINGS_HELD_OUT] if "reward" in names else [])]
    files = list(args.eval_data) or ([] if own_data else [str(SAMPLES / name) for name in samples])
    data, held_out = hold_out_prompts(data, files, folder)
    plan = Plan(
        folder,
        policy_files=[file for file, examples in held_out.items() if not isinstance(examples[0], Rating)],
        reward_files=[file for file, examples in held_out.items() if isinstance(examples[0], Pair | Rating)],
        eval_words=[*(OWN_DATA_EVAL_ARGS if own_data else ()), *shell_words("--eval-args", args.eval_args)],
        stop=stop,
    )
    if not plan.policy_files and set(names) - {"reward", "ppo"}:
        raise InputError("there is nothing to score the stages on; give held-out data with --eval-data.")

    # 2. The stages, each as far as it is not done already.
    began = time.time()
    stop.begin_steps(folder)
    done = []
    try:
        with stop.noted_only():  # a recipe announces by itself that it stops
            done.append(start_from(args.model, plan))
            for name in names[: names.index(args.until) + 1 if args.until else None]:
                done.append(run_stage(name, arguments[name][0], data[name].source, done[-1], plan))
    except StepFailed as failure:
        print(failure, file=sys.stderr)
        return failure.exit_code
    folder.mkdir(parents=True, exist_ok=True)
    write_report(done, folder, time.time() - began)
    return None


if __name__ == "__main__":
    run_command(main)
