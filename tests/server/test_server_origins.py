"""Which web pages and which names of the server are accepted, by option."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from support.server_process import LlmkitServer, serving

from llmkit.cli.serve import ServeArguments
from llmkit.cli.typer_options import parse_words
from llmkit.common.errors import UsageError
from llmkit.runtime.server.http.api_keys import Client
from llmkit.runtime.server.http.hosts import AllowedHosts
from llmkit.runtime.server.http.origins import AllowedOrigins
from llmkit.runtime.server.run_server import log_open_doors
from llmkit.runtime.server.serve_options import ServeOptions

if TYPE_CHECKING:
    from playwright.sync_api import Browser

KEY = "secret-key"
DEV_PAGE = "http://localhost:5173"
OBSIDIAN = "app://obsidian.md"
EDITOR = "vscode-webview://*"
OPTIONS: dict[str, Any] = {
    "served_model_name": "tiny",
    "dp": 2,
    "kv_cache_memory": 2**24,
    "allowed_hosts": ["llm.example.com", "10.0.0.5"],
}
BODY = {"model": "tiny", "prompt": "x", "max_tokens": 2}
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.send_header("content-type", "text/html")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def pages() -> Iterator[list[str]]:
    """The origins of two web servers. The server allows the first one."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _Page) for _ in range(2)]
    for one in servers:
        threading.Thread(target=one.serve_forever, daemon=True).start()
    yield [f"http://localhost:{one.server_address[1]}" for one in servers]
    for one in servers:
        one.shutdown()
        one.server_close()


@pytest.fixture(scope="module")
def server(
    model: Path, pages: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LlmkitServer]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys").write_text(f"{KEY}\n")
    options = OPTIONS | {"allowed_origins": [DEV_PAGE, OBSIDIAN, EDITOR, pages[0]]}
    keys = str(folder / "keys")
    with serving(folder / "log", model, KEY, api_key_file=keys, **options) as running:
        yield running


def cors(answer: httpx.Response) -> dict[str, str]:
    """The CORS headers of a response, without "access-control-"."""
    prefix = "access-control-"
    return {
        name.removeprefix(prefix): value
        for name, value in answer.headers.items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize(
    ("origin", "credentials"),
    [(DEV_PAGE, True), (OBSIDIAN, True), ("vscode-webview://0a1b2c", False)],
)
def test_allowed_origin_gets_cors_headers_and_a_preflight(
    server: LlmkitServer, http: httpx.Client, origin: str, credentials: bool
) -> None:
    expected = {"allow-origin": origin} | ({"allow-credentials": "true"} if credentials else {})
    # A preflight has no key.
    asked = httpx.options(
        f"{server.url}/v1/completions",
        headers=PREFLIGHT | {"origin": origin, "access-control-request-private-network": "true"},
    )
    assert (asked.status_code, asked.content) == (204, b"")
    answered = cors(asked)
    exposed = answered.pop("expose-headers")
    assert answered == expected | {
        "allow-methods": "GET, HEAD, POST, DELETE, OPTIONS",
        "allow-headers": "authorization, content-type, x-stainless-lang",
        "allow-private-network": "true",
        "max-age": "600",
    }
    assert "x-request-id" in exposed.split(", ")
    assert "Origin" in asked.headers["vary"].split(", ")
    for status, answer in (
        (200, http.post("/v1/completions", json=BODY, headers={"origin": origin})),
        (
            200,
            http.post("/v1/completions", json=BODY | {"stream": True}, headers={"origin": origin}),
        ),
        (404, http.get("/nowhere", headers={"origin": origin})),
        (415, http.post("/v1/completions", headers={"origin": origin})),
        (401, httpx.get(f"{server.url}/v1/models", headers={"origin": origin})),
    ):
        assert answer.status_code == status
        assert cors(answer) == expected | {"expose-headers": exposed}
        assert answer.headers["vary"] == "Origin"


def test_preflight_returns_only_header_names(http: httpx.Client) -> None:
    names = "x-a, b c, <script>, , x-d;q=1, Authorization, " + "x" * 129
    headers = PREFLIGHT | {"origin": DEV_PAGE, "access-control-request-headers": names}
    answer = http.options("/v1/completions", headers=headers)
    assert cors(answer)["allow-headers"] == "x-a, Authorization"
    assert http.options("/v1/completions", headers={"origin": DEV_PAGE}).status_code == 405


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.localhost:5173",
        "http://localhost:5173.evil.example",
        "http://localhost:51730",
        "http://localhost",
        "https://localhost:5173",
        "http://localhost:5173/",
        "http://localhost:5173, http://evil.example",
        "app://obsidian.md.evil",
        "app://evil/obsidian.md",
        "xapp://obsidian.md",
        "app://",
        "vscode-webviewx://0a1b",
        "xvscode-webview://0a1b",
        "vscode-webview:/0a1b",
        "https://vscode-webview://0a1b",
        "vscode-webview://0a1b/path",
        "null",
        "*",
        "",
    ],
)
def test_lookalike_of_an_allowed_origin_is_refused(http: httpx.Client, origin: str) -> None:
    for method, headers in (("POST", {}), ("OPTIONS", PREFLIGHT)):
        answer = http.request(
            method, "/v1/completions", json=BODY, headers=headers | {"origin": origin}
        )
        assert (answer.status_code, cors(answer)) == (403, {})
        error = answer.json()["error"]
        assert error["code"] == "foreign_origin"
        assert "--allowed-origins" in error["message"]
    assert http.get("/health", headers={"origin": origin}).status_code == 403


def test_refusal_suggests_a_value_that_would_allow_the_origin(http: httpx.Client) -> None:
    for origin, value in (
        ("https://chat.example.com", "https://chat.example.com."),
        ("moz-extension://0a1b-2c", "'moz-extension://*'."),
        ("null", "'*'."),
    ):
        message = http.get("/version", headers={"origin": origin}).json()["error"]["message"]
        assert message.endswith(f"--allowed-origins {value}")


def test_allowed_hosts_are_accepted_and_lookalikes_refused(http: httpx.Client) -> None:
    for host, status in (
        ("llm.example.com", 200),
        ("LLM.example.com:8443", 200),
        ("10.0.0.5:8000", 200),
        ("localhost:1", 200),
        ("evil.llm.example.com", 403),
        ("llm.example.com.evil.example", 403),
        ("llm.example.com:x", 403),
        ("10.0.0.50", 403),
        ("[]", 403),
    ):
        answer = http.get("/version", headers={"host": host})
        assert answer.status_code == status, host
        if status == 403:
            assert "--allowed-hosts" in answer.json()["error"]["message"]
    own_page = {"host": "llm.example.com", "origin": "https://llm.example.com"}
    assert http.get("/version", headers=own_page).status_code == 200


@pytest.mark.parametrize("allowed", [True, False])
def test_page_of_another_origin_in_a_browser(
    browser: Browser, server: LlmkitServer, pages: list[str], allowed: bool
) -> None:
    """Chromium sends the preflight itself, and decides what the page may read."""
    context = browser.new_context()
    page = context.new_page()
    console: list[str] = []
    page.on("console", lambda message: console.append(message.text))
    page.goto(pages[0 if allowed else 1])
    answer = page.evaluate(
        """async ([url, key, body]) => {
            const headers = {authorization: `Bearer ${key}`, "content-type": "application/json"};
            try {
                const response = await fetch(url, {method: "POST", headers, body});
                const id = response.headers.get("x-request-id");
                return [response.status, id.length, await response.text()];
            } catch (error) {
                return String(error);
            }
        }""",
        [f"{server.url}/v1/completions", KEY, json.dumps(BODY | {"stream": True})],
    )
    context.close()
    if allowed:
        assert answer[:2] == [200, 32]
        assert answer[2].endswith("data: [DONE]\n\n")
    else:
        assert answer == "TypeError: Failed to fetch"
        assert "Response to preflight request doesn't pass access control check" in console[0]


def test_any_origin_is_allowed_without_credentials() -> None:
    origins = AllowedOrigins(["*", DEV_PAGE])
    for origin in ("https://any.example", "null", "app://x"):
        headers = dict(origins.cors_headers(origin) or ())
        assert headers[b"access-control-allow-origin"] == b"*"
        assert b"access-control-allow-credentials" not in headers
    listed = dict(origins.cors_headers(DEV_PAGE) or ())
    assert listed[b"access-control-allow-origin"] == DEV_PAGE.encode()
    assert listed[b"access-control-allow-credentials"] == b"true"
    assert AllowedOrigins([]).cors_headers("null") is None
    assert AllowedOrigins([]).vary == []


@pytest.mark.parametrize(
    ("host", "allowed", "given", "accepted"),
    [
        ("127.0.0.1", (), "evil.example", False),
        ("127.0.0.1", ("*",), "evil.example", True),
        ("127.0.0.2", (), "127.0.0.2:8000", True),
        ("::1", (), "[::1]:8000", True),
        ("::1", (), "::1", False),
        ("127.0.0.1", ("fd00:0::5",), "[fd00::5]:8000", True),
        ("127.0.0.1", ("[fd00::5]",), "[fd00::5]", True),
        ("0.0.0.0", (), "evil.example", True),
        ("0.0.0.0", ("llm.example.com",), "evil.example", False),
        ("0.0.0.0", ("llm.example.com",), "llm.example.com", True),
        ("0.0.0.0", ("llm.example.com",), "localhost:8000", True),
        ("0.0.0.0", ("llm.example.com", "*"), "evil.example", True),
    ],
)
def test_hosts_accept_the_servers_names(
    host: str, allowed: tuple[str, ...], given: str, accepted: bool
) -> None:
    assert AllowedHosts(host, allowed).accepts(given) is accepted


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--allowed-hosts", "http://llm.example.com"], "is not a host name.*llm.example.com"),
        (["--allowed-hosts", "llm.example.com:8000"], "without scheme and port"),
        (["--allowed-hosts", "*.example.com"], "is not a host name"),
        (["--allowed-origins", "llm.example.com"], "is not an origin.*https://chat"),
        (["--allowed-origins", "https://llm.example.com/"], "without a path"),
        (["--allowed-origins", "https://*"], "other than http and https"),
        (["--allowed-origins", "http://*"], "is not an origin"),
        (["--allowed-origins", "https://*.example.com"], "is not an origin"),
        (["--allowed-origins", "null"], "is not an origin"),
        (["--allowed-origins", "app://x/y"], "is not an origin"),
    ],
)
def test_wrong_host_or_origin_is_a_usage_error(words: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_words(ServeArguments, "serve", ["model", *words])


def test_hosts_and_origins_are_repeatable_options() -> None:
    words = ["--allowed-hosts", "a.example", "--allowed-hosts", "fd00::1"]
    words += ["--allowed-origins", "https://a.example:8443", "--allowed-origins", "file://"]
    words += ["--allowed-origins", "vscode-webview://*", "--allowed-origins", "*"]
    options = parse_words(ServeArguments, "serve", ["model", *words]).options
    assert options.allowed_hosts == ("a.example", "fd00::1")
    assert options.allowed_origins == (
        "https://a.example:8443",
        "file://",
        "vscode-webview://*",
        "*",
    )


def test_every_page_without_a_key_is_warned_about() -> None:
    lines: list[str] = []
    for options in (
        ServeOptions("m"),
        ServeOptions("m", allowed_origins=(DEV_PAGE,), allowed_hosts=("a.example",)),
    ):
        log_open_doors(options, (), lines.append)
    every_page = ServeOptions("m", allowed_origins=("*",), allowed_hosts=("*",))
    log_open_doors(every_page, (Client.of("key"),), lines.append)
    assert lines == []
    log_open_doors(every_page, (), lines.append)
    assert [line.split(" and ")[0] for line in lines] == [
        "warning: with --allowed-origins '*'",
        "warning: with --allowed-hosts '*'",
    ]
