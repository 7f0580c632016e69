"""Fetch a source that docker/sources.txt pins by hash, and unpack it. A step of the Dockerfile.

    python -m install.sources llama-cpp-python /unpacked

Not by pip, which would run the package's own build to learn its name.
"""

import io
import re
import sys
import tarfile

from common.errors import run_command

from install import index
from install.environment import ROOT, disk_errors


def main(name: str, folder: str) -> None:
    pins = (ROOT / "docker" / "sources.txt").read_text()
    version, sha256 = re.findall(rf"^{name}==(\S+) --hash=sha256:(\w+)$", pins, re.M)[0]
    index.use_pip_settings()
    file = rf"{name.replace('-', '[-_]')}-{re.escape(version)}\.tar\.gz"
    with (
        disk_errors(),
        tarfile.open(fileobj=io.BytesIO(index.fetch(f"source of {name} {version}", name, file, [sha256]))) as archive,
    ):
        archive.extractall(folder)  # its hash is known: every path in it is too


if __name__ == "__main__":
    run_command(lambda: main(*sys.argv[1:]))
