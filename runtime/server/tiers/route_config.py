"""Routes as data: --route and the file of --route-config, checked before anything starts.

A route's file:

    upstreams:
      large: {url: https://api.example.com/v1, model: big-model, api_key_env: BIG_KEY}
    routes:
      auto:
        tiers: [small, large]
        rules:
          - {when: {tools: true}, tier: large}
        uncertainty: {small: {tokens: 16, first: {bias: 3.1, weights: {...}, threshold: 0.6}}}
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from llmkit.common.errors import UsageError
from llmkit.common.formatting import nearest
from llmkit.common.yaml_file import YamlFile
from llmkit.runtime.server.tiers.signals import sigmoid
from llmkit.runtime.server.tiers.uncertainty import (
    UNCALIBRATED,
    Calibration,
    Probability,
    Settings,
    Uncertainty,
)
from llmkit.runtime.server.tiers.upstream_urls import URL_PREFIX, is_upstream

ROUTE_FORM = "NAME=TIER,TIER[:RULE...] was expected, such as auto=small,large:tools"
_RULE_FORMS = "tools, prompt_chars>=N, key=NAME, header.NAME=VALUE or threshold=P"
_MAX_EMBEDDING = 65_536  # numbers

Name = Annotated[str, Field(min_length=1, max_length=256)]
HeaderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")]


class Learned(Settings):
    """A logistic regression from a prompt's embedding to the probability that the tier will do."""

    model: Name  # the model whose /v1/embeddings is asked
    bias: float
    weights: Annotated[list[float], Field(min_length=1, max_length=_MAX_EMBEDDING)]
    # A prompt with a lower probability goes to the next tier at once.
    threshold: Probability

    def probability(self, embedding: Sequence[float]) -> float:
        """The probability for an embedding of as many numbers as `weights`."""
        products = (w * x for w, x in zip(self.weights, embedding, strict=True))
        return sigmoid(self.bias + sum(products))


class Condition(Settings):
    """What a request must be; all fields given must hold."""

    min_prompt_chars: Annotated[int, Field(ge=1)] | None = None
    max_prompt_chars: Annotated[int, Field(ge=0)] | None = None
    tools: bool | None = None  # whether the request offers tools
    key: Name | None = None  # the name of a key in --api-key-file
    model: Name | None = None  # the route's name, or one of its aliases
    # Values of headers by name; "*" is any value.
    headers: dict[HeaderName, str] = Field(default_factory=dict)


class Rule(Settings):
    """Sends the requests of a condition to one tier, whose answer is not questioned."""

    when: Condition
    tier: Name


class Route(Settings):
    """A name that clients use as a model, and what answers it."""

    tiers: Annotated[list[Name], Field(min_length=1, max_length=8)]  # the cheapest first
    aliases: list[Name] = Field(default_factory=list)
    # The first that holds decides.
    rules: list[Rule] = Field(default_factory=list, max_length=256)
    # By tier; None: UNCALIBRATED for all tiers but the last. An empty one: only rules decide.
    uncertainty: dict[Name, Uncertainty] | None = None
    learned: Learned | None = None  # asked when no rule holds
    # Whether another tier answers when one is down.
    fallback: bool = True


class Upstream(Settings):
    """A tier at a URL: any OpenAI-compatible server that the operator chose."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$", max_length=2048)]
    model: Name | None = None  # its name there; None: the tier's name
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    api_key_file: Path | None = None  # its first line
    # Send the client's own key instead; otherwise no key of a client leaves this server.
    forward_client_key: bool = False
    connect_timeout: Annotated[float, Field(gt=0, le=600)] = 10.0  # seconds
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 600.0  # the longest silence, seconds
    ca_file: Path | None = None  # PEM; None: the system's certificate authorities


class RoutesFile(Settings):
    """The content of a file of --route-config."""

    upstreams: dict[Name, Upstream] = Field(default_factory=dict)
    routes: dict[Name, Route] = Field(default_factory=dict)


@dataclass(frozen=True)
class Routing:
    """The routes and upstreams of a router, whose names are unique."""

    routes: Mapping[str, Route]
    upstreams: Mapping[str, Upstream]

    def num_local(self, models: Collection[str]) -> int:
        """The most local models that one route needs at the same time."""
        counts = [len(set(route.tiers) & set(models)) for route in self.routes.values()]
        return max(counts, default=1)


def split_upstreams(models: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Upstream]]:
    """Split the models of a command line into local ones and URLs, by name.

    A URL is url:ADDRESS, or begins with http:// or https://. It may end with #MODEL, the model's
    name there. Raises UsageError for a URL that is none.
    """
    local: dict[str, str] = {}
    upstreams: dict[str, Upstream] = {}
    for name, reference in models.items():
        if not is_upstream(reference):
            local[name] = reference
            continue
        address, _, model = reference.removeprefix(URL_PREFIX).partition("#")
        try:
            upstreams[name] = Upstream(url=address, model=model or None)
        except ValidationError as error:
            raise UsageError(
                f"{name}={reference}: {_reason(error.errors(include_url=False)[0])}",
                "http://HOST/v1 or https://HOST/v1 was expected, without a user or a query",
            ) from None
    return local, upstreams


def load_routing(
    words: Sequence[str],
    file: Path | None,
    local_models: Collection[str],
    upstreams: Mapping[str, Upstream],
    key_names: Collection[str] = (),
) -> Routing:
    """The routes of --route and of a file.

    local_models, upstreams: those of the command line. key_names: of --api-key-file. Raises
    UsageError for a wrong value, a tier that is not there, and a name that is used twice.
    """
    content = RoutesFile()
    where = YamlFile(file).where if file is not None else lambda path: "--route"
    if file is not None:
        content = _read_file(file)
    for name in content.upstreams:
        if name in local_models or name in upstreams:
            raise UsageError(f"{where(['upstreams', name])}: {name!r} is a model already")
    all_upstreams = {**upstreams, **content.upstreams}
    routes = dict(content.routes)
    places = {name: where(["routes", name]) for name in routes}
    for word in words:
        name, route = parse_route(word)
        if name in routes:
            raise UsageError(f"--route {word}: the route {name!r} is in {places[name]}, too")
        routes[name] = route
        places[name] = f"--route {word}"
    known = [*local_models, *all_upstreams]
    taken = set(known)
    for name, route in routes.items():
        _check_route(places[name], name, route, known, key_names)
        for own in (name, *route.aliases):
            if own in taken:
                raise UsageError(
                    f"{places[name]}: the name {own!r} is taken",
                    "A name that no model, route or alias has was expected",
                )
            taken.add(own)
    return Routing(routes, all_upstreams)


def parse_route(word: str) -> tuple[str, Route]:
    """Parse "auto=small,large:tools:prompt_chars>=8000:threshold=0.7".

    Every rule sends its requests to the last tier. Raises UsageError.
    """
    name, equals, rest = word.partition("=")
    tier_text, *rule_words = rest.split(":")
    tiers = [tier.strip() for tier in tier_text.split(",")]
    if not equals or not name.strip() or not all(tiers):
        raise UsageError(f"--route {word!r} is not understood", ROUTE_FORM)
    uncertainty = None
    rules = []
    for rule_word in rule_words:
        key, _, value = rule_word.partition("=")
        if key == "threshold":
            uncertainty = {
                tier: UNCALIBRATED.with_threshold(_probability(word, value)) for tier in tiers[:-1]
            }
        else:
            rules.append(Rule(when=_parse_condition(word, rule_word), tier=tiers[-1]))
    try:
        return name.strip(), Route(tiers=tiers, rules=rules, uncertainty=uncertainty)
    except ValidationError as error:
        reason = _reason(error.errors(include_url=False)[0])
        raise UsageError(f"--route {word!r}: {reason}", ROUTE_FORM) from None


def _parse_condition(word: str, rule_word: str) -> Condition:
    length = re.fullmatch(r"prompt_chars>=([1-9][0-9]{0,8})", rule_word)
    if length:
        return Condition(min_prompt_chars=int(length[1]))
    if rule_word == "tools":
        return Condition(tools=True)
    key, _, value = rule_word.partition("=")
    try:
        if key == "key":
            return Condition(key=value)
        if key.startswith("header.") and value:
            return Condition(headers={key.removeprefix("header."): value})
    except ValidationError:
        pass  # the same error as for an unknown rule
    raise UsageError(
        f"--route {word!r}: the rule {rule_word!r} is not understood", f"Rules are {_RULE_FORMS}"
    )


def _probability(word: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageError(
            f"--route {word!r}: the threshold {text!r} is wrong", "0 to 1 was expected"
        )
    return value


def _read_file(path: Path) -> RoutesFile:
    file = YamlFile(path)
    try:
        return RoutesFile.model_validate(file.content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = [step for step in first["loc"] if isinstance(step, str | int)]
        expected = ""
        if first["type"] == "extra_forbidden" and location:
            expected = _known_fields(location)
        name = ".".join(map(str, location)) or "the file"
        raise UsageError(f"{file.where(location)}: {name}: {_reason(first)}", expected) from None


def _known_fields(location: Sequence[str | int]) -> str:
    """What to say to an unknown field: the nearest one."""
    models: tuple[type[Settings], ...] = (
        RoutesFile,
        Route,
        Rule,
        Condition,
        Uncertainty,
        Calibration,
        Learned,
        Upstream,
    )
    fields = dict.fromkeys(name for model in models for name in model.model_fields)
    return nearest(str(location[-1]), fields)


def _reason(error: Any) -> str:
    return "it is not a field" if error["type"] == "extra_forbidden" else str(error["msg"])


def _check_route(
    place: str, name: str, route: Route, known: Sequence[str], key_names: Collection[str]
) -> None:
    """Raises UsageError for a tier or a key that is not there."""
    for tier in route.tiers:
        if tier not in known:
            raise UsageError(
                f"{place}: the tier {tier!r} of {name!r} is not a model of this server",
                nearest(tier, known, "Models are"),
                f"Add {tier}=MODEL or {tier}=https://HOST/v1",
            )
    if len(set(route.tiers)) < len(route.tiers):
        raise UsageError(f"{place}: a tier of {name!r} is named twice")
    learned_models = [route.learned.model] if route.learned else []
    if any(model not in known for model in learned_models):
        raise UsageError(
            f"{place}: learned.model {learned_models[0]!r} is not a model of this server",
            nearest(learned_models[0], known, "Models are"),
        )
    others = [("uncertainty", tier) for tier in route.uncertainty or ()]
    others += [("rules", rule.tier) for rule in route.rules]
    for field, tier in others:
        if tier not in route.tiers:
            raise UsageError(
                f"{place}: {field} names {tier!r}, which is no tier of {name!r}",
                f"Its tiers are {', '.join(route.tiers)}",
            )
    if route.tiers[-1] in (route.uncertainty or ()):
        raise UsageError(
            f"{place}: uncertainty of {route.tiers[-1]!r}, the last tier of {name!r}",
            "No tier comes after it, so its answers always stand",
        )
    _check_conditions(place, name, route, key_names)


def _check_conditions(place: str, name: str, route: Route, key_names: Collection[str]) -> None:
    names = (name, *route.aliases)
    for rule in route.rules:
        condition = rule.when
        if condition == Condition():
            raise UsageError(
                f"{place}: a rule of {name!r} has no condition",
                f"`when` has one or more of {', '.join(Condition.model_fields)}",
            )
        if condition.key is not None and condition.key not in key_names:
            raise UsageError(
                f"{place}: no key has the name {condition.key!r}",
                _listed("Names in --api-key-file are", key_names),
                "Write name=NAME after the key",
            )
        if condition.model is not None and condition.model not in names:
            raise UsageError(
                f"{place}: a rule's model {condition.model!r} is no name of {name!r}",
                f"Its names are {', '.join(names)}",
            )


def _listed(head: str, words: Iterable[str]) -> str:
    return f"{head} {', '.join(words) or 'none'}"
