"""What this machine can run, what is wrong with it, and the command that mends it.

    make check                                        inside .venv, or with the system's python3 before there is one
    make check MODEL=qwen2.5-7b ARGS="--recipe sft"   one job: exit 3 and the reason if it cannot run here
    make check ARGS=--json                            for machines; --online asks the hub, too

One line per check: what was found, what is wanted, and under it what mends it. Versions are held against the windows
that the installed packages declare themselves, and against our lock. Libraries are not only imported: each runs one
small call in a child process (scripts/env_check/probes.py), so that one that crashes or hangs is a line, not the end.
Nothing is changed, Python's own bytecode cache aside. Exit 0: ready, warnings allowed; 3: not ready; 2: a wrong
argument.

Standard library only, before anything is installed. A Python older than 3.11 gets one line, so this file must parse on
Python 3.6.

Left out: GPUs that are not NVIDIA's; several machines.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    version = ".".join(map(str, sys.version_info[:3]))
    print(
        f"This needs Python 3.11 or newer, and {sys.executable} is {version}. Install one, then: "
        "make check PYTHON=/path/to/python3.12",
        file=sys.stderr,
    )
    sys.exit(3)

import argparse
import difflib
import json
import os
from importlib.util import find_spec

if find_spec("env_check") is None:  # run by itself, not by make: again, with our parts on Python's path
    here = os.path.dirname(os.path.abspath(__file__))
    path = [os.path.join(here, "recipes"), os.path.join(here, "scripts"), os.environ.get("PYTHONPATH", "")]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, path)))
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)

from env_check.checks import FAILURE, Facts
from env_check.children import run_probes
from env_check.fit import card_names, check_job, read_cards, recipe_names, what_runs
from env_check.gpus import ask_driver, check_driver, check_gpu, check_health
from env_check.libraries import check_attention, check_libraries, check_torch
from env_check.machine import check_compiler, check_disk, check_hub, check_shared_memory, check_system
from env_check.packages import check_packages, check_python
from env_check.screen import show

READY, NOT_READY = 0, 3
CHECKS = (check_system, check_python, check_packages, check_driver, check_gpu, check_health, check_torch)
CHECKS += (check_compiler, check_libraries, check_attention, check_shared_memory, check_disk, check_hub)


def main():
    recipes, models = recipe_names(), card_names()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", help="ask about one recipe: " + ", ".join(recipes))
    parser.add_argument("--model", help="ask about one model card; `make models` lists them")
    parser.add_argument("--online", action="store_true", help="ask the hub, too")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the screen")
    args = parser.parse_args()
    for flag, asked, known in (("--recipe", args.recipe, recipes), ("--model", args.model, models)):
        if asked and asked not in known:
            near = difflib.get_close_matches(asked, known, 1) or [", ".join(known)]
            parser.error(f"{flag} {asked}: there is none of that name; there is {near[0]}")
    cards = read_cards()
    if args.recipe and args.model and args.recipe not in cards[args.model].methods:
        parser.error(f"--recipe {args.recipe}: {args.model} is offered for {', '.join(cards[args.model].methods)}")

    if sys.stderr.isatty():
        print("Importing the libraries and running a call of each ...", file=sys.stderr)
    facts = Facts(ask_driver(), run_probes(), args.online)
    checks = [line for check in CHECKS for line in check(facts)]
    recipes = [args.recipe] if args.recipe else recipes
    runs = {recipe: what_runs(recipe, cards, facts) for recipe in recipes}
    for recipe in recipes if args.model else []:
        if recipe in cards[args.model].methods:
            checks += check_job(recipe, args.model, cards[args.model], runs[recipe], facts)
    ready = all(line.status != FAILURE for line in checks)
    if args.json:
        print(json.dumps({"ready": ready, "checks": [line._asdict() for line in checks], "runs": runs}, indent=1))
    else:
        show(checks, runs, facts)
    return READY if ready else NOT_READY


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
