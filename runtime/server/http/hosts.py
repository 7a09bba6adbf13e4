"""Which names of the server a Host header may have, and which addresses are loopback."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from llmkit.common.errors import UsageError

ANY = "*"
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_allowed_host(option: str, value: str) -> None:
    """An option's check that a value is a name or address without a port, or `*`."""
    if value == ANY or _NAME.fullmatch(value) or _ip6(value):
        return
    raise UsageError(
        f"{option} {value!r} is not a host name",
        "A name or an IP address without scheme and port was expected, or * for every host",
        "Write it like llm.example.com",
    )


class AllowedHosts:
    """The names that a request's Host header may have.

    A server on a loopback address accepts loopback names only. Otherwise a web page could let its
    own name resolve to 127.0.0.1 and use the server. Any port is accepted, so that a forwarded port
    works. On any other address every name is accepted, unless there is a list.
    """

    def __init__(self, host: str, allowed: Sequence[str] = ()) -> None:
        """host: the address that the server listens on. allowed: names accepted besides it."""
        self._names: frozenset[str] | None = None  # None: every Host is accepted
        if ANY not in allowed and (allowed or is_loopback(host)):
            self._names = _LOOPBACK_NAMES | {_as_in_header(name) for name in (host, *allowed)}

    def accepts(self, host: str) -> bool:
        """Return whether a Host header may be `host`, which is in lower case."""
        return self._names is None or name_without_port(host) in self._names


def name_without_port(host: str) -> str:
    """Return the name in the value of a Host header."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def _as_in_header(name: str) -> str:
    """Return a name or address as a browser writes it in a Host header."""
    address = _ip6(name)
    return f"[{address}]" if address else name.lower()


def _ip6(text: str) -> str:
    """Return the IPv6 address `text`, without brackets and shortened; "" for other text."""
    try:
        return str(ipaddress.IPv6Address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        return ""
