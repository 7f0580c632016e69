"""The licence of a locked package as an SPDX expression: from docker/licences.tsv, else from the installed package.

The table makes the audit the same on every machine, whatever is installed there. `update` writes it: from the metadata
of the packages in .venv, and for all others by pip, which reads the metadata of a wheel on the index by its first and
last bytes. Each row keeps the words of the metadata beside the expression that was made of them.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from common.errors import MachineError, one_line
from common.run.files import read_object, write_bytes
from install import index, uv
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression
from packaging.utils import canonicalize_name

from auditing.locks import DOCKER, Package

TABLE = DOCKER / "licences.tsv"
COLUMNS = ("name", "version", "licence", "declared", "parts under another licence")
UNKNOWN = "LicenseRef-unknown"
PIP = "pip==26.3"  # an older one leaves License-Expression out of its reports
LONGEST = 80  # characters of a licence's own text that count as its name

# What metadata says in place of an SPDX expression. A "BSD" that does not say which of them stays one.
NAMES = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "LicenseRef-BSD",
    "bsd license": "LicenseRef-BSD",
    "bsd-derived (http://www.repoze.org/license.txt)": "LicenseRef-BSD-derived",
    "gnu lesser general public license v3 (lgplv3)": "LGPL-3.0-only",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "lgpl-3.0-or-newer": "LGPL-3.0-or-later",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "nvidia proprietary software": "LicenseRef-NVIDIA-Proprietary",
    "other/proprietary license": "LicenseRef-Proprietary",
    "psfl": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
    "the mit license (mit)": "MIT",
}
# Packages whose metadata names no licence: what the licence file in their wheel, or their source, is.
READ = {
    "cuda-toolkit": ("LicenseRef-NVIDIA-Proprietary", "an empty wheel of NVIDIA that names the others"),
    "oss-harmony": ("Apache-2.0", "licenses/LICENSE of its wheel"),
    "quack-kernels": ("Apache-2.0", "licenses/LICENSE of its wheel"),
    "torchcodec": ("BSD-3-Clause", "licenses/LICENSE of its wheel"),
    "llama-cpp-python": ("MIT", "docker/sources.txt"),
    "flash-attn": ("BSD-3-Clause", "docker/sources.txt"),
    "xformers": ("BSD-3-Clause", "docker/sources.txt"),
}
# The licence files of an installed package, by words that only one licence has; the first that is found counts.
TEXTS = {
    "AML": r"This Apple software is supplied to you by Apple",
    "Apache-2.0": r"Apache License,?\s+Version 2\.0",
    "BSD-3-Clause": r"Redistributions in binary form.*(Neither|names? of).{0,200}endorse or promote",
    "BSD-2-Clause": r"Redistributions in binary form",
    "MIT": r"Permission is hereby granted, free of charge",
}
GNU = (("Affero General", "AGPL"), ("(?:Lesser|Library) General", "LGPL"), ("General", "GPL"))
CODE = (".py", ".js", ".ts", ".tsx", ".c", ".h", ".cpp", ".cu", ".cuh", ".sh")
HEADER = 2000  # bytes


@dataclass(frozen=True)
class Licence:
    """`expression` in SPDX, made of what the metadata has `declared`; `parts` of the package have another licence."""

    expression: str
    declared: str
    parts: str = ""


def licence_of(package: Package) -> Licence:
    """By the table, else by the installed package; else UNKNOWN. Another version counts as another package."""
    if row := table().get((package.name, package.version)):
        return row
    found = _installed().get(package.name)
    if found is not None and found.version == package.version:
        return from_distribution(found)
    return Licence(UNKNOWN, "nothing")


@cache
def table() -> dict[tuple[str, str], Licence]:
    """docker/licences.tsv, by name and version."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()[1:] if TABLE.is_file() else []
    rows = [line.split("\t") for line in lines]
    return {(name, version): Licence(*more) for name, version, *more in rows}


@cache
def _installed() -> dict[str, metadata.Distribution]:
    return {canonicalize_name(found.name): found for found in metadata.distributions()}


def update(packages: Iterable[Package]) -> int:
    """Write the table for all these packages; returns how many rows it has. Raises MachineError where pip fails."""
    wanted = {(package.name, package.version) for package in packages}
    rows: dict[tuple[str, str], Licence] = {}
    for name, version in wanted:
        found = _installed().get(name)
        if found is not None and found.version == version:
            rows[name, version] = from_distribution(found)
        elif name in READ:
            rows[name, version] = Licence(*READ[name])
    rows |= _from_index(sorted(wanted - rows.keys()))
    lines = [COLUMNS, *((*key, row.expression, row.declared, row.parts) for key, row in sorted(rows.items()))]
    write_bytes(TABLE, "".join("\t".join(line) + "\n" for line in lines).encode())
    table.cache_clear()
    return len(rows)


def _from_index(wanted: list[tuple[str, str]]) -> dict[tuple[str, str], Licence]:
    """By one `pip install --dry-run`, which installs nothing; hashes would make it fetch every wheel whole."""
    if not wanted:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        pins, report = Path(folder, "pins.txt"), Path(folder, "report.json")
        pins.write_text("".join(f"{name}==={version}\n" for name, version in wanted), encoding="utf-8")
        index.use_pip_settings()
        command = [uv.find(), "tool", "run", "--quiet", "--no-config", "--python", uv.PYTHON, "--from", PIP, "pip"]
        command += ["install", "--quiet", "--dry-run", "--use-feature=fast-deps", "--no-deps", "--ignore-installed"]
        command += ["--report", str(report), "-r", str(pins)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MachineError(f"--update-licences: pip cannot read the index: {one_line(OSError(done.stderr))}")
        found = [entry["metadata"] for entry in read_object(report)["install"]]
    return {(canonicalize_name(one["name"]), one["version"]): from_metadata(one) for one in found}


def from_distribution(found: metadata.Distribution) -> Licence:
    """The licence of an installed package: by its metadata, else by its licence files; and its parts under another."""
    by = from_metadata(dict(found.metadata.json))
    if by.expression in (UNKNOWN, "LicenseRef-BSD"):
        files = [file for file in found.files or () if re.search(r"dist-info/.*(LICEN[CS]E|COPYING)", str(file), re.I)]
        text = " ".join(" ".join(file.read_text(encoding="utf-8").split()) for file in sorted(files))
        if by_text := next((name for name, words in TEXTS.items() if re.search(words, text)), None):
            declared = f"{by.declared}; its licence file" if by.expression != UNKNOWN else "its licence file"
            by = Licence(by_text, declared)
    return Licence(by.expression, by.declared, _parts(found, by.expression))


def from_metadata(found: dict[str, Any]) -> Licence:
    """The licence by the core metadata of a package: License-Expression, else License, else its classifiers."""
    short = " ".join((found.get("license") or "").split())
    short = short if len(short) <= LONGEST else next((name for name in NAMES if short.lower().startswith(name)), "")
    classifiers = [text.rpartition("::")[2].strip() for text in found.get("classifier") or []]
    classifiers = [name for name in classifiers if name.lower() in NAMES]
    for words in (found.get("license_expression") or "", short, " AND ".join(dict.fromkeys(classifiers))):
        if expression := _as_spdx(words):
            return Licence(expression, words)
    if read := READ.get(canonicalize_name(found["name"])):
        return Licence(*read)
    return Licence(UNKNOWN, "nothing")


def _as_spdx(words: str) -> str | None:
    parts = [NAMES.get(part.lower(), part) for part in words.split(" AND ")]
    try:
        return canonicalize_license_expression(" AND ".join(parts))
    except InvalidLicenseExpression:
        return None


def _parts(found: metadata.Distribution, own: str) -> str:
    """The files of a package whose header names a stricter licence than its metadata does, counted by folder."""
    counts: Counter[tuple[str, str]] = Counter()
    for file in found.files or ():
        if not str(file).endswith(CODE) or ".." in file.parts or "tests" in file.parts:
            continue
        try:
            with open(str(file.locate()), "rb") as stream:
                licence = licence_of_header(stream.read(HEADER).decode("utf-8", "replace"))
        except OSError:  # a file that RECORD names and an image has left out
            continue
        if licence and group(licence) > group(own):
            counts[licence, "/".join(file.parts[: 2 if len(file.parts) > 2 else 1])] += 1
    by_licence: dict[str, list[str]] = {}
    for (licence, place), count in sorted(counts.items()):
        by_licence.setdefault(licence, []).append(f"{place} ({count})")
    return "; ".join(f"{licence}: {', '.join(places)}" for licence, places in by_licence.items())


def licence_of_header(text: str) -> str | None:
    """The GNU licence that the first lines of a file name, by an SPDX line or in words; None for any other."""
    if named := re.search(r"SPDX-License-Identifier:\s*([\w.+-]+(?: WITH [\w.-]+)?)", text):
        return named[1] if "GPL" in named[1] else None
    words = " ".join(" ".join(re.sub(r"^\s*(#|//|\*)", "", line) for line in text.splitlines()).split())
    for gnu, name in GNU:
        if re.search(rf"GNU {gnu} Public License", words):
            version = re.search(r"[vV]ersion (\d(?:\.\d)?)", words)
            later = "or-later" if "any later version" in words else "only"
            return f"{name}-{float(version[1]):.1f}-{later}" if version else name
    return None


# --- what a licence asks of whoever passes the package on -----------------------------------------------------------

PERMISSIVE, PROPRIETARY, WEAK, STRONG, NETWORK, NOT_KNOWN = range(6)
GROUPS = ("permissive", "proprietary", "weak copyleft", "copyleft", "network copyleft", "unknown")


def group(expression: str) -> int:
    """Which of GROUPS an SPDX expression is in: of an AND the strictest part, of an OR the least strict."""
    words = re.findall(r"\(|\)|[^\s()]+", expression)
    strictest, rest = _any_of(words)
    assert not rest, expression
    return strictest


def _any_of(words: list[str]) -> tuple[int, list[str]]:
    found, words = _all_of(words)
    while words[:1] == ["OR"]:
        other, words = _all_of(words[1:])
        found = min(found, other)
    return found, words


def _all_of(words: list[str]) -> tuple[int, list[str]]:
    found, words = _one(words)
    while words[:1] == ["AND"]:
        other, words = _one(words[1:])
        found = max(found, other)
    return found, words


def _one(words: list[str]) -> tuple[int, list[str]]:
    if words[0] == "(":
        found, words = _any_of(words[1:])
        return found, words[1:]
    if words[1:2] == ["WITH"]:  # an exception, which takes a duty away: the linking of a GPL library is free
        found = _of_licence(words[0])
        return (WEAK if found == STRONG else found), words[3:]
    return _of_licence(words[0]), words[1:]


def _of_licence(name: str) -> int:
    if name.startswith("AGPL"):
        return NETWORK
    if name.startswith("GPL"):
        return STRONG
    if name.startswith(("LGPL", "MPL", "EPL", "CDDL")):
        return WEAK
    if name == UNKNOWN:
        return NOT_KNOWN
    return PROPRIETARY if "Proprietary" in name else PERMISSIVE
