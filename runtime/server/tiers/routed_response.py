"""The response of a route: asks its tiers in turn until an answer stands, and forwards that one.

Nothing is sent to the client before a tier is chosen, except the keep-alive comments of a stream.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import aiohttp
from fastapi import Response
from starlette.types import Receive, Scope, Send

from llmkit.runtime.server.http.http_errors import invalid
from llmkit.runtime.server.router.client_stream import ClientStream
from llmkit.runtime.server.router.forward import server_ended, until_disconnect
from llmkit.runtime.server.tiers.prompt_facts import PromptFacts, first_rule
from llmkit.runtime.server.tiers.route_config import Learned, Route
from llmkit.runtime.server.tiers.route_metrics import RouteMetrics
from llmkit.runtime.server.tiers.tier import Tier, TierDownError, TierRequest
from llmkit.runtime.server.tiers.uncertainty import UNCALIBRATED, Uncertainty
from llmkit.runtime.server.tiers.url_logprobs import objects, parse_json

# Of a response: which tier answered, why, and what answers that were given up have cost.
ROUTE_HEADER = "x-llmkit-route"
_EMBEDDINGS = "/v1/embeddings"
_MAX_EMBEDDING_BYTES = 8 * 1024 * 1024


class NamedRoute:
    """A route with its tiers."""

    def __init__(
        self, name: str, route: Route, tiers: Mapping[str, Tier], metrics: RouteMetrics
    ) -> None:
        """tiers: all that the server has."""
        self.name = name
        self.metrics = metrics
        self.rules = route.rules
        self.learned = route.learned
        self.learned_tier = tiers[route.learned.model] if route.learned else None
        self.fallback = route.fallback
        self.tiers: Sequence[Tier] = [tiers[tier] for tier in route.tiers]
        uncertainty = route.uncertainty
        if uncertainty is None:
            uncertainty = dict.fromkeys(route.tiers[:-1], UNCALIBRATED)
        # For each tier: when its answer is given up.
        self.gates: Sequence[Uncertainty | None] = [uncertainty.get(tier) for tier in route.tiers]

    def position(self, tier: str) -> int:
        """The place of a tier, by name."""
        return next(index for index, one in enumerate(self.tiers) if one.name == tier)


class RoutedResponse(Response):
    """The response of a route to one request."""

    def __init__(
        self,
        route: NamedRoute,
        request: TierRequest,
        key_name: str,
        generates: bool,
        keep_alive_s: float | None,
    ) -> None:
        """key_name: of the client's key.

        generates: whether the path writes an answer. Otherwise the first tier answers, because
        token ids and embeddings of different models do not go together.
        """
        if request.body.get("previous_response_id") is not None:
            raise invalid(
                "previous_response_id",
                "A route cannot continue a response, because each tier keeps its own. Name the "
                "model that gave the response, or send the whole input.",
                "unsupported",
            )
        self._route = route
        self._request = request
        self._key_name = key_name
        self._generates = generates
        self._keep_alive_s = keep_alive_s
        self._spent: list[str] = []  # what answers that were given up have cost, for the header
        self._tier = route.tiers[0]  # asked last
        self._start_s = time.perf_counter()
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = ClientStream(send, scope["path"], self._keep_alive_s)
        try:
            await until_disconnect(self._respond(client), receive)
        except TierDownError as down:
            await client.send_error(down.error)
        except (aiohttp.ClientError, OSError) as error:
            await client.send_error(server_ended(self._tier.name, error))

    async def _respond(self, client: ClientStream) -> None:
        position, reason = 0, "first"
        may_gate = self._generates
        if self._generates:
            position, reason = await client.wait(self._first_tier())
            may_gate = reason != "rule"
        failed: set[int] = set()
        while True:
            gate = self._route.gates[position] if may_gate else None
            try:
                if await self._ask(client, position, gate, reason):
                    return
                position, reason = position + 1, "unsure"
            except TierDownError:
                self._route.metrics.record_failure(self._route.name, self._tier.name)
                failed.add(position)
                later = [i for i in range(position + 1, len(self._route.tiers)) if i not in failed]
                earlier = [i for i in range(position - 1, -1, -1) if i not in failed]
                if not (later or earlier) or not self._route.fallback or not self._generates:
                    raise
                # A larger tier is as good; of the smaller ones, the largest is, as it is.
                may_gate = may_gate and bool(later)
                position, reason = (later or earlier)[0], "fallback"

    async def _ask(
        self, client: ClientStream, position: int, gate: Uncertainty | None, reason: str
    ) -> bool:
        """Forward the answer of a tier and return True, or give it up and return False.

        Raises TierDownError before anything is forwarded.
        """
        route = self._route
        tier = self._tier = route.tiers[position]
        request = TierRequest(
            self._request.client, self._request.path, self._request.body, self._request.stream, gate
        )
        async with contextlib.AsyncExitStack() as stack:
            opened = await client.wait(stack.enter_async_context(tier.open(request)))
            if not opened.is_sure and opened.confidence is not None:
                tokens = opened.confidence.completion_tokens
                route.metrics.record_escalation(route.name, tier.name, tokens)
                self._spent.append(
                    f"{_token(tier.name)}_probability={opened.confidence.probability:g}; "
                    f"{_token(tier.name)}_tokens={tokens}"
                )
                return False
            if opened.confidence is not None:
                reason = "sure"
            if opened.confidence is not None or self._spent:
                route.metrics.record_held(route.name, time.perf_counter() - self._start_s)
            route.metrics.record_answer(route.name, tier.name, reason)
            header = "; ".join([_token(tier.name), f"reason={reason}", *self._spent])
            await client.forward(opened.answer, [(ROUTE_HEADER.encode(), header.encode())])
            return True

    async def _first_tier(self) -> tuple[int, str]:
        """The tier to ask first, and why."""
        route = self._route
        facts = PromptFacts.of(self._request.body, self._key_name, self._request.client.headers.get)
        rule = first_rule(route.rules, facts)
        if rule is not None:
            return route.position(rule.tier), "rule"
        if route.learned is not None and len(route.tiers) > 1 and facts.question:
            probability = await self._learned_probability(route.learned, facts.question)
            if probability is not None and probability < route.learned.threshold:
                return 1, "learned"
        return 0, "first"

    async def _learned_probability(self, learned: Learned, question: str) -> float | None:
        """The learned router's opinion; None where the embedding is not to be had."""
        assert self._route.learned_tier is not None
        body = {"model": learned.model, "input": question, "encoding_format": "float"}
        request = TierRequest(self._request.client, _EMBEDDINGS, body, stream=False)
        try:
            async with self._route.learned_tier.open(request) as opened:
                content = bytearray()
                async for chunk in opened.answer.chunks:
                    content += chunk
                    if len(content) > _MAX_EMBEDDING_BYTES:
                        break
        except (TierDownError, aiohttp.ClientError, OSError):
            self._route.metrics.record_failure(self._route.name, learned.model)
            return None
        embedding = embedding_in(parse_json(bytes(content)))
        if len(embedding) != len(learned.weights):
            self._route.metrics.record_failure(self._route.name, learned.model)
            return None
        return learned.probability(embedding)


def embedding_in(document: Any) -> list[float]:
    """The first embedding of a response of /v1/embeddings; empty where there is none."""
    entries = objects(document.get("data")) if isinstance(document, dict) else []
    embedding = entries[0].get("embedding") if entries else None
    if not isinstance(embedding, list) or not all(type(x) in (int, float) for x in embedding):
        return []
    return embedding


def _token(name: str) -> str:
    """A tier's name in a header."""
    return quote(name, safe="/:._-")
