"""Which versions of which models are deployed, and how the traffic is divided among them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Version(msgspec.Struct, frozen=True):
    """A checkpoint that answers for a model. app: its Serve application or deployment. share: of the traffic, to 1."""

    app: str
    checkpoint: str
    share: float


Table = dict[str, list[Version]]  # the name of a model -> its versions, the newest last; their shares sum to 1


class Routes(msgspec.Struct, frozen=True):
    """What the fronts of a cluster do. host: what its HTTP proxies listen on. api_key_file: see `llmkit serve`."""

    models: Table
    host: str
    api_key_file: str | None = None


def with_share(versions: Sequence[Version], app: str, share: float) -> list[Version]:
    """`versions` with `share` of the traffic to the version `app`, and the rest divided as it was."""
    others = [one for one in versions if one.app != app]
    total = sum(one.share for one in others)
    return [
        msgspec.structs.replace(
            one,
            share=share if one.app == app else (1 - share) * (one.share / total if total else 1 / len(others)),
        )
        for one in versions
    ]
