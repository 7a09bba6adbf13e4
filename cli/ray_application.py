"""Models on Ray Serve out of a file, as one application: what `serve deploy` and KubeRay's RayService read.

In the file, `import_path: llmkit.cli.ray_application:build`, and as `args` what `Arguments` has.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import msgspec

from llmkit.checkpoint.errors import UsageError
from llmkit.cli.serve import serve_options
from llmkit.cli.sizes import parse_share

if TYPE_CHECKING:
    from ray.serve import Application


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A version of a model. Versions of one name divide its traffic: share as "1%", or the rest."""

    name: str
    model: str  # a directory that every node has, or a hub id
    options: str = ""  # of `llmkit serve`
    share: str | None = None
    replicas: int = 1  # where none are added by load
    most_replicas: int | None = None  # as many as load asks for, from `replicas` on
    downscale_delay: float = 600.0
    cpus: float = 1.0
    gpus: float = 0.0


class Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """host: what the HTTP proxies listen on; beyond loopback a file of keys is needed, on every node."""

    models: list[Model]
    host: str = "127.0.0.1"
    api_key_file: str | None = None


def build(args: dict[str, Any]) -> Application:
    """The Serve application. Raises msgspec.ValidationError and UsageError for what a file must not say."""
    from llmkit.deploy.ray_serve import Answering, Size, application
    from llmkit.runtime.server.http.hosts import is_loopback

    given = msgspec.convert(args, Arguments)
    if not given.models:
        raise UsageError("models: there is none", "One at least")
    if not is_loopback(given.host) and not given.api_key_file:
        raise UsageError(f"host {given.host} can be reached from elsewhere", "An api_key_file is needed there")
    rest = dict.fromkeys((one.name for one in given.models), 1.0)
    said = [parse_share("share", one.share) if one.share else None for one in given.models]
    for one, share in zip(given.models, said, strict=True):
        rest[one.name] -= share or 0.0
    versions = []
    for one, share in zip(given.models, said, strict=True):
        served = serve_options(one.model, one.name, shlex.split(one.options), given.api_key_file)
        size = Size(one.replicas, one.most_replicas, one.cpus, one.gpus, one.downscale_delay)
        versions.append(Answering(one.name, served, size, rest[one.name] if share is None else share))
    for name in rest:
        if abs(sum(one.share for one in versions if one.name == name) - 1) > 1e-6:
            expected = "One of its versions can be without a share, and gets the rest"
            raise UsageError(f"the shares of {name} do not come to 100%", expected)
    return application(versions, given.host, given.api_key_file)
