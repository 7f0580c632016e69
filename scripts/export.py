"""Export what a run trained, as files that other programs load, and prove that they are what was trained.

    make export RUN=outputs/sft-tiny-1a2b3c4d                                    all, in RUN/export
    make export RUN=outputs/sft-tiny-1a2b3c4d FORMAT=gguf QUANT="q4_k_m q8_0"    for llama.cpp, Ollama, LM Studio
    make export RUN=outputs/merged FORMAT=merged                                 a model that `make merge` wrote

    adapter/      the adapter alone, for PEFT and vLLM, with the id and commit of its base
    merged/       the whole model in 16 bit, for transformers, vLLM and TGI
    gguf/         one file a quantization, and Ollama's Modelfile
    README.md     a model card from run.json, with the command lines that run these files
    export.json   what was made, of what, and what the gate measured

The gate compares all of them with the trained model, tokens and log-probabilities (docs/export.md), and the folder gets
its name when it has passed. Where anything differs there is no export; the first difference is shown.

Left out: importance matrices and i-quants, 4-bit formats of other programs, reward models, images.
"""

import hashlib
import shutil
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common import environment
from common.cli import parse_arguments
from common.environment import describe_code
from common.errors import InputError, did_you_mean, run_command
from common.lm.hub import contents, fetch
from common.lm.render import end_token
from common.run.files import PART, read_object, write_bytes, write_folder, write_json
from common.run.screen import loading
from exporting.merged import Trained, find_trained, trained_tokenizer, write_adapter, write_merged
from exporting.model_card import model_card
from exporting.modelfile import modelfile
from exporting.quantize import FILE_TYPES, WIDE
from merge import identify

if TYPE_CHECKING:
    from exporting.gate import Exported

CONTEXT = 4096  # tokens that Ollama makes room for, if the model has that many


@dataclass(frozen=True)
class Args:
    run: str
    """The folder of a run, or of a model that `make merge` wrote."""
    format: Literal["all", "merged", "gguf"] = "all"
    """merged: safetensors; gguf: for llama.cpp and Ollama. The adapter is in each."""
    quant: tuple[str, ...] = ("q4_k_m",)
    """Quantizations of the GGUF files: f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, ... One that is unknown lists all."""
    model: str | None = None
    """The base of an adapter that has no run.json beside it."""
    load_pickle: bool = False
    """Read weights that are in pytorch_model*.bin alone, by torch's weights_only, which runs nothing."""
    output_dir: str | None = None
    """Where the export goes; else `export`, in the run's folder. An earlier one there keeps its formats if it is of the
    same weights, and is replaced if not."""


def main() -> None:
    args = parse_arguments(Args, __doc__)
    quants = read_quants(args.quant)
    trained = find_trained(args.run, args.model)
    folder = Path(args.output_dir or trained.folder / "export").expanduser()
    check_target(folder, trained)
    environment.set_variables(models=trained.models)
    loading(trained.name)
    trained = replace(trained, base=trained.base and fetch(trained.base), whole=trained.whole and fetch(trained.whole))
    form, quants = with_earlier(folder, trained, args.format, quants)
    export(trained, folder, form, quants)
    print(f"Export in {folder}")


def read_quants(given: tuple[str, ...]) -> list[str]:
    """The quantizations, each once; they may be joined by commas. Raises InputError for an unknown one."""
    names = list(dict.fromkeys(name.lower() for text in given for name in text.replace(",", " ").split()))
    known = [*WIDE, *FILE_TYPES]
    for name in names:
        if name not in known:
            raise InputError(f"--quant {name}: unknown{did_you_mean(name, known)}; there are {', '.join(known)}")
    if not names:
        raise InputError(f"--quant: is empty; give some of {', '.join(known)}")
    return names


def check_target(folder: Path, trained: Trained) -> None:
    """Raise InputError where `folder` is not empty and no export."""
    if folder.resolve() in (trained.folder.resolve(), *trained.folder.resolve().parents):
        raise InputError(f"{folder}: holds what is exported; give another folder with --output-dir")
    if folder.exists() and not (folder / "export.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder}: holds something else than an export; give another folder with --output-dir")


def with_earlier(folder: Path, trained: Trained, form: str, quants: list[str]) -> tuple[str, list[str]]:
    """Format and quantizations with those of an earlier export in `folder`, if that is of the same weights."""
    file = folder / "export.json"
    earlier = read_object(file) if file.is_file() else {}
    if earlier.get("weights") != identify_weights(trained):
        return form, quants
    wanted = [] if form == "merged" else quants
    kept = [name for name in earlier["quants"] if name not in wanted]
    if kept:
        say(f"The export there has {', '.join(kept)}, too: made again, to be compared with the rest")
    return form if form == earlier["format"] else "all", [*wanted, *kept]


def export(trained: Trained, folder: Path, form: str, quants: list[str]) -> None:
    """Write the export of `trained` to `folder`, when the gate passes.

    Raises InputError and MachineError as the steps do, and then leaves nothing.
    """
    from exporting import gate

    started = time.monotonic()
    try:
        with write_folder(folder) as part:
            if trained.adapter:
                write_adapter(trained, part / "adapter")
            say("Merging" if trained.adapter else "Copying")
            merge_check = write_merged(trained, part / "merged")
            exported, notes = gate.Exported(part / "merged"), []
            if form != "merged":
                notes = write_gguf(trained, part, quants, exported)
            say("Comparing with what was trained")
            measured = gate.check(trained, exported, say)
            for kind, file in exported.gguf.items():
                if kind not in quants:
                    file.unlink()
            if form == "gguf":
                shutil.rmtree(part / "merged")
            if (trained.folder / "run.json").is_file():
                names = [file.relative_to(part) for file in part.rglob("*") if file.is_file()]
                write_bytes(part / "README.md", model_card(trained.folder, names).encode())
            record = {
                "run": trained.name,
                "format": form,
                "quants": quants if form != "merged" else [],
                "weights": identify_weights(trained),
                "base": trained.base and (trained.base.name if trained.base.local else trained.base.source),
                "merge": merge_check,
                "gate": measured,
                "notes": notes,
                "seconds": round(time.monotonic() - started, 1),
                "code": describe_code(),
                "versions": {name: metadata.version(name) for name in ("xllamacpp", "transformers", "peft")},
                "files": describe_files(part),
            }
            write_json(part / "export.json", record)
    except BaseException:  # such as Ctrl-C: nothing half-written stays
        shutil.rmtree(folder.with_name(f"{folder.name}.{PART}"), ignore_errors=True)
        raise


def identify_weights(trained: Trained) -> dict[str, str | None]:
    """What an export is made of: hashes of its base and its adapter, or of its whole model."""
    if trained.adapter and trained.base:
        return identify(trained.base, trained.adapter)
    assert trained.whole
    return {"whole": contents(trained.whole)}


def write_gguf(trained: Trained, part: Path, quants: list[str], exported: "Exported") -> list[str]:
    """Write the GGUF files and the Modelfile, and name them in `exported`; returns what could not be as requested."""
    from exporting.convert import convert
    from exporting.quantize import quantize

    tokenizer, notes = trained_tokenizer(trained), []
    end = end_token(tokenizer) if tokenizer.chat_template else str(tokenizer.eos_token)
    target = part / "gguf"
    target.mkdir()
    for kind in [kind for kind in WIDE if kind in quants] or ["f16"]:
        say(f"Converting to GGUF, {kind}")
        exported.gguf[kind] = target / f"{trained.name}-{kind}.gguf"
        convert(part / "merged", exported.gguf[kind], kind, trained.name, end)
    wide = next(iter(exported.gguf.values()))
    for kind in quants:
        if kind in FILE_TYPES:
            say(f"Quantizing to {kind}")
            exported.gguf[kind] = target / f"{trained.name}-{kind}.gguf"
            fallen = quantize(wide, exported.gguf[kind], kind)
            notes += [f"{kind}: {line}" for line in fallen]
            if fallen:
                say(f"{kind}: {fallen[0]}" + (f"; and {len(fallen) - 1} more" if fallen[1:] else ""))
    if tokenizer.chat_template:
        config = read_object(part / "merged" / "config.json")
        room = min(config.get("max_position_embeddings", CONTEXT), CONTEXT)
        try:
            exported.modelfile = modelfile(tokenizer, exported.gguf[quants[0]].name, [end], {"num_ctx": room})
        except InputError as error:
            notes.append(f"no Modelfile: {error}")
            say(f"No Modelfile for Ollama: {error}")
        else:
            write_bytes(target / "Modelfile", exported.modelfile.encode())
    return notes


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """{path in the export: its size in bytes and sha256}"""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            found[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": sha256}
    return found


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_command(main)
