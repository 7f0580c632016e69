"""A torch profile of some steps of a run: a trace for chrome://tracing or Perfetto, and a table of its kernels.

    PROFILE_STEPS=12-13 make sft MODEL=qwen2.5-7b DATA=my.jsonl

The run's folder gets profile/trace.json.gz and profile/kernels.md. A step that is profiled is slower, so
`make benchmark PROFILE=yes` sets the variable for steps behind those that it measures.
"""

import os
import re
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.run.files import write_bytes
from common.run.ranks import is_first

VARIABLE = "PROFILE_STEPS"
ROWS = 25  # of the table


class Profile:
    """Profiles the steps that PROFILE_STEPS names, as 12-13 or 12; none without it. Raises InputError for other words.

    Args:
        folder: where trace.json.gz and kernels.md are written, once the last of the steps is done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.first, self.last = profiled_steps()
        self.profiler: Any = None

    def before(self, step: int) -> None:
        """Start where `step`, counted from 1, is the first of them. Call it when the step before is complete.

        A run that is resumed among them starts there.
        """
        if self.profiler is None and self.first <= step <= self.last and is_first():
            self.first = step
            from torch.profiler import profile

            self.profiler = profile()  # every activity that this machine can record
            self.profiler.start()

    def after(self, step: int) -> None:
        """Stop where `step` is the last of them, and write what was recorded."""
        if self.profiler is not None and step >= self.last:
            self.finish(step)

    def finish(self, step: int) -> None:
        """Write what was recorded up to `step`, the last of the run; nothing where nothing is being recorded."""
        if self.profiler is None:
            return
        self.last = step
        self.profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        steps = f"Steps {self.first} to {self.last}" if self.last > self.first else f"Step {self.first}"
        table = kernel_table(self.profiler.key_averages())
        write_bytes(self.folder / "kernels.md", f"{steps}.\n\n{table}".encode())
        self.profiler = None


def profiled_steps() -> tuple[int, int]:
    """The first and the last step that PROFILE_STEPS names; without it (0, -1), which is none. Raises InputError."""
    words = os.environ.get(VARIABLE, "")
    if not words:
        return 0, -1
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", words)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 0 < first <= last:
        raise InputError(f"{VARIABLE}={words}: expected a step from 1, or the first and the last, as 12-13")
    return first, last


def kernel_table(averages: Any) -> str:
    """The kernels that took the most time, as a Markdown table: of the GPU, or where it did nothing of the processor.

    `averages` are torch's, of profile.key_averages(). The share is of the time of all kernels.
    """
    from torch.autograd import DeviceType

    on_gpu = [one for one in averages if one.device_type == DeviceType.CUDA and not one.is_user_annotation]
    times = [(one.self_device_time_total, one) for one in on_gpu]
    if not any(time for time, _ in times):
        times = [(one.self_cpu_time_total, one) for one in averages]
    total = sum(time for time, _ in times) or 1.0
    rows = [f"| {'kernel' if on_gpu else 'operation'} | ms | share | calls |", "|---|---|---|---|"]
    for time, one in sorted(times, key=lambda pair: -pair[0])[:ROWS]:
        name = one.key.replace("|", "\\|")[:100]
        rows.append(f"| `{name}` | {time / 1000:.2f} | {time / total:.1%} | {one.count} |")
    return "\n".join(
        [*rows, f"| all {len(times)} | {total / 1000:.2f} | 100 % | {sum(one.count for _, one in times)} |\n"]
    )
