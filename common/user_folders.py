"""The folders in which llmkit keeps files of a user."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def state_folder() -> Path:
    """The folder for what lasts from one run to the next: below XDG_STATE_HOME or ~/.local/state.

    It may not exist yet.
    """
    configured = Path(os.environ.get("XDG_STATE_HOME", ""))
    # The specification of these variables says that a relative path counts as not set.
    if configured.is_absolute():
        return configured / "llmkit"
    try:
        return Path.home() / ".local" / "state" / "llmkit"
    except RuntimeError:  # a container's user that is in no list of users
        return Path(tempfile.gettempdir()) / f"llmkit-{os.getuid()}"


def make_private_folder(folder: Path) -> None:
    """Create a folder that only this user can read, if it is missing. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
