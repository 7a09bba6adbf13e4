"""The web pages at `/` and `/docs`: their files, and headers that forbid to load anything else.

The files hold no secret, so they need no key. The page gets its data from the API, with a key.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import Response

_FOLDER = Path(__file__).parents[1] / "page"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "no-cache",
}


def _url_path(file: Path) -> str:
    for name, path in (("index.html", "/"), ("docs.html", "/docs")):
        if file == _FOLDER / name:
            return path
    return f"/page/{file.relative_to(_FOLDER).as_posix()}"


_FILES = {
    _url_path(file): file for file in sorted(_FOLDER.rglob("*")) if file.suffix in _MEDIA_TYPES
}
PAGE_PATHS = frozenset(_FILES)


def page_routes() -> dict[str, Callable[[], Awaitable[Response]]]:
    """Return an endpoint for each path of the page.

    The files are read once, here. No file name is ever taken from a request.
    """
    return {
        path: _file_endpoint(file.read_bytes(), _MEDIA_TYPES[file.suffix])
        for path, file in _FILES.items()
    }


def _file_endpoint(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def endpoint() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return endpoint
