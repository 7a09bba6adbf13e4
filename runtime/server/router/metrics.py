"""The metrics of several servers as one text: each sample gets the name of its model as a label."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmkit.runtime.server.router.fleet import Model

_SAMPLE = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def merged(models: Sequence[Model], texts: Mapping[str, str]) -> bytes:
    """The exposition text. texts: that of each model that is loaded, by name."""
    families: dict[str, list[str]] = {}
    heads: dict[str, list[str]] = {}
    for name, text in texts.items():
        label, family = f'model="{_escaped(name)}"', ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                lines = heads.setdefault(family, [])
                lines += [] if line in lines else [line]
            elif (match := _SAMPLE.match(line)) is not None:
                rest = line[match.end() :]
                labels = f"{{{label},{rest[1:]}" if rest.startswith("{") else f"{{{label}}}{rest}"
                families.setdefault(family, []).append(match[0] + labels)
    parts = ["\n".join([*heads[family], *samples]) for family, samples in families.items()]
    return "\n".join([*parts, *_own(models), ""]).encode()


def _own(models: Sequence[Model]) -> list[str]:
    own = (
        ("model_loaded", "gauge", "Whether the model takes requests now.", lambda m: int(m.state == "loaded")),
        ("model_requests_waiting", "gauge", "Requests that wait for the model to be loaded.", lambda m: m.waiting),
        ("model_loads_total", "counter", "Times that the model was loaded.", lambda m: m.loads),
        ("model_failures_total", "counter", "Times that it could not be, or ended by itself.", lambda m: m.failures),
    )
    lines = []
    for name, kind, text, read in own:
        lines += [f"# HELP llmkit:{name} {text}", f"# TYPE llmkit:{name} {kind}"]
        lines += [f'llmkit:{name}{{model="{_escaped(model.name)}"}} {read(model)}' for model in models]
    return lines


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
