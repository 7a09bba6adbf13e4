"""A Gateway API HTTPRoute that divides a model's traffic between two versions of it.

The first Service of a rule is the old version, the second one is the new version. An existing file
keeps its text: only names and weights of Services are replaced in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmkit.common.errors import InputError, UsageError

# Shares are hundredths of a percent. A Gateway only looks at the weights' ratio.
TOTAL_WEIGHT = 10_000
_KIND = "HTTPRoute"
# A label of RFC 1035, which the name of a Service is.
_SERVICE = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Traffic:
    """How the requests of a route are divided."""

    old: str  # a Service
    new: str
    share: float  # of `new`, 0 to 1

    @property
    def weights(self) -> tuple[int, int]:
        """The weights of both Services."""
        new = round(self.share * TOTAL_WEIGHT)
        return TOTAL_WEIGHT - new, new

    def with_new(self, service: str) -> Traffic:
        """The same traffic, with `service` as the new version, which gets a share next.

        Raises UsageError when the old and the new version both have traffic.
        """
        if service == self.new:
            return self
        if 0 < self.share < 1:
            raise UsageError(
                f"--next {service}: {self.old} and {self.new} both have traffic",
                todo="End that rollout first, with --promote or --rollback",
            )
        live = self.new if self.share else self.old
        if service == live:
            raise UsageError(
                f"--next {service}: it has all traffic already",
                "The Service of another version was expected",
            )
        return Traffic(live, service, 0.0)


@dataclass(frozen=True)
class RouteTemplate:
    """What a new HTTPRoute has beside its traffic."""

    name: str
    gateway: str
    port: int  # of both Services
    mirror_percent: int = 0  # of the requests to copy to the new version


class RouteFile:
    """A file of YAML documents, one of which is the HTTPRoute `name`.

    Raises InputError when it is not there, or has no rule with two Services.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._text = _read(path)
        self._rules = list(self._find_rules(_documents(path, self._text)))
        found = {self._traffic_of(rule) for rule in self._rules}
        if len(found) != 1:
            raise InputError(
                f"{path}: the rules of the {_KIND} {name!r} divide traffic in different ways"
                if found
                else f"{path}: no rule of the {_KIND} {name!r} has two backendRefs",
                "Two Services with a weight each were expected",
                "`llmkit deploy gateway` writes such a file where there is none",
            )
        (self.traffic,) = found

    @property
    def mirrors(self) -> set[str]:
        """The Services that get copies of requests."""
        rules = _items(_fields(self._route.get("spec")).get("rules"))
        filters = [_fields(one) for rule in rules for one in _items(_fields(rule).get("filters"))]
        backends = (_fields(one.get("requestMirror")).get("backendRef") for one in filters)
        return {_scalar(_fields(backend).get("name")) for backend in backends} - {""}

    def with_traffic(self, traffic: Traffic) -> str:
        """The file's text with other Services and weights."""
        # By place: rules may have the same list, by an alias.
        changes: dict[tuple[int, int], str] = {}
        services = (traffic.old, traffic.new)
        for rule in self._rules:
            for backend, service, weight in zip(rule, services, traffic.weights, strict=True):
                changes[_place(backend["name"])] = service
                changes[_place(backend["weight"])] = str(weight)
        text = self._text
        # From the end, so that the places before stay.
        for (start, end), value in sorted(changes.items(), reverse=True):
            text = text[:start] + value + text[end:]
        return text

    def _find_rules(
        self, documents: Sequence[yaml.Node]
    ) -> Iterator[Sequence[Mapping[str, yaml.Node]]]:
        """The Services of each rule that has two."""
        routes = [
            document
            for document in map(_fields, documents)
            if _scalar(document.get("kind")) == _KIND
            and _scalar(_fields(document.get("metadata")).get("name")) == self._name
        ]
        if len(routes) != 1:
            raise InputError(
                f"{self._path} has {len(routes)} objects {_KIND} with the name {self._name!r}",
                "One was expected",
            )
        (self._route,) = routes
        for rule in _items(_fields(self._route.get("spec")).get("rules")):
            backends = [_fields(node) for node in _items(_fields(rule).get("backendRefs"))]
            if len(backends) == 2:
                yield backends

    def _traffic_of(self, rule: Sequence[Mapping[str, yaml.Node]]) -> Traffic:
        weights = []
        for backend in rule:
            text = _scalar(backend.get("weight"))
            if not text.isdecimal() or not _scalar(backend.get("name")):
                raise InputError(
                    f"{self._path}: a backendRef of the {_KIND} {self._name!r} has no weight",
                    "A name and a weight were expected, such as {name: llmkit, weight: 1}",
                )
            weights.append(int(text))
        if not sum(weights):
            raise InputError(f"{self._path}: both weights of {self._name!r} are 0")
        old, new = (_scalar(backend.get("name")) for backend in rule)
        return Traffic(old, new, weights[1] / sum(weights))


def check_service(option: str, name: str) -> None:
    """Raise UsageError unless Kubernetes allows the name for a Service."""
    if not _SERVICE.fullmatch(name):
        raise UsageError(
            f"{option}: {name!r} is not a name of a Service",
            "Up to 63 small letters, digits and hyphens were expected, a letter first",
        )


def new_route(template: RouteTemplate, traffic: Traffic) -> str:
    """The text of a new HTTPRoute."""
    backends = [
        {"name": service, "port": template.port, "weight": weight}
        for service, weight in zip((traffic.old, traffic.new), traffic.weights, strict=True)
    ]
    rule: dict[str, Any] = {"timeouts": {"request": "0s"}, "backendRefs": backends}
    if template.mirror_percent:
        backend = {"name": traffic.new, "port": template.port}
        mirror = {"backendRef": backend, "percent": template.mirror_percent}
        rule["filters"] = [{"type": "RequestMirror", "requestMirror": mirror}]
    document = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": _KIND,
        "metadata": {"name": template.name},
        "spec": {"parentRefs": [{"name": template.gateway}], "rules": [rule]},
    }
    comment = (
        "# The first Service is the old version, the second one the new version. Streams may take\n"
        "# long, so there is no limit of time (0s). `llmkit deploy gateway` changes the weights.\n"
    )
    return comment + yaml.safe_dump(document, sort_keys=False)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"{path} cannot be read ({reason})") from None


def _documents(path: Path, text: str) -> list[yaml.Node]:
    """The documents as nodes, which know their places in the text."""
    try:
        nodes: list[yaml.Node] = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(
            f"{path} is not valid YAML ({getattr(error, 'problem', None) or error})"
        ) from None
    return nodes


def _place(node: yaml.Node) -> tuple[int, int]:
    """Where a node begins and ends in the text."""
    return node.start_mark.index, node.end_mark.index


def _fields(node: yaml.Node | None) -> dict[str, yaml.Node]:
    """The values of a mapping by key; empty for anything else."""
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {key.value: value for key, value in node.value}


def _items(node: yaml.Node | None) -> list[yaml.Node]:
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _scalar(node: yaml.Node | None) -> str:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else ""
