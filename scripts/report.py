"""The report of a run as one HTML file, to read and to mail: curves, samples, figures, and how to repeat it.

    make report RUN=outputs/sft-tiny-6d63f2d4                     outputs/sft-tiny-6d63f2d4/report.html
    make report RUN="outputs/a outputs/b" OUT=outputs/both.html   runs in the same plots, with what differs

Every run writes its report at its end; this writes it again, also of a run that trains, was stopped or was killed.
"""

from dataclasses import dataclass
from pathlib import Path

from common.cli import parse_arguments
from common.errors import InputError, MachineError, run_command
from common.pages.reading import run_folders
from common.pages.report import NAME, write_report


@dataclass(frozen=True)
class Args:
    """Reads the files of the runs and nothing else."""

    run: tuple[str, ...]
    """The folder of a run, or of several, which then share their plots."""
    output: str | None = None
    """The file to write. Without it report.html in the run's folder; of several runs outputs/report.html."""


def main() -> None:
    args = parse_arguments(Args, __doc__)
    folders = run_folders(args.run)  # before anything is written
    file = (
        Path(args.output).expanduser() if args.output else (folders[0] if len(folders) == 1 else Path("outputs")) / NAME
    )
    if file.is_dir():
        raise InputError(f"--output {file}: is a folder; give a file, such as {file / NAME}")
    if file.suffix.lower() not in (".html", ".htm"):  # it would be written over a file of another kind
        raise InputError(f"--output {file}: is no name of a page; give a file that ends in .html")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_report(folders, file)
    except OSError as error:
        raise MachineError(f"--output {file}: {error.strerror}") from None
    print(f"{file} written")


if __name__ == "__main__":
    run_command(main)
