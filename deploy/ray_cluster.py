"""Joining a Ray cluster."""

from __future__ import annotations

import logging
from typing import Any

from llmkit.common.errors import ShortageError


def connect(address: str) -> Any:
    """Joins the cluster at an address, or "auto". Returns the module `ray`.

    Raises ShortageError when there is no cluster or no Ray.
    """
    try:
        import ray
    except ImportError:
        raise ShortageError("Ray is not installed", todo="Install llmkit[ray]") from None
    try:
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            ignore_reinit_error=True,
        )
    except ConnectionError:
        todo = "Start one with `ray start --head`, or name another with --address"
        raise ShortageError(f"there is no Ray cluster at {address}", todo=todo) from None
    return ray
