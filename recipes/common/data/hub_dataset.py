"""A dataset of the hub, at one commit."""

import functools
import re
from typing import TYPE_CHECKING

from common.errors import InputError, MachineError
from common.lm.network import tried

if TYPE_CHECKING:
    from datasets import DatasetBuilder

COMMIT = re.compile("[0-9a-f]{40}")
PROGRAM = "scripts are no longer supported"  # in the words of datasets


@functools.cache  # so that the rows and the commit in a run's identity are of the same request
def hub_dataset(name: str) -> "DatasetBuilder":
    """The dataset of the hub that `name`, id or id@revision, means; its `hash` is the commit.

    Without a network it is the newest copy in the local cache. Raises MachineError when that is of another commit.
    """
    from datasets import load_dataset_builder

    dataset, _, revision = name.partition("@")
    try:
        builder = tried(
            name, lambda _: load_dataset_builder(dataset, revision=revision or None), hopeless=no_such_dataset
        )
    except (OSError, ValueError) as error:
        raise hub_refusal(name, error) from None
    except RuntimeError as error:
        if PROGRAM not in str(error):
            raise
        program = f"{dataset.rpartition('/')[2]}.py in its repository"
        raise InputError(f"{name}: the dataset is a program, {program}, which is never run; give its rows") from None
    if COMMIT.fullmatch(revision) and builder.hash != revision:
        raise MachineError(
            f"{name}: the hub cannot be reached, and the newest copy on this machine is of commit {builder.hash}"
        )
    return builder


def no_such_dataset(error: Exception) -> bool:
    """Whether another try would end the same: the hub has none, it is a program, or its rows are wrong.

    What fails on the way is no answer.
    """
    known = isinstance(error, ValueError | FileNotFoundError | PermissionError)
    return known or PROGRAM in str(error) or of_rows(error)


def of_rows(error: Exception) -> bool:
    """Whether datasets could not read the rows that it has; it wraps the errors of the network in the same way."""
    import httpx  # late: most data are files

    wrapped = type(error).__module__ == "datasets.exceptions" and not isinstance(error, OSError)
    return wrapped and not isinstance(error.__cause__, OSError | httpx.HTTPError)


def hub_refusal(name: str, error: Exception) -> InputError | MachineError:
    """What to raise where the hub gave no dataset."""
    # datasets raises ValueError for a missing split or an unknown builder; everything of the network is an OSError.
    if isinstance(error, ValueError):
        return InputError(f"{name}: the hub has no such dataset with a train split: {error}")
    return MachineError(
        f"{name}: no file or folder of this name, and the hub gave no dataset: {str(error).splitlines()[0]}\n"
        "For a file, give its path; for a dataset, check the name, the network, HF_TOKEN and HF_ENDPOINT."
    )
