"""HTTPS with a certificate of our own making, and clients that must show one."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.server_process import LlmkitServer, serving
from support.tiny_models import tiny_checkpoint

from llmkit.common.errors import InputError, LlmkitError, UsageError
from llmkit.runtime.server.http import tls
from llmkit.runtime.server.http.tls import TlsLoop, tls_context
from llmkit.runtime.server.run_server import run_server
from llmkit.runtime.server.serve_options import ServeOptions


class Authority:
    """Somebody who signs certificates, in PEM files of `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.path = self._write(f"{name}.pem", self._signed(self._name, self._key, ca=True))

    def certificate(self, name: str, password: bytes | None = None) -> tuple[Path, Path]:
        """The files of a certificate of localhost, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        secret = (
            serialization.BestAvailableEncryption(password)
            if password
            else serialization.NoEncryption()
        )
        form = serialization.PrivateFormat.PKCS8
        written = key.private_bytes(serialization.Encoding.PEM, form, secret)
        return self._write(f"{name}.pem", self._signed(subject, key, ca=False)), self._write(
            f"{name}.key", written
        )

    def _signed(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, ca: bool) -> bytes:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(
            self._name, subject, key.public_key(), x509.random_serial_number()
        )
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(
            now + timedelta(days=1)
        )
        builder = builder.add_extension(
            x509.BasicConstraints(ca=ca, path_length=None), critical=True
        )
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, data: bytes) -> Path:
        path = self._folder / name
        path.write_bytes(data)
        return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def tls_server(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlmkitServer]:
    folder = tmp_path_factory.mktemp("server")
    certificate, key = authority.certificate("server")
    files = {
        "ssl_certfile": str(certificate),
        "ssl_keyfile": str(key),
        "ssl_ca_certs": str(authority.path),
    }
    with serving(
        folder / "log", tiny_checkpoint(folder / "model"), kv_cache_memory=2**25, **files
    ) as running:
        yield running


def client_context(authority: Authority, shown: tuple[Path, Path] | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.path)
    if shown is not None:
        context.load_cert_chain(*shown)
    return context


def test_tls_clients_connect_and_show_a_certificate(
    tls_server: LlmkitServer, authority: Authority, tmp_path: Path
) -> None:
    url = f"https://localhost:{tls_server.port}"
    assert f" is ready at https://127.0.0.1:{tls_server.port} " in tls_server.log.read_text()
    with httpx.Client(verify=client_context(authority, authority.certificate("client"))) as http:
        client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", http_client=http, max_retries=0
        )
        answer = client.completions.create(model="model", prompt="one two", max_tokens=3)
        assert answer.usage is not None
        chunks = list(
            client.completions.create(model="model", prompt="one two", max_tokens=3, stream=True)
        )
        assert chunks[-1].choices[0].finish_reason is not None
        # The page sends its own origin.
        assert http.get(f"{url}/", headers={"origin": url}).status_code == 200
        assert (
            http.get(f"{url}/health", headers={"origin": "https://evil.example"}).status_code == 403
        )
    stranger = Authority(tmp_path, "stranger").certificate("client")
    for shown in (None, stranger):
        with (
            httpx.Client(verify=client_context(authority, shown)) as http,
            pytest.raises(httpx.HTTPError),
        ):
            http.get(f"{url}/health")
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://localhost:{tls_server.port}/health")


def test_tls_refuses_old_versions(authority: Authority) -> None:
    certificate, key = authority.certificate("server")
    context = tls_context(ServeOptions("m", ssl_certfile=certificate, ssl_keyfile=key))
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode == ssl.CERT_NONE
    assert tls_context(ServeOptions("m")) is None


def test_tls_file_errors_are_reported_before_the_model_is_opened(
    authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.certificate("server")
    _, other = authority.certificate("other")
    _, encrypted = authority.certificate("encrypted", b"password")
    empty = tmp_path / "empty"
    absent = tmp_path / "absent"
    empty.touch()
    both = tmp_path / "both"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())

    def problem(kind: type[LlmkitError], **files: Path) -> str:
        with pytest.raises(kind) as caught:
            run_server(ServeOptions("absent", port=0, **files))
        assert caught.value.exit_code == kind.exit_code
        return str(caught.value)

    assert InputError.exit_code == 3
    for wrong in (absent, tmp_path):
        assert f"{wrong} cannot be read" in problem(InputError, ssl_certfile=wrong)
        assert f"{wrong} cannot be read" in problem(
            InputError, ssl_certfile=certificate, ssl_keyfile=wrong
        )
        assert f"{wrong} cannot be read" in problem(
            InputError, ssl_certfile=both, ssl_ca_certs=wrong
        )
    for given in (empty, key, certificate):
        assert "no certificate and key can be read" in problem(InputError, ssl_certfile=given)
    assert "--ssl-keyfile" in problem(InputError, ssl_certfile=certificate)
    assert "the key is not the certificate's" in problem(
        InputError, ssl_certfile=certificate, ssl_keyfile=other
    )
    assert "is encrypted" in problem(InputError, ssl_certfile=certificate, ssl_keyfile=encrypted)
    assert "no certificate can be read" in problem(
        InputError, ssl_certfile=both, ssl_ca_certs=empty
    )
    assert "--ssl-keyfile" in problem(UsageError, ssl_keyfile=key)
    assert "--ssl-ca-certs" in problem(UsageError, ssl_ca_certs=certificate)


def test_tls_handshake_that_stalls_is_cut_off(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT_S", 0.2)
    certificate, key = authority.certificate("server")
    context = tls_context(ServeOptions("m", ssl_certfile=certificate, ssl_keyfile=key))

    async def run() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        server = await asyncio.get_running_loop().create_server(
            asyncio.Protocol, sock=listener, ssl=context
        )
        for sent in (b"", b"\x16\x03\x01\x02\x00\x01"):  # nothing, and the beginning of a hello
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(sent)
            async with asyncio.timeout(30):  # half of what asyncio would wait without our limit
                assert await reader.read() == b""
            writer.close()
        server.close()

    with asyncio.Runner(loop_factory=TlsLoop) as runner:
        runner.run(run())
