"""Lists the import circles among llmkit's modules. `make lint` runs this and fails if there is one.

Imports under `if TYPE_CHECKING` and imports inside functions count too. Two modules that need each
other's types are one idea in two files, or share something that belongs in a third.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]


def import_circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """The groups of modules that import each other, directly or through others."""
    reachable = {module: graph.find_upstream_modules(module) for module in graph.modules}
    groups: list[list[str]] = []
    grouped: set[str] = set()
    for module in sorted(graph.modules):
        if module in grouped:
            continue
        others = [other for other in reachable[module] if module in reachable[other]]
        if others:
            group = sorted({module, *others})
            groups.append(group)
            grouped.update(group)
    return groups


def main() -> int:
    """Print the circles; returns 1 when there are any."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["importlinter"]["root_packages"]
    groups = import_circles(grimp.build_graph(*packages))
    sys.stdout.write(f"Import circles: {len(groups)}\n")
    for group in groups:
        sys.stdout.write(f"  {', '.join(group)}\n")
    return 1 if groups else 0


if __name__ == "__main__":
    sys.exit(main())
