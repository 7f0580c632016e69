"""The archive of `make repro`: what someone else needs to take the steps of a run again, and nothing else of it."""

import copy
import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from common.data.rows import find_source
from common.environment import ROOT, recipes_sha256
from common.errors import InputError, without_credentials
from common.lm.cards import card_names
from common.run.files import PART, as_bytes
from launch.mounts import REWARD

from verification.archive_page import page
from verification.comparison import sample_sha256
from verification.record import ARCHIVED, CONTENTS, FILES, OWN, Recorded, identity_of, located

# Of run.json: what decides the bits, and what says so. The rest is of the user's machine and data.
KEPT = ("recipe", "arguments", "matters", "code", "machine", "revision", "dtype", "fit", "micro_batch")
KEPT += ("weights_sha256", "step", "status")
OF_THE_MACHINE = ("host", "slurm_job")
TOP = "repro"  # the folder in it
Contents = dict[str, bytes | Path]  # by name in the archive: bytes, or a file


def contents_of(run: Recorded, with_data: bool) -> Contents:
    """The files of the archive, by name; data only `with_data`. Raises InputError where a file to include is gone."""
    record = {name: copy.deepcopy(run.record[name]) for name in KEPT if name in run.record}
    record["machine"] = {name: value for name, value in record.get("machine", {}).items() if name not in OF_THE_MACHINE}
    files: Contents = {}
    for name in FILES:
        if value := run.arguments.get(name):
            _set(record, name, _take_file(run, name, value, with_data, files))
    if rewards := run.arguments.get("rewards"):
        _set(record, "rewards", [_take_reward(entry, files) for entry in rewards])
    for name in OWN & record["arguments"].keys():
        del record["arguments"][name]  # where it wrote and whom it told
        record["matters"].pop(name, None)
    record["identity"] = identity_of(record["matters"])
    code = record["code"]
    if lock := _lock(code):
        files[lock[0]] = lock[1]
    patch = _patch(code)
    if patch:
        files["code.patch"] = patch
    files["run.json"] = _json(record)
    files["metrics.jsonl"] = b"".join(_line(row) for row in run.metrics)
    samples = [row if with_data else {"step": row.get("step", 0), "sha256": sample_sha256(row)} for row in run.samples]
    if samples:
        files["samples.jsonl"] = b"".join(map(_line, samples))
    files["README.md"] = page(record, set(files)).encode()
    return files


def write(files: Contents, archive: Path) -> None:
    """Write a .tar.gz whose bytes depend on the names and contents alone, whole or not at all."""
    aside = archive.with_name(f"{archive.name}.{PART}")
    archive.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            aside.open("wb") as raw,
            gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for name in sorted(files):
                content = files[name]
                entry = tarfile.TarInfo(f"{TOP}/{name}")
                entry.mode = 0o644
                entry.size = len(content) if isinstance(content, bytes) else content.stat().st_size
                with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
                    tar.addfile(entry, stream)
        aside.replace(archive)
    finally:
        aside.unlink(missing_ok=True)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack an archive into the new `folder`; the folder in it that holds run.json."""
    with tarfile.open(archive, "r:gz") as tar:
        tar.extractall(folder, filter="data")
    found = sorted(folder.glob("run.json")) + sorted(folder.glob("*/run.json"))
    if not found:
        raise InputError(f"--repro {archive}: holds no run.json; give an archive that `make repro` wrote")
    return found[0].parent


def _take_file(run: Recorded, name: str, value: str, with_data: bool, files: Contents) -> str:
    """The value of an argument in the archive; what it names is added to `files`, where it is to be."""
    if name == "model" and value in card_names():
        return value
    identity = run.record["matters"].get("base" if name == "model" else name)
    on_disk = name == "chat_template_path" or bool(isinstance(identity, str) and CONTENTS.fullmatch(identity))
    if not on_disk:
        return value  # of a hub
    path = Path(os.path.expanduser(value))
    if path.is_absolute() and path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "outputs"):
        return str(path.relative_to(ROOT))  # of the repository itself
    if not path.is_absolute() and (ROOT / path).is_relative_to(ROOT / "data_samples"):
        return value
    short = path.name
    if name == "chat_template_path" or (with_data and name in ("data", "eval_data")):
        place = Path(located(run, name, value))
        if place.is_dir():
            for file in find_source(str(place)):
                files[f"{ARCHIVED}/{name}/{short}/{Path(file).name}"] = Path(file)
        else:
            files[f"{ARCHIVED}/{name}/{short}"] = place
        return f"{name}/{short}"
    return short


def _take_reward(entry: str, files: Contents) -> str:
    found = REWARD.match(entry)
    if not found or not os.path.exists(os.path.expanduser(found["path"])):
        return entry
    path, after = Path(os.path.expanduser(found["path"])), found["after"] or ""
    if path.is_dir():  # a reward model
        return f"{found['before']}{path.name}{after}"
    files[f"{ARCHIVED}/rewards/{path.name}"] = path
    return f"{found['before']}rewards/{path.name}{after}"


def _set(record: dict[str, Any], name: str, value: Any) -> None:
    """Put a value into the arguments, and into the settings where it is one of them and no hash of contents."""
    record["arguments"][name]["value"] = value
    matters = record["matters"]
    if name in ("chat_template_path", "rewards") and name in matters:
        matters[name] = value


def _lock(code: dict[str, Any]) -> tuple[str, bytes] | None:
    """Name and contents of the lock that the run's packages are from, of here or of its commit; None where neither."""
    lock = code.get("lock") or {}
    if not lock.get("file"):
        return None
    here, commit = ROOT / lock["file"], (code.get("git") or {}).get("commit")
    candidates = [here.read_bytes()] if here.is_file() else []
    candidates += [text for text in [_git("show", f"{commit}:{lock['file']}")] if text]
    for content in candidates:
        if hashlib.sha256(content).hexdigest() == lock.get("sha256"):
            return Path(lock["file"]).name, content
    return None


def _patch(code: dict[str, Any]) -> bytes:
    """What was not committed of the run's code, where it is still what is here now; else nothing."""
    git = code.get("git") or {}
    if not git.get("dirty") or code.get("recipes") != recipes_sha256():
        return b""
    return _git("diff", str(git.get("commit")), "--", "recipes") or b""


def _git(*words: str) -> bytes | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _json(value: Any) -> bytes:
    return as_bytes(without_credentials(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"))


def _line(row: dict[str, Any]) -> bytes:
    return as_bytes(json.dumps(row, ensure_ascii=False) + "\n")
