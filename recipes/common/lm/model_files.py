"""The files of a model before anything loads them: whole, safetensors, of a kind that is known, and downloaded.

Two things in a model's folder are programs: a pickle, which runs what it names when it is loaded, and the modules that
an `auto_map` names. Neither is ever run here. A folder with weights in a pickle alone is refused, a pickle beside
safetensors is not read.
"""

import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InputError, MachineError, one_line, without_credentials
from common.lm import network
from common.lm.resumed import fetch_weights
from common.run.files import read_object

if TYPE_CHECKING:
    from common.lm.hub import Model

SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")  # what transformers would load
CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
LONGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one
# What loading needs of a repository: no pickles, and no weights of other frameworks.
PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
IGNORED = ["*/*", "consolidated*"]  # the same weights in other forms


def check_files(folder: Path) -> None:
    """Raise InputError where config.json is no configuration, or a file of weights is missing, cut or not safetensors.

    Only the headers of the weights are read.
    """
    read_object(folder / "config.json")
    check_weights(folder)
    for file in sorted(folder.glob("*.safetensors")):
        _check_header(file)
    if missing := [name for name in _parts(folder) if not (folder / name).is_file()]:
        raise InputError(f"{folder}: lacks {', '.join(missing[:3])}, which {INDEX} names; copy the folder again")


def check_weights(folder: Path) -> None:
    """Raise InputError where transformers would read the weights in `folder` from another file than a safetensors one.

    A folder without any weights passes: a command that reads no more than the tokenizer needs none.
    """
    refuse_special(folder)
    config = read_object(folder / "config.json")
    named = config.get("transformers_weights")  # a file that transformers loads in place of the usual ones
    if named is not None and not (isinstance(named, str) and _is_plain(named)):
        raise InputError(
            f"{folder / 'config.json'}: names {json.dumps(named)[:100]} as its weights (transformers_weights); "
            "expected a .safetensors file of the folder"
        )
    _parts(folder)
    pickled = [name for name in PICKLED if (folder / name).is_file()]
    if pickled and named is None and not (folder / SAFE).is_file() and not (folder / INDEX).is_file():
        kind = (config.get("architectures") or [""])[0]
        kind = kind if isinstance(kind, str) and re.fullmatch(r"[A-Z]\w+", kind) else "AutoModelForCausalLM"
        raise InputError(
            f"{folder / pickled[0]}: the weights are a pickle, which can run code when it is loaded, and there is no "
            f'{SAFE} beside it. If you trust it, convert it there: python -c "from transformers import {kind} as M; '
            "M.from_pretrained('.', use_safetensors=False, dtype='auto').save_pretrained('.')\""
        )


def refuse_special(folder: Path) -> None:
    """Raise InputError where a folder holds a pipe, a socket or a device: who reads one waits, perhaps forever."""
    for file in sorted(folder.iterdir()):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise InputError(f"{file}: is a pipe, a socket or a device; a model has plain files")


def _parts(folder: Path) -> list[str]:
    """The files that the index of the weights names, none where there is no index. Raises InputError for a pickle."""
    if not (folder / INDEX).is_file():
        return []
    parts = read_object(folder / INDEX).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise InputError(f"{folder / INDEX}: has no weight_map that names files")
    if other := [name for name in parts.values() if not _is_plain(name)]:
        raise InputError(f"{folder / INDEX}: names {other[0][:100]!r}; expected .safetensors files of the folder")
    return sorted(set(parts.values()))


def _is_plain(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name


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
        raise InputError(
            f"{model.source}: cannot be loaded: {own_code(model) or describe(error)}. Code of a model is never run "
            "(trust_remote_code is off); take a model whose kind transformers knows."
        ) from None


def own_code(model: "Model") -> str:
    """What of a model's folder would run with trust_remote_code, in words, "" for nothing: its modules, by auto_map."""
    if (folder := snapshot(model)) is None:
        return ""
    named: dict[str, dict[str, str]] = {}  # {module: {class: the file that names it}}
    for file in CONFIGS:
        try:
            entries = read_object(folder / file).get("auto_map")
        except (InputError, OSError):
            continue
        for value in (entries if isinstance(entries, dict) else {"": entries}).values():
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str):
                    module, _, kind = name.rpartition(".")  # of another repository: owner/name--module.Class
                    named.setdefault(f"{module.replace('--', ': ')}.py", {})[kind] = file
    programs = [
        f"{module} ({', '.join(kinds)}; by {', '.join(dict.fromkeys(kinds.values()))})"
        for module, kinds in named.items()
    ]
    return f"it needs code of its own, {', '.join(programs)[:300]}" if programs else ""


def snapshot(model: "Model") -> Path | None:
    """The folder of a model's files: its own, or that in the hub's cache; None where the cache has none."""
    if model.local:
        return Path(model.source)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.source, "config.json", revision=model.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def describe(error: BaseException) -> str:
    """The error of a library in a message, on one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def download(model: "Model") -> None:
    """Download a model of the hub into its cache; what is there already stays. Raises MachineError when it fails.

    A file that came in part is continued. A hub that refuses gets one request: it answers the libraries the same.
    Raises InputError where the hub has no safetensors of it: a library would take a pickle then.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if network.is_offline():
        _check_snapshot(model)
        return
    refused = (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)

    def attempt(number: int) -> None:
        fetch_weights(model, PATTERNS, IGNORED, by_xet=number == 0)
        snapshot_download(model.source, revision=model.revision, allow_patterns=PATTERNS, ignore_patterns=IGNORED)

    try:
        network.tried(model.source, attempt, hopeless=lambda error: isinstance(error, refused))
    except refused:
        _check_snapshot(model)  # of a repository that was open once
        return  # load_tokenizer says so
    except Exception as error:  # noqa: BLE001  as in network.tried
        raise MachineError(
            f"{model.source}: the download failed {network.DOWNLOADS} times: {without_credentials(describe(error))}\n"
            "The same command continues it. Check the network and HF_ENDPOINT, or name a local directory."
        ) from None
    _check_snapshot(model)


def _check_snapshot(model: "Model") -> None:
    """Raise InputError where the files of a model in the cache have no safetensors among them."""
    folder = snapshot(model)
    if folder is None:
        return  # the tokenizer, which is loaded next, says so
    check_weights(folder)
    if any(folder.glob("*.safetensors")):
        return
    if network.is_offline() and not any((folder / name).exists() for name in PICKLED):
        raise MachineError(
            f"{model.source}: its weights are not in the cache of this machine, {network.cache()}, and HF_HUB_OFFLINE "
            "is set; run the command once with the network, or name a local directory"
        )
    raise InputError(
        f"{model.source}: has no weights as safetensors, and a pickle (pytorch_model.bin) can run code when it is "
        f"loaded. If you trust it: hf download {model.source} --local-dir FOLDER, and give --model FOLDER; the "
        "message about the file in it has the command that converts it"
    )
