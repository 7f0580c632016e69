"""The package index as pip is configured for it, which uv does not read; and single files of it.

The files are uv itself and the sources in docker/sources.txt, which nothing may build. Fetched by the standard library
alone: the python3 of a bare Debian has neither pip nor ensurepip.
"""

import configparser
import errno
import hashlib
import os
import re
import sys
import tempfile
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import HTTPBasicAuthHandler, HTTPPasswordMgrWithPriorAuth, build_opener

from common.errors import MachineError

CONNECT = "Connect this machine, or set PIP_INDEX_URL to an index in reach"


def pip_setting(key: str) -> str:
    """What pip would use for `key`, such as "index-url"; "" when it is not configured."""
    home = Path.home()
    user = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config", "pip", "pip.conf")
    own = os.environ.get("PIP_CONFIG_FILE", "")
    files = ["/etc/xdg/pip/pip.conf", "/etc/pip.conf", home / ".pip/pip.conf", user, Path(sys.prefix, "pip.conf"), own]
    parser = configparser.RawConfigParser()
    parser.optionxform = lambda optionstr: optionstr.lower().replace("_", "-")
    try:
        parser.read([] if own == os.devnull else files, encoding="utf-8")  # a later file wins, as in pip
    except configparser.Error as error:
        raise MachineError(f"pip is not configured as it should be: {' '.join(str(error).split())}") from None
    values = [os.environ.get("PIP_" + key.upper().replace("-", "_"))]
    values += [parser.get(section, key, fallback="") for section in ("install", "global")]
    return next((value.strip() for value in values if value and value.strip()), "")


def index_url() -> str:
    """The package index: uv's own variables, then pip's settings, then the public one."""
    own = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL") or ""
    return re.sub(r"^[\w.-]+=", "", own) or pip_setting("index-url") or "https://pypi.org/simple"  # uv has name=url


def use_pip_settings() -> None:
    """Put pip's index and certificate where both uv and Python's own TLS look for them."""
    if pip_setting("index-url"):
        os.environ.setdefault("UV_DEFAULT_INDEX", index_url())
    if certificate := os.environ.get("SSL_CERT_FILE") or pip_setting("cert"):
        os.environ["SSL_CERT_FILE"] = certificate
    else:
        # The system's certificates, which a company adds its own to, instead of the list built into uv.
        os.environ.setdefault("UV_SYSTEM_CERTS", "true")


def bare(text: str) -> str:
    """A URL, or a text with some, without passwords: to be shown."""
    return re.sub(r"//[^/\s]*@", "//", text)


def fetch(what: str, project: str, name: str, hashes: list[str]) -> BinaryIO:
    """The file of a project on the index whose name the pattern `name` matches; `what` it is, for messages.

    It is an open file without a name: 77 MB would be much in the memory of a small machine. Raises MachineError without
    an answer, without such a file, and when its sha256 is none of `hashes`.
    """
    page = bare(index_url()).rstrip("/") + f"/{project}/"
    host = urlsplit(index_url())
    passwords = HTTPPasswordMgrWithPriorAuth()
    if host.username:  # for this host alone, wherever its links lead
        login = unquote(host.username), unquote(host.password or "")
        passwords.add_password(None, urljoin(page, "/"), *login, is_authenticated=True)
    opener = build_opener(HTTPBasicAuthHandler(passwords))
    opener.addheaders = [("Accept", "text/html, */*;q=0.1")]
    try:
        with opener.open(page, timeout=60) as answer:
            links = re.findall(r'href="([^"]+)"', answer.read().decode("utf-8", "replace"))
        urls = [urljoin(page, link.replace("&amp;", "&")).partition("#")[0] for link in links]
        urls = [url for url in urls if re.fullmatch(name, unquote(url.rpartition("/")[2]))]
        if not urls:
            raise MachineError(f"{page} lists no {what}: set PIP_INDEX_URL to an index that does.")
        file, digest = cast("BinaryIO", tempfile.TemporaryFile()), hashlib.sha256()  # noqa: SIM115  the caller's
        with opener.open(urls[0], timeout=60) as answer:
            while block := answer.read(2**20):
                digest.update(block)
                file.write(block)
    except (OSError, HTTPException, ValueError) as error:  # no network, an answer that ends half-way, no URL
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        cause = getattr(error, "reason", None) or f"{type(error).__name__} {error}"
        raise MachineError(f"No answer from {page} ({cause}). {CONNECT}.") from None
    found = digest.hexdigest()
    if found not in hashes:
        raise MachineError(
            f"{page} has a {what} with sha256 {found}, which docker/ does not list: "
            "do not use that index before you know why."
        )
    file.seek(0)
    return file
