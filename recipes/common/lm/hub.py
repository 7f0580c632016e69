"""Find a model by its name, and say what it is: a card's name, a directory or a hub id becomes a `Model`.

Only `fetch` and `load_tokenizer` may send requests to a hub.
"""

import hashlib
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.environment import ROOT
from common.errors import InputError, MachineError, did_you_mean
from common.lm.adapter import CONFIG, read_config
from common.lm.cards import HUB_ID, Card, card_names, read_card
from common.lm.model_files import check_files, check_kind, check_weights, describe, download, pickles
from common.lm.network import snapshot
from common.lm.own_code import COMMIT, FLAG, TRUSTED, UNUSED, code_files, how_to_trust, own_code
from common.run.files import read_object
from common.run.ranks import first_of_machine_alone

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MERGE_RECORD = "merge.json"  # beside the weights of a merged model: the base, adapter and card that it was made from

HASHES = ROOT / ".cache" / "sha256"  # a small file for each file whose hash is known
SETTLED = 2.0  # seconds without a change, more than a tick of any file system's clock

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# All that decides how a checkpoint reads text, beside its weights and config.json.
READS_TEXT = (*TOKENIZER_FILES, "tokenizer_config.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
READS_TEXT += ("chat_template.jinja", "chat_template.json")

# {hub id: commit} of the runs that this process resumes: a branch may have moved since they began. Set by plan_run.
RESUMED: dict[str, str] = {}


@dataclass(frozen=True)
class Model:
    """Where to load a model from. `source` is an absolute directory when `local`, else a hub id."""

    name: str  # short, used in the names of folders
    source: str
    revision: str | None
    card: Card | None
    local: bool
    trusted: bool = False  # the user lets its own code run

    @property
    def origin(self) -> dict[str, Any]:
        """What `from_pretrained` needs besides the source: the revision, and whether the model's own code may run."""
        return {"revision": self.revision, "trust_remote_code": self.trusted}


def find_model(name: str) -> Model:
    """The model that `name` means: a card first, then a directory, then a hub id.

    No card has a slash in its name, so `./tiny` is always a directory. Raises InputError for a name that is none of
    the three, for a directory without a model, and for a card with a mistake in it.
    """
    model = _find(name)
    if model.source in TRUSTED:
        return replace(model, revision=TRUSTED[model.source], trusted=True)
    return model


def trust(names: Sequence[str]) -> None:
    """Let the code of these models run from now on, and of no others: what --trust-remote-code names.

    A name is as in `find_model`; of a hub model with its commit, org/name@COMMIT, unless its card has one. Raises
    InputError for a hub model without a commit, which could be other code tomorrow.
    """
    TRUSTED.clear()
    found: dict[str, str | None] = {}
    for name in names:
        plain, at, commit = name.rpartition("@")
        pinned = bool(at and not Path(name).expanduser().is_dir())
        model = _find(plain if pinned else name)
        commit = commit if pinned else model.revision or ""
        if model.local and pinned:
            raise InputError(f"{FLAG} {name}: a folder has no commit; give {plain}")
        if not model.local and not COMMIT.fullmatch(commit):
            raise InputError(
                f"{FLAG} {name}: the code of a hub model may change; give the commit whose code you have read, as "
                f"{FLAG}={plain if pinned else name}@ and its 40 digits"
            )
        if model.revision and commit != model.revision:
            raise InputError(f"{FLAG} {name}: the card of {model.name} has the commit {model.revision}; give that one")
        found[model.source] = commit or None
    TRUSTED.update(found)
    UNUSED.clear()
    UNUSED.update(found)


def _find(name: str) -> Model:
    if name in card_names():
        card = read_card(name)
        if card.hub_id is not None:
            return Model(name, card.hub_id, card.revision, card, local=False)
        return Model(name, str(_checkpoint(ROOT / str(card.path))), None, card, local=True)
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        directory = _checkpoint(directory.resolve())
        return Model(directory.name, str(directory), None, _card_of_merged(directory), local=True)
    if HUB_ID.fullmatch(name):
        return Model(name.rpartition("/")[2], name, None, None, local=False)
    raise InputError(
        f"no model {name!r}: not a card{did_you_mean(name, card_names())}, not a directory and not a hub id (org/name)."
        " `make models` lists the cards."
    )


def _card_of_merged(directory: Path) -> Card | None:
    """The card of the base of a merged model, which is valid for the merged model too."""
    record = directory / MERGE_RECORD
    card = read_object(record)["card"] if record.is_file() else None
    return read_card(card) if card else None


def _checkpoint(directory: Path) -> Path:
    """Return `directory`. Raises InputError unless it holds a model that can be loaded by itself, and is no pickle."""
    if not (directory / CONFIG).is_file():
        if (directory / "config.json").is_file():
            check_weights(directory)
            return directory
        raise InputError(f"{directory} holds no model: it has no config.json. Name a folder saved by save_pretrained.")
    # Also beside a config.json: transformers would load the adapter, on whatever base its configuration names.
    base = read_config(directory).get("base_model_name_or_path", "an unknown base")
    raise InputError(
        f"{directory} holds an adapter of {base}, not a model: merge the two (make merge ADAPTER={directory}) and give "
        "the merged folder, or give the base to start again from it."
    )


def resolved_revision(model: Model) -> str | None:
    """The commit of the model's files in the local hub cache; None for a directory, and before a download."""
    if model.local:
        return None
    folder = snapshot(model)
    return folder.name if folder else None  # .../snapshots/<commit>


@first_of_machine_alone()
def fetch(model: Model, weights: bool = True) -> Model:
    """Return `model`, or with UNSLOTH_USE_MODELSCOPE=1 its local copy, downloaded from ModelScope.

    A model of Hugging Face is downloaded now, with several tries, each from where the one before it ended; without
    `weights` the libraries get the few files that they read. Raises MachineError when it cannot be had, InputError when
    transformers does not know the kind of a model. For a run that is resumed it is the commit with which it began. Of
    several ranks the first of each machine downloads it.
    """
    if not model.local and model.revision is None:
        model = replace(model, revision=RESUMED.get(model.source))
    if model.local:
        check_kind(model)
        return model
    if os.environ.get("UNSLOTH_USE_MODELSCOPE") != "1":
        if weights or model.trusted:  # its code is read before any of it runs
            download(model, weights)
        if snapshot(model) is None:
            model = replace(model, trusted=False)  # the tokenizer, which is loaded next, says what is wrong
        check_kind(model)
        return model
    from modelscope import snapshot_download

    try:
        folder = snapshot_download(model.source, revision=model.revision)
    except (OSError, ValueError) as error:  # network errors are OSErrors, wrong names ValueErrors
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"{model.source}: cannot be downloaded from ModelScope (UNSLOTH_USE_MODELSCOPE=1): {reason}"
        ) from None
    check_weights(Path(folder))  # ModelScope has no patterns: what the repository has is all here
    found = replace(model, source=folder, revision=None, local=True)
    check_kind(found)
    return found


def embedding_rows(model: Model) -> int | None:
    """How many token ids the model has an embedding for, by its config or else its card; None where neither is here."""
    folder = snapshot(model)
    if folder and (folder / "config.json").is_file():
        config = read_object(folder / "config.json")
        rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        if isinstance(rows, int):
            return rows
    return model.card.architecture.vocab_size if model.card else None


def load_tokenizer(model: Model) -> "PreTrainedTokenizerBase":
    """The tokenizer of `model`, from its directory or the hub.

    Raises InputError when the hub has no such model, MachineError when the hub cannot be reached or refuses it.
    """
    # Late: huggingface_hub reads HF_* at import, which set_variables sets; and unsloth patches transformers before.
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from transformers import AutoTokenizer

    # Without this check transformers 5 makes an empty tokenizer of the config's class, without a warning.
    if model.local and not any(Path(model.source, name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"{model.source} holds no tokenizer, none of {', '.join(TOKENIZER_FILES)}: save one beside it."
        )
    try:
        return AutoTokenizer.from_pretrained(model.source, revision=model.revision, trust_remote_code=model.trusted)
    except Exception as error:  # noqa: BLE001  files of somebody else break a library in any way
        if not isinstance(error, OSError):
            needs = "trust_remote_code" in str(error) and not model.trusted and own_code(model)
            reason = f"{needs}. {how_to_trust(model)}" if needs else describe(error)
            raise InputError(f"{model.source}: its tokenizer cannot be read: {reason}") from None
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, GatedRepoError):
                raise MachineError(
                    f"{model.source} is gated: accept its licence on its page, then set HF_TOKEN to a token of yours."
                ) from None
            if isinstance(cause, RepositoryNotFoundError | RevisionNotFoundError):
                raise InputError(f"{model.source}: the hub has no such model: {cause}") from None
            cause = cause.__cause__
        if model.local:
            raise InputError(f"{model.source}: its tokenizer cannot be read: {error}") from None
        reason = str(error).splitlines()[0]
        raise MachineError(
            f"{model.source} cannot be loaded: {reason}\nCheck the network, HF_ENDPOINT and HF_HUB_OFFLINE, or name a "
            "local directory."
        ) from None


def contents(model: Model) -> str:
    """What `model` is, wherever it is stored: `base_sha256` of a directory, or the hub id with its revision.

    Raises InputError where the files of a directory are not whole.
    """
    if not model.local:
        return f"{model.source}@{model.revision or 'main'}"
    check_files(Path(model.source))
    return base_sha256(model.source, model.trusted)


def base_sha256(path: str | Path, trusted: bool = False) -> str:
    """One sha256 for what a checkpoint directory computes and how it reads text, wherever it is stored.

    It is the hash of one line per file, `<name> <sha256 of the file>`, for config.json, every *.safetensors, the
    pickles that are read in their place, those of READS_TEXT that are there, sorted by name, and of a `trusted` model
    its code. Raises InputError without weights or config.json.
    """
    folder = _checkpoint(Path(path))
    weights = [*folder.glob("*.safetensors"), *pickles(folder)]
    if not weights:
        raise InputError(f"{path} has no *.safetensors to identify it by; save it with safetensors.")
    texts = [file for name in READS_TEXT if (file := Path(path) / name).is_file()]
    total = hashlib.sha256()
    for file in sorted([*weights, *texts, Path(path) / "config.json"]):
        total.update(f"{file.name} {_file_sha256(file)}\n".encode())
    for name, sha256 in (code_files(folder) if trusted else {}).items():
        total.update(f"{name} {sha256}\n".encode())
    return total.hexdigest()


def _file_sha256(file: Path) -> str:
    """The sha256 of a file, which is read once: the result is kept in HASHES until the file changes.

    A pipeline asks for the hash of a base several times a stage, and 15 GB take a while to read. A changed file has
    another size, inode, time of modification or time of change. A file whose times are of the last seconds is not
    kept, as it may be written again within the same tick of the clock.
    """
    state = file.stat()
    facts = (file.resolve(), state.st_size, state.st_ino, state.st_mtime_ns, state.st_ctime_ns)
    kept = HASHES / hashlib.sha256(repr(facts).encode()).hexdigest()
    if kept.is_file() and re.fullmatch("[0-9a-f]{64}", sha256 := kept.read_text(encoding="ascii")):
        return sha256
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time() - max(state.st_mtime, state.st_ctime) > SETTLED:
        with suppress(OSError):  # no room or no right to write there: the next time takes longer, and that is all
            HASHES.mkdir(parents=True, exist_ok=True)
            aside = HASHES / f"{kept.name}.{os.getpid()}"
            aside.write_text(sha256, encoding="ascii")
            aside.replace(kept)
    return sha256
