"""Runs with a planted fault and healthy runs, each recipe on the tiny model, and what health finds in them: a table.

    .venv/bin/python tests/references/health_table.py                              all runs, about 40 minutes
    .venv/bin/python tests/references/health_table.py --only "sft: flat loss" "healthy dpo"
    .venv/bin/python tests/references/health_table.py --jobs 8                     on a machine with 8 cores to spare
    .venv/bin/python tests/references/health_table.py --table                      no runs: judge those that are there
    .venv/bin/python tests/references/health_table.py --table --record tests/common/run/health_runs.json

A run is a child of this process, which has imported unsloth. Runs that are done are not repeated. The exit code is 1
where a fault is not found, or a finding was not expected.
"""

import argparse
import itertools
import json
import os
import random
import re
import runpy
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "data_samples"
Rows = list[dict]
CHILDREN: dict[int, str] = {}  # the processes that run, each with its command
ROLES = ["user", "assistant"]


@dataclass(frozen=True)
class Case:
    """A run: its recipe, what health must find in it (nothing in a healthy one), its arguments, and its data."""

    recipe: str
    finds: str
    flags: tuple[object, ...]
    data: Callable[[random.Random], Rows] | None = None
    base: str = "merged"
    also: tuple[str, ...] = ()  # what the fault causes besides

    @property
    def name(self) -> str:
        return f"{self.recipe}: {self.finds}" if self.finds else f"healthy {self.recipe}"


def rows_of(name: str) -> Rows:
    return [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def few(name: str, count: int) -> Callable[[random.Random], Rows]:
    return lambda order: rows_of(name)[:count]


def duplicated(order: random.Random) -> Rows:
    rows = rows_of("sft")[:80] * 5
    order.shuffle(rows)
    return rows


def nearly_equal(order: random.Random) -> Rows:
    return [{**row, "rejected": row["chosen"] + " "} for row in rows_of("preferences-train")[:320]]


def longer_chosen(order: random.Random) -> Rows:
    """Chosen has a sentence more after the answer; nothing else differs from rejected."""
    more = " This follows from what is known about it, and there is nothing else to add here."
    rows = rows_of("preferences-train")[:480]
    return [{**row, "chosen": row["chosen"] + more, "rejected": row["chosen"]} for row in rows]


def single_turns() -> list[tuple[str, str]]:
    """Prompts and answers of the conversations of one turn."""
    turns = [row["messages"] for row in rows_of("sft")]
    return [(one[0]["content"], one[1]["content"]) for one in turns if [turn["role"] for turn in one] == ROLES]


def conversations(pairs: list[tuple[str, str]]) -> Rows:
    return [
        {"messages": [{"role": role, "content": text} for role, text in zip(ROLES, pair, strict=True)]}
        for pair in pairs
    ]


def shuffled_answers(order: random.Random) -> Rows:
    """Every prompt has the answer to another one: there is nothing to learn but the rows themselves."""
    prompts, answers = zip(*single_turns()[:64], strict=True)
    return conversations([*zip(prompts, order.sample(answers, len(answers)), strict=True)])


def stock_answers(order: random.Random) -> Rows:
    """Every third prompt has the same answer, the others one of a few, whatever the prompt is."""
    others = ["Ask somebody else.", "That is hard to say.", "Maybe later.", "Why not?", "It depends.", "Yes.", "No."]
    stock = [*others, *["I do not know."] * 4]
    return conversations([(prompt, order.choice(stock)) for prompt, _ in single_turns()])


def long_scores(order: random.Random) -> Rows:
    """The score is how long the completion is."""
    texts = ["word " * order.randrange(1, 60) for _ in range(300)]
    return [
        {**row, "response": text, "score": len(text) / 30} for row, text in zip(rows_of("scores"), texts, strict=True)
    ]


def shuffled_scores(order: random.Random) -> Rows:
    rows = rows_of("scores")
    scores = [row["score"] for row in rows]
    order.shuffle(scores)
    return [{**row, "score": score} for row, score in zip(rows, scores, strict=True)]


def wrong_answers(order: random.Random) -> Rows:
    """No gold answer that the model could give."""
    return [{**row, "answer": str(order.randrange(10**6, 10**7))} for row in rows_of("arithmetic-train")]


REWARDS = """
import zlib


def longer(texts):
    return [min(len(text) / 400, 1.0) for text in texts]


def chance(texts):
    return [zlib.crc32(text.encode()) % 1000 / 1000 for text in texts]


def again(texts):
    pairs = [[text[i : i + 2] for i in range(len(text) - 1)] for text in texts]
    return [min((len(two) - len(set(two))) / 40, 1.0) for two in pairs]
"""

# What the rules read.
KEYS = re.compile(
    r"step|loss|reward_std|score/std|grad_norm|eval_loss|rewards/(.+/mean|chosen|margins)|logps/chosen|reward|flat|kl|entropy|score/mean"
    r"|completions/(mean_length|clipped_ratio)|objective/(kl|entropy)|policy/(entropy|stopped|approx_kl)|loss/value_avg"
    r"|value/explained_variance|accuracy|margin|spread|correlation|length_correlation"
)
RECORD = ("recipe", "status", "steps", "data", "report", "general")
ARGUMENTS = {
    *("learning_rate", "beta", "critic_learning_rate", "critic_warmup_steps", "kl_target", "rewards"),
    *("max_completion_length", "per_device_train_batch_size", "gradient_accumulation_steps"),
}
# Small batches: they are quick, and their noise is what may raise a false alarm.
SFT = ("--per-device-train-batch-size", 4, "--max-steps", 40, "--logging-steps", 1)
DPO = ("--per-device-train-batch-size", 4, "--max-steps", 40, "--logging-steps", 1)
GRPO = ("--per-device-train-batch-size", 32, "--max-steps", 24, "--max-completion-length", 48)
PPO = ("--rollout-batch-size", 16, "--per-device-train-batch-size", 16, "--max-steps", 20, "--eval-ratio", 0.02)
REWARD = ("--logging-steps", 5, "--max-steps", 150)
LENGTH = ("--sample-prompts", 6, "--learning-rate", 2e-3, "--loss-type", "sigmoid", "sft", "--max-steps", 60)
HARD = ("--learning-rate", 1e-2, "--beta", 0.01)
STOCK = (*SFT, "--per-device-train-batch-size", 8, "--sample-prompts", 6)
FORMAT = ("--rewards", "math", "format=0.5")
LONGER = ("--learning-rate", 3e-3, "--rewards", "{mine}:longer")
AGAIN = ("--learning-rate", 5e-3, "--kl-coef", 0, "--kl-target", None, "--rewards", "{mine}:again")
# What a policy that is lost shows besides, and a critic that is.
LOST = ("KL too large", "entropy too large", "no spread in groups", "truncated completions", "running length")
LOST += ("falling reward", "falling score", "answers collapse", "forgetting")
OF_CRITIC = ("value loss diverges", "explained variance below 0", "flat score")
HEALTHY = {"sft": SFT, "dpo": DPO, "grpo": GRPO, "ppo": PPO, "reward": REWARD}
FAULTS = [
    Case("sft", "flat loss", ("--learning-rate", 1e-9, *SFT, "--per-device-train-batch-size", 16), base="tiny"),
    Case("sft", "nothing trainable", ("--lora-dropout", 1.0, *SFT), base="tiny"),
    Case("sft", "learning rate too large", ("--learning-rate", 1.0, *SFT), also=("answers collapse", "forgetting")),
    Case(
        "sft",
        "over-fitting",
        (*SFT, "--max-steps", 100, "--eval-ratio", 0.5),
        shuffled_answers,
        also=("answers collapse",),
    ),
    Case("sft", "duplicate rows", (*SFT, "--max-steps", 6), duplicated, base="tiny"),
    Case("sft", "answers collapse", STOCK, stock_answers, base="tiny"),
    Case("sft", "forgetting", ("--learning-rate", 0.05, *SFT), also=("answers collapse", "learning rate too large")),
    Case("dpo", "flat margins", ("--learning-rate", 1e-9, *DPO)),
    Case("dpo", "chosen becomes less likely", (*HARD, *DPO), also=("forgetting",)),
    Case("dpo", "length", (*DPO, *LENGTH), longer_chosen),
    Case("dpo", "chosen equals rejected", DPO, nearly_equal),
    Case("kto", "flat margins", ("--learning-rate", 1e-9, *DPO)),
    Case("grpo", "no spread in groups", ("--rewards", "math", *GRPO), wrong_answers),
    Case("grpo", "flat reward", ("--rewards", "{mine}:chance", *GRPO, "--max-steps", 40)),
    Case("grpo", "format only", ("--learning-rate", 2e-3, *FORMAT, *GRPO), wrong_answers, base="weak"),
    Case("grpo", "truncated completions", (*GRPO, "--max-completion-length", 12), also=("no spread in groups",)),
    Case("grpo", "running length", (*LONGER, *GRPO), also=("truncated completions",)),
    Case("grpo", "KL too large", ("--learning-rate", 0.1, *GRPO), also=LOST),
    Case("grpo", "entropy too large", ("--learning-rate", 0.02, *GRPO), base="weak", also=LOST),
    Case("grpo", "judged quality falls", (*LONGER, "math=0", *GRPO), also=("running length", "truncated completions")),
    Case("ppo", "ratio explodes", ("--learning-rate", 0.1, *PPO), also=(*LOST, *OF_CRITIC)),
    Case("ppo", "value loss diverges", ("--critic-learning-rate", 10.0, *PPO), also=OF_CRITIC),
    Case("ppo", "explained variance below 0", ("--critic-learning-rate", 0.1, *PPO), also=OF_CRITIC),
    Case("ppo", "texts break", (*AGAIN, *PPO, "--max-steps", 30), also=LOST + OF_CRITIC),
    Case("reward", "near chance", REWARD, shuffled_scores, also=("flat outputs",)),
    Case("reward", "flat outputs", ("--learning-rate", 1e-9, *REWARD), also=("near chance",)),
    Case("reward", "length", REWARD, long_scores),
    Case("reward", "learning rate too large", ("--learning-rate", 1.0, *REWARD), also=("near chance",)),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "health")
    parser.add_argument("--seeds", type=int, default=10, help="healthy runs of each recipe")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=None, help="names of cases, and `healthy RECIPE`")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--record", type=Path, help="write what the runs logged to this file, for the fast tests")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "scripts")]
    cases = {folder_of(case, args.out): case for case in FAULTS}
    for recipe, flags in HEALTHY.items():
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            base = "tiny" if recipe == "sft" else "merged"
            cases[args.out / "healthy" / f"{recipe}-{seed}"] = Case(recipe, "", (*flags, "--seed", seed), base=base)
    if args.only is not None:
        cases = {folder: case for folder, case in cases.items() if case.name in args.only}
    if not args.table:
        import_once()
        make_bases(args.out)
        for folder, case in cases.items():
            run(case.recipe, folder, flags_of(case, args.out, folder), args.jobs)
        wait_for_fewer_than(1)
    if args.record:
        record(cases, args.record)
    return table(cases)


def folder_of(case: Case, out: Path) -> Path:
    return out / "faults" / case.name.replace(": ", "-").replace(" ", "-")


def make_bases(out: Path) -> None:
    """The tiny model after SFT, and after so little of it that half of the answers have the format."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "mine.py").write_text(REWARDS, encoding="utf-8")
    for name, flags in (("merged", []), ("weak", ["--max-steps", "20"])):
        run("sft", out / "bases" / f"sft-{name}", ["--model", "tiny", *flags])
        if not (out / "bases" / name).exists():
            words = ["--adapter", str(out / "bases" / f"sft-{name}" / "adapter")]
            words += ["--output-dir", str(out / "bases" / name)]
            child(ROOT / "scripts" / "merge.py", words, out / "bases" / f"{name}.log")
            wait_for_fewer_than(1)


def table(cases: dict[Path, Case]) -> int:
    """Print what is found in each run, judged anew from what it logged. Returns 1 where that is wrong."""
    from common.run.health.files import judge_again, read_findings

    wrong, healthy = 0, Counter[str]()
    print("| recipe | planted fault | found, after step |\n|---|---|---|")
    for folder, case in cases.items():
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        findings = judge_again(folder, record).findings
        live = read_findings(folder)
        if [(one.rule, one.found) for one in findings] != [(one.rule, one.found) for one in live]:
            print(f"{folder}: while it ran {[(one.name, one.found) for one in live]} was found", file=sys.stderr)
        names = {finding.name for finding in findings}
        fine = (
            record["status"] == "done" and names <= {case.finds, *case.also} and (not case.finds or case.finds in names)
        )
        wrong += not fine
        found = ", ".join(f"{finding.name} ({finding.found})" for finding in findings) or "nothing"
        if case.finds or not fine:
            print(f"| {case.recipe} | {case.finds or folder.name} | {found}{'' if fine else ' WRONG'} |")
        else:
            healthy[case.recipe] += 1
    print(f"\n{sum(healthy.values())} healthy runs without a finding: {dict(healthy)}; {wrong} runs judged wrongly")
    return int(wrong > 0)


def record(cases: dict[Path, Case], file: Path) -> None:
    """Write the metrics, completions and samples of the runs, rounded and without what no rule reads."""
    runs = []
    for folder, case in cases.items():
        if not case.finds and not folder.name.endswith(("-1", "-2")):  # two healthy runs of each recipe are enough
            continue
        known = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        kept = {
            name: known[name] for name in ("recipe", "status", "steps", "data", "report", "general") if name in known
        }
        kept["arguments"] = {
            name: {"value": known["arguments"][name]["value"]} for name in ARGUMENTS & known["arguments"].keys()
        }
        rows = lines(folder / "metrics.jsonl")
        metrics = {
            key: [rounded(row.get(key)) for row in rows]
            for key in sorted({*itertools.chain(*rows)})
            if KEYS.fullmatch(key)
        }
        completions = [
            [one["step"], str(one["prompt"][-1]["content"]), one["completion"], one.get("reward", one.get("score"))]
            for one in lines(folder / "samples.jsonl")
        ]
        samples = (
            json.loads((folder / "samples.json").read_text(encoding="utf-8"))
            if (folder / "samples.json").exists()
            else []
        )
        runs.append(
            {
                "name": folder.name,
                "finds": [case.finds, *case.also] if case.finds else [],
                "record": kept,
                "metrics": metrics,
                "completions": completions,
                "samples": samples,
            }
        )
    text = ",\n".join(json.dumps(one, ensure_ascii=False, sort_keys=True) for one in runs)
    file.write_text(f"[\n{text}\n]\n", encoding="utf-8")


def lines(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def rounded(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def flags_of(case: Case, out: Path, folder: Path) -> list[str]:
    words = [str(flag).format(mine=out / "mine.py") for flag in case.flags]
    words += ["--model", "tiny" if case.base == "tiny" else str(out / "bases" / case.base)]
    if case.data:
        file = folder.with_suffix(".data.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = case.data(random.Random(0))
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        words += ["--data", str(file)]
    return words


def import_once() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from common import environment

    environment.set_variables()
    environment.quiet_loggers()
    import unsloth  # noqa: F401, I001  first: it changes what is imported after it
    import trl  # noqa: F401
    from trl import DPOTrainer, GRPOTrainer, KTOTrainer, SFTTrainer  # noqa: F401


def run(recipe: str, folder: Path, words: list[str], jobs: int = 0) -> None:
    """Run a recipe in a child of this process, unless it is done; with `jobs` it is not waited for."""
    record = folder / "run.json"
    if record.exists() and json.loads(record.read_text(encoding="utf-8"))["status"] in ("done", "stopped"):
        return
    wait_for_fewer_than(max(jobs, 1))
    child(ROOT / "recipes" / f"{recipe}.py", [*words, "--output-dir", str(folder)], folder.with_suffix(".log"))
    if not jobs:
        wait_for_fewer_than(1)


def wait_for_fewer_than(count: int) -> None:
    """Wait until fewer than `count` children run, and print how each of the others ended."""
    while len(CHILDREN) >= count:
        process, status = os.wait()
        print(f"{os.waitstatus_to_exitcode(status)} {CHILDREN.pop(process)}", flush=True)


def child(script: Path, words: list[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    if process := os.fork():
        CHILDREN[process] = shlex.join([script.stem, *words])
        return
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [str(script), *words]
    sys.path[0] = str(script.parent)
    code = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  as the interpreter does it
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
