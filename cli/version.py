"""The version of llmkit that runs."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """The installed version; "unknown" when the folders are run without being installed."""
    try:
        return importlib.metadata.version("llmkit")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
