"""HTTPS: the certificate and the timeout of a handshake."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any, NoReturn

import uvloop

from llmkit.common.errors import InputError, UsageError
from llmkit.runtime.server.serve_options import ServeOptions

HANDSHAKE_TIMEOUT_S = 20.0  # the same as for headers, see protocol.HEADER_TIMEOUT_S


class TlsLoop(uvloop.Loop):
    """A uvloop whose TLS servers close slow handshakes; uvicorn has no setting for that."""

    async def create_server(  # type: ignore[override]
        self, *args: Any, **options: Any
    ) -> asyncio.AbstractServer:
        """As the event loop's, with HANDSHAKE_TIMEOUT_S."""
        return await super().create_server(
            *args, ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S, **options
        )


def new_event_loop(options: ServeOptions) -> asyncio.AbstractEventLoop:
    """Return a new event loop for a server with `options`."""
    loop: asyncio.AbstractEventLoop = (
        uvloop.new_event_loop() if options.ssl_certfile is None else TlsLoop()
    )
    return loop


def tls_context(options: ServeOptions) -> ssl.SSLContext | None:
    """Return a context for TLS 1.2 or later, or None without a certificate.

    Raises UsageError for options that do not fit together, and InputError for unreadable files.
    """
    certificate = options.ssl_certfile
    key = options.ssl_keyfile
    client_ca = options.ssl_ca_certs
    if certificate is None:
        for option, path in (("--ssl-keyfile", key), ("--ssl-ca-certs", client_ca)):
            if path is not None:
                raise UsageError(
                    f"{option} {path} is of no use without a certificate",
                    todo="Give --ssl-certfile FILE",
                )
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _check_readable(certificate, key, client_ca)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        key_path = key or certificate
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InputError(
                f"the key is not the certificate's ({key_path}, {certificate})"
            ) from None
        raise InputError(
            f"no certificate and key can be read ({certificate}, {key_path}: "
            f"{error.reason or error})",
            "A certificate, followed by its chain, and its key were expected, both as PEM",
            "" if key else "Give the key's file with --ssl-keyfile",
        ) from None
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise InputError(
                f"no certificate can be read ({client_ca}: {error.reason or error})",
                "Certificates of the authorities that sign clients were expected, as PEM",
            ) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(*paths: Path | None) -> None:
    for path in paths:
        if path is None:
            continue
        try:
            Path(path).open("rb").close()
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error.strerror})", "A file in PEM was expected"
            ) from None


def _no_password() -> NoReturn:
    """Refuse an encrypted key: OpenSSL calls this to ask for its password."""
    raise InputError(
        "the certificate's key is encrypted", todo="Decrypt it: openssl pkey -in KEY -out FILE"
    )
