"""Measure the main memory of runs on the CPU: `python tests/common/plan/measure_host.py OUT.json NAME...`.

Each run of host_runs.json that is named, or all of them, is taken in a process of its own, whose resident memory is
read 20 times a second, and its figures are written to OUT.json.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FIELDS = ("VmHWM", "RssAnon", "RssFile")


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:]
    runs = json.loads((HERE / "host_runs.json").read_text())
    found = []
    for run in runs:
        if names and run["name"] not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "figures.json"
            words = [str(word).format(data=write_data(run["method"], Path(folder))) for word in run["words"]]
            if shape := run.get("shape"):
                make_checkpoint(shape, Path(folder) / "base")
                words += ["--model", f"{folder}/base"]
            command = [sys.executable, __file__, "--inside", figures, run["method"], *words]
            done = subprocess.run([*map(str, command), "--output-dir", f"{folder}/run"], check=False)
            assert done.returncode == 0, run["name"]
            found.append({**run, "measured": json.loads(figures.read_text())})
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(found[-1]["name"], found[-1]["measured"])


def write_data(method: str, folder: Path) -> Path:
    """Rows that are longer than any --max-length here, so that every one fills it."""
    file, text = folder / "rows.jsonl", "What is ninety and four, and what is the first word of this? " * 60
    rows: list[dict] = [{"prompt": f"{number}: {text[:40]}", "completion": f"{number} {text}"} for number in range(64)]
    if method in ("dpo", "reward"):
        rows = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"No. {row['completion']}"}
            for row in rows
        ]
    if method == "kto":
        rows = [{**row, "label": number % 2 == 0} for number, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_checkpoint(shape: dict, folder: Path) -> None:
    """A model of that shape with random weights in bfloat16, and the tokenizer of the tiny one."""
    code = (
        "import sys, json, torch; from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM as M; "
        "torch.set_default_dtype(torch.bfloat16); model = M(Qwen2Config(**json.loads(sys.argv[1]))); "
        "model.save_pretrained(sys.argv[2]); "
        "AutoTokenizer.from_pretrained(sys.argv[3]).save_pretrained(sys.argv[2])"
    )
    words = [json.dumps(shape), folder, ROOT / "data_samples" / "tiny"]
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True)


def read() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        name: int(rest.split()[0]) * 1024 for line in lines for name, _, rest in [line.partition(":")] if name in FIELDS
    }


def inside(out: Path, method: str, words: list[str]) -> None:
    """Run the recipe in this process; write the peaks of its memory, and what it was when the model began to load."""
    import runpy

    from common.plan import fit

    peaks = dict.fromkeys(FIELDS, 0)
    before: dict[str, int] = {}
    plain = fit.fit_to_gpu

    def look(*args, **kwargs):
        before.update(read())
        return plain(*args, **kwargs)

    fit.fit_to_gpu = look

    def watch() -> None:
        while True:
            for name, value in read().items():
                peaks[name] = max(peaks[name], value)
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    sys.argv = [str(ROOT / "recipes" / f"{method}.py"), *words]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        peaks["VmHWM"] = read()["VmHWM"]
        out.write_text(json.dumps({"peak": peaks, "before": before}))


if __name__ == "__main__":
    if sys.argv[1] == "--inside":
        inside(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    else:
        main()
