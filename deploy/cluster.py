"""Joining a Ray cluster."""

from __future__ import annotations

import logging
from typing import Any

from llmkit.checkpoint.errors import ShortageError


def connect(address: str) -> Any:
    """The module `ray`, joined to the cluster at an address, or "auto". Raises ShortageError where there is none."""
    try:
        import ray
    except ImportError:
        raise ShortageError("Ray is not installed", todo="Install llmkit[ray]") from None
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True)
    except ConnectionError:
        todo = "Start one with `ray start --head`, or name another with --address"
        raise ShortageError(f"there is no Ray cluster at {address}", todo=todo) from None
    return ray
