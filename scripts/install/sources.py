"""Fetch a source that docker/sources.txt pins by hash, and unpack it. A step of the Dockerfile.

    python -m install.sources flash-attn /unpacked

Not by pip, which would run the package's own build to learn its name.
"""

import re
import sys
import tarfile

from common.errors import run_command

from install import index
from install.installed import ROOT, disk_errors


def pin(name: str) -> tuple[str, str]:
    """The version and the sha256 of a source."""
    pins = (ROOT / "docker" / "sources.txt").read_text()
    return re.findall(rf"^{name}==(\S+) --hash=sha256:(\w+)$", pins, re.M)[0]


def fetch(name: str) -> tarfile.TarFile:
    """The archive of a source; its hash is known, so every path in it is too. Raises MachineError as index.fetch."""
    version, sha256 = pin(name)
    index.use_pip_settings()
    file = rf"{name.replace('-', '[-_]')}-{re.escape(version)}\.tar\.gz"
    return tarfile.open(fileobj=index.fetch(f"source of {name} {version}", name, file, [sha256]))


def main(name: str, folder: str) -> None:
    with disk_errors(), fetch(name) as archive:
        archive.extractall(folder)


if __name__ == "__main__":
    run_command(lambda: main(*sys.argv[1:]))
