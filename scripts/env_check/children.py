"""Run the probes of the installed libraries in child processes, so that one that crashes or hangs is only a result.

Children run side by side, each with several probes. On a busy machine a probe may run out of time although its library
works, so it gets a second try: by itself, and with more time. One that runs out of that too is slow, never broken:
nothing is known of its library.
"""

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

from common.environment import ROOT

from env_check.checks import Result
from env_check.packages import find_module

# In the order they run, torch first: without it none of the others has a result. See scripts/env_check/probes.py.
PROBES = ("torch", "sandbox", "sdpa", "bitsandbytes", "torchao", "torchvision", "triton", "varlen")
PROBES += ("flash-attn 2", "flash-attn 3", "flash-attn 4", "xformers", "nccl", "unsloth", "vllm")
ALONE = ("unsloth", "vllm")  # slow, and each changes other libraries: a child of its own, beside that of the others
SECONDS = 90  # for one probe; the first import after an installation compiles for a minute
PATIENT_SECONDS = 240  # for its second try
# What libraries would leave behind goes into a temporary folder.
FOLDERS = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "UNSLOTH_COMPILE_LOCATION", "HF_HOME")
FOLDERS += ("MPLCONFIGDIR", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "FLASHINFER_WORKSPACE_BASE")


def run_probes() -> dict[str, Result]:
    """The result of each probe whose library is installed; none of those that run after a torch that failed."""
    names = [name for name in PROBES if has_library(name)]
    if "torch" not in names:
        return {}
    try:
        folder = tempfile.mkdtemp(prefix="env-check-")
    except OSError as error:
        return {"torch": Result(error=f"not tried: {error}")}
    results: dict[str, Result] = {}
    try:
        together = [name for name in names if name not in ALONE]
        run_side_by_side([together, *([name] for name in names if name in ALONE)], SECONDS, folder, results)
        late = [name for name in names if name not in results or results[name].slow]
        if late and not results["torch"].error:
            if sys.stderr.isatty():
                print(f"{', '.join(late)}: slow. A second try, up to {PATIENT_SECONDS} s each ...", file=sys.stderr)
            for name in late:
                results.pop(name, None)
            run_side_by_side([late], PATIENT_SECONDS, folder, results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return results


def has_library(probe: str) -> bool:
    """Is what `probe` tries installed? flash-attn 4 alone leaves a flash_attn that is no package of its own."""
    modules = {"sandbox": "common", "sdpa": "torch", "varlen": "torch", "nccl": "torch"}
    modules |= {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn"}
    spec = find_module(modules.get(probe, probe))
    if spec and probe == "flash-attn 2":
        return spec.origin is not None
    if spec and probe == "flash-attn 4":
        return any(os.path.isdir(os.path.join(path, "cute")) for path in spec.submodule_search_locations or ())
    return spec is not None


def run_side_by_side(groups: list[list[str]], seconds: float, folder: str, results: dict[str, Result]) -> None:
    """Fill `results` for the probes of all groups; `seconds` are for one probe."""
    children: list[Child] = []
    threads = [
        threading.Thread(target=run_group, args=(group, seconds, folder, results, children), daemon=True)
        for group in groups
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        results["torch"] = Result(error="stopped")  # so no group starts another child
        for child in children:
            child.kill()
        raise


def run_group(
    names: list[str], seconds: float, folder: str, results: dict[str, Result], children: list["Child"]
) -> None:
    """Fill `results` for `names`, one after the other, with a new child after each that has no value."""
    left = list(names)
    while left and results.get("torch", Result()).works:
        child = Child(left, folder)
        children.append(child)
        works = True
        while left and works:
            name = left.pop(0)
            results[name] = child.next_result(seconds)
            works = results[name].works


class Child:
    """A process that runs probes one after the other, up to the first that fails."""

    def __init__(self, names: list[str], folder: str) -> None:
        environment = dict(os.environ, VLLM_NO_USAGE_STATS="1")
        environment |= {name: os.path.join(folder, name) for name in FOLDERS}
        # Without scripts/, in which `import evaluate` would find evaluate.py; -P leaves out the folder of probes.py.
        path = [str(ROOT / "recipes"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment["PYTHONPATH"] = os.pathsep.join(each for each in path if each not in (str(ROOT / "scripts"), ""))
        self.process = subprocess.Popen(
            [sys.executable, "-P", ROOT / "scripts" / "env_check" / "probes.py", *names],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()  # of its stdout; "" at its end
        self.last_error = ""  # the last line of its stderr
        self.readers = [threading.Thread(target=read, daemon=True) for read in (self._read_stdout, self._read_stderr)]
        for reader in self.readers:
            reader.start()

    def _read_stdout(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line)
        self.lines.put("")

    def _read_stderr(self) -> None:
        for line in self.process.stderr or ():
            self.last_error = line.strip() or self.last_error

    def next_result(self, seconds: float) -> Result:
        """The result of the next probe, within `seconds`; the child does not survive one without a value."""
        try:
            if line := self.lines.get(timeout=seconds):
                _, value, error = json.loads(line)
                return Result(value, error)
            status = self.process.wait(seconds)
        except (queue.Empty, subprocess.TimeoutExpired):
            self.kill()
            return Result(slow=f"slow: took more than {seconds:g} s here")
        if status == -signal.SIGKILL:
            return Result(slow="killed from outside, as when memory runs out")
        cause = f"crashed with {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        self.readers[1].join(seconds)
        return Result(error=": ".join(filter(None, [cause, self.last_error]))[:300])

    def kill(self) -> None:
        """Kill it and what it started."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: it stays behind
            self.process.wait(5)
