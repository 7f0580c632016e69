"""The files of a model before anything loads them: whole, of a kind that is known, and downloaded from the hub."""

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import InputError, MachineError, one_line, without_credentials
from common.lm import network
from common.lm.resumed import fetch_weights

if TYPE_CHECKING:
    from common.lm.hub import Model

LONGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one
INDEX = "model.safetensors.index.json"
# What loading needs of a repository: no pickles, and no weights of other frameworks.
PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
IGNORED = ["*/*", "consolidated*"]  # the same weights in other forms


def check_files(folder: Path) -> None:
    """Raise InputError where config.json is no configuration, or a file of weights is missing, cut or not safetensors.

    Only the headers of the weights are read.
    """
    _object_in(folder / "config.json")
    for file in sorted(folder.glob("*.safetensors")):
        _check_header(file)
    if (folder / INDEX).is_file():
        parts = _object_in(folder / INDEX).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
            raise InputError(f"{folder / INDEX}: has no weight_map that names files")
        if missing := sorted({name for name in parts.values() if not (folder / name).is_file()}):
            raise InputError(f"{folder}: lacks {', '.join(missing[:3])}, which {INDEX} names; copy the folder again")


def _object_in(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is damaged or no JSON ({describe(error)})") from None
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds no JSON object")
    return found


def _check_header(file: Path) -> None:
    """A safetensors file begins with the length of its header, and its header says how long the rest is."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"{file}: is no safetensors file ({describe(error)}); copy or download it again") from None
    if size != expected:
        raise InputError(f"{file}: has {size} of {expected} bytes; copy or download it again")


def check_kind(model: "Model") -> None:
    """Raise InputError where transformers does not know this kind of model. Call it after `import unsloth`.

    Code that a model brings along (auto_map) is never run.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model.source, revision=model.revision, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  files of somebody else break a library in any way
        if isinstance(error, OSError) and not model.local:
            return  # the hub: the tokenizer, which is loaded next, says what is wrong with it
        code = _own_code(Path(model.source) / "config.json") if model.local else ""
        raise InputError(
            f"{model.source}: cannot be loaded: {code or describe(error)}. Code of a model is never run "
            "(trust_remote_code is off); take a model whose kind transformers knows."
        ) from None


def _own_code(config: Path) -> str:
    try:
        named = _object_in(config).get("auto_map")
    except InputError:
        return ""
    return f"its config.json names code of its own, {json.dumps(named)[:100]}" if named else ""


def describe(error: BaseException) -> str:
    """The error of a library in a message, on one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def download(model: "Model") -> None:
    """Download a model of the hub into its cache; what is there already stays. Raises MachineError when it fails.

    A file that came in part is continued. A hub that refuses gets one request: it answers the libraries the same.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if network.is_offline():
        return
    refused = (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)

    def attempt(number: int) -> None:
        fetch_weights(model, PATTERNS, IGNORED, by_xet=number == 0)
        snapshot_download(model.source, revision=model.revision, allow_patterns=PATTERNS, ignore_patterns=IGNORED)

    try:
        network.tried(model.source, attempt, hopeless=lambda error: isinstance(error, refused))
    except refused:
        return  # load_tokenizer says so
    except Exception as error:  # noqa: BLE001  as in network.tried
        raise MachineError(
            f"{model.source}: the download failed {network.DOWNLOADS} times: {without_credentials(describe(error))}\n"
            "The same command continues it. Check the network and HF_ENDPOINT, or name a local directory."
        ) from None
