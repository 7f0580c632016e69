"""Write files and folders completely or not at all: a reader sees the old or the new one, never a part."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import InputError, one_line

ROOT = Path(__file__).resolve().parents[3]  # not environment's: the installer takes this file along, and not that one
# Settings of an adapter that PEFT keeps as sets; Unsloth keeps modules_to_save as one.
SETS = {"target_modules", "exclude_modules", "modules_to_save"}
UNFILLED = "More Information Needed"  # as PEFT's README.md has it 39 times
PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")  # files that can run code where they are loaded
PART = "part"  # the suffix of what is being written; in checkpoints/ the folder of such checkpoints


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises InputError where it cannot be read or is damaged, OSError where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is damaged or no JSON ({type(error).__name__}: {one_line(error)})") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises as `read_json`, and InputError where it holds anything else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds no JSON object")
    return found


def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects that a JSON file lists. Raises as `read_json`, and InputError where it holds anything else."""
    found = read_json(path)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise InputError(f"{path}: holds no list of JSON objects")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never a part."""
    write_bytes(path, as_bytes(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"))


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write a JSON Lines file, a line for each row, whole as `write_bytes` does."""
    write_bytes(path, as_bytes("".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)))


def as_bytes(text: str) -> bytes:
    """JSON in UTF-8. A byte of a file's name that is no letter in this locale becomes an escape, read as it was."""
    return text.encode(errors="backslashreplace")  # Python has it as half of a surrogate pair, and writes it \udcc3


def write_bytes(path: Path, content: bytes, executable: bool = False) -> None:
    """Write a file so that a reader sees the old or the new one, never a part. After an OSError it is the old one."""
    aside = path.with_name(f"{path.name}.{PART}")
    try:
        with aside.open("wb") as stream:
            if executable:
                os.fchmod(stream.fileno(), 0o755)
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except OSError:  # a full disk
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def read_jsonl(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON Lines file of a run, none without a file; lines that are damaged or half are left out."""
    try:
        stream = file.open("rb")  # bytes: text is split at more than a line feed, and may end within a character
    except FileNotFoundError:
        return
    with stream:
        yield from (row for line in stream if (row := _row(line)) is not None)


def keep_rows(file: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a JSON Lines file of a run without the rows that `keep` rejects; damaged ones go too, and a line says so.

    A reader sees the old or the new file, never a part.
    """
    if not file.exists():
        return
    before = file.read_bytes()
    rows = [(line, _row(line)) for line in before.splitlines(keepends=True)]
    if damaged := sum(row is None for _, row in rows):
        print(
            f"{file}: dropped {damaged} damaged line{'s' * (damaged > 1)}, not written completely by an earlier process"
        )
    after = b"".join(line for line, row in rows if row is not None and keep(row))
    if after != before:
        write_bytes(file, after)


def _row(line: bytes) -> dict[str, Any] | None:
    """The object in a line of a JSON Lines file; None in one that is damaged, or that is not ended."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:  # UnicodeDecodeError is one
        return None
    return row if isinstance(row, dict) else None


def make_readable(folder: Path) -> None:
    """Give the files of a folder the permissions of the caller's umask, which safetensors ignores (it writes 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def make_reproducible(folder: Path) -> None:
    """Rewrite what PEFT writes differently in every process and on every machine, in the adapters below a folder.

    Sets, such as the target modules, become sorted lists. A base in a local directory is named by its path in this
    repository, or outside of it by its name alone. PEFT's README.md, a form with that path in it that nobody has filled
    in, is taken away: a run writes its own at its end.
    """
    for file in folder.rglob("adapter_config.json"):
        config = read_object(file)
        base = config.get("base_model_name_or_path")
        if base and Path(base).is_absolute():
            origin = Path(base).relative_to(ROOT) if Path(base).is_relative_to(ROOT) else Path(base).name
            config["base_model_name_or_path"] = str(origin)
        form = file.with_name("README.md")
        if form.is_file() and UNFILLED in form.read_text(encoding="utf-8"):
            form.unlink()
        for name in SETS & config.keys():
            config[name] = sorted(config[name]) if isinstance(config[name], list) else config[name]
        file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `folder` once the block has ended without an error."""
    aside = folder.with_name(f"{folder.name}.{PART}")
    shutil.rmtree(aside, ignore_errors=True)  # left by a run that was killed
    aside.mkdir(parents=True)
    yield aside
    put_in_place(aside, folder)


def put_in_place(aside: Path, folder: Path) -> None:
    """Replace `folder` by `aside` once all of it is on the disk, readable and reproducible as above.

    A power cut, a killed process or a full disk leaves the old or the new one, never a part under the final name.
    """
    make_readable(aside)
    make_reproducible(aside)
    for path in [*aside.rglob("*"), aside]:
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks cannot sync one
            raise
    finally:
        os.close(descriptor)
