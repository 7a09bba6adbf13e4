"""Ports for servers that must be told theirs before they start."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 10_000


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens.

    It is below those that the system gives to connections and to servers without one, so nobody
    else gets it before the server listens.
    """
    low = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768
    ports = random.SystemRandom()
    while True:
        port = ports.randrange(_FIRST, low)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
