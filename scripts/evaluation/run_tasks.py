"""Run tasks of lm-evaluation-harness in a process of its own: `python -P run_tasks.py request.json`.

Nothing of this repository is imported here: the harness imports a package `evaluate`, which is a script's name here.
The request says what to do and where the answer goes; see harness.py. Exit code 2 for a wrong task, 3 where a task's
data cannot be had; the reason is then the answer's "error".
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

# The errors, by name, of libraries that reach for the hub.
OFFLINE = {"OfflineModeIsEnabled", "ConnectionError", "ConnectError", "ConnectTimeout", "LocalEntryNotFoundError"}
OFFLINE |= {"DatasetNotFoundError"}


def main() -> int:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.path.append(request["overlay"])
    answer: dict[str, Any] = {}
    try:
        answer, code = evaluate(request), 0
    except Exception as error:
        names = {type(one).__name__ for one in causes(error)}
        code = 3 if names & OFFLINE else 2
        answer = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        if code == 2 and not isinstance(error, ValueError):
            raise
    Path(request["answer"]).write_text(json.dumps(answer, default=str), encoding="utf-8")
    return code


def causes(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def evaluate(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from lm_eval.tasks import TaskManager  # pyrefly: ignore[missing-import]  it is in the overlay

    tasks = TaskManager(include_path=request["include"] or None, include_defaults=request["public"])
    tasks.load(request["tasks"])  # first: where the data of a task cannot be had, no model is loaded for it
    from lm_eval import simple_evaluate  # pyrefly: ignore[missing-import]  it is in the overlay
    from lm_eval.models.huggingface import HFLM  # pyrefly: ignore[missing-import]  it is in the overlay

    on_gpu = torch.cuda.is_available()
    found: dict[str, Any] = {}
    lm: Any = None
    for name, side in request["sides"].items():
        same_base = lm is not None and side.get("switch_off")
        if not same_base:
            lm = None  # one model in memory at a time
            lm = HFLM(
                pretrained=side["pretrained"],
                revision=side["revision"],
                tokenizer=side["tokenizer"],
                peft=side["peft"],
                device="cuda" if on_gpu else "cpu",
                dtype="bfloat16" if on_gpu else "float32",
                batch_size="auto" if on_gpu else 8,
            )
        with lm.model.disable_adapter() if same_base else contextlib.nullcontext():
            out = simple_evaluate(
                model=lm,
                tasks=request["tasks"],
                task_manager=tasks,
                limit=request["limit"],
                num_fewshot=request["num_fewshot"],
                apply_chat_template=request["chat_template"],
                bootstrap_iters=1000,
                random_seed=request["seed"],
                numpy_random_seed=request["seed"],
                torch_random_seed=request["seed"],
                fewshot_random_seed=request["seed"],
                log_samples=True,
            )
        found[name] = {
            "results": out["results"] | out.get("groups", {}),
            "subtasks": out.get("group_subtasks", {}),
            "higher_is_better": out.get("higher_is_better", {}),
            "rows": {task: rows(samples) for task, samples in out["samples"].items()},
        }
    return found


def rows(samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By metric and filter, as the harness names them, the value of each row by its number; numbers only."""
    found: dict[str, dict[str, float]] = {}
    for sample in samples:
        for metric in sample.get("metrics", []):
            value = sample.get(metric)
            if isinstance(value, bool | int | float):
                found.setdefault(f"{metric},{sample['filter']}", {})[str(sample["doc_id"])] = float(value)
    return found


if __name__ == "__main__":
    sys.exit(main())
