"""Convert a model folder to a 16-bit GGUF file, by llama.cpp's converter in .venv/share/llama.cpp.

The converter runs in a process of its own, of this file: it brings a `gguf` package newer than the one on the index.
It reads, converts and writes tensor by tensor. Two things are added to what it does. It knows a tokenizer by a hash of
some ids, so one with a vocabulary of its own is unknown to it: such a one is named by the expression that splits texts
into words, if llama.cpp has that. And the end token of the chat template is marked as one that stops.
"""

import json
import subprocess
import sys
from pathlib import Path

from common.errors import BAD_INPUT, InputError, MachineError

CONVERTER = Path(sys.prefix, "share", "llama.cpp")
# How a tokenizer.json splits texts into words, but for its digits; and {its digits: llama.cpp's name for it}, as
# src/llama-vocab.cpp of llama.cpp has them.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {SPLIT.replace("DIGITS", r"\p{N}"): "qwen2", SPLIT.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe"}


def convert(folder: Path, file: Path, kind: str, name: str, end: str) -> None:
    """Write the model in `folder` to `file`.

    Args:
        kind: f16 or bf16, of the matrices.
        name: the model's, in the file.
        end: the token that ends an answer.

    Raises InputError where the converter does not know the model or its tokenizer, MachineError where there is none.
    """
    if not (CONVERTER / "conversion").is_dir():
        raise MachineError(f"{CONVERTER}: llama.cpp's converter is not there; `make setup` fetches it")
    command = [sys.executable, "-P", __file__, *map(str, (CONVERTER, folder, file, kind, name, end))]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        what = "does not take this model" if done.returncode == BAD_INPUT else "failed"
        raise InputError(f"--format gguf: llama.cpp's converter {what}: {reason}; --format merged exports it")


def split_name(tokenizer_json: str) -> str | None:
    """llama.cpp's name for how a tokenizer splits texts, None where it has none."""
    found = json.loads(tokenizer_json).get("pre_tokenizer") or {}
    parts = found.get("pretokenizers", [found])
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    return SPLITS.get(patterns[0] or "") if len(patterns) == 1 else None


def main(converter: str, folder: str, file: str, kind: str, name: str, end: str) -> None:
    sys.path[:0] = [str(Path(converter, "gguf-py")), converter]
    import gguf  # pyrefly: ignore[missing-import]  the converter's
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # pyrefly: ignore[missing-import]  as gguf
    from transformers import AutoTokenizer

    def refuse(reason: str) -> None:
        print(reason, file=sys.stderr)
        sys.exit(BAD_INPUT)

    parameters = ModelBase.load_hparams(Path(folder), False)
    architecture = get_model_architecture(parameters, ModelType.TEXT)
    try:
        kinds = get_model_class(architecture)
    except NotImplementedError:
        refuse(f"it knows no {architecture}")
        return
    by_hash = kinds.get_vocab_base_pre

    def split(model, tokenizer) -> str:
        try:
            return by_hash(model, tokenizer)
        except NotImplementedError:
            known = split_name(tokenizer.backend_tokenizer.to_str())
            if known is None:
                refuse("it does not know how this tokenizer splits texts into words")
            return str(known)

    kinds.get_vocab_base_pre = split
    types = {"f16": gguf.LlamaFileType.MOSTLY_F16, "bf16": gguf.LlamaFileType.MOSTLY_BF16}
    with torch.inference_mode():
        model = kinds(Path(folder), types[kind], Path(file), model_name=name)
        prepare = model.prepare_metadata

        def prepare_metadata(vocab_only: bool) -> None:
            prepare(vocab_only)
            given = {key for values in model.gguf_writer.kv_data for key in values}
            token = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).convert_tokens_to_ids(end)
            if gguf.Keys.Tokenizer.EOT_ID not in given:
                model.gguf_writer.add_eot_token_id(token)

        model.prepare_metadata = prepare_metadata
        model.write()


if __name__ == "__main__":
    main(*sys.argv[1:])
