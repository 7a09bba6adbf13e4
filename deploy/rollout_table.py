"""The rollout table: the deployed versions of each model, and their shares of the traffic."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Version(msgspec.Struct, frozen=True):
    """A checkpoint that is deployed for a model."""

    app: str  # its Serve application or deployment
    checkpoint: str
    share: float  # of the model's traffic, up to 1


# Each model's versions by the model's name, the newest last. The shares of a model's versions sum
# to 1.
RolloutTable = dict[str, list[Version]]


class Routes(msgspec.Struct, frozen=True):
    """What the ingress replicas of a cluster serve."""

    models: RolloutTable
    host: str  # address that Ray's HTTP proxies listen on
    api_key_file: str | None = None  # see `llmkit serve`, as for the next two
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()


def with_share(versions: Sequence[Version], app: str, share: float) -> list[Version]:
    """`versions` with `share` of the traffic for the version `app`.

    The shares of the others keep their proportions.
    """
    others = [version for version in versions if version.app != app]
    total = sum(version.share for version in others)
    changed = []
    for version in versions:
        if version.app == app:
            new_share = share
        elif total:
            new_share = (1 - share) * version.share / total
        else:
            new_share = (1 - share) / len(others)
        changed.append(msgspec.structs.replace(version, share=new_share))
    return changed
