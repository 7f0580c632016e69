"""Upload what a run exported to the hub: the adapter, the merged weights or the GGUF files, with their model card.

    make push RUN=outputs/sft-tiny-1a2b3c4d REPO=me/my-model DRY_RUN=yes      what would go, and how large it is
    make push RUN=outputs/sft-tiny-1a2b3c4d REPO=me/my-model FORMAT=gguf
    make push RUN=outputs/sft-tiny-1a2b3c4d REPO=me/my-model PRIVATE=no       for everybody to see

The token is that of `hf auth login`, or HF_TOKEN; it has to allow writing. A new repository is private unless
PRIVATE=no. Files with a token or a key in them, or with a path of this machine, are refused. After the upload every
file is compared with what the hub has, by its hash.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.cli import parse_arguments
from common.commands import command
from common.errors import InputError, MachineError, one_line, run_command
from common.lm.cards import HUB_ID
from common.run.files import PICKLES
from common.run.record import adapter_of
from exporting.leaks import leaks
from exporting.model_card import NAME as CARD
from exporting.model_card import model_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Args:
    run: str
    """The folder of a run."""
    repo: str
    """The repository on the hub, as me/my-model; it is made if it is not there."""
    format: Literal["adapter", "merged", "gguf"] | None = None
    """What to upload; without it what is exported, if that is one kind, else the adapter."""
    private: bool = True
    """Make a new repository private; --no-private for everybody to see."""
    dry_run: bool = False
    """Only list the files, with their sizes; nothing is sent."""
    message: str | None = None
    """The message of the commit."""


def main() -> None:
    args = parse_arguments(Args, __doc__)
    if not HUB_ID.fullmatch(args.repo) or args.repo.endswith(".git"):
        raise InputError(f"--repo {args.repo}: expected owner/name, as me/my-model")
    run = Path(args.run).expanduser()
    kind, folder = what_to_push(run, args.format)
    files = {name: file for name, file in files_of(folder).items() if name != CARD}
    card = model_card(run, files, args.repo)
    check(files, card, run)
    with tempfile.TemporaryDirectory() as aside:
        files = {CARD: Path(aside) / CARD, **files}
        files[CARD].write_text(card, encoding="utf-8")
        visibility = "private" if args.private else "public"
        print(f"{kind} of {run} to {args.repo}, {visibility} if it is new:")
        for name, file in files.items():
            print(f"  {size(file.stat().st_size):>10}  {name}")
        print(f"  {size(sum(file.stat().st_size for file in files.values())):>10}  in {len(files)} files")
        if args.dry_run:
            print("Nothing was sent: leave out --dry-run to upload them.")
            return
        push(files, args, args.message or f"Upload the {kind} of {run.resolve().name}")


def what_to_push(run: Path, wanted: str | None) -> tuple[str, Path]:
    """The kind and the folder to upload. Raises InputError where it is not there, or was not proved by the export."""
    adapter = None if (run / "model").is_dir() else adapter_of(run)
    export = run / "export"
    proved = (export / "export.json").is_file()
    there = [name for name in ("adapter", "merged", "gguf") if proved and (export / name).is_dir()]
    kind = wanted or (there[0] if len(there) == 1 else "adapter" if adapter else "merged")
    if kind in there:
        return kind, export / kind
    if kind == "adapter" and adapter:
        return kind, adapter
    raise InputError(f"{run}: has no {kind} that an export has proved; first {command('export', run=run, format=kind)}")


def files_of(folder: Path) -> dict[str, Path]:
    """{name in the repository: file} of a folder, without hidden ones. Raises InputError for a file that runs code."""
    files = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if file.suffix in PICKLES:
            raise InputError(f"{file}: a pickle, which runs code where it is loaded; save it as safetensors")
        files[name] = file
    if not files:
        raise InputError(f"{folder}: is empty")
    return files


def check(files: dict[str, Path], card: str, run: Path) -> None:
    """Raise InputError for what must not leave this machine, all of it at once."""
    own = (run.resolve(), Path.cwd())
    found = [leak for name, file in files.items() for leak in leaks(file, name, own)]
    with tempfile.TemporaryDirectory() as aside:
        file = Path(aside) / CARD
        file.write_text(card, encoding="utf-8")
        found += leaks(file, f"{CARD}, written from run.json", own)
    if found:
        raise InputError("Nothing was sent.\n" + "\n".join(found) + "\nTake it out of the files and repeat.")


def push(files: dict[str, Path], args: Args, message: str) -> None:
    """Upload files as one commit, and compare what the hub has then. Raises MachineError where it refuses."""
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    token = get_token()
    if not token:
        raise MachineError(
            "there is no token of the hub: `hf auth login` saves one, or set HF_TOKEN; it has to allow writing"
        )
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise MachineError("HF_HUB_OFFLINE=1 forbids to ask the hub; unset it to upload")
    api = HfApi(token=token)
    try:
        make_repository(api, args)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        commit = api.create_commit(args.repo, operations, commit_message=message)
        confirm(api, args.repo, files, commit.oid)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = error.server_message or one_line(error)
        if status in (401, 403):
            raise MachineError(f"{args.repo}: the token may not write there ({reason})") from None
        raise MachineError(f"{args.repo}: the hub refused it: {reason}") from None
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise MachineError(
            f"{args.repo}: cannot be reached: {one_line(error)}\nCheck the network and HF_ENDPOINT, and "
            "repeat: what has arrived is not sent again."
        ) from None
    print(f"Done: {commit.commit_url}")


def make_repository(api: "HfApi", args: Args) -> None:
    """Make the repository. Raises InputError where it is there and public, and a private one is wanted."""
    if not api.repo_exists(args.repo):
        api.create_repo(args.repo, private=args.private)
    elif args.private and not api.model_info(args.repo).private:
        raise InputError(f"--repo {args.repo}: is there already and public; give another name, or --no-private")


def confirm(api: "HfApi", repo: str, files: dict[str, Path], commit: str) -> None:
    """Print what the hub has at the commit. Raises MachineError where a file is not there as it is here."""
    from huggingface_hub.utils import sha

    info = api.model_info(repo, revision=commit, files_metadata=True)
    there = {one.rfilename: one for one in info.siblings or []}
    for name, file in files.items():
        one = there.get(name)
        with file.open("rb") as stream:
            if one is not None and one.lfs is not None:
                same = one.lfs.sha256 == sha.sha_fileobj(stream).hex()
            else:
                same = one is not None and one.blob_id == sha.git_hash(stream.read())
        if not same:
            raise MachineError(
                f"{name}: the hub has {'another' if one else 'no'} file of that name at {commit}; repeat it"
            )
    others = [name for name in there if name not in files and name != ".gitattributes"]
    print(f"The hub has all {len(files)} files, byte for byte, at commit {commit}.")
    if others:
        print(f"Left there from before: {', '.join(others[:10])}{', ...' if len(others) > 10 else ''}")


def size(count: int) -> str:
    """Bytes in words, as 1.2 MB."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


if __name__ == "__main__":
    run_command(main)
