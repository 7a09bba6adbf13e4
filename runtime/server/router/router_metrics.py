"""The metrics of several servers in one text: each sample gets its model's name as a label."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from llmkit.runtime.server.router.model_pool import PooledModel

_METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
# Name, type, help text and value of the pool's own metrics.
_POOL_METRICS: tuple[tuple[str, str, str, Callable[[PooledModel], int]], ...] = (
    (
        "model_loaded",
        "gauge",
        "Whether the model takes requests now.",
        lambda model: int(model.state == "loaded"),
    ),
    (
        "model_requests_waiting",
        "gauge",
        "Requests that wait for the model to be loaded.",
        lambda model: model.num_waiting,
    ),
    (
        "model_loads_total",
        "counter",
        "Times that the model was loaded.",
        lambda model: model.num_loads,
    ),
    (
        "model_failures_total",
        "counter",
        "Times that the model could not be loaded, or its server ended by itself.",
        lambda model: model.num_failures,
    ),
)


def merge_metrics(
    models: Sequence[PooledModel], texts: Mapping[str, str], num_open_sockets: int = 0
) -> bytes:
    """Return the Prometheus text. texts: from each loaded model's server, by model name.

    num_open_sockets: WebSockets, which the router has for all models.
    """
    samples: dict[str, list[str]] = {}
    comments: dict[str, list[str]] = {}
    for model_name, text in texts.items():
        model_label = f'model="{_escape(model_name)}"'
        family = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                family_comments = comments.setdefault(family, [])
                if line not in family_comments:
                    family_comments.append(line)
                continue
            match = _METRIC_NAME.match(line)
            if match is None:
                continue
            rest = line[match.end() :]
            if rest.startswith("{"):
                labels_and_value = f"{{{model_label},{rest[1:]}"
            else:
                labels_and_value = f"{{{model_label}}}{rest}"
            samples.setdefault(family, []).append(match[0] + labels_and_value)
    sockets = [
        "# HELP llmkit:open_websockets WebSockets that are open.",
        "# TYPE llmkit:open_websockets gauge",
        f"llmkit:open_websockets {num_open_sockets}",
    ]
    families = ["\n".join([*comments[family], *lines]) for family, lines in samples.items()]
    return "\n".join([*families, *_pool_metrics(models), *sockets, ""]).encode()


def _pool_metrics(models: Sequence[PooledModel]) -> list[str]:
    lines = []
    for name, metric_type, help_text, read in _POOL_METRICS:
        lines.append(f"# HELP llmkit:{name} {help_text}")
        lines.append(f"# TYPE llmkit:{name} {metric_type}")
        lines += [
            f'llmkit:{name}{{model="{_escape(model.name)}"}} {read(model)}' for model in models
        ]
    return lines


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
