"""Write a small archive of a run, from which someone else takes its steps again and compares them.

    make repro RUN=outputs/try                            outputs/repro-try.tar.gz, without your data
    make repro RUN=outputs/try WITH_DATA=yes OUT=try.tar.gz
    make verify REPRO=outputs/repro-try.tar.gz            elsewhere: equal, or what differs

In it: the settings of the run, its logged numbers and the sha256 of its weights; the lock of its packages; your reward
functions and chat template; a README.md with what is needed and the commands. Data is there by its sha256 alone unless
WITH_DATA=yes, as its size or its licence may forbid more; then completions are there as hashes, too. Weights are not in
it. No name of a machine, no path of yours, and no secret: what looks like one ends the command. The same run gives the
same bytes.

Left out: the base model, checkpoints, what a reward file imports besides.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common.arguments import parse
from common.errors import InputError, run_command
from exporting.leaks import leaks
from verification.archive import Contents, contents_of, write
from verification.record import read_recorded

SUFFIX = ".tar.gz"


@dataclass(frozen=True)
class Args:
    run: str
    """The folder of a run."""
    output: str | None = None
    """The archive, a name that ends in .tar.gz; by default outputs/repro-RUN.tar.gz."""
    with_data: bool = False
    """Put the data itself into it, and the completions; look at its licence first."""


def main() -> None:
    args = parse(Args, sys.argv[1:], "repro")
    folder = Path(args.run).expanduser()
    run = read_recorded(folder)
    archive = Path(args.output or f"outputs/repro-{folder.resolve().name}{SUFFIX}").expanduser()
    if not archive.name.endswith(SUFFIX):
        raise InputError(f"--output {archive}: give a name that ends in {SUFFIX}")
    files = contents_of(run, args.with_data)
    if found := look_for_leaks(files):
        raise InputError("\n".join([*found, "Nothing was written. Take this out of the files, or leave them out."]))
    write(files, archive)
    size = archive.stat().st_size
    print(f"{archive} written: {len(files)} files, {size / 1000:,.0f} kB. `make verify REPRO={archive}` reads it.")
    if not args.with_data:
        print("Your data is in it as a sha256 only; --with-data adds it, where its licence allows.")


def look_for_leaks(files: Contents) -> list[str]:
    """Secrets in the files, and paths of this machine, each with the name of its file; data may have any path in it."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            file = content
            if isinstance(content, bytes):
                file = Path(folder, "part")
                file.write_bytes(content)
            told = leaks(Path(str(file)), name)
            free = name.startswith("files/") or name in ("code.patch", "samples.jsonl")  # texts of the user, any words
            found += [one for one in told if not (free and "names a place" in one)]
    return found


if __name__ == "__main__":
    run_command(main)
