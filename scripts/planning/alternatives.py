"""Cards and models with which a run would fit, where it does not."""

from typing import Any

from common.lm.cards import card_names, read_card
from common.plan.devices import SIZES, Device, of_size
from common.plan.search import Plan, plan
from common.plan.words import setting_words, variables

LENGTHS = {"max_length", "max_prompt_length", "max_completion_length"}


def cell(one: Plan) -> str:
    shorter = {name: value for name, value in one.changed.items() if name.endswith("_length")}
    return setting_words(one.work) + (f"; {variables(shorter)}, which truncates rows" if shorter else "")


def larger_card(sizes: Any, method: str, device: Device, given: dict[str, Any], **more: Any) -> list[str]:
    """The smallest card that holds the run, as a variable of make; [] where even the largest does not."""
    for size in SIZES:
        if of_size(size).gib > device.gib and (found := plan(sizes, method, of_size(size), given, **more)).fits:
            return [f"CARD={size}GB: {found.total:.1f} GiB, {cell(found)}"]
    return []


def smaller_models(
    name: str, parameters: int, method: str, device: Device, given: dict[str, Any], **more: Any
) -> list[str]:
    """The largest model of the family of `name` that fits `device`, and the largest of all, as variables of make.

    Only models with fewer than `parameters` count, and none whose rows would have to be truncated.
    """
    cards = [card for card in map(read_card, card_names()) if card.parameters < parameters and method in card.methods]
    fitting = []
    for card in sorted(cards, key=lambda card: -card.parameters):
        found = plan(card, method, device, given, **more)
        if card.name != "tiny" and found.fits and not found.changed.keys() & LENGTHS:
            fitting.append((card.name, found))
    family = [one for one in fitting if one[0].split("-")[0] == name.split("-")[0]][:1]
    chosen = family + [one for one in fitting[:1] if one not in family]
    return [f"MODEL={other}: {found.total:.1f} GiB, {cell(found)}" for other, found in chosen]
