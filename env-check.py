"""Check what this machine can run, what is broken, and which command fixes it.

    make check                                        in .venv, or with the system's python3 before there is one
    make check MODEL=qwen2.5-7b RECIPE=sft            one job: exit 3 with the reason if it cannot run here
    python3 env-check.py --json                       for machines; --online contacts the hub, too

One line per check: what was found, what is wanted, and below it how to fix it. Versions are compared with the windows
that the installed packages declare, and with our lock. Libraries are not only imported: each runs one small call in a
child process (scripts/env_check/probes.py), so one that crashes or hangs is a line, not the end. One that only takes
long is a warning. Nothing is changed, Python's own bytecode cache aside. Exit 0: ready, warnings allowed; 3: not ready;
2: a wrong argument.

Standard library only: it runs before anything is installed. A Python older than 3.11 gets one line, so this file must
parse on Python 3.6.

Left out: GPUs that are not NVIDIA's; several machines.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  an older Python reads this file, too
    version = ".".join(map(str, sys.version_info[:3]))
    print(
        f"This needs Python 3.11 or newer, and {sys.executable} is {version}. Install one, then: "
        "make check PYTHON=/path/to/python3.12",
        file=sys.stderr,
    )
    sys.exit(3)

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

if find_spec("env_check") is None:  # started directly: start again with our parts on Python's path
    here = os.path.dirname(os.path.abspath(__file__))
    path = [os.path.join(here, "recipes"), os.path.join(here, "scripts"), os.environ.get("PYTHONPATH", "")]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, path)))
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)

from common.arguments import name_arguments, parse
from common.errors import CANNOT, DONE, InputError, did_you_mean, run_command, spell
from common.plan.workload import METHODS
from env_check.checks import FAILURE, Facts
from env_check.children import run_probes
from env_check.fit import check_job, read_cards, what_runs
from env_check.gpus import check_driver, check_gpu, check_health, query_driver
from env_check.libraries import check_attention, check_libraries, check_torch
from env_check.machine import check_compiler, check_disk, check_hub, check_shared_memory, check_system
from env_check.packages import check_converter, check_packages, check_python
from env_check.screen import show
from launch.commands import COMMANDS
from launch.usage import help_of

CHECKS = (check_system, check_python, check_packages, check_converter, check_driver, check_gpu, check_health)
CHECKS += (check_torch, check_compiler, check_libraries, check_attention, check_shared_memory, check_disk, check_hub)


@dataclass(frozen=True)
class Args:
    recipe: Literal["sft", "dpo", "kto", "grpo", "ppo", "reward"] | None = None
    """Check this recipe only."""
    model: str | None = None
    """Check that this model card fits; `make models` lists them."""
    online: bool = False
    """Contact the hub, too."""
    json: bool = False
    """Print one JSON object."""


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_of("check", by_make=False))
        return DONE
    args, cards = parse(Args, sys.argv[1:], "check"), read_cards()
    if args.model and args.model not in cards:
        hint = did_you_mean(args.model, cards) or f"; there are {', '.join(cards)}"
        raise InputError(f"--model={args.model}: no such model card{hint}.")
    if args.recipe and args.model and args.recipe not in cards[args.model].methods:
        offered = ", ".join(cards[args.model].methods)
        raise InputError(f"--recipe={args.recipe}: {args.model} is offered for {offered} only.")

    if sys.stderr.isatty():
        print("Importing the libraries and running a call of each ...", file=sys.stderr)
    facts = Facts(query_driver(), run_probes(), args.online)
    checks = [line for check in CHECKS for line in check(facts)]
    recipes = [args.recipe] if args.recipe else METHODS
    runs = {recipe: what_runs(recipe, cards, facts) for recipe in recipes}
    if args.model:
        card = cards[args.model]
        for recipe in (recipe for recipe in recipes if recipe in card.methods):
            checks += check_job(recipe, args.model, card, runs[recipe], facts)
    for recipe in METHODS:  # the fixes name arguments of the recipes, too
        name_arguments(COMMANDS[recipe].fields())
    checks = [line._replace(found=spell(line.found), fix=spell(line.fix)) for line in checks]
    ready = all(line.status != FAILURE for line in checks)
    if args.json:
        print(json.dumps({"ready": ready, "checks": [line._asdict() for line in checks], "runs": runs}, indent=1))
    else:
        show(checks, runs, facts)
    return DONE if ready else CANNOT


if __name__ == "__main__":
    run_command(main)
