"""Which origins of web pages may use the server, and the CORS headers for them.

A browser sends `Origin` with the requests of a page. The server's own page is always accepted.
Pages of other origins are refused, unless the user allows their origins; the Fetch standard's CORS
headers then let them read the responses.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence

from llmkit.common.errors import UsageError

ANY = "*"
Headers = list[tuple[bytes, bytes]]

_WEB_ORIGIN = re.compile(r"https?://([a-z0-9_.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
# Applications have schemes of their own: app://obsidian.md, vscode-webview://ID, file://.
_APP_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9_.:-]*")
_ANY_HOST = "://*"
_METHODS = b"GET, HEAD, POST, DELETE, OPTIONS"
# Response headers that a page may read, beside those that are always readable.
_EXPOSED = (
    b"x-request-id, request-id, retry-after, x-should-retry, x-llmkit-cache, x-llmkit-ignored"
)
_VARY = b"Origin"
_VARY_PREFLIGHT = (
    b"Access-Control-Request-Method, Access-Control-Request-Headers, "
    b"Access-Control-Request-Private-Network"
)
# Schemes whose hosts are drawn at random, for each window or each installation.
_RANDOM_HOSTS = ("vscode-webview", "moz-extension")
_MAX_AGE_S = 600  # how long a browser may remember the answer to a preflight
_TOKEN = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")


def check_allowed_origin(option: str, value: str) -> None:
    """An option's check that a value is an origin, `SCHEME://*` or `*`."""
    origin = value.lower()
    scheme = origin.partition("://")[0]
    is_web = scheme in ("http", "https")
    pattern = _WEB_ORIGIN if is_web else _APP_ORIGIN
    any_host = not is_web and origin.endswith(_ANY_HOST)
    if origin == ANY or pattern.fullmatch(origin.removesuffix("*") if any_host else origin):
        return
    raise UsageError(
        f"{option} {value!r} is not an origin",
        "SCHEME://HOST[:PORT] without a path was expected, SCHEME://* for every host of a scheme "
        "other than http and https, or * for every origin",
        "Write it like https://chat.example.com, app://obsidian.md or vscode-webview://*",
    )


class AllowedOrigins:
    """The origins that may use the server besides its own."""

    def __init__(self, allowed: Sequence[str]) -> None:
        """allowed: values that `check_allowed_origin` accepts."""
        origins = [origin.lower() for origin in allowed]
        self._any = ANY in origins
        self._schemes = frozenset(
            origin.removesuffix("*") for origin in origins if origin.endswith(_ANY_HOST)
        )
        self._origins = frozenset(origins) - {ANY}
        # A cache must not give the answer for one origin to another.
        self.vary: Headers = [(b"vary", _VARY)] if origins else []

    def cors_headers(self, origin: str) -> Headers | None:
        """Return the headers that let a page of `origin` read a response; None: it may not.

        Only an origin that is listed in full may send credentials.
        """
        lower = origin.lower()
        headers = [(b"access-control-expose-headers", _EXPOSED)]
        allowed = origin
        if lower in self._origins:
            headers.append((b"access-control-allow-credentials", b"true"))
        elif self._any:
            allowed = ANY
        elif not self._has_allowed_scheme(lower):
            return None
        return [*headers, (b"access-control-allow-origin", allowed.encode("latin-1"))]

    def _has_allowed_scheme(self, origin: str) -> bool:
        scheme, separator, _ = origin.partition("://")
        return scheme + separator in self._schemes and _APP_ORIGIN.fullmatch(origin) is not None


def value_that_allows(origin: str) -> str:
    """Return the value of --allowed-origins that allows `origin`, quoted for a shell."""
    scheme, _, host = origin.partition("://")
    # "null" is any page that hides its origin, so it cannot be allowed by itself.
    value = origin if host else ANY
    if scheme in _RANDOM_HOSTS:
        value = scheme + _ANY_HOST
    return shlex.quote(value)


def own_origins(host: str) -> Collection[str]:
    """Return the origins of a page that came from this server under the Host `host`."""
    return (f"http://{host}", f"https://{host}")


def is_preflight(method: str, headers: Mapping[bytes, bytes]) -> bool:
    """Return whether a browser asks if a page may send a request."""
    return method == "OPTIONS" and b"access-control-request-method" in headers


def preflight_headers(headers: Mapping[bytes, bytes]) -> Headers:
    """Return the headers that allow what the preflight with `headers` asks for.

    `*` would not include Authorization, so the requested names are returned.
    """
    requested = headers.get(b"access-control-request-headers", b"").split(b",")
    names = [name for name in map(bytes.strip, requested) if _TOKEN.fullmatch(name)]
    answer = [
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-max-age", b"%d" % _MAX_AGE_S),
        (b"vary", _VARY_PREFLIGHT),
    ]
    if names:
        answer.append((b"access-control-allow-headers", b", ".join(names)))
    if headers.get(b"access-control-request-private-network") == b"true":
        answer.append((b"access-control-allow-private-network", b"true"))
    return answer
