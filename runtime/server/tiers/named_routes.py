"""All routes of a router by the names that clients use."""

from __future__ import annotations

from collections.abc import Mapping

from llmkit.runtime.server.router.model_pool import ModelPool
from llmkit.runtime.server.tiers.route_config import Route
from llmkit.runtime.server.tiers.route_metrics import RouteMetrics
from llmkit.runtime.server.tiers.routed_response import NamedRoute
from llmkit.runtime.server.tiers.tier import LocalTier, Tier


class NamedRoutes:
    """The routes by name and alias. A tier at a URL is a route of its own, too."""

    def __init__(
        self, routes: Mapping[str, Route], url_tiers: Mapping[str, Tier], pool: ModelPool
    ) -> None:
        self.metrics = RouteMetrics()
        tiers: dict[str, Tier] = {
            name: LocalTier(pool, model) for name, model in pool.models.items()
        }
        tiers |= url_tiers
        self.tiers = tiers  # by name
        self._routes: dict[str, NamedRoute] = {}
        for name in url_tiers:
            self._routes[name] = NamedRoute(name, Route(tiers=[name]), tiers, self.metrics)
        for name, route in routes.items():
            named = NamedRoute(name, route, tiers, self.metrics)
            self._routes |= dict.fromkeys((name, *route.aliases), named)

    @property
    def names(self) -> list[str]:
        """All names and aliases."""
        return list(self._routes)

    def __contains__(self, name: str) -> bool:
        return name in self._routes

    def __getitem__(self, name: str) -> NamedRoute:
        return self._routes[name]
