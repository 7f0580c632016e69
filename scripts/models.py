"""List the model cards, or pin one to the commit its repository is at now.

    python scripts/models.py                    # make models
    python scripts/models.py pin qwen2.5-7b     # make pin MODEL=qwen2.5-7b

Pinning asks the hub (HF_ENDPOINT, HF_TOKEN) and writes one line of the card, `revision`; nothing is downloaded.
"""

import argparse
import os
import re

from common.errors import InputError, MachineError, run_command
from common.lm.cards import CARDS, Method, card_names, read_card
from rich.console import Console
from rich.table import Table

METHODS = Method.__args__


def list_cards() -> None:
    console = Console()
    on_screen = console.is_terminal  # there, licence and methods wrap to leave the hub id its room
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("size", no_wrap=True, justify="right")
    table.add_column("context", no_wrap=True, justify="right")
    table.add_column("licence", max_width=10 if on_screen else None)
    table.add_column("gated", no_wrap=True)
    table.add_column("methods", max_width=7 if on_screen else None)
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
            card.hub_id or card.path,
        )
    if not on_screen:  # piped: one line per card, whatever the width
        console.width = table.__rich_measure__(console, console.options.update(max_width=1000)).maximum
    console.print(table)


def pin(name: str) -> None:
    card = read_card(name)
    if card.hub_id is None:
        raise InputError(f"{name} is the folder {card.path} of this repository; there is nothing to pin.")
    commit = current_commit(card.hub_id)
    file = CARDS / f"{name}.toml"
    text = file.read_bytes()
    line = f'revision = "{commit}"'.encode()
    if card.revision:
        text = re.sub(rb'(?m)^revision *= *["\'][0-9a-f]{40}["\']', line, text, count=1)
    else:
        text = re.sub(rb"(?m)^(hub_id\b[^\r\n]*(\r?\n))", rb"\1" + line + rb"\2", text, count=1)
    # Written beside and moved, so that a card is never half a card.
    beside = file.with_suffix(".toml.new")
    beside.write_bytes(text)
    os.replace(beside, file)
    print(f"{name}: {card.hub_id} at {commit}" + (", as before" if commit == card.revision else ""))


def current_commit(hub_id: str) -> str:
    """The commit that the repository's main branch is at. Raises MachineError when the hub does not say."""
    # Slow to import, and listing needs none of it.
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    hub = HfApi()
    try:
        return hub.model_info(hub_id, timeout=30).sha
    except GatedRepoError:
        reason = "its licence is not accepted, or HF_TOKEN is not set"
    except RepositoryNotFoundError:
        reason = "there is no such repository, or HF_TOKEN is not set and it is private or gated"
    except (HTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
    raise MachineError(f"cannot pin {hub_id} from {hub.endpoint}: {reason}. The card is as it was.")


def main() -> None:
    parser = argparse.ArgumentParser(description="List the model cards, or pin one to a commit.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="one line per card (the default)")
    commands.add_parser("pin", help="write the repository's present commit into a card").add_argument("name")
    arguments = parser.parse_args()
    if arguments.command == "pin":
        pin(arguments.name)
    else:
        list_cards()


if __name__ == "__main__":
    run_command(main)
