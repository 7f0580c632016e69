"""llama.cpp's converter to GGUF in .venv/share/llama.cpp, where `make export` runs it. `make setup` calls `ensure`.

    python -m install.converter     # it alone, a step of the Dockerfile

It is in no wheel: the package index has it within the source of llama-cpp-python, 77 MB, of which 3 MB are kept. They
stay in .cache, so that another .venv needs no network for them.
"""

import hashlib
import shutil
from pathlib import Path

from common.errors import MachineError, run_command
from common.run.files import PART

from install import sources
from install.installed import CACHE, CONVERTER, KEPT, converter_mark, disk_errors, has_converter, say

SOURCE, MEGABYTES = "llama-cpp-python", 77


def ensure(needed: bool = True) -> None:
    """Put the converter into .venv if it is not there. Raises MachineError if it is `needed` and cannot be had."""
    if has_converter():
        return
    version, _ = sources.pin(SOURCE)
    cached = CACHE / f"llama.cpp-{version}-{hashlib.sha256(converter_mark().encode()).hexdigest()[:8]}"
    try:
        if not cached.is_dir():
            unpack(cached, version)
    except MachineError as error:
        if needed:
            raise
        say(f"{error} Without it there is no llama.cpp converter, which `make export` needs; `make setup` tries again")
        return
    part = CONVERTER.with_name(f"llama.cpp.{PART}")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(cached, part)
    shutil.rmtree(CONVERTER, ignore_errors=True)
    part.rename(CONVERTER)


def unpack(target: Path, version: str) -> None:
    """Fetch the source, and write what is kept of it to `target`. Raises MachineError as sources.fetch."""
    say(f"fetching llama.cpp's converter, in the source of {SOURCE} {version}, {MEGABYTES} MB")
    part = target.with_name(f"{target.name}.{PART}")
    shutil.rmtree(part, ignore_errors=True)
    with sources.fetch(SOURCE) as archive:
        for member in archive:
            if (path := KEPT.fullmatch(member.name)) and (content := archive.extractfile(member)):
                file = part / path[1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content.read())
    (part / "source.sha256").write_text(converter_mark())
    part.rename(target)


def main() -> None:
    with disk_errors():
        ensure()


if __name__ == "__main__":
    run_command(main)
