"""Models of a Serve config file as one application, for `serve deploy` and KubeRay's RayService.

The file has `import_path: llmkit.cli.ray_application:build`, and the fields of
`ApplicationArguments` as `args`.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import msgspec

from llmkit.cli.serve import serve_options
from llmkit.common.errors import UsageError
from llmkit.common.option_values import parse_share

if TYPE_CHECKING:
    from ray.serve import Application


class ModelArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version of a model. The versions with one name divide that model's traffic."""

    name: str
    model: str  # a directory that every node has, or a hub id
    options: str = ""  # of `llmkit serve`
    share: str | None = None  # of the traffic, such as "1%"; None: the rest
    replicas: int = 1  # the number, or with autoscaling the smallest number
    most_replicas: int | None = None  # the largest number with autoscaling; None: no autoscaling
    downscale_delay: float = 600.0
    cpus: float = 1.0
    gpus: float = 0.0


class ApplicationArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All versions, and the address of the HTTP proxies."""

    models: list[ModelArguments]
    host: str = "127.0.0.1"  # any other than loopback needs a file of keys
    api_key_file: str | None = None  # a path on every node
    allowed_hosts: tuple[str, ...] = ()  # see `llmkit serve`
    allowed_origins: tuple[str, ...] = ()


def build(args: dict[str, Any]) -> Application:
    """The Serve application.

    Raises msgspec.ValidationError and UsageError for a mistake in the file.
    """
    # Ray is an extra: imported only where it is used.
    from llmkit.deploy.ray_serve import (
        ClusterAddress,
        ModelVersion,
        ReplicaOptions,
        application,
    )
    from llmkit.runtime.server.http.hosts import check_allowed_host, is_loopback
    from llmkit.runtime.server.http.origins import check_allowed_origin

    arguments = msgspec.convert(args, ApplicationArguments)
    if not arguments.models:
        raise UsageError("models: there is none", "At least one is needed")
    if not is_loopback(arguments.host) and not arguments.api_key_file:
        raise UsageError(
            f"host {arguments.host} can be reached from elsewhere",
            "An api_key_file is needed there",
        )
    for name in arguments.allowed_hosts:
        check_allowed_host("allowed_hosts:", name)
    for origin in arguments.allowed_origins:
        check_allowed_origin("allowed_origins:", origin)
    versions = []
    for model, share in zip(arguments.models, _shares(arguments.models), strict=True):
        options = serve_options(
            model.model, model.name, shlex.split(model.options), arguments.api_key_file
        )
        replicas = ReplicaOptions(
            model.replicas, model.most_replicas, model.cpus, model.gpus, model.downscale_delay
        )
        versions.append(ModelVersion(model.name, options, replicas, share))
    address = ClusterAddress(
        host=arguments.host,
        api_key_file=arguments.api_key_file,
        allowed_hosts=arguments.allowed_hosts,
        allowed_origins=arguments.allowed_origins,
    )
    return application(versions, address)


def _shares(models: list[ModelArguments]) -> list[float]:
    """The share of each version. Raises UsageError when the shares of a name do not sum to 100%."""
    given = [parse_share("share", model.share) if model.share else None for model in models]
    rest = {model.name: 1.0 for model in models}
    for model, share in zip(models, given, strict=True):
        rest[model.name] -= share or 0.0
    shares = []
    totals = {model.name: 0.0 for model in models}
    for model, share in zip(models, given, strict=True):
        shares.append(rest[model.name] if share is None else share)
        totals[model.name] += shares[-1]
    for name, total in totals.items():
        if abs(total - 1) > 1e-6:
            raise UsageError(
                f"the shares of {name} do not sum to 100%",
                "One of its versions can be without a share, and gets the rest",
            )
    return shares
