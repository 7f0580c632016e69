"""Pin a model card to the commit its repository is at now.

    make pin MODEL=qwen2.5-7b

This asks the hub (HF_ENDPOINT, HF_TOKEN) and writes one line of the card, `revision`; nothing is downloaded.
"""

import os
import re
from dataclasses import dataclass

from common.cli import parse_arguments
from common.errors import InputError, MachineError, run_command
from common.lm.cards import CARDS, read_card


@dataclass(frozen=True)
class Args:
    model: str
    """The name of a card."""


def main() -> None:
    name = parse_arguments(Args, __doc__).model
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
        if commit := hub.model_info(hub_id, timeout=30).sha:
            return commit
        reason = "it names no commit"
    except GatedRepoError:
        reason = "its licence is not accepted, or HF_TOKEN is not set"
    except RepositoryNotFoundError:
        reason = "there is no such repository, or HF_TOKEN is not set and it is private or gated"
    except (HTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
    raise MachineError(f"cannot pin {hub_id} from {hub.endpoint}: {reason}. The card is as it was.")


if __name__ == "__main__":
    run_command(main)
