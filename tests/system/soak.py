"""Kill runs at random and compare what they end with: python tests/system/soak.py [--kills 50] [--seed 0] [--keep DIR]

Each of five recipes runs once undisturbed, on the tiny model. Then it runs again and again, is killed by SIGKILL at a
random moment, perhaps once more as it resumes, and at last is left alone. Its adapter must then have the same bytes
as that of the undisturbed run, samples.jsonl too, and metrics.jsonl the same rows, apart from times. A third of the
moments are in the start-up, a third while a checkpoint is being written, the rest anywhere. Prints the counts; ends
with 1 where something differs.

unsloth is imported once; every run is a child of that process, as in tests/system/warm.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "warm")]

import server  # noqa: E402

ROOT = Path(__file__).parents[2]
SMALL = "--sample-prompts 2 --sample-tokens 4 --save-steps 2 --save-total-limit 2"
LOGGED = f"{SMALL} --logging-steps 3"  # not where checkpoints are: what is not logged yet has to survive too
SUMS = f"--max-completion-length 12 --data {ROOT}/data_samples/arithmetic.jsonl --max-steps 6"
RECIPES = {
    "sft": f"{LOGGED} --max-steps 8 --per-device-train-batch-size 2 --lora-dropout 0.1",
    "dpo": f"{LOGGED} --max-steps 6 --per-device-train-batch-size 2",
    "grpo": f"{LOGGED} {SUMS} --num-generations 4 --per-device-train-batch-size 4 --gradient-accumulation-steps 2",
    "reward": "--save-steps 2 --logging-steps 3 --max-steps 8 --per-device-train-batch-size 2",
    "ppo": f"{SMALL} {SUMS} --rollout-batch-size 8 --per-device-train-batch-size 8 --gradient-accumulation-steps 1 "
    "--num-ppo-epochs 2 --critic-warmup-steps 1 --eval-ratio 0.02",
}
TIMES = ("second", "runtime", "timestamp", "memory", "allocated", "time", "flos")  # in the names of metrics


def start(recipe: str, folder: Path, log: Path) -> int:
    """Begin a run in a child of this process; its pid."""
    if pid := os.fork():
        return pid
    os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    words = [str(ROOT / "recipes" / f"{recipe}.py"), "--output-dir", str(folder), *RECIPES[recipe].split()]
    server.run(
        {"words": words, "folder": str(ROOT), "environment": dict(os.environ)},
        [os.open(os.devnull, os.O_RDONLY), output, os.dup(output)],
    )
    raise AssertionError  # server.run ends the process


def wait(pid: int) -> int:
    """The exit code of a child, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(pid: int, folder: Path, moment: str, seconds: float, chance: random.Random) -> str:
    """Kill a run at a moment of this kind: what became of it, "killed" or "done before". `seconds` is a whole run."""
    begun, part = time.monotonic(), folder / "checkpoints" / "part"
    delay = chance.uniform(0.0, {"start-up": 0.35, "anywhere": 1.0, "checkpoint": 0.6}[moment] * seconds)
    in_part = chance.uniform(0.0, 0.05)
    while time.monotonic() - begun < delay or (moment == "checkpoint" and not any(part.glob("checkpoint-*"))):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return "done before"
        time.sleep(0.001)
    if moment == "checkpoint":
        time.sleep(in_part)
    os.killpg(pid, signal.SIGKILL)
    wait(pid)
    return "killed"


def ends(folder: Path) -> dict[str, object]:
    """What two runs of the same command must have in common."""
    adapter = {file.name: file.read_bytes() for file in sorted((folder / "adapter").iterdir())}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{key: value for key, value in row.items() if not any(time in key for time in TIMES)} for row in rows]
    samples = folder / "samples.jsonl"
    return {"adapter": adapter, "metrics": rows, "samples": samples.read_bytes() if samples.is_file() else b""}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--keep", type=Path, help="a folder for the runs; by default a temporary one")
    given = parser.parse_args()
    os.environ.update(RUNTIME="local", HF_HUB_OFFLINE="1")
    root = given.keep or Path(tempfile.mkdtemp(prefix="soak-"))
    root.mkdir(parents=True, exist_ok=True)
    server.preload()
    recipes, chance = given.recipes.split(","), random.Random(given.seed)
    whole, seconds = {}, {}
    for recipe in recipes:
        begun = time.monotonic()
        code = wait(start(recipe, root / recipe, root / f"{recipe}.log"))
        if code:
            print(f"{recipe} ends with {code}:\n{(root / f'{recipe}.log').read_text()}")
            return 1
        whole[recipe], seconds[recipe] = ends(root / recipe), time.monotonic() - begun
        print(f"{recipe}: undisturbed in {seconds[recipe]:.1f} s", flush=True)

    counts: Counter[str] = Counter()
    number = 0
    while counts["killed"] < given.kills:
        recipe = recipes[number % len(recipes)]
        folder, log = root / f"{recipe}-{number}", root / f"{recipe}-{number}.log"
        number += 1
        moments = [chance.choice(("start-up", "checkpoint", "anywhere")) for _ in range(chance.choice((1, 1, 2)))]
        did = []
        for moment in moments:
            outcome = kill_at(start(recipe, folder, log), folder, moment, seconds[recipe], chance)
            did.append(f"{outcome} ({moment})")
            counts[outcome] += 1
            counts[moment] += outcome == "killed"
        counts["twice in a row"] += sum(one.startswith("killed") for one in did) == 2
        code = wait(start(recipe, folder, log))
        found = ends(folder) if code == 0 else {}
        equal = [name for name, value in whole[recipe].items() if found.get(name) == value]
        counts.update(f"equal {name}" for name in equal)
        counts["runs"] += 1
        print(f"{folder.name}: {', '.join(did)}, exit {code}, equal: {', '.join(equal) or 'nothing'}", flush=True)
        if len(equal) < 3:
            counts["different"] += 1
            print(f"  kept: {folder}, {log}")
        else:
            shutil.rmtree(folder)
    print("; ".join(f"{name} {count}" for name, count in counts.items()))
    return int(counts["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())
