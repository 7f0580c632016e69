"""What must not leave this machine: tokens and keys, and paths that say whose machine it was."""

import re
from collections.abc import Iterable
from pathlib import Path

from common.environment import ROOT

SECRETS = {
    "a token of Hugging Face": re.compile(rb"\bhf_[A-Za-z0-9]{30,}"),
    "a token of GitHub": re.compile(rb"\b(ghp|gho|ghs|github_pat)_[A-Za-z0-9_]{30,}"),
    "a key of OpenAI or Anthropic": re.compile(rb"\bsk-[A-Za-z0-9_-]{30,}"),
    "a key of AWS": re.compile(rb"\bAKIA[0-9A-Z]{16}\b"),
    "a key of Weights & Biases": re.compile(rb"WANDB_API_KEY\W{1,4}[0-9a-f]{40}\b"),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
LOCAL = re.compile(rb"(?<![\w./:])(/(?:home|Users|root|mnt|data|scratch|workspace|tmp)/[\w.~-]+(?:/[\w.~-]+)*)")
VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"}  # which may have words like /tmp/x
PIECE = 2**24  # bytes looked at at once
OVERLAP = 512


def leaks(file: Path, name: str, own: Iterable[Path] = ()) -> list[str]:
    """What in a file must not leave, in words; `own` are folders of this machine to look for, besides the usual ones.

    All of a file is searched for secrets and for the folders of this machine; other local paths are looked for in
    small files of text, since weights and vocabularies have every string.
    """
    folders = {str(folder).encode() for folder in (ROOT, Path.home(), *own) if len(folder.parts) > 2}
    found: dict[str, None] = {}
    is_text = (
        file.stat().st_size < PIECE and file.name not in VOCABULARIES and file.suffix not in (".gguf", ".safetensors")
    )
    with file.open("rb") as stream:
        before = b""
        while piece := stream.read(PIECE):
            content = before + piece
            for what, pattern in SECRETS.items():
                if match := pattern.search(content):
                    found[f"{name}: holds {what} ({match[0][:6].decode('ascii', 'replace')}…)"] = None
            paths = [folder for folder in folders if folder in content]
            paths += [match[1] for match in LOCAL.finditer(content)] if is_text else []
            for path in paths[:3]:
                found[f"{name}: names a place on this machine, {path.decode('utf-8', 'replace')}"] = None
            before = content[-OVERLAP:]
    return list(found)
