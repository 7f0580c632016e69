"""Read a recipe's arguments, and remember where each value came from.

Order of precedence: the recipe's default, then the model card's number for this method, then the command line.
"""

import dataclasses
import sys
from typing import TypeVar

import tyro
from pydantic import TypeAdapter, ValidationError

from common.errors import InputError
from common.lm.cards import method_settings
from common.lm.hub import Model, find_model

Args = TypeVar("Args")


def parse(recipe: type[Args], method: str, description: str) -> tuple[Args, Model, dict[str, str]]:
    """Parse sys.argv into `recipe`, a frozen dataclass with a field `model`.

    Returns the arguments, the model they name, and for each argument where its value came from.

    An unknown flag or a value of the wrong type prints what was meant and exits 2 (tyro). Raises InputError for an
    unknown model or a card with a wrong setting.
    """
    first = tyro.cli(recipe, description=description)
    model = find_model(first.model)
    fields = [field.name for field in dataclasses.fields(recipe)]
    card = method_settings(model.card, method, fields)
    try:
        default = TypeAdapter(recipe).validate_python(card)
    except ValidationError as error:
        detail = error.errors()[0]
        raise InputError(f"card {model.name}: {method}.{detail['loc'][0]}: {detail['msg'].lower()}") from None
    args = tyro.cli(recipe, description=description, default=default)
    given = {word.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_") for word in sys.argv[1:]}
    origins = {
        name: "command line" if name in given else f"card {model.name}" if name in card else "recipe" for name in fields
    }
    return args, model, origins
