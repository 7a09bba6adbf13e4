"""Names that may stand in Prometheus' expressions without quotes of their own. Imports no torch."""

from __future__ import annotations

import re

from llmkit.common.errors import UsageError


def check_job(option: str, job: str) -> None:
    """The check of a job's name. Raises UsageError."""
    if not re.fullmatch(r"[A-Za-z0-9_./:-]+", job):
        raise UsageError(
            f"{option}: {job!r} is not a job", "Letters, digits and the characters _ . / : -"
        )
