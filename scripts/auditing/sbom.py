"""A lock as a CycloneDX 1.6 SBOM in JSON: the components with purl, licence and hashes, and which needs which.

https://cyclonedx.org/docs/1.6/json. It has no time of its making, so that the same lock gives the same bytes. A lock
lists the hash of every file of a release, for all platforms, and so does a component here; which of them was
installed depends on the machine.
"""

import hashlib
import json
import uuid
from typing import Any
from urllib.parse import quote

from auditing.licences import UNKNOWN, Licence, licence_of
from auditing.locks import Lock, Package, needs

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/schema/bom-1.6.schema.json")
OURS = "post-training-recipes"  # as pyproject.toml has it


def sbom(lock: Lock) -> str:
    """The SBOM of a lock, as text that ends with a newline."""
    sha256 = hashlib.sha256(lock.file.read_bytes()).hexdigest()
    edges = needs(lock)
    purls = {package.name: purl(package) for package in lock.packages}
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, f'{lock.file.name} {sha256}')}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": OURS,
                "name": OURS,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
                "properties": [
                    {"name": "recipes:lock", "value": f"docker/{lock.file.name}"},
                    {"name": "recipes:lock:sha256", "value": sha256},
                ],
            }
        },
        "components": [_component(package, licence_of(package)) for package in lock.packages],
        "dependencies": [
            {"ref": purls.get(name, OURS), "dependsOn": sorted(purls[needed] for needed in edges.get(name, []))}
            for name in ("", *purls)
        ],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def purl(package: Package) -> str:
    """The package URL, https://github.com/package-url/purl-spec: a name in lower case, "+" of a version encoded."""
    return f"pkg:pypi/{package.name}@{quote(package.version, safe='.-_~')}"


def _component(package: Package, licence: Licence) -> dict[str, Any]:
    known = {} if licence.expression == UNKNOWN else {"licenses": [{"expression": licence.expression}]}
    properties = [{"name": "recipes:licence:declared", "value": licence.declared}]
    if licence.parts:
        properties.append({"name": "recipes:licence:parts", "value": licence.parts})
    return {
        "type": "library",
        "bom-ref": purl(package),
        "name": package.name,
        "version": package.version,
        "hashes": [{"alg": "SHA-256", "content": content} for content in package.sha256],
        **known,
        "purl": purl(package),
        "properties": properties,
    }


def file_name(lock: Lock) -> str:
    """What the SBOM of a lock is called; *.cdx.json is the name that CycloneDX recommends."""
    return f"{lock.name}.cdx.json"
