"""Take the first steps of a run again, from its run.json alone, and compare them with what the run recorded.

    make verify RUN=outputs/try                       the first 20 steps, or all of a shorter run
    make verify RUN=outputs/try STEPS=100
    make verify RUN=outputs/try STRICT=yes            both sides here, with PyTorch's deterministic algorithms
    make verify REPRO=outputs/repro-try.tar.gz        the run of an archive that `make repro` wrote

The recipe runs with the run's arguments, data and base in a folder that is deleted afterwards; nothing of the run is
touched. Compared bit for bit: every logged number that no clock and no allocator measured, the sha256 of the trained
weights after the steps 1, 5, 20, 100 and the last, and the completions in samples.jsonl.

The answer is "equal", or the first step and number that differ, with both values, and what differs in the
circumstances: code, versions, device, driver, threads, locale, settings. Threads are those of the run, unless
OMP_NUM_THREADS says otherwise. Exit 0: equal; 3: this machine, as it is, gives other bits; 2: data or base are not
those of the run, or not there.

A run on a GPU has the same bits again where every kernel adds in one order. A run that was trained with
FULL_DETERMINISM=yes has only such kernels; one that was not can be compared as it is, or with STRICT=yes: then not the
run itself is verified but its settings, here, twice. A kernel that has no deterministic form is named.

Left out: the steps after a resume, which are the same by themselves; more than one difference to a number.
"""

import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from common.arguments import parse
from common.errors import CANNOT, DONE, InputError, run_command
from verification.again import RecipeFailed, room, take_again
from verification.archive import unpack
from verification.circumstances import HARMLESS, Circumstance, differences
from verification.comparison import Compared, compare
from verification.record import Recorded, read_recorded, repeat_words


@dataclass(frozen=True)
class Args:
    run: str | None = None
    """The folder of a run."""
    repro: str | None = None
    """Or an archive of `make repro`, or the folder that it was unpacked to."""
    steps: int = 20
    """How many steps to take again, from the first."""
    strict: bool = False
    """Deterministic algorithms on both sides; of a run that was not trained so, both sides are computed here."""

    # Where files are now, if they have moved since the run. They are known by their contents.
    data: str | None = None
    eval_data: str | None = None
    model: str | None = None
    reward_model: str | None = None
    chat_template_path: str | None = None

    trust_remote_code: tuple[str, ...] = ()
    """Models whose own code may run, as in the run: its run.json permits nothing."""


def main() -> int:
    args = parse(Args, sys.argv[1:], "verify")
    if bool(args.run) == bool(args.repro):
        raise InputError("give one of the two: --run outputs/try, or --repro ARCHIVE")
    if args.steps < 1:
        raise InputError(f"--steps {args.steps}: give 1 or more")
    with room() as folder:
        try:
            return verify(args, open_run(args, folder), folder)
        except RecipeFailed as failure:
            return failure.exit_code


def open_run(args: Args, folder: Path) -> Recorded:
    """The run that is to be verified, an archive unpacked into `folder`."""
    if args.run:
        return read_recorded(Path(args.run).expanduser())
    archive = Path(str(args.repro)).expanduser()
    if archive.is_dir():
        return read_recorded(archive)
    try:
        return read_recorded(unpack(archive, folder / "archive"))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"--repro {archive}: cannot be unpacked: {error}") from None


def verify(args: Args, run: Recorded, folder: Path) -> int:
    """Take the steps again, print what is equal and what is not. Returns the exit code."""
    steps = min(args.steps, run.steps)
    places = {name: value for name in ("data", "eval_data", "model", "reward_model", "chat_template_path")
              if (value := getattr(args, name))}  # fmt: skip
    words = repeat_words(run, places, args.strict)
    words += ["--trust-remote-code", *args.trust_remote_code] if args.trust_remote_code else []
    name = args.run or args.repro
    of_all = f"the first {steps} of {run.steps} steps" if steps < run.steps else f"all {steps} steps"
    both = args.strict and not run.arguments.get("full_determinism")
    print(f"Taking {of_all} of {name} again ({run.record['recipe']})", flush=True)
    then = run
    if both:
        print("It was not trained with --full-determinism, so the steps are taken twice here.", flush=True)
        then = take_again(run, words, steps, folder / "first", "Taking the steps for the first time")
    now = take_again(run, words, steps, folder / "again", "Taking the steps again")
    found, differing = compare(then, now, steps), differences(then.record, now.record)
    if not found.rows:
        raise InputError(f"{name}: no step up to {steps} was logged; give --steps {run.steps}")
    show(found, differing, now, twice=both)
    if both and (of_run := compare(run, now, steps).first):
        print(f"The run itself, without deterministic algorithms, differs from step {of_run.step} on.")
    return CANNOT if found.differences else DONE


def show(found: Compared, differing: list[Circumstance], now: Recorded, twice: bool) -> None:
    """Print the answer, what was compared, and the circumstances that differ."""
    compared = [f"{found.numbers} numbers in {found.rows} row{'s' * (found.rows != 1)} of metrics.jsonl"]
    if found.weights:
        steps = ", ".join(map(str, found.weights))
        compared.append(f"the trained weights after step{'s' * (len(found.weights) != 1)} {steps}")
    if found.samples:
        compared.append(f"{found.samples} completions")
    sides = ("the first time", "the second time") if twice else ("in the run", "now")
    if (first := found.first) is None:
        print(f"Equal: {'; '.join(compared)}.")
        if found.weights:
            sha256 = now.record["weights_sha256"][str(found.weights[-1])]
            print(f"The weights after step {found.weights[-1]}: sha256 {sha256}")
        else:
            print("The run has no sha256 of its weights up to this step: it is of an earlier version, or too short.")
    else:
        print(f"Different from step {first.step} on: {first.what}: {first.then} {sides[0]}, {first.now} {sides[1]}.")
        more = len(found.differences) - 1
        print(f"Compared: {'; '.join(compared)}; {more} more of them differ{'s' * (more == 1)}.")
    for_bits = [one for one in differing if one.name not in HARMLESS]
    if for_bits:
        print("Circumstances that differ:" if found.differences else "Circumstances that differ, without effect:")
        for one in [*for_bits, *(one for one in differing if one.name in HARMLESS)]:
            print(f"  {one}")
    elif found.differences:
        print("No circumstance differs that is recorded.", advice(now, twice))


def advice(now: Recorded, twice: bool) -> str:
    """What to do where bits differ and nothing tells why."""
    strict = now.arguments.get("full_determinism")
    if "gpu" in now.record.get("machine", {}) and not strict:
        return "A kernel adds in an order that changes: --strict takes others, and names the one that has no other."
    if twice or strict:
        return "Then a kernel that PyTorch does not know of is not deterministic; please report it with both run.json."
    return "Please report it with run.json: on a CPU the same code gives the same bits."


if __name__ == "__main__":
    run_command(main)
