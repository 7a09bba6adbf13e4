"""HTTPS: the certificate, read and checked before anything else starts, and how long a handshake may take."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any, NoReturn

import uvloop

from llmkit.checkpoint.errors import InputError, UsageError
from llmkit.runtime.server.options import ServeOptions

HANDSHAKE_TIMEOUT_S = 20.0  # as long as headers may take


class TlsLoop(uvloop.Loop):
    """uvloop's, whose TLS servers hang up on slow handshakes: uvicorn has no setting for that."""

    async def create_server(self, *args: Any, **options: Any) -> asyncio.AbstractServer:  # type: ignore[override]
        """As the event loop's."""
        return await super().create_server(*args, ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S, **options)


def event_loop(options: ServeOptions) -> asyncio.AbstractEventLoop:
    """A new one to serve with."""
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop() if options.ssl_certfile is None else TlsLoop()
    return loop


def tls_context(options: ServeOptions) -> ssl.SSLContext | None:
    """What to speak TLS 1.2 or later with; None without a certificate. Raises UsageError and InputError."""
    certificate, key, clients = options.ssl_certfile, options.ssl_keyfile, options.ssl_ca_certs
    if certificate is None:
        for name, given in (("--ssl-keyfile", key), ("--ssl-ca-certs", clients)):
            if given is not None:
                raise UsageError(f"{name} {given} is of no use without a certificate", todo="Give --ssl-certfile FILE")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _check_readable(certificate, key, clients)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InputError(f"the key is not the certificate's ({key or certificate}, {certificate})") from None
        raise InputError(
            f"no certificate and key can be read ({certificate}, {key or certificate}: {error.reason or error})",
            "A certificate, with those that it depends on behind it, and its key were expected, both as PEM",
            "" if key else "Give the key's file with --ssl-keyfile",
        ) from None
    if clients is not None:
        try:
            context.load_verify_locations(clients)
        except ssl.SSLError as error:
            raise InputError(
                f"no certificate can be read ({clients}: {error.reason or error})",
                "Certificates of those who vouch for clients were expected, as PEM",
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(*paths: Path | None) -> None:
    for path in paths:
        try:
            if path is not None:
                Path(path).open("rb").close()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})", "A file in PEM was expected") from None


def _no_password() -> NoReturn:
    raise InputError("the certificate's key is encrypted", todo="Decrypt it: openssl pkey -in KEY -out FILE")
