"""What the locks in docker/ bring along: licences, an SBOM of each lock, and known advisories.

    make audit                                       licences, and outputs/audit/LOCK.cdx.json, CycloneDX 1.6
    make audit LOCK="cpu cuda" OUT=sbom              of these locks only
    make audit ADVISORIES=all.zip                    and advisories in OSV's format, a zip or a folder on this machine
    make audit ADVISORIES=all.zip ACCEPT=GHSA-1234   that one is known, and does not concern this use
    make audit UPDATE_LICENCES=yes                   writes docker/licences.tsv again, after `make lock`; by network

Without UPDATE_LICENCES it needs no network, and the same locks give the same bytes. The exit code is 2 where a package
has no known licence, or an advisory that is not accepted. docs/audit.md has what the licences mean for a user.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from auditing.advisories import Advisory, Database
from auditing.licences import GROUPS, PERMISSIVE, TABLE, UNKNOWN, group, licence_of, update
from auditing.locks import Lock, Package, read_locks
from auditing.sbom import file_name, sbom
from common.cli import parse_arguments
from common.errors import BAD_INPUT, DONE, InputError, MachineError, run_command
from common.run.files import write_bytes
from rich.console import Console

NO_DATABASE = (
    "Advisories: NOT CHECKED, no database was given. --advisories takes OSV's all.zip of PyPI, or a folder of its files"
)


@dataclass(frozen=True)
class Args:
    """Reads docker/ and nothing of the network, but for --update-licences."""

    lock: tuple[str, ...] = ()
    """Names of locks in docker/, such as cpu; all of them, and sources, if not given."""
    advisories: str | None = None
    """A zip or a folder of advisories in OSV's format."""
    accept: tuple[str, ...] = ()
    """Advisories, by any of their names, that do not count."""
    update_licences: bool = False
    """First write docker/licences.tsv again, from what is installed and what the index says of the rest."""
    output_dir: str = "outputs/audit"
    """The folder for an SBOM of each lock and for licences.tsv, all packages with their licences."""


def main() -> int:
    args = parse_arguments(Args, __doc__)
    locks = read_locks(args.lock)
    if args.accept and not args.advisories:
        raise InputError("--accept: names advisories, and there are none without --advisories")
    if args.update_licences:
        count = update(package for lock in read_locks(()) for package in lock.packages)
        print(f"{TABLE} written: {count} packages")
    packages = {(one.name, one.version): one for lock in locks for one in lock.packages}
    database = Database(Path(args.advisories).expanduser(), {name for name, _ in packages}) if args.advisories else None

    folder = Path(args.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for lock in locks:
            write_bytes(folder / file_name(lock), sbom(lock).encode())
        write_bytes(folder / "licences.tsv", as_rows(locks).encode())
    except OSError as error:
        raise MachineError(f"--output-dir {folder}: {error.strerror}") from None

    console = Console(highlight=False, soft_wrap=True, markup=False)
    unknown = show_licences(console, locks, packages)
    open_advisories = show_advisories(console, packages, database, args.accept)
    console.print(f"An SBOM of each lock, and licences.tsv, in {folder}")
    return BAD_INPUT if unknown or open_advisories else DONE


def as_rows(locks: list[Lock]) -> str:
    """Every package of every lock as lines of tab-separated values."""
    lines = [("lock", "name", "version", "licence", "group", "parts under another licence")]
    for lock in locks:
        for package in lock.packages:
            licence = licence_of(package)
            kind = GROUPS[group(licence.expression)]
            lines.append((lock.name, package.name, package.version, licence.expression, kind, licence.parts))
    return "".join("\t".join(line) + "\n" for line in lines)


def show_licences(console: Console, locks: list[Lock], packages: dict[tuple[str, str], Package]) -> int:
    """Print how many packages are in each group, and all that are not permissive; returns how many are unknown."""
    for lock in locks:
        counts = Counter(group(licence_of(package).expression) for package in lock.packages)
        words = ", ".join(f"{counts[number]} {name}" for number, name in enumerate(GROUPS) if counts[number])
        console.print(f"{lock.name:10} {len(lock.packages):4} packages: {words}")

    used = {key: [lock.name for lock in locks if key in lock.versions] for key in packages}
    rows: list[tuple[str, str, str]] = []
    parts: list[str] = []
    unknown: list[str] = []
    for key in sorted(packages):
        name, licence = " ".join(key), licence_of(packages[key])
        if licence.expression == UNKNOWN:
            unknown.append(name)
        elif group(licence.expression) != PERMISSIVE:
            rows.append((licence.expression, name, " ".join(used[key])))
        parts += [f"  {name}: {part}" for part in licence.parts.split("; ") if part]
    if rows:
        console.print("\nNot permissive, by the packages' own metadata; docs/audit.md has what this means:")
    for licence, name, names in sorted(rows):
        console.print(f"  {licence:29} {name:34} {names}")
    if parts:
        console.print("\nParts whose files name a stricter licence than the package, and how many files:")
    for part in parts:
        console.print(part)
    if unknown:
        console.print(f"\nWithout a known licence: {', '.join(unknown)}. --update-licences looks again.")
    return len(unknown)


def show_advisories(
    console: Console, packages: dict[tuple[str, str], Package], database: Database | None, accept: tuple[str, ...]
) -> int:
    """Print the advisories of all packages; returns how many are not accepted. Raises InputError for --accept."""
    console.print()
    if database is None:
        console.print(NO_DATABASE)
        return 0
    found = [advisory for _, package in sorted(packages.items()) for advisory in database.of(package)]
    for name in accept:
        if not any(advisory.known_as((name,)) for advisory in found):
            raise InputError(f"--accept {name}: no package of these locks has such an advisory; leave it out")
    for advisory in found:
        console.print(_as_line(advisory, advisory.known_as(accept)))
    still = [advisory for advisory in found if not advisory.known_as(accept)]
    newest = f", the newest of {database.newest[:10]}" if database.newest else ""
    console.print(
        f"Advisories: {len(found)} for {len(packages)} packages, {len(found) - len(still)} of them accepted; "
        f"{database.read} were read{newest}."
    )
    return len(still)


def _as_line(advisory: Advisory, accepted: bool) -> str:
    names = " = ".join((advisory.id, *advisory.aliases))
    fixed = f"fixed in {' and '.join(advisory.fixed)}" if advisory.fixed else "not fixed"
    severity = f", {advisory.severity}" if advisory.severity else ""
    mark = "accepted: " if accepted else ""
    return f"{mark}{advisory.name} {advisory.version}: {names}{severity}, {fixed}: {advisory.summary}"


if __name__ == "__main__":
    run_command(main)
