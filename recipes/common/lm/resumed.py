"""Weights of a hub model whose download continues where the last one ended, in this process or in the one before.

huggingface_hub continues a file after a lost connection, but only within one call: a file that failed, or whose process
was killed, begins at its first byte again. Here the part that came stays in the hub's cache, as blobs/SHA256.part, and
becomes the blob when all of it is there and has that sha256. The library finds the blob and only links it.
"""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from common.lm.network import cache

if TYPE_CHECKING:
    from common.lm.hub import Model


def fetch_weights(model: "Model", patterns: list[str], ignored: list[str], by_xet: bool) -> None:
    """Fetch the safetensors files of a model that are not in the cache.

    Files that the hub offers by Xet are left to the library with `by_xet`: it is faster, and what Xet has fetched of a
    file is lost with it. Raises the errors of huggingface_hub and httpx, and OSError for a file of another sha256.
    """
    # Late: huggingface_hub reads HF_* when it is imported, which set_variables sets.
    import httpx
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    try:
        info = HfApi().model_info(model.source, revision=model.revision, timeout=30)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (httpx.ConnectError, httpx.TimeoutException, HfHubHTTPError):
        if isinstance(try_to_load_from_cache(model.source, "config.json", revision=model.revision), str):
            return  # the library takes what is there, if it is whole
        raise
    names = [one.rfilename for one in info.siblings or [] if one.rfilename.endswith(".safetensors")]
    blobs = cache() / f"models--{model.source.replace('/', '--')}" / "blobs"
    for name in filter_repo_objects(names, allow_patterns=patterns, ignore_patterns=ignored):
        url = hf_hub_url(model.source, name, revision=info.sha)
        if (blobs.parent / "snapshots" / str(info.sha) / name).exists():
            continue
        facts = get_hf_file_metadata(url)
        xet = by_xet and facts.xet_file_data is not None and not constants.HF_HUB_DISABLE_XET
        if xet or facts.size is None or facts.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
            continue  # a file as large as that comes by Xet alone
        if not re.fullmatch("[0-9a-f]{64}", facts.etag or ""):
            continue  # without git LFS a file is small, and its etag is no sha256
        blobs.mkdir(parents=True, exist_ok=True)
        _fetch(url, blobs / str(facts.etag), facts.size)


def _fetch(url: str, blob: Path, size: int) -> None:
    """Continue the part of a blob, whose name is its sha256, until it has `size` bytes."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    part = blob.with_name(f"{blob.name}.part")
    with WeakFileLock(blob.with_name(f"{blob.name}.lock")):
        if blob.exists():
            return  # another process was faster
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        with part.open("ab") as stream:
            http_get(url, stream, resume_size=stream.tell(), headers=build_hf_headers(), expected_size=size)
        with part.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if sha256 != blob.name:
            part.unlink()
            raise OSError(f"{url.rpartition('/')[2]} arrived with sha256 {sha256}, not {blob.name}")
        part.replace(blob)
