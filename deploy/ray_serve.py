"""`llmkit deploy ray`: models on a Ray cluster behind one ingress.

Only public APIs of Ray Serve are used. There are three kinds of Serve applications, because Serve
restarts a whole application when it is deployed again:

- one for each version of a model, without a route,
- one for the ingress, with the route "/",
- one for the controller, which holds the rollout table that the ingress replicas poll.

Deploying, promoting and rolling back change the table, and start or delete a version's application.
A Serve config file makes one application of the ingress and all versions instead: see
`application`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from llmkit.common.errors import InputError, OutputError, ShortageError, UsageError
from llmkit.deploy.ray_cluster import connect
from llmkit.deploy.rollout_table import RolloutTable, Routes, Version, with_share
from llmkit.runtime.server.serve_options import ServeOptions

if TYPE_CHECKING:
    from ray.serve import Application, Deployment

# Names of Serve applications.
INGRESS_APP = "llmkit"
CONTROLLER_APP = "llmkit-table"

# The longest wait until all ingress replicas have a new rollout table.
_ROLLOUT_TIMEOUT_S = 60.0
# Requests are spread over the ingress replicas: this many answers in a row show that all have the
# new table.
_MATCHES_IN_A_ROW = 16
# The longest time that an ingress replica waits for its streams when it stops.
_DRAIN_TIMEOUT_S = 3600.0
_INGRESS_AUTOSCALING = {
    "min_replicas": 2,
    "max_replicas": 32,
    "target_ongoing_requests": 200,
    "downscale_delay_s": 600,
}


@dataclass(frozen=True)
class ReplicaOptions:
    """The number of replicas of a version, and the resources of each."""

    min_replicas: int = 1
    max_replicas: int | None = None  # None: no autoscaling
    cpus: float = 1.0
    gpus: float = 0.0
    downscale_delay: float = 600.0  # seconds of less load before a replica is removed

    def deployment_options(self, max_num_seqs: int) -> dict[str, Any]:
        """Options of a Serve deployment whose replicas run `max_num_seqs` requests at once.

        A replica gets an eighth more requests than its engine runs at once, so that the next
        request is always there; Serve's default of 5 would leave the batch almost empty.
        Autoscaling aims at four fifths of a batch.
        """
        options: dict[str, Any] = {
            "max_ongoing_requests": max_num_seqs + math.ceil(max_num_seqs / 8),
            "ray_actor_options": {"num_cpus": self.cpus, "num_gpus": self.gpus},
        }
        if self.max_replicas is None:
            return options | {"num_replicas": self.min_replicas}
        autoscaling = {
            "min_replicas": self.min_replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": max(1.0, 0.8 * max_num_seqs),
            "downscale_delay_s": self.downscale_delay,
        }
        return options | {"autoscaling_config": autoscaling}


@dataclass(frozen=True)
class ClusterAddress:
    """A Ray cluster, and the address of its HTTP proxies."""

    address: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: str | None = None  # a path on every node
    allowed_hosts: tuple[str, ...] = ()  # see `llmkit serve`
    allowed_origins: tuple[str, ...] = ()

    def routes(self) -> Routes:
        """The Routes of an ingress without models."""
        return Routes({}, self.host, self.api_key_file, self.allowed_hosts, self.allowed_origins)


@dataclass(frozen=True)
class ModelVersion:
    """A version of a model in a Serve config file."""

    name: str
    options: ServeOptions
    replicas: ReplicaOptions
    share: float  # of the model's traffic


def application(versions: Sequence[ModelVersion], address: ClusterAddress) -> Application:
    """The ingress and every version as one Serve application.

    address: without `address` and `port`, which the Serve config file has.
    """
    table: RolloutTable = {}
    deployments = {}
    for version in versions:
        versions_of_model = table.setdefault(version.name, [])
        name = f"{version.name}-{len(versions_of_model) + 1}"
        versions_of_model.append(Version(name, version.options.model, version.share))
        deployment = _replica_deployment(name, version.options, version.replicas)
        deployments[name] = deployment.bind(version.options)
    ingress = _ingress_deployment().options(user_config=msgspec.to_builtins(table))
    return _bind_ingress(ingress, address.routes(), "", deployments)


def _bind_ingress(
    ingress: Deployment, routes: Routes, controller: str, replicas: Mapping[str, Any]
) -> Application:
    """The ingress with the arguments of `Ingress`."""
    return ingress.bind(
        routes.host,
        routes.api_key_file,
        controller,
        replicas,
        routes.allowed_hosts,
        routes.allowed_origins,
    )


def _ingress_deployment() -> Deployment:
    # Ray is an extra: imported only where it is used.
    from ray import serve

    from llmkit.deploy.ingress import Ingress

    return serve.deployment(
        Ingress,
        # Serve config files use this name.
        name="front",
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=_DRAIN_TIMEOUT_S,
        autoscaling_config=_INGRESS_AUTOSCALING,
        ray_actor_options={"num_cpus": 0.1},
    )


def _check_same_ingress(routes: Routes, address: ClusterAddress) -> None:
    """Raise UsageError when a model would change the ingress of those that are deployed."""
    for option, deployed, given in (
        ("--api-key-file", routes.api_key_file, address.api_key_file),
        ("--allowed-hosts", routes.allowed_hosts, address.allowed_hosts),
        ("--allowed-origins", routes.allowed_origins, address.allowed_origins),
    ):
        if deployed != given:
            text = deployed if isinstance(deployed, str) else " ".join(deployed or ())
            raise UsageError(
                f"the models that are deployed have {option} {text or 'none'}",
                "One ingress is for all",
                "Give the same, or --remove the models first",
            )


def _replica_deployment(name: str, options: ServeOptions, replicas: ReplicaOptions) -> Deployment:
    from ray import serve

    from llmkit.deploy.prefix_router import PrefixRouter
    from llmkit.deploy.replica import Replica

    return serve.deployment(
        Replica,
        name=name,
        graceful_shutdown_timeout_s=options.drain_timeout,
        max_constructor_retry_count=2,
        request_router_config={"request_router_class": PrefixRouter},
        **replicas.deployment_options(options.engine.max_num_seqs),
    )


class Cluster:
    """The models on a Ray cluster.

    Raises ShortageError when Ray is not installed, or no cluster is at the address.
    """

    def __init__(self, address: ClusterAddress) -> None:
        connect(address.address)
        from ray import serve

        self._serve = serve
        self._address = address
        logging.getLogger("ray.serve").setLevel(logging.WARNING)

    def table(self) -> RolloutTable:
        """The models and their versions. Raises UsageError for models of a Serve config file."""
        routes = self._routes()
        return {} if routes is None else routes.models

    def _routes(self) -> Routes | None:
        applications = self._serve.status().applications
        if CONTROLLER_APP in applications:
            controller = self._serve.get_app_handle(CONTROLLER_APP)
            return msgspec.convert(controller.routes.remote().result(), Routes)
        if INGRESS_APP in applications:
            raise UsageError(
                "the models here were deployed from a file",
                "Change the file, and `serve deploy` it",
            )
        return None

    def deploy(
        self, name: str, options: ServeOptions, replicas: ReplicaOptions, share: float | None
    ) -> RolloutTable:
        """Start a version of model `name`. When it is ready it gets `share` of the traffic, or all.

        Raises OutputError when the name is taken and `share` is None, InputError when no replica
        starts, UsageError for another file of keys than the deployed models have.
        """
        routes = self._routes()
        table = {} if routes is None else routes.models
        if routes is not None:
            _check_same_ingress(routes, self._address)
        versions = table.get(name, [])
        if versions and share is None:
            raise OutputError(
                f"the model {name} is deployed already, from {versions[-1].checkpoint}",
                todo="Say --share 1% to send this checkpoint a share of its requests, or another "
                "--name",
            )
        if len(versions) > 1:
            raise OutputError(
                f"two versions of {name} are deployed already",
                todo=f"--promote or --rollback {name} first",
            )
        number = int(versions[-1].app.rpartition("-")[2]) + 1 if versions else 1
        app = f"{INGRESS_APP}-{name}-{number}"
        self._start_version(app, options, replicas)
        if not versions or share is None:
            share = 1.0
        new_versions = with_share([*versions, Version(app, options.model, 1.0)], app, share)
        return self._apply(table | {name: new_versions})

    def promote(self, name: str) -> RolloutTable:
        """Send all requests of a model to its newest version; drain and delete the other one."""
        return self._finish_rollout(name, keep_newest=True)

    def rollback(self, name: str) -> RolloutTable:
        """Send all requests of a model to its older version; drain and delete the newest."""
        return self._finish_rollout(name, keep_newest=False)

    def set_share(self, name: str, share: float) -> RolloutTable:
        """Give the newest version of a model another share of the traffic."""
        table = self.table()
        versions = self._two_versions(table, name)
        return self._apply(table | {name: with_share(versions, versions[-1].app, share)})

    def remove(self, name: str) -> RolloutTable:
        """Delete a model; the ingress is deleted with the last one."""
        table = self.table()
        versions = self._versions(table, name)
        rest = {other: kept for other, kept in table.items() if other != name}
        self._apply(rest)
        for version in versions:
            self._serve.delete(version.app)
        if not rest:
            self._serve.delete(INGRESS_APP)
            self._serve.delete(CONTROLLER_APP)
        return rest

    def _finish_rollout(self, name: str, keep_newest: bool) -> RolloutTable:
        table = self.table()
        versions = self._two_versions(table, name)
        older = versions[0]
        newest = versions[-1]
        kept, deleted = (newest, older) if keep_newest else (older, newest)
        new_table = self._apply(table | {name: [msgspec.structs.replace(kept, share=1.0)]})
        # Serve waits for the version's requests, at most its drain_timeout.
        self._serve.delete(deleted.app)
        return new_table

    def _start_version(self, app: str, options: ServeOptions, replicas: ReplicaOptions) -> None:
        self._serve.start(http_options={"host": self._address.host, "port": self._address.port})
        deployment = _replica_deployment("replica", options, replicas)
        try:
            self._serve.run(deployment.bind(options), name=app, route_prefix=None)
        except RuntimeError:
            message = self._serve.status().applications[app].deployments["replica"].message
            self._serve.delete(app)
            raise InputError(
                f"no replica of {options.model} starts: {_replica_error(message)}"
            ) from None

    def _apply(self, table: RolloutTable) -> RolloutTable:
        """Give the controller a new table, and wait until all ingress replicas have it."""
        from ray import serve

        from llmkit.deploy.ingress import Controller

        routes = self._routes() or self._address.routes()
        controller = serve.deployment(
            Controller, name="controller", ray_actor_options={"num_cpus": 0}
        )
        self._serve.run(
            controller.bind(msgspec.structs.replace(routes, models=table)),
            name=CONTROLLER_APP,
            route_prefix=None,
        )
        if INGRESS_APP not in self._serve.status().applications:
            ingress = _bind_ingress(_ingress_deployment(), routes, CONTROLLER_APP, {})
            self._serve.run(ingress, name=INGRESS_APP, route_prefix="/")
        handle = self._serve.get_app_handle(INGRESS_APP)
        deadline = time.monotonic() + _ROLLOUT_TIMEOUT_S
        matches = 0
        while matches < _MATCHES_IN_A_ROW:
            if time.monotonic() > deadline:
                raise ShortageError(
                    f"the ingress did not take its new table within {_ROLLOUT_TIMEOUT_S:g} s"
                )
            if msgspec.convert(handle.table.remote().result(), RolloutTable) == table:
                matches += 1
            else:
                matches = 0
            time.sleep(0.05)
        return table

    @staticmethod
    def _versions(table: RolloutTable, name: str) -> list[Version]:
        if name not in table:
            raise UsageError(
                f"no model {name} is deployed", f"There are: {', '.join(table) or 'none'}"
            )
        return table[name]

    def _two_versions(self, table: RolloutTable, name: str) -> list[Version]:
        """The older and the newest version of a model. Raises UsageError when there is only one."""
        versions = self._versions(table, name)
        if len(versions) < 2:
            raise UsageError(
                f"there is only one version of {name}",
                todo=f"Deploy another first: MODEL --name {name} --share 1%",
            )
        return versions


def _replica_error(message: str) -> str:
    """The replica's own error in Serve's message about a deployment that does not start."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.partition("Error: ")[2] for line in lines if "Error: " in line]
    if errors:
        return errors[-1]
    return lines[-1] if lines else "its log says why"
