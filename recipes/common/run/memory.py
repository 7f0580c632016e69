"""`--oom retry`: after an out-of-memory error a run begins again with half the micro-batch and twice the accumulation.

The batch of a step stays what it was, so the same is learned, but for the order in which floats are added. The smaller
micro-batch is in run.json, and every later start of the run takes it from there (common/plan/fit.py).
"""

from typing import Any

from common.errors import Restart, one_line, spell
from common.plan.fit import BY_MICRO_BATCH
from common.run import stopping
from common.run.ranks import world_size

# Losses that are no sum over the rows of a step; kto estimates its reference point from the micro-batch.
OF_THE_MICRO_BATCH = {*BY_MICRO_BATCH, "kto"}
ROWS, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


def with_smaller_batch(record: dict[str, Any], error: BaseException) -> Restart | None:
    """The restart that --oom=retry means, with its `micro_batch` put into `record`; None where the run has to end."""
    given = {name: argument["value"] for name, argument in record.get("arguments", {}).items()}
    if given.get("oom") != "retry":
        return None
    now = {**given, **record.get("fit", {}), **record.get("micro_batch", {})}
    if reason := _why_not(now):
        print(spell(f"--oom=retry cannot help: {reason}."))
        return None
    rows = max(size for size in range(1, now[ROWS] // 2 + 1) if now[ROWS] % size == 0)
    accumulation = now[ACCUMULATION] * (now[ROWS] // rows)
    record["micro_batch"] = {ROWS: rows, ACCUMULATION: accumulation}
    return Restart(
        f"Out of memory: {one_line(error)}\n--oom=retry: {now[ROWS]} x {now[ACCUMULATION]} rows a step become {rows} x "
        f"{accumulation}, the same batch; the run resumes after step {record.get('step', 0)}.",
        stopping.STARTED,
    )


def _why_not(now: dict[str, Any]) -> str | None:
    losses = now.get("loss_type", ())
    by_batch = OF_THE_MICRO_BATCH & set(losses if isinstance(losses, list | tuple) else [losses])
    if world_size() > 1:
        return "the other processes of this run would have to restart too"
    if by_batch:
        return f"--loss-type={min(by_batch)} depends on the rows of a micro-batch: a smaller one learns something else"
    if now[ROWS] < 2:
        return f"--{ROWS.replace('_', '-')} is 1 already"
    return None
