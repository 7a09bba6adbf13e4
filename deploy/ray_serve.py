"""`llmkit deploy ray`: models on a Ray cluster, behind one front. Public APIs of Ray Serve only.

By the command, each version of a model is a Serve application without a route, the fronts are one with the route "/",
and one more keeps the table that the fronts follow: deploying, promoting and rolling back are changes of it, before or
after an application comes or goes. There are three kinds because Serve starts all of an application anew where it is
run again. Out of a file (`application`), the fronts and all versions are one application.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from llmkit.checkpoint.errors import InputError, OutputError, ShortageError, UsageError
from llmkit.deploy.cluster import connect
from llmkit.deploy.table import Routes, Table, Version, with_share
from llmkit.runtime.server.options import ServeOptions

if TYPE_CHECKING:
    from ray.serve import Application, Deployment

FRONT = "llmkit"
KEEPER = "llmkit-table"
_ROUTED_WITHIN_S = 60.0  # the fronts have another table by then
_AGREED = 16  # times that one or another front said so
_LONGEST_S = 3600.0  # that a front waits for its streams
_FRONTS = {"min_replicas": 2, "max_replicas": 32, "target_ongoing_requests": 200, "downscale_delay_s": 600}


@dataclass(frozen=True)
class Size:
    """How many replicas there are and what one gets. most None: no autoscaling."""

    least: int = 1
    most: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    downscale_delay: float = 600.0  # seconds of less load before a replica goes

    def options(self, max_num_seqs: int) -> dict[str, Any]:
        """Options of a Serve deployment whose replicas run so many requests at once.

        A replica is sent an eighth more than its engine runs at once, so that there is always a next request; Serve's
        own default of 5 would leave the batch all but empty. One more replica is wanted at four fifths of a batch.
        """
        ongoing = max_num_seqs + math.ceil(max_num_seqs / 8)
        options: dict[str, Any] = {
            "max_ongoing_requests": ongoing,
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }
        if self.most is None:
            return options | {"num_replicas": self.least}
        target = max(1.0, 0.8 * max_num_seqs)
        scaling = {
            "min_replicas": self.least,
            "max_replicas": self.most,
            "target_ongoing_requests": target,
            "downscale_delay_s": self.downscale_delay,
        }
        return options | {"autoscaling_config": scaling}


@dataclass(frozen=True)
class Place:
    """Where: the Ray cluster, and the address of its HTTP proxies."""

    address: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None  # on every node


@dataclass(frozen=True)
class Answering:
    """A version of a model in an application out of a file. share: of the model's traffic, beside the others'."""

    name: str
    options: ServeOptions
    size: Size
    share: float


def application(versions: Sequence[Answering], host: str, api_key_file: str | None) -> Application:
    """The front and every version as one Serve application. See `Place` for host and api_key_file."""
    table: Table = {}
    replicas = {}
    for one in versions:
        others = table.setdefault(one.name, [])
        deployment = f"{one.name}-{len(others) + 1}"
        others.append(Version(deployment, one.options.model, one.share))
        replicas[deployment] = _replicas(deployment, one.options, one.size).bind(one.options)
    front = _front().options(user_config=msgspec.to_builtins(table))
    return front.bind(host, api_key_file, "", replicas)


def _front() -> Deployment:
    from ray import serve

    from llmkit.deploy.front import Front

    return serve.deployment(
        Front,
        name="front",
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=_LONGEST_S,
        autoscaling_config=_FRONTS,
        ray_actor_options={"num_cpus": 0.1},
    )


def _replicas(name: str, options: ServeOptions, size: Size) -> Deployment:
    from ray import serve

    from llmkit.deploy.prefix_router import PrefixRouter
    from llmkit.deploy.replica import Replica

    return serve.deployment(
        Replica,
        name=name,
        graceful_shutdown_timeout_s=options.drain_timeout,
        max_constructor_retry_count=2,
        request_router_config={"request_router_class": PrefixRouter},
        **size.options(options.engine.max_num_seqs),
    )


class Cluster:
    """The models on a Ray cluster. Raises ShortageError where there is no Ray, or no cluster at the address."""

    def __init__(self, place: Place) -> None:
        connect(place.address)
        from ray import serve

        self._serve, self._place = serve, place
        logging.getLogger("ray.serve").setLevel(logging.WARNING)

    def table(self) -> Table:
        """The models and their versions. Raises UsageError where they came out of a file."""
        routes = self._routes()
        return {} if routes is None else routes.models

    def _routes(self) -> Routes | None:
        applications = self._serve.status().applications
        if KEEPER in applications:
            return msgspec.convert(self._serve.get_app_handle(KEEPER).routes.remote().result(), Routes)
        if FRONT in applications:
            raise UsageError("the models here came out of a file", "Change the file, and `serve deploy` it")
        return None

    def deploy(self, name: str, options: ServeOptions, size: Size, share: float | None) -> Table:
        """Start a version of model `name`; once it is ready it gets `share` of the model's traffic, or all.

        Raises OutputError where the name is taken and no share is said, InputError when no replica starts, UsageError
        for other keys than the models that are there have.
        """
        routes = self._routes()
        table = {} if routes is None else routes.models
        if routes is not None and routes.api_key_file != self._place.api_key_file:
            raise UsageError(
                f"the models that are deployed have --api-key-file {routes.api_key_file or 'none'}",
                "One for all was expected",
            )
        versions = table.get(name, [])
        if versions and share is None:
            raise OutputError(
                f"the model {name} is deployed already, from {versions[-1].checkpoint}",
                todo="Say --share 1% to send this checkpoint a share of its requests, or another --name",
            )
        if len(versions) > 1:
            raise OutputError(
                f"two versions of {name} are deployed already", todo=f"--promote or --rollback {name} first"
            )
        number = int(versions[-1].app.rpartition("-")[2]) + 1 if versions else 1
        app = f"{FRONT}-{name}-{number}"
        self._start(app, options, size)
        added = [*versions, Version(app, options.model, 1.0)]
        return self._route(table | {name: with_share(added, app, share if versions and share is not None else 1.0)})

    def promote(self, name: str) -> Table:
        """All requests of a model to its newest version; the other one is drained and deleted."""
        return self._keep(name, newest=True)

    def rollback(self, name: str) -> Table:
        """All requests of a model to its older version; the newest is drained and deleted."""
        return self._keep(name, newest=False)

    def set_share(self, name: str, share: float) -> Table:
        """Another share for the newest version of a model."""
        table = self.table()
        versions = self._two(table, name)
        return self._route(table | {name: with_share(versions, versions[-1].app, share)})

    def remove(self, name: str) -> Table:
        """Take a model away; the front goes with the last one."""
        table = self.table()
        versions = self._known(table, name)
        rest = {other: kept for other, kept in table.items() if other != name}
        self._route(rest)
        for version in versions:
            self._serve.delete(version.app)
        if not rest:
            self._serve.delete(FRONT)
            self._serve.delete(KEEPER)
        return rest

    def _keep(self, name: str, newest: bool) -> Table:
        table = self.table()
        versions = self._two(table, name)
        kept, other = (versions[-1], versions[0]) if newest else (versions[0], versions[-1])
        routed = self._route(table | {name: [msgspec.structs.replace(kept, share=1.0)]})
        self._serve.delete(other.app)  # after its requests, or their drain_timeout
        return routed

    def _start(self, app: str, options: ServeOptions, size: Size) -> None:
        self._serve.start(http_options={"host": self._place.host, "port": self._place.port})
        try:
            self._serve.run(_replicas("replica", options, size).bind(options), name=app, route_prefix=None)
        except RuntimeError:
            told = self._serve.status().applications[app].deployments["replica"].message
            self._serve.delete(app)
            raise InputError(f"no replica of {options.model} starts: {_reason(told)}") from None

    def _route(self, table: Table) -> Table:
        """Have another table kept, and wait until the fronts follow it."""
        from ray import serve

        from llmkit.deploy.front import Keeper

        routes = self._routes() or Routes({}, self._place.host, self._place.api_key_file)
        keeper = serve.deployment(Keeper, name="keeper", ray_actor_options={"num_cpus": 0})
        self._serve.run(keeper.bind(msgspec.structs.replace(routes, models=table)), name=KEEPER, route_prefix=None)
        if FRONT not in self._serve.status().applications:
            front = _front().bind(routes.host, routes.api_key_file, KEEPER, {})
            self._serve.run(front, name=FRONT, route_prefix="/")
        fronts = self._serve.get_app_handle(FRONT)
        until = time.monotonic() + _ROUTED_WITHIN_S
        agreed = 0
        while agreed < _AGREED:
            if time.monotonic() > until:
                raise ShortageError(f"the fronts did not take their new table within {_ROUTED_WITHIN_S:g} s")
            agreed = agreed + 1 if msgspec.convert(fronts.table.remote().result(), Table) == table else 0
            time.sleep(0.05)
        return table

    @staticmethod
    def _known(table: Table, name: str) -> list[Version]:
        if name not in table:
            raise UsageError(f"no model {name} is deployed", f"There are: {', '.join(table) or 'none'}")
        return table[name]

    def _two(self, table: Table, name: str) -> list[Version]:
        versions = self._known(table, name)
        if len(versions) < 2:
            raise UsageError(
                f"there is only one version of {name}", todo=f"Deploy another first: MODEL --name {name} --share 1%"
            )
        return versions


def _reason(told: str) -> str:
    """Of what Serve says of a deployment that does not start, the replica's own error."""
    lines = [line.strip() for line in told.splitlines() if line.strip()] or ["its log says why"]
    errors = [line.partition("Error: ")[2] for line in lines if "Error: " in line]
    return [*lines[-1:], *errors][-1]
