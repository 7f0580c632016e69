"""Fetch a source that docker/sources.txt pins and unpack it, once its sha256 is seen to be the one that stands there.

    python3 -m install.sources llama-cpp-python /unpacked    # in the Dockerfile, from the index of install.environment

Not by pip, which would run the package's own build to learn its name.
"""

import hashlib
import io
import os
import re
import sys
import tarfile

from install import environment as setup

ROOT = setup.ROOT


def main(name, folder):
    with open(os.path.join(ROOT, "docker", "sources.txt")) as sources:
        version, wanted = re.search(rf"^{name}==(\S+) --hash=sha256:(\w+)$", sources.read(), re.M).groups()
    setup.settle_network()
    page = setup.index_url().rstrip("/") + f"/{name}/"
    file = re.compile(rf"/{name.replace('-', '[-_]')}-{re.escape(version)}\.tar\.gz(#|$)")
    urls = [url for url in setup.page_links(page) if file.search(url)]
    if not urls:
        raise setup.Refusal(f"{setup.bare(page)} lists no source of {name} {version}")
    source = setup.download(urls[0].partition("#")[0])
    found = hashlib.sha256(source).hexdigest()
    if found != wanted:
        raise setup.Refusal(f"{name} {version} has sha256 {found}; docker/sources.txt has {wanted}")
    with tarfile.open(fileobj=io.BytesIO(source)) as archive:
        archive.extractall(folder)  # its hash is known: every path in it is too


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except setup.Refusal as refusal:
        sys.exit(f"fetch: {refusal}")
