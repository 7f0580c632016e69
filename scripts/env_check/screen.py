"""Print the result: one line per check, then what runs here."""

import os
import platform
import shutil
import sys
import textwrap
from typing import Any

from env_check.checks import FAILURE, GIB, OK, WARNING, Check, Facts
from env_check.packages import installed

FOUND = 40  # columns of what was found, where all fits a line
WHOLE = 1_000  # columns of what is no terminal: a line of a log is not broken
SLOTH = (
    r"====((=======((====",
    r"    //  ___  \\    ",
    r"   ((  (o.o)  ))   ",
    r"    \\  \_/  //    ",
    r"     '--___--'     ",
)


def show(checks: list[Check], runs: dict[str, list[dict[str, Any]]], facts: Facts) -> None:
    """Print everything; `runs` are the lines of what_runs by recipe."""
    for drawing, text in zip(SLOTH, banner(facts), strict=True):
        print(drawing, text)
    print()
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    colours = {OK: 32, WARNING: 33, FAILURE: 31} if coloured else {}
    name_width = max(len(line.name) for line in checks)
    indent = " " * (8 + 1 + name_width + 2)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else WHOLE
    for line in checks:
        mark = f"{line.status:8}"
        if line.status in colours:
            mark = f"\033[{colours[line.status]}m{mark}\033[0m"
        first, *rest = wrapped(found(line, columns - len(indent)), columns - len(indent))
        print(f"{mark} {line.name:{name_width}}  {first}")
        rest += wrapped(f"-> {line.fix}", columns - len(indent)) if line.fix else []
        for text in rest:
            print(f"{indent}{text}")
    failed = [line.name for line in checks if line.status == FAILURE]
    warnings = sum(line.status == WARNING for line in checks)
    print(f"\n{'Not ready: ' + ', '.join(failed) if failed else 'Ready'}; warnings: {warnings}.")
    texts: dict[str, list[str]] = {}
    for recipe, lines in runs.items():
        texts.setdefault(in_words(lines, facts), []).append(recipe)
    for text, recipes in texts.items():
        print(f"{' '.join(recipes)}: {text}{', once that is fixed' if failed else ''}")


def found(line: Check, width: int) -> str:
    """What was found, and in a column behind it what was wanted; where that is too wide, only if it is not the same."""
    both = f"{line.found:{FOUND}}  {line.wanted}" if line.wanted else line.found
    if len(both) <= width:
        return both
    return f"{line.found}; wanted: {line.wanted}" if line.wanted and line.status != OK else line.found


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, which is broken between words only; an empty text is one line."""
    if len(text) <= width:
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def banner(facts: Facts) -> tuple[str, ...]:
    """What Unsloth prints when it loads a model, as far as it is known before one is named."""
    absent = {"unsloth": "missing", "trl": "missing", "transformers": "missing", "torch": "missing", "triton": "none"}
    versions = {name: installed(name) or word for name, word in absent.items()}
    gpu = facts.gpus[0] if facts.gpus else {"name": "No GPU", "total": 0, "capability": (0, 0)}
    capability = "{}.{}".format(*gpu["capability"]) if facts.gpus else "none"
    return (
        "Unsloth {unsloth}. TRL: {trl}. Transformers: {transformers}.".format(**versions),
        f"{gpu['name']}. Num GPUs = {len(facts.gpus)}. Max memory: {gpu['total'] / GIB:.1f} GiB. "
        f"Platform: {platform.system()}.",
        f"Torch: {versions['torch']}. CUDA: {capability}. CUDA Toolkit: {facts.torch.get('cuda') or 'none'}. "
        f"Triton: {versions['triton']}",
        f"Bfloat16 = {str(gpu['capability'][0] >= 8).upper()}. Python: {platform.python_version()}.",
        "Post-training recipes; `make` lists the commands.",
    )


def in_words(lines: list[dict[str, Any]], facts: Facts) -> str:
    """The lines of what_runs as one."""
    fits = [line for line in lines if line["fits"]]
    if facts.free_gib is None:
        names = ", ".join(line["model"] for line in fits) or "nothing"
        return f"{names} in minutes; without a GPU larger models take days"
    parts = []
    for bits, in_4bit in ((16, False), (4, True)):
        chosen = [line for line in fits if line["load_in_4bit"] == in_4bit]
        if chosen:
            parts.append("{} in {} bit ({} GiB)".format(up_to(chosen), bits, chosen[-1]["gib"]))
    large = [line for line in lines if not line["fits"]]
    return "; ".join([*parts, *(["too large " + up_to(large)] if large else [])]) or "no model is offered for it"


def up_to(lines: list[dict[str, Any]]) -> str:
    names = [line["model"] for line in lines]
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} models up to {names[-1]}"
