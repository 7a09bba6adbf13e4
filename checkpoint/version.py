"""The version of llmkit that runs."""

from __future__ import annotations

import importlib.metadata


def version(package: str = "llmkit") -> str:
    """The installed version; "unknown" when there is none: the folders can be run without being installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
