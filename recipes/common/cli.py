"""Parse a command's arguments, and record where each value of a recipe's came from.

Order of precedence: the recipe's default, then the model card's number for this method, then the command line.
"""

import contextlib
import functools
import inspect
import io
import sys
from pathlib import Path
from typing import Any, TypeVar

import tyro
from pydantic import TypeAdapter, ValidationError

from common.arguments import Given, check, read_fields
from common.errors import PLAN_ADVICE, InputError
from common.lm.cards import method_settings
from common.lm.hub import Model, find_model, trust
from common.lm.model_files import allow_pickles
from common.plan.fit import check_fit, of_rank, where_it_fits
from common.run import determinism
from common.run.profile import profiled_steps

Args = TypeVar("Args")


def parse(recipe: type[Args], method: str, description: str) -> tuple[Args, Model, dict[str, str]]:
    """Parse sys.argv into `recipe`, a frozen dataclass called Args with a field `model`.

    Returns the arguments, the model they name, and for each argument where its value came from. tyro parses twice: only
    after the first time the model's card is known, whose numbers are the defaults of the second. Raises InputError for
    wrong arguments, an unknown model, or a card with a wrong setting.
    """
    given = _check(recipe)
    first: Any = _tyro(recipe, description)
    permit(first)
    model = find_model(first.model)
    fields = list(inspect.signature(recipe).parameters)
    card = method_settings(model.card, method, fields)
    try:
        default = TypeAdapter(recipe).validate_python(card)
    except ValidationError as error:
        detail = error.errors()[0]
        raise InputError(f"card {model.name}: {method}.{detail['loc'][0]}: {detail['msg'].lower()}") from None
    args = _tyro(recipe, description, default)
    typed = {one.field.name for one in given}
    origins = {
        name: "command line" if name in typed else f"card {model.name}" if name in card else "recipe" for name in fields
    }
    check_fit(args)
    of_rank(args, method)  # raises InputError where the batch does not divide among the ranks
    if (skipped := getattr(args, "skip_bad_steps", 0)) < 0:
        raise InputError(f"--skip-bad-steps={skipped}: give 0 or more")
    profiled_steps()
    determinism.set_variables(args)
    PLAN_ADVICE[:] = [functools.partial(where_it_fits, model, method, args)]
    return args, model, origins


def parse_arguments(command: type[Args], description: str, default: Args | None = None) -> Args:
    """Parse sys.argv into `command`, a frozen dataclass called Args. Raises InputError for wrong arguments.

    What sys.argv does not give is as in `default`, else as the class has it.
    """
    _check(command)
    args = _tyro(command, description, default)
    permit(args)
    return args


def permit(args: Any) -> None:
    """Permit what --load-pickle and --trust-remote-code say, and nothing else. Raises InputError as `trust`."""
    trusted = getattr(args, "trust_remote_code", ())
    if trusted and getattr(args, "rollouts", "") == "vllm":
        raise InputError("--rollouts=vllm runs no code of a model; leave out that, or --trust-remote-code")
    allow_pickles(getattr(args, "load_pickle", False))
    trust(trusted)


def _check(command: type) -> list[Given]:
    """The arguments that sys.argv gives, checked before tyro, whose errors are boxes; --help and the like are left to
    it."""
    if any(word in ("-h", "--help") or word.startswith("--tyro-") for word in sys.argv[1:]):
        return []
    file = Path(inspect.getfile(command))
    return check(read_fields(file) or [], sys.argv[1:], file.stem)


def _tyro(command: type[Args], description: str, default: Args | None = None) -> Args:
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(command, description=description, default=default)
    except SystemExit as exit:
        if not exit.code:  # --help
            raise
        lines = [line.strip("│╭╰╮╯─ ") for line in errors.getvalue().splitlines()[1:]]
        raise InputError(" ".join(lines[: lines.index("")])) from None
