"""`make audit`: the licence of each locked package, an SBOM that the official schema accepts, planted advisories."""

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import audit
import pytest
from auditing import licences, locks
from auditing.advisories import Database
from auditing.licences import GROUPS, from_distribution, from_metadata, group, licence_of_header, table
from auditing.locks import Package, lock_names, read_locks
from auditing.sbom import purl, sbom
from common.errors import InputError, run_command
from conftest import ROOT
from in_process import as_it_was
from jsonschema import Draft7Validator
from packaging.utils import canonicalize_name
from referencing import Registry, Resource

SCHEMAS = ROOT / "tests" / "references" / "cyclonedx-1.6.zip"


def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str]:
    """`make audit` with these words: its exit code, and what it prints."""
    with as_it_was():
        monkeypatch.setattr(sys, "argv", ["audit", *map(str, words)])
        with pytest.raises(SystemExit) as exited:
            run_command(audit.main)
    printed = capsys.readouterr()
    return int(exited.value.code or 0), printed.out + printed.err


# --- licences


def test_the_table_has_every_locked_package_and_no_other():
    """After `make lock`: make audit UPDATE_LICENCES=yes."""
    wanted = {(package.name, package.version) for lock in read_locks(()) for package in lock.packages}
    assert table().keys() == wanted
    assert [key for key, row in table().items() if row.expression == licences.UNKNOWN] == []


def test_the_table_is_what_the_metadata_of_the_installed_packages_says():
    installed = {canonicalize_name(found.name): found for found in metadata.distributions()}
    checked = 0
    for (name, version), row in table().items():
        found = installed.get(name)
        if found is None or found.version != version or "its licence file" in row.declared:
            continue
        by = from_metadata(dict(found.metadata.json))
        assert (by.expression, by.declared) == (row.expression, row.declared), name
        checked += 1
    assert checked > 100
    zoo = installed["unsloth-zoo"]
    assert table()["unsloth-zoo", zoo.version] == from_distribution(zoo)


def test_what_unsloth_licenses_otherwise_is_in_the_table():
    parts = {name: row.parts for (name, _), row in table().items()}
    for part in ("studio/backend", "unsloth_cli", "unsloth/models"):
        assert re.search(rf"AGPL-3.0-only: [^;]*{part} \(\d+\)", parts["unsloth"]), part
    assert re.search(r"AGPL-3.0-or-later: [^;]*unsloth_zoo/cpu \(\d+\)", parts["unsloth-zoo"])


@pytest.mark.parametrize(
    ("expression", "kind"),
    [
        ("MIT", "permissive"),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", "weak copyleft"),
        ("(GPL-3.0-only OR MIT) AND BSD-3-Clause", "permissive"),
        ("MIT OR (LGPL-2.1-only AND GPL-3.0-only)", "permissive"),
        ("MIT AND GPL-3.0-only", "copyleft"),
        ("GPL-2.0-only WITH Linux-syscall-note", "weak copyleft"),
        ("AGPL-3.0-or-later", "network copyleft"),
        ("LicenseRef-NVIDIA-Proprietary", "proprietary"),
        ("LicenseRef-unknown AND MIT", "unknown"),
    ],
)
def test_of_an_and_the_strictest_part_counts_and_of_an_or_the_least_strict(expression, kind):
    assert GROUPS[group(expression)] == kind


@pytest.mark.parametrize(
    ("found", "expression"),
    [
        ({"license_expression": "mit", "license": "GPL"}, "MIT"),
        ({"license": "Apache License, Version 2.0"}, "Apache-2.0"),
        ({"license": "MIT License\n\nCopyright (c) 2022\n" + "Permission is hereby granted " * 9}, "MIT"),
        ({"classifier": ["License :: OSI Approved :: BSD License"]}, "LicenseRef-BSD"),
        ({"license": "as you like", "classifier": ["Topic :: Games"]}, licences.UNKNOWN),
        ({}, licences.UNKNOWN),
    ],
)
def test_metadata_becomes_an_spdx_expression_or_counts_as_unknown(found, expression):
    assert from_metadata({"name": "x", **found}).expression == expression


def test_a_header_names_its_gnu_licence_by_an_spdx_line_or_in_words():
    assert licence_of_header("# SPDX-License-Identifier: AGPL-3.0-only\n") == "AGPL-3.0-only"
    assert licence_of_header("# SPDX-License-Identifier: Apache-2.0\n# not the GNU General Public License") is None
    lesser = "# it under the terms of the GNU Lesser General Public\n# License, either version 3 of the License, or\n"
    assert licence_of_header(lesser + "# any later version. See the GNU General Public License.") == "LGPL-3.0-or-later"
    assert licence_of_header("import torch") is None


def test_a_package_without_a_known_licence_fails_the_audit(capsys, monkeypatch, tmp_path):
    (tmp_path / "cpu.lock").write_text(f"nobody-knows-it==1.0 \\\n    --hash=sha256:{'a' * 64}\n")
    monkeypatch.setattr(locks, "DOCKER", tmp_path)
    code, printed = run(capsys, monkeypatch, "--lock", "cpu", "--output-dir", tmp_path / "out")
    assert code == 2
    assert "Without a known licence: nobody-knows-it 1.0." in printed
    (component,) = json.loads((tmp_path / "out" / "cpu.cdx.json").read_text())["components"]
    assert "licenses" not in component


def test_a_pin_without_a_hash_is_refused_by_its_line(monkeypatch, tmp_path):
    (tmp_path / "cpu.lock").write_text(f"good==1.0 \\\n    --hash=sha256:{'a' * 64}\nbad==2.0\n")
    monkeypatch.setattr(locks, "DOCKER", tmp_path)
    with pytest.raises(InputError, match=r"cpu\.lock:3: bad==2\.0: has no hash"):
        read_locks(("cpu",))
    with pytest.raises(InputError, match=r"--lock gpu: is none of .*did you mean cpu\?"):
        read_locks(("gpu",))


@pytest.mark.slow
def test_what_is_not_installed_is_read_from_the_index_and_nothing_is_installed(monkeypatch, tmp_path):
    """By a real pip, and an index that is a folder with one wheel."""
    from auditing.licences import Licence, update

    wheel = tmp_path / "far_away-1.5-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as target:
        lines = "Metadata-Version: 2.4\nName: far.away\nVersion: 1.5\nLicense-Expression: MPL-2.0\n"
        target.writestr("far_away-1.5.dist-info/METADATA", lines)
        target.writestr("far_away-1.5.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        target.writestr("far_away-1.5.dist-info/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(licences, "TABLE", tmp_path / "licences.tsv")
    table.cache_clear()
    try:
        trl = metadata.version("trl")
        assert update([Package("far-away", "1.5", (), (), True), Package("trl", trl, (), (), True)]) == 2
        assert table()["far-away", "1.5"] == Licence("MPL-2.0", "MPL-2.0")
        assert table()["trl", trl].expression == "Apache-2.0"
    finally:
        table.cache_clear()
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("far-away")


# --- the SBOM


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cuda-vllm", "lm-eval", "sources", "bootstrap"]
)  # cpu and cuda are parts of the first
def test_the_official_schema_accepts_it(name):
    with zipfile.ZipFile(SCHEMAS) as archive:
        schemas = {file: json.loads(archive.read(file)) for file in archive.namelist() if file.endswith(".json")}
    at = "http://cyclonedx.org/schema/"
    registry = Registry().with_resources([(at + file, Resource.from_contents(it)) for file, it in schemas.items()])
    validator = Draft7Validator(schemas["bom-1.6.SNAPSHOT.schema.json"], registry=registry)
    document = json.loads(sbom(read_locks((name,))[0]))
    assert [error.message for error in validator.iter_errors(document)] == []
    document["components"][0]["hashes"][0]["content"] = "no hash"
    assert not validator.is_valid(document)


def test_it_holds_what_the_lock_holds():
    lock = read_locks(("cpu",))[0]
    text = lock.file.read_text()
    document = json.loads(sbom(lock))
    components = {component["name"]: component for component in document["components"]}
    assert len(components) == len(re.findall(r"^[\w.-]+==", text, re.M))
    assert sum(len(component["hashes"]) for component in components.values()) == text.count("--hash=sha256:")
    assert components["torch"]["purl"] == f"pkg:pypi/torch@{components['torch']['version'].replace('+', '%2B')}"
    assert components["unsloth-zoo"]["licenses"] == [{"expression": "LGPL-3.0-or-later"}]
    needed = {one["ref"]: one["dependsOn"] for one in document["dependencies"]}
    assert len(needed) == len(components) + 1
    assert components["accelerate"]["purl"] in needed[components["trl"]["purl"]]  # "# via ... trl" in the lock
    for direct in ("trl", "torch"):
        assert components[direct]["purl"] in needed["post-training-recipes"]
    assert components["mdurl"]["purl"] not in needed["post-training-recipes"]


def test_the_same_lock_gives_the_same_bytes_and_without_a_database_it_says_so(tmp_path):
    words = [sys.executable, ROOT / "scripts" / "audit.py", "--output-dir", tmp_path, "--lock", "cpu", "lm-eval"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    done = subprocess.run(words, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for lock in read_locks(("cpu", "lm-eval")):
        assert (tmp_path / f"{lock.name}.cdx.json").read_text(encoding="utf-8") == sbom(lock)
    assert "Advisories: NOT CHECKED, no database was given." in done.stdout
    assert re.search(r"LGPL-3.0-or-later +unsloth-zoo \S+ +cpu\n", done.stdout)


# --- advisories


def advisory(name: str, package: str, *events: dict[str, str], **more: object) -> dict:
    affected = {
        "package": {"ecosystem": more.pop("ecosystem", "PyPI"), "name": package},
        "ranges": [{"type": "ECOSYSTEM", "events": list(events)}] if events else [],
        "versions": more.pop("versions", []),
    }
    return {"id": name, "modified": "2026-11-01T00:00:00Z", "summary": "planted", "affected": [affected], **more}


def written(folder: Path, *entries: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for entry in entries:
        (folder / f"{entry['id']}.json").write_text(json.dumps(entry))
    return folder


def of(folder: Path, version: str, *entries: dict, name: str = "some-package") -> list[str]:
    database = Database(written(folder, *entries), {name})
    return [one.id for one in database.of(Package(name, version, (), (), True))]


def test_a_version_is_affected_when_it_is_listed_or_in_a_range(tmp_path):
    two = ({"introduced": "1.0"}, {"fixed": "1.2"}, {"introduced": "2.0"}, {"fixed": "2.0.1"})
    for number, (version, entry, affected) in enumerate(
        [
            ("1.1", advisory("A", "Some_Package", *two), True),  # another spelling of the name
            ("1.2", advisory("A", "some-package", *two), False),
            ("2.0", advisory("A", "some-package", *two), True),
            ("2.0+cpu", advisory("A", "some-package", *two), True),
            ("2.0.1", advisory("A", "some-package", *two), False),
            ("0.9", advisory("A", "some-package", *two), False),
            ("1.10", advisory("A", "some-package", {"introduced": "0"}, {"last_affected": "1.9"}), False),
            ("1.9", advisory("A", "some-package", {"introduced": "0"}, {"last_affected": "1.9"}), True),
            ("3.0", advisory("A", "some-package", {"introduced": "0"}), True),
            ("3.0", advisory("A", "some-package", versions=["3", "4"]), True),
            ("3.1", advisory("A", "some-package", versions=["3", "4"]), False),
            ("3.0", advisory("A", "some-package", {"introduced": "0"}, withdrawn="2026-01-01T00:00:00Z"), False),
            ("3.0", advisory("A", "some-package", {"introduced": "0"}, ecosystem="npm"), False),
            ("3.0", advisory("A", "other", {"introduced": "0"}), False),
            ("3.0", advisory("A", "some-package", {"introduced": "0"}, {"fixed": "2004b-final"}), True),  # not PEP 440
        ]
    ):
        assert bool(of(tmp_path / str(number), version, entry)) is affected, (version, entry)


def test_two_names_of_one_advisory_are_one(tmp_path):
    everything = {"introduced": "0"}
    one = advisory("GHSA-1", "some-package", everything, aliases=["CVE-2026-1"])
    other = advisory("PYSEC-2026-1", "some-package", everything, aliases=["CVE-2026-1", "GHSA-1"])
    assert of(tmp_path, "1.0", one, other, advisory("PYSEC-2026-2", "some-package", everything)) == [
        "GHSA-1",
        "PYSEC-2026-2",
    ]


def test_a_planted_advisory_fails_the_audit_until_it_is_accepted(capsys, monkeypatch, tmp_path):
    trl = next(package for package in read_locks(("cpu",))[0].packages if package.name == "trl")
    bad = advisory("GHSA-aaaa", "trl", {"introduced": "0"}, {"fixed": "99.0"}, aliases=["CVE-2026-9"])
    bad["database_specific"] = {"severity": "HIGH"}
    folder = written(tmp_path / "osv", bad, advisory("GHSA-bbbb", "not-here", {"introduced": "0"}))
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for file in folder.iterdir():
            target.write(file, file.name)
    for place in (folder, archive):
        words = ("--lock", "cpu", "--output-dir", tmp_path / "out", "--advisories", place)
        code, printed = run(capsys, monkeypatch, *words)
        assert code == 2
        assert f"trl {trl.version}: GHSA-aaaa = CVE-2026-9, high, fixed in 99.0: planted" in printed
        assert "Advisories: 1 for " in printed
        assert "2 were read, the newest of 2026-11-01." in printed
        code, printed = run(capsys, monkeypatch, *words, "--accept", "CVE-2026-9")
        assert (code, "accepted: trl" in printed) == (0, True)
    code, printed = run(capsys, monkeypatch, *words, "--accept", "CVE-2020-1")
    assert (code, "--accept CVE-2020-1: no package" in printed) == (2, True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("osv", None, "give a folder or a zip"),
        ("osv.zip", "no zip", "give a folder or a zip"),
        ("osv/a.json", "{", "is no JSON"),
        ("osv/a.json", "[1]", "is no advisory in OSV's format"),
        ("osv/a.txt", "x", "holds no advisory"),
    ],
)
def test_a_database_that_is_none_is_refused_and_no_silent_pass(name, content, message, tmp_path):
    file = tmp_path / name
    if content:
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    with pytest.raises(InputError, match=message):
        Database(tmp_path / name.partition("/")[0], set())


def test_purls_are_names_in_lower_case_with_the_version_encoded():
    assert purl(Package("a-b", "1.0+cpu", (), (), True)) == "pkg:pypi/a-b@1.0%2Bcpu"
    assert lock_names()[-1] == "sources"
