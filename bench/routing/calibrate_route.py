"""Calibrates a route: asks both tiers, compares their answers, fits when the small one will do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llmkit.bench.backends import ServedBackend, is_url
from llmkit.bench.gates import check_gates, parse_gate, require_gate_metrics
from llmkit.bench.load_client import query_server
from llmkit.bench.routing import agreement
from llmkit.bench.routing.agreement import Qualities
from llmkit.bench.routing.ask_tiers import TierClient, TierReply
from llmkit.bench.routing.fit_logistic import (
    Array,
    best_ridge,
    fit_logistic,
    held_out_predictions,
)
from llmkit.bench.routing.route_curve import (
    RouteOutcomes,
    area_under_roc,
    threshold_for_share,
)
from llmkit.bench.routing.route_options import RouteBenchOptions
from llmkit.bench.routing.route_prompts import RoutePrompt, read_prompts
from llmkit.bench.routing.route_report import RouteReport
from llmkit.common.errors import InputError, ShortageError, UsageError
from llmkit.common.progress import Progress
from llmkit.runtime.server.tiers.signals import SIGNALS
from llmkit.runtime.server.tiers.upstream_urls import URL_PREFIX

_SIGNAL_RIDGE = 1.0
_EMBEDDING_RIDGES = (1.0, 10.0, 100.0, 1000.0)
_GOOD = 0.5  # the quality from which an answer counts as good, for the AUC
_FIRST, _WHOLE, _LEARNED = "first tokens", "whole answer", "learned"


@dataclass(frozen=True)
class TierReference:
    """A tier of the command line: NAME=MODEL or NAME=URL."""

    name: str
    reference: str


@dataclass(frozen=True)
class _Fit:
    """A calibration: its parameters from all prompts, its curve from held-out predictions."""

    scores: Array  # [n] held-out probabilities
    threshold: float
    bias: float
    weights: Array  # [F]


def parse_tiers(words: Sequence[str]) -> list[TierReference]:
    """The two tiers of the command line. Raises UsageError."""
    tiers = []
    for word, default in zip(words, ("small", "large"), strict=False):
        name, equals, reference = word.partition("=")
        if not equals or "/" in name or Path(word).exists():
            name, reference = default, word
        if not name or not reference:
            raise UsageError(f"{word!r} is not NAME=MODEL")
        tiers.append(TierReference(name, reference.removeprefix(URL_PREFIX)))
    if len(words) != 2 or tiers[0].name == tiers[1].name:
        raise UsageError(
            f"{len(words)} tiers were given" if len(words) != 2 else "both tiers have one name",
            "Two tiers were expected, the cheap one first, such as small=MODEL large=MODEL",
        )
    return tiers


def calibrate_route(
    tiers: Sequence[TierReference], options: RouteBenchOptions, progress: Progress
) -> tuple[RouteReport, dict[str, Any]]:
    """The report, and the content of the route's file.

    Raises InputError and UsageError for wrong prompts and options, before a model is loaded where
    that is possible, and for answers without log probabilities.
    """
    prompts = read_prompts(options.prompts)
    gates = [parse_gate(gate) for gate in options.gates]
    metric_names = [*_METRICS, *(["route_gap_learned"] if options.learned else [])]
    require_gate_metrics(gates, metric_names, "a route")
    small_tier, large_tier = tiers
    embeddings = None
    with _client(small_tier, options, progress) as client:
        small = client.replies(prompts, options.max_tokens, options.tokens)
        if options.learned:
            embeddings = client.embeddings([prompt.question for prompt in prompts])
    with _client(large_tier, options, progress) as client:
        large = client.replies(prompts, options.max_tokens, options.tokens)
        measured = _measure(client, prompts, small, large)
    measure = agreement.choose(options.agreement, measured)
    fits = _fits(small, embeddings, measured[measure], options)
    outcomes = _outcomes(small, large, measured[measure], options)
    metrics = _metrics(fits, outcomes, options)
    first_large = fits[_FIRST].scores < fits[_FIRST].threshold
    gaps = {
        name: _outcomes(small, large, qualities, options).point(first_large).gap
        for name, qualities in sorted(measured.items(), key=lambda item: item[0] != measure)
    }
    report = RouteReport(
        (small_tier.name, large_tier.name),
        measure,
        len(prompts),
        metrics,
        {
            **{name: outcomes.curve(fit.scores) for name, fit in fits.items()},
            "random": outcomes.random(),
            "oracle": outcomes.oracle(),
        },
        gaps,
        _price_text(options),
        _notes(metrics),
        check_gates(gates, {"route": metrics}, None),
    )
    return report, _route_file(tiers, fits, options)


_METRICS = (
    "route_gap",
    "route_gap_whole",
    "route_large",
    "route_quality",
    "route_cost",
    "route_auc",
    "small_quality",
    "large_quality",
)


@contextlib.contextmanager
def _client(
    tier: TierReference, options: RouteBenchOptions, progress: Progress
) -> Iterator[TierClient]:
    """A client of a tier, whose server is started if it is a checkpoint."""
    if is_url(tier.reference):
        address, _, model = tier.reference.partition("#")
        yield TierClient(query_server(_base(address), model or None), options.concurrency, progress)
        return
    backend = ServedBackend(tier.name, tier.reference, 0, ["--device", options.device])
    try:
        backend.start()
        assert backend.server is not None
        yield TierClient(backend.server, options.concurrency, progress)
    finally:
        backend.stop()


def _base(address: str) -> str:
    return address.rstrip("/").removesuffix("/v1")


def _measure(
    client: TierClient,
    prompts: Sequence[RoutePrompt],
    small: Sequence[TierReply],
    large: Sequence[TierReply],
) -> dict[str, Qualities]:
    """Every measure of quality that can be had, by name."""
    found = {
        "exact": agreement.exact(small, large),
        "likelihood": agreement.likelihood(client, prompts, small, large),
        "embedding": agreement.embedding(client, small, large),
        "reference": agreement.reference(prompts, small, large),
    }
    return {name: qualities for name, qualities in found.items() if qualities is not None}


def _fits(
    small: Sequence[TierReply],
    embeddings: Sequence[Sequence[float]] | None,
    qualities: Qualities,
    options: RouteBenchOptions,
) -> dict[str, _Fit]:
    # The small tier's answer will do where it is as good as the large tier's.
    labels = np.clip(1.0 - (qualities.large - qualities.small), 0.0, 1.0)
    fits = {
        _FIRST: _fit(_signals([reply.first for reply in small]), labels, _SIGNAL_RIDGE, options),
        _WHOLE: _fit(_signals([reply.whole for reply in small]), labels, _SIGNAL_RIDGE, options),
    }
    if options.learned:
        if embeddings is None:
            raise InputError("--learned needs /v1/embeddings of the small tier, which failed")
        features = np.array(embeddings)
        ridge = best_ridge(features, labels, _EMBEDDING_RIDGES, options.seed)
        fits[_LEARNED] = _fit(features, labels, ridge, options)
    return fits


def _fit(features: Array, labels: Array, ridge: float, options: RouteBenchOptions) -> _Fit:
    scores = held_out_predictions(features, labels, ridge, options.seed)
    fit = fit_logistic(features, labels, ridge)
    return _Fit(scores, threshold_for_share(scores, options.large_share), fit.bias, fit.weights)


def _signals(values: Sequence[Mapping[str, float] | None]) -> Array:
    """Features [n, 3]. Raises InputError for answers without log probabilities."""
    missing = sum(value is None for value in values)
    if missing == len(values):
        raise InputError("the small tier's server returns no log probabilities")
    # An empty answer has no signals: it counts as the least sure one.
    known = np.array([[value[name] for name in SIGNALS] for value in values if value is not None])
    least_sure = [known[:, 0].min(), known[:, 1].min(), known[:, 2].max()]
    return np.array(
        [least_sure if value is None else [value[name] for name in SIGNALS] for value in values]
    )


def _outcomes(
    small: Sequence[TierReply],
    large: Sequence[TierReply],
    qualities: Qualities,
    options: RouteBenchOptions,
) -> RouteOutcomes:
    small_price, large_price = options.prices or (1.0, 1.0)
    # Without prices the cost is the large tier's tokens alone.
    small_price = small_price if options.prices else 0.0

    def tokens(replies: Sequence[TierReply], limit: int | None = None) -> Array:
        counts = [
            reply.prompt_tokens
            + (reply.completion_tokens if limit is None else min(limit, reply.completion_tokens))
            for reply in replies
        ]
        return np.array(counts, dtype=float)

    return RouteOutcomes(
        qualities.small,
        qualities.large,
        small_price * tokens(small),
        small_price * tokens(small, options.tokens),
        large_price * tokens(large),
    )


def _metrics(
    fits: Mapping[str, _Fit], outcomes: RouteOutcomes, options: RouteBenchOptions
) -> dict[str, float]:
    def at_threshold(name: str) -> Any:
        return outcomes.point(fits[name].scores < fits[name].threshold)

    point = at_threshold(_FIRST)
    good = outcomes.small_quality >= np.minimum(outcomes.large_quality, _GOOD)
    metrics = {
        "route_gap": point.gap,
        "route_gap_whole": at_threshold(_WHOLE).gap,
        "route_large": point.share,
        "route_quality": point.quality,
        "route_cost": point.cost,
        "route_auc": area_under_roc(fits[_FIRST].scores, good),
        "small_quality": float(outcomes.small_quality.mean()),
        "large_quality": float(outcomes.large_quality.mean()),
    }
    if options.learned:
        metrics["route_gap_learned"] = at_threshold(_LEARNED).gap
    return metrics


def _notes(metrics: Mapping[str, float]) -> list[str]:
    if metrics["large_quality"] > metrics["small_quality"]:
        return []
    return ["The large tier is not better than the small one here: there is no gap to keep."]


def _price_text(options: RouteBenchOptions) -> str:
    if not options.prices:
        return "cost: tokens of the large tier"
    small, large = options.prices
    return f"cost: {small:g} and {large:g} for a million tokens"


def _route_file(
    tiers: Sequence[TierReference], fits: Mapping[str, _Fit], options: RouteBenchOptions
) -> dict[str, Any]:
    """The content of a file for --route-config."""

    def calibration(name: str) -> dict[str, Any]:
        fit = fits[name]
        return {
            "bias": round(fit.bias, 6),
            "weights": {
                signal: round(float(weight), 6)
                for signal, weight in zip(SIGNALS, fit.weights, strict=True)
            },
            "threshold": round(fit.threshold, 6),
        }

    small, large = tiers
    route: dict[str, Any] = {
        "tiers": [small.name, large.name],
        "uncertainty": {
            small.name: {
                "tokens": options.tokens,
                "first": calibration(_FIRST),
                "whole": calibration(_WHOLE),
            }
        },
    }
    if _LEARNED in fits:
        fit = fits[_LEARNED]
        route["learned"] = {
            "model": small.name,
            "bias": round(fit.bias, 6),
            "threshold": round(fit.threshold, 6),
            "weights": [round(float(weight), 6) for weight in fit.weights],
        }
    return {"routes": {options.name: route}}


def write_route(path: Path, content: Mapping[str, Any], report: RouteReport) -> None:
    """Write a file for --route-config. Raises ShortageError."""
    small, large = report.tiers
    head = (
        f"# llmkit bench route: {small} before {large}, {report.num_prompts} prompts.\n"
        f"# At {100 * report.metrics['route_large']:.0f} % large calls"
        f" {100 * report.metrics['route_gap']:.0f} % of the gap is kept ({report.measure}).\n"
    )
    text = yaml.safe_dump(dict(content), sort_keys=False, default_flow_style=None, width=100)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + text, encoding="utf-8")
    except OSError as error:
        raise ShortageError(
            f"{path} cannot be written ({error.strerror})", todo="Choose another place"
        ) from error
