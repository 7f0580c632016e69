"""List the model cards: name, size, context, licence, methods, hub id.

    make models

A card is a file in recipes/models; its name is what MODEL takes. `make pin` writes a commit into one.
"""

from dataclasses import dataclass
from typing import get_args

from common.cli import parse_arguments
from common.errors import run_command
from common.lm.cards import Method, card_names, read_card
from rich.console import Console
from rich.table import Table

METHODS = get_args(Method)
WITH_HUB_IDS = 100  # columns of a terminal


@dataclass(frozen=True)
class Args:
    """It takes none."""


def main() -> None:
    parse_arguments(Args, __doc__)
    console = Console()
    on_screen = console.is_terminal
    wide = not on_screen or console.width >= WITH_HUB_IDS
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("size", no_wrap=True, justify="right")
    table.add_column("context", no_wrap=True, justify="right")
    table.add_column("licence", max_width=10 if on_screen and wide else None)  # leaves the hub id its room
    table.add_column("gated", no_wrap=True)
    table.add_column("methods", max_width=7 if on_screen else None)
    if wide:
        table.add_column("hub id", overflow="fold")
    for card in sorted(map(read_card, card_names()), key=lambda card: card.parameters):
        billions = card.parameters / 1e9
        table.add_row(
            card.name,
            f"{billions:.1f} B" if billions >= 0.1 else f"{billions * 1000:.1f} M",
            str(card.context),
            card.licence,
            "yes" if card.gated else "no",
            "all" if set(card.methods) == set(METHODS) else " ".join(card.methods),
            *([card.hub_id or card.path] if wide else []),
        )
    if not on_screen:  # piped: one line per card, whatever the width
        console.width = table.__rich_measure__(console, console.options.update(max_width=1000)).maximum
    console.print(table)
    if not wide:
        console.print(f"From {WITH_HUB_IDS} columns on the list has the hub ids, too; so has `make models | cat`.")


if __name__ == "__main__":
    run_command(main)
