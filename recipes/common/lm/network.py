"""Whether the hub can be reached, found out once and in seconds, before the libraries retry every file for minutes; and
what is tried again, and after which time, where it was reached and a request fails.
"""

import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from common.errors import MachineError, one_line, without_credentials
from common.run.files import read_object

if TYPE_CHECKING:
    from common.lm.hub import Model

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
TIMEOUT = 6.0  # seconds; a slow network answers within two
TRIES, WAIT = 2, 1.0  # before the hub counts as unreachable, with a second between
DOWNLOADS, FIRST_WAIT = 5, 2.0  # a download that fails is tried again after 2, 4, 8 and 16 seconds,
LONGEST_WAIT = 120.0  # or after what the hub's Retry-After says, if it is no longer than this
WEIGHTS = "model.safetensors"  # a pickle is never loaded
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")

T = TypeVar("T")


def check_hub(models: Iterable["Model"], datasets: Iterable[str]) -> None:
    """Find out whether the hub is needed and can be reached, before a library is imported that uses it.

    Where all files are in the cache at a fixed commit, or where the hub cannot be reached and the models are in the
    cache, HF_HUB_OFFLINE is set, so that no library tries. (Whether a dataset is in the cache is seen when it is read.)
    Raises MachineError when a model has to be fetched and the hub cannot be reached.
    """
    if is_offline():
        return
    if os.environ.get("UNSLOTH_USE_MODELSCOPE") == "1":  # the models come from there: see hub.fetch
        models = ()
    models, datasets = [model for model in models if not model.local], list(datasets)
    missing = [model.source for model in models if not in_cache(model)]
    if not (missing or datasets):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # there will be no download to watch
        if all(re.fullmatch("[0-9a-f]{40}", model.revision or "") for model in models):
            os.environ["HF_HUB_OFFLINE"] = "1"
            return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    hub = without_credentials(endpoint)
    if (reason := _why_unreachable(endpoint)) is None:
        return
    reason = without_credentials(reason)
    if missing:
        raise MachineError(
            f"{', '.join(missing)}: not in the cache ({cache()}), and {hub} cannot be reached: {reason}.\n"
            "Check the network, or set HF_ENDPOINT to a mirror. Without a network, give a local directory, or copy the "
            "cache of a machine that has the model, and set HF_HUB_OFFLINE=1."
        )
    print(f"{hub} cannot be reached ({reason}): using the files in the cache.", file=sys.stderr)
    os.environ["HF_HUB_OFFLINE"] = "1"


def is_offline() -> bool:
    """Whether every request to the hub is forbidden, by the user or by `check_hub`."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE)


def tried(what: str, attempt: Callable[[int], T], hopeless: Callable[[Exception], bool]) -> T:
    """What `attempt` returns, by its number, after up to DOWNLOADS tries with a line and a longer wait before each.

    Raises the error of the last try; at once one that is `hopeless` to try again, and any error offline.
    """
    for number in range(DOWNLOADS):
        try:
            return attempt(number)
        except Exception as error:
            if number == DOWNLOADS - 1 or is_offline() or hopeless(error):
                raise
            wait = max(FIRST_WAIT * 2**number, min(_retry_after(error), LONGEST_WAIT))
            words = without_credentials(f"{type(error).__name__}: {one_line(error)}")
            print(f"{what}: {words}; again in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    raise AssertionError("a try returns or raises")


def _retry_after(error: BaseException | None) -> float:
    """The seconds that the hub's answer wants one to wait, 0 without any; of an error or of what caused it."""
    while error is not None:
        answer = getattr(error, "response", None)
        text = answer.headers.get("Retry-After", "") if answer is not None else ""
        if text.isdigit():
            return float(text)
        error = error.__cause__ or error.__context__
    return 0.0


def _why_unreachable(url: str) -> str | None:
    """As `why_unreachable`, after several tries where the network answers at once that it cannot."""
    reason = None
    for number in range(TRIES):
        if number:
            time.sleep(WAIT)
        begun = time.monotonic()
        if (reason := why_unreachable(url)) is None or time.monotonic() - begun > TIMEOUT / 2:
            break
    return reason


def why_unreachable(url: str) -> str | None:
    """Why `url` gave no answer to one request, within TIMEOUT seconds; None if it gave any, be it an error."""
    import httpx  # as huggingface_hub: the same proxies and certificates

    results: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def request() -> None:
        try:
            httpx.head(url, timeout=TIMEOUT)
            results.put(None)
        except (httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError) as error:  # the last two: of a proxy
            results.put(str(error).rstrip(".") or type(error).__name__)

    threading.Thread(target=request, daemon=True).start()  # the search for a host's address has no timeout of its own
    try:
        return results.get(timeout=TIMEOUT)
    except queue.Empty:
        return f"no answer in {TIMEOUT:.0f} seconds"


def cache() -> Path:
    """The hub's cache. Not by huggingface_hub: when it is imported it reads the variables that are set here."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))).expanduser()


def in_cache(model: "Model") -> bool:
    """Whether config, tokenizer and all weights of a model of the hub are in the cache."""
    folder = cache() / f"models--{model.source.replace('/', '--')}"
    revision = model.revision or "main"
    ref = folder / "refs" / revision
    files = folder / "snapshots" / (ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision)
    if not (files / "config.json").exists() or not any((files / name).exists() for name in TOKENIZERS):
        return False
    if model.trusted and not any(files.glob("*.py")):  # it was downloaded without its code
        return False
    index = files / f"{WEIGHTS}.index.json"
    parts = set(read_object(index)["weight_map"].values()) if index.exists() else {WEIGHTS}
    return all((files / part).exists() for part in parts)


def snapshot(model: "Model") -> Path | None:
    """The folder of a model's files: its own, or that in the hub's cache; None where the cache has none."""
    if model.local:
        return Path(model.source)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.source, "config.json", revision=model.revision)
    return Path(cached).parent if isinstance(cached, str) else None
