"""Shadows as options: --shadow, --shadow-judge and the log, checked before anything starts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkit.common.errors import UsageError
from llmkit.common.formatting import nearest
from llmkit.runtime.server.tiers.route_config import Upstream

SHADOW_FORM = "NAME=SHADOW[:SHARE] was expected, such as chat=next:10%"


@dataclass(frozen=True)
class Shadow:
    """A model whose requests are copied to another model."""

    model: str  # answers the clients
    shadow: str  # its answers are compared only
    share: float = 1.0  # of the requests, above 0 and at most 1


@dataclass(frozen=True)
class ShadowOptions:
    """All shadows of a server, and what is done with their answers."""

    shadows: Sequence[Shadow] = ()
    judge: str | None = None  # the model that compares answers
    log: Path | None = None  # JSON Lines
    log_texts: bool = False  # whether the log has requests and answers

    def models_beside(self, model: str) -> set[str]:
        """The models that a request to `model` needs, with `model` itself."""
        shadows = [shadow.shadow for shadow in self.shadows if shadow.model == model]
        judge = [self.judge] if self.judge is not None and shadows else []
        return {model, *shadows, *judge}

    def num_local(self, local_models: Collection[str]) -> int:
        """The most local models that one request needs at the same time."""
        counts = (
            len(self.models_beside(shadow.model) & set(local_models)) for shadow in self.shadows
        )
        return max(counts, default=1)


def parse_shadow(word: str) -> Shadow:
    """Parse "chat=next:10%". A share is a percentage above 0% and up to 100%. Raises UsageError."""
    model, _, rest = word.partition("=")
    shadow, colon, share_text = rest.rpartition(":")
    if not colon:
        shadow, share_text = rest, "100%"
    if not model or not shadow:
        raise UsageError(f"--shadow {word!r} is not understood", SHADOW_FORM)
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", share_text)
    share = float(match[1]) / 100 if match is not None else 0.0
    if not 0 < share <= 1:
        raise UsageError(
            f"--shadow {word!r}: the share {share_text!r} is wrong",
            "Write it like 10%, above 0% and up to 100%",
        )
    return Shadow(model, shadow, share)


def shadow_options(
    words: Sequence[str],
    judge: str | None,
    log: Path | None,
    log_texts: bool,
    local_models: Collection[str],
    upstreams: Mapping[str, Upstream],
) -> ShadowOptions:
    """The shadows of a command line.

    local_models, upstreams: of the server. Raises UsageError for a name that is not there, and for
    options that do not go together.
    """
    shadows = [parse_shadow(word) for word in words]
    known = [*local_models, *upstreams]
    pairs = [(f"--shadow {word}", shadow) for word, shadow in zip(words, shadows, strict=True)]
    for option, shadow in pairs:
        for name in (shadow.model, shadow.shadow):
            _check_name(option, name, known, upstreams)
        if shadow.model == shadow.shadow:
            raise UsageError(f"{option}: a model cannot be its own shadow")
        if [other.model for other in shadows].count(shadow.model) > 1:
            raise UsageError(f"{option}: {shadow.model!r} has two shadows", "One was expected")
    given = {"--shadow-judge": judge, "--shadow-log": log, "--shadow-log-texts": log_texts}
    for option, value in given.items():
        if value and not shadows:
            raise UsageError(f"{option} is for --shadow, which is not given")
    if log_texts and log is None:
        raise UsageError("--shadow-log-texts is for --shadow-log, which is not given")
    if judge is not None:
        _check_name(f"--shadow-judge {judge}", judge, known, upstreams)
    return ShadowOptions(tuple(shadows), judge, log, log_texts)


def _check_name(
    option: str, name: str, known: Sequence[str], upstreams: Mapping[str, Upstream]
) -> None:
    if name not in known:
        raise UsageError(
            f"{option}: {name!r} is not a model of this server",
            nearest(name, known, "Models are"),
            f"Add {name}=MODEL or {name}=https://HOST/v1",
        )
    upstream = upstreams.get(name)
    if upstream is not None and upstream.forward_client_key:
        raise UsageError(
            f"{option}: {name!r} is asked with the clients' keys (forward_client_key)",
            "Copies of requests carry no key of a client",
            "Give it api_key_env or api_key_file",
        )
