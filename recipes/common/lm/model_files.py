"""The files of a model before anything loads them: whole, safetensors, of a kind that is known, and downloaded.

Two things in a model's folder are programs: a pickle, which runs what it names when it is loaded, and the modules that
an `auto_map` names (common/lm/own_code.py). A folder with weights in a pickle alone is refused, unless the user says
--load-pickle: then torch reads tensors from it and nothing else (weights_only), and one that names any code is refused
all the same. A pickle beside safetensors is not read.
"""

import hashlib
import json
import pickle
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ARGUMENTS, InputError, MachineError, one_line, without_credentials
from common.lm import network
from common.lm.own_code import announce_code, how_to_trust, own_code, run_only_printed
from common.lm.resumed import fetch_weights
from common.run.files import read_object
from common.run.ranks import is_first

if TYPE_CHECKING:
    from common.lm.hub import Model

SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")  # what transformers would load
PICKLED_PART = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")  # a pickle that --load-pickle may read
LOAD_PICKLE = "--load-pickle"
LONGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no longer one
# What loading needs of a repository: no pickles, and no weights of other frameworks.
PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
IGNORED = ["*/*", "consolidated*"]  # the same weights in other forms

_pickles_allowed = False  # by --load-pickle


def allow_pickles(allowed: bool) -> None:
    """Let weights be read from pickles from now on, or no longer: what --load-pickle says."""
    global _pickles_allowed
    _pickles_allowed = allowed


def check_files(folder: Path) -> None:
    """Raise InputError where config.json is no configuration, or a file of weights is missing, cut or not safetensors.

    Only the headers of the weights are read.
    """
    read_object(folder / "config.json")
    check_weights(folder)
    for file in sorted(folder.glob("*.safetensors")):
        _check_header(file)
    pickled = [file.name for file in pickles(folder)]
    if missing := [name for name in (*_parts(folder), *pickled) if not (folder / name).is_file()]:
        index = PICKLED[1] if pickled else INDEX
        raise InputError(f"{folder}: lacks {', '.join(missing[:3])}, which {index} names; copy the folder again")


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
    pickled = [] if _is_safe(folder) else [name for name in PICKLED if (folder / name).is_file()]
    if pickled and not (_pickles_allowed and pickles(folder)):
        kind = (config.get("architectures") or [""])[0]
        kind = kind if isinstance(kind, str) and re.fullmatch(r"[A-Z]\w+", kind) else "AutoModelForCausalLM"
        cure = f"Read it by torch's weights_only, which runs nothing: {LOAD_PICKLE}. Or, i" if _can_allow() else "I"
        raise InputError(
            f"{folder / pickled[0]}: the weights are a pickle, which can run code when it is loaded, and there is no "
            f"{SAFE} beside it. {cure}f you trust it, convert it there: python -c "
            f'"from transformers import {kind} as M; '
            "M.from_pretrained('.', use_safetensors=False, dtype='auto').save_pretrained('.')\""
        )


def _can_allow() -> bool:
    """Whether this command has --load-pickle, and it was not given."""
    return LOAD_PICKLE in ARGUMENTS and not _pickles_allowed


def _is_safe(folder: Path) -> bool:
    """Whether transformers would read the weights from safetensors, of their usual names or of config.json's."""
    named = read_object(folder / "config.json").get("transformers_weights")
    return named is not None or (folder / SAFE).is_file() or (folder / INDEX).is_file()


def pickles(folder: Path) -> list[Path]:
    """The pickles from which transformers would read a model's weights, [] where it has safetensors.

    Raises InputError where their index names a file that is none of pytorch_model*.bin.
    """
    single, index, _ = PICKLED
    if _is_safe(folder):
        return []
    if (folder / single).is_file():
        return [folder / single]
    if not (folder / index).is_file():
        return []
    parts = read_object(folder / index).get("weight_map")
    names = sorted({str(name) for name in parts.values()}) if isinstance(parts, dict) else [""]
    if other := [name for name in names if not PICKLED_PART.fullmatch(name)]:
        raise InputError(f"{folder / index}: names {other[0][:100]!r}; expected pytorch_model-*.bin of the folder")
    return [folder / name for name in names]


def check_pickles(model: "Model") -> None:
    """Print which pickles a model's weights are read from. Raises InputError for one that names code. Imports torch.

    It is read as the library will, by torch's weights_only, but for the tensors' numbers.
    """
    if not model.local or not (files := pickles(Path(model.source))):
        return
    import torch

    for file in files:
        try:
            found = torch.load(file, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            names = re.search(r"GLOBAL (\S+)", str(error))
            code = f": it names {names[1]}" if names else ""
            raise InputError(
                f"{file}: is a pickle with more than tensors{code}, which would run when it is loaded; {LOAD_PICKLE} "
                "reads tensors only. Take this model as safetensors"
            ) from None
        except Exception as error:  # noqa: BLE001  whatever torch thinks of a file of somebody else
            raise InputError(f"{file}: was not written by torch.save ({describe(error)})") from None
        if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise InputError(f"{file}: is no weights of a model; expected a tensor for each name")
        if is_first():
            with file.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            print(f"{file}: {len(found)} tensors are read from a pickle, by weights_only (sha256 {sha256})", flush=True)


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
    """Raise InputError where transformers cannot load this kind of model. Call it after `import unsloth`.

    Code that a model brings along (auto_map) runs from here on, if the user trusts it, and is printed before.
    """
    from transformers import AutoConfig

    run_only_printed()
    announce_code(model)
    check_pickles(model)
    try:
        AutoConfig.from_pretrained(model.source, revision=model.revision, trust_remote_code=model.trusted)
    except Exception as error:  # noqa: BLE001  files of somebody else break a library in any way
        if isinstance(error, OSError) and not model.local:
            return  # the hub: the tokenizer, which is loaded next, says what is wrong with it
        if model.trusted or not (needs := own_code(model)):
            raise InputError(f"{model.source}: cannot be loaded: {describe(error)}") from None
        raise InputError(f"{model.source}: cannot be loaded: {needs}. {how_to_trust(model)}") from None


def describe(error: BaseException) -> str:
    """The error of a library in a message, on one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def download(model: "Model", weights: bool = True) -> None:
    """Download a model of the hub into its cache; what is there already stays. Raises MachineError when it fails.

    A file that came in part is continued. A hub that refuses gets one request: it answers the libraries the same.
    Raises InputError where the hub has no safetensors of it: a library would take a pickle then.
    """
    if not network.is_offline():
        _ask_hub(model, weights)
    if weights:
        _check_snapshot(model)


def _ask_hub(model: "Model", weights: bool) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    refused = (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError)

    def attempt(number: int) -> None:
        if weights:
            fetch_weights(model, PATTERNS, IGNORED, by_xet=number == 0)
        patterns = PATTERNS if weights else [one for one in PATTERNS if one != "*.safetensors"]
        snapshot_download(model.source, revision=model.revision, allow_patterns=patterns, ignore_patterns=IGNORED)
        if model.trusted:  # all of it, as in custom_generate/: the library would fetch what is not here, unprinted
            snapshot_download(model.source, revision=model.revision, allow_patterns=["*.py"])

    try:
        network.tried(model.source, attempt, hopeless=lambda error: isinstance(error, refused))
    except refused:
        pass  # load_tokenizer says so, unless the repository was open once and is in the cache
    except Exception as error:  # noqa: BLE001  as in network.tried
        raise MachineError(
            f"{model.source}: the download failed {network.DOWNLOADS} times: {without_credentials(describe(error))}\n"
            "The same command continues it. Check the network and HF_ENDPOINT, or name a local directory."
        ) from None


def _check_snapshot(model: "Model") -> None:
    """Raise InputError where the files of a model in the cache have no safetensors among them."""
    folder = network.snapshot(model)
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
        f"loaded. If you trust it: hf download {model.source} --local-dir FOLDER, and give --model FOLDER "
        f"{LOAD_PICKLE}, which reads tensors only"
    )
