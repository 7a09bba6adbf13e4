"""Compares data/operators.yaml with the definitions in operators' releases.

    python tests/support/operator_definitions.py FOLDER

FOLDER has the files that the first document of operators.yaml names, under any name. Run it when a
version is raised there.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parents[1] / "data" / "operators.yaml"
# Sources by apiVersion, and descriptions by apiVersion and kind.
DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all(DATA.read_text()))
_WORDS = ("enum", "minimum", "maximum", "minItems", "maxItems")


def compare(folder: Path) -> list[str]:
    """What is different, one line for each place."""
    definitions: dict[tuple[str, str], Any] = {}
    for path in folder.glob("*.yaml"):
        for one in filter(None, yaml.safe_load_all(path.read_text())):
            for version in one["spec"]["versions"]:
                key = f"{one['spec']['group']}/{version['name']}", one["spec"]["names"]["kind"]
                definitions[key] = version["schema"]["openAPIV3Schema"]
    sources, descriptions = DOCUMENTS
    differences = []
    for version in sources:
        for kind, description in descriptions[version].items():
            where = f"{version} {kind}"
            if (version, kind) in definitions:
                differences += _differences(description, definitions[version, kind], where)
            else:
                differences.append(f"{where}: no definition")
    return differences


def wrong_files(folder: Path) -> list[str]:
    """The sources that are not in the folder, by their digests."""
    found = {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.yaml")}
    return [
        f"{source['project']} {source['version']}: {source['file']} is not here"
        for sources in DOCUMENTS[0].values()
        for source in sources
        if source["sha256"] not in found
    ]


def _differences(description: Any, official: Any, where: str) -> Iterator[str]:
    """Compare the fields that a description has."""
    # A reference is to an object of Kubernetes itself.
    if official.get("type") != description.get("type", "object"):
        yield f"{where}: type"
    for word in _WORDS:
        if official.get(word) != description.get(word):
            yield f"{where}: {word}"
    required = set(official.get("required", ()))
    if "properties" in description and required != set(description.get("required", ())):
        yield f"{where}: required"
    for name, one in description.get("properties", {}).items():
        if name in official.get("properties", {}):
            yield from _differences(one, official["properties"][name], f"{where}.{name}")
        else:
            yield f"{where}.{name}: unknown"
    for word in ("items", "additionalProperties"):
        if isinstance(description.get(word), dict):
            yield from _differences(description[word], official.get(word, {}), f"{where}[]")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    problems = wrong_files(folder) + compare(folder)
    sys.stdout.write("".join(f"{problem}\n" for problem in problems))
    sys.exit(bool(problems))
