"""The version of llmkit."""

from __future__ import annotations

import importlib.metadata


def version(package: str = "llmkit") -> str:
    """The installed version of a package; "unknown" when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
