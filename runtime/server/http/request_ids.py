"""The id of a request, which its client may choose: `x-request-id`, in and out."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable

HEADER = b"x-request-id"
# No character that needs quoting in a log, a shell or a URL's query.
_SANE = re.compile(rb"[A-Za-z0-9._~:/+=@-]{1,128}")


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the id in `headers`, or a new one when there is none, several or a strange one."""
    given = [value for name, value in headers if name == HEADER]
    if len(given) == 1 and _SANE.fullmatch(given[0]):
        return given[0]
    return uuid.uuid4().hex.encode()
