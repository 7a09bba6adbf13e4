"""Attack requests: bytes over a socket, damaged by a seeded generator, and their responses."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import httptools

MAX_ERROR_BYTES = 16 * 1024
HANG_S = 60.0  # far more than any answer takes: what is not answered by then never will be
_QUIET_S = 0.3  # without a byte for so long the client says that it has no more to say
BODY = b'{"model":"tiny","prompt":"x","max_tokens":2}'
SMUGGLED = b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n"
_TOKENS = [
    b"\x00",
    b"\r",
    b"\n",
    b"\r\n",
    b" ",
    b"\t",
    b":",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"%00",
    b"\x7f",
    b"\x0b",
]


@dataclass
class Answers:
    """The responses of one connection: status and body each. Raises for bytes that are no HTTP."""

    statuses: list[int] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    closed: bool = False

    def feed(self, received: bytes) -> Answers:
        parser = httptools.HttpResponseParser(self)
        self._parser = parser
        parser.feed_data(received)
        return self

    def on_headers_complete(self) -> None:
        self.statuses.append(self._parser.get_status_code())
        self.bodies.append(b"")

    def on_body(self, body: bytes) -> None:
        self.bodies[-1] += body


async def exchange(port: int, parts: Sequence[bytes], quiet_s: float = _QUIET_S) -> Answers:
    """Send `parts`, take what comes until the server closes. TimeoutError when it never does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    answers = Answers()
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        try:
            while chunk := await asyncio.wait_for(reader.read(65536), quiet_s):
                received += chunk
        except TimeoutError:
            writer.write_eof()
            async with asyncio.timeout(HANG_S):
                while chunk := await reader.read(65536):
                    received += chunk
        answers.closed = True
    except ConnectionError:
        answers.closed = True
    finally:
        writer.transport.abort()
    return answers.feed(received)


def request(
    body: bytes = BODY,
    path: bytes = b"/v1/completions",
    method: bytes = b"POST",
    key: str = "",
    *more: bytes,
) -> bytes:
    """A valid request with the headers `more`; with a Content-Length unless `more` has a length."""
    lines = [
        method + b" " + path + b" HTTP/1.1",
        b"Host: localhost",
        b"Content-Type: application/json",
    ]
    lines += [b"Authorization: Bearer " + key.encode()] if key else []
    if not any(line.lower().startswith((b"content-length", b"transfer-encoding")) for line in more):
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, *more, b"", body])


def chunked(
    *chunks: bytes, key: str = "", coding: bytes = b"chunked", end: bytes = b"0\r\n\r\n"
) -> bytes:
    """A request whose body is in `chunks`, each with its size already."""
    return request(
        b"".join(chunks) + end, b"/v1/completions", b"POST", key, b"Transfer-Encoding: " + coding
    )


def damaged(seed: int, key: str = "") -> list[bytes]:
    """The parts of a damaged request. The same seed gives the same bytes."""
    rng = random.Random(seed)
    data = b"".join(rng.choice(_DAMAGES)(rng, key) for _ in range(rng.choice([1, 1, 1, 2, 3])))
    if rng.random() < 0.3:
        data = _bytes_changed(rng, data)
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.choice([0, 0, 1, 3])))
    return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def _bytes_changed(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(data), 2000) + 1)
        cut = rng.choice([0, 0, 1, 5])
        data = data[:at] + rng.choice([*_TOKENS, rng.randbytes(3)]) + data[at + cut :]
    return data


def _truncated(rng: random.Random, key: str) -> bytes:
    complete = request(key=key)
    return complete[: rng.randrange(len(complete))]


def _wrong_length(rng: random.Random, key: str) -> bytes:
    length = rng.choice(
        [
            b"0",
            b"1",
            b"45",
            b"9999",
            b"-1",
            b"+44",
            b"0x2c",
            b"44, 44",
            b"44 ",
            b"\x0044",
            b"4 4",
            b"",
            b"1e3",
            b"9223372036854775808",
            b"18446744073709551615",
            b"18446744073709551616",
            b"0" * 5000 + b"44",
            b"9" * 5000,
        ]
    )
    twice = [b"Content-Length: 44"] if rng.random() < 0.3 else []
    return request(
        BODY + SMUGGLED, b"/v1/completions", b"POST", key, b"Content-Length: " + length, *twice
    )


def _both_lengths(rng: random.Random, key: str) -> bytes:
    coding = rng.choice(
        [
            b"chunked",
            b"xchunked",
            b"identity",
            b"Chunked ",
            b"\tchunked",
            b'"chunked"',
            b"chunked\x0b",
        ]
    )
    lengths = [b"Content-Length: %d" % rng.choice([0, 4, 44]), b"Transfer-Encoding: " + coding]
    rng.shuffle(lengths)
    return request(b"0\r\n\r\n" + SMUGGLED, b"/v1/completions", b"POST", key, *lengths)


def _codings(rng: random.Random, key: str) -> bytes:
    coding = rng.choice(
        [
            b"gzip",
            b"identity",
            b"gzip, chunked",
            b"chunked, gzip",
            b"chunked, chunked",
            b"chunked;q=1",
            b"CHUNKED",
            b"chunk",
            b"chunked\r\nTransfer-Encoding: identity",
            b"\r\n chunked",
            b"identity\r\nTransfer-Encoding:chunked",
        ]
    )
    return chunked(b"%x\r\n" % len(BODY), BODY, b"\r\n", key=key, coding=coding) + SMUGGLED


def _chunks(rng: random.Random, key: str) -> bytes:
    size = rng.choice(
        [
            b"2c",
            b"2C",
            b"02c",
            b"2b",
            b"2d",
            b"-2c",
            b"+2c",
            b"0x2c",
            b" 2c",
            b"2c ",
            b"2 c",
            b"",
            b"g",
            b"f" * 16,
            b"f" * 17,
            b"0" * 70_000 + b"2c",
            b"2c;" + b"e" * 100_000,
            b'2c;a="\r\n"',
            b"2c;a=\x00",
            b"2c\r",
        ]
    )
    line = rng.choice([b"\r\n", b"\r\n", b"\n", b"\r", b"\r\n\r\n", b""])
    end = rng.choice(
        [
            b"0\r\n\r\n",
            b"0\r\n",
            b"0\n\n",
            b"",
            b"0\r\nHost: evil\r\n\r\n",
            b"0\r\nx: " + b"t" * 100_000,
            b"00\r\n\r\n",
            b"0\r\n" + b"x: y\r\n" * 30_000 + b"\r\n",
        ]
    )
    return chunked(size, line, BODY, line, key=key, end=end)


def _headers(rng: random.Random, key: str) -> bytes:
    more = rng.choice(
        [
            b"X: a\r\n b",
            b"X: a\r\n\tb",
            b" X: a",
            b"X : a",
            b": a",
            b"X",
            b"X:",
            b"X: \x00",
            b"\x00: a",
            b"X: \xff\xfe",
            b"X\xff: a",
            b"X: a\rb",
            b"X: a\nY: b",
            b"Host: evil",
            b"Host:",
            b"Content-Type: text/plain",
            b"X: " + b"a" * 70_000,
            b"a" * 70_000 + b": b",
            b"\r\n".join([b"X: y"] * 20_000),
            b"Expect: 100-continue",
            b"Expect: 200-ok",
            b"Connection: close, keep-alive",
            b"Connection: " + b"x," * 5000,
            b"Origin: null",
            b"Authorization: Bearer \xff",
            b"Content-Encoding: gzip",
            b"Connection: upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
            b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n"
            b"Sec-WebSocket-Version: 13",
        ]
    )
    return request(BODY, b"/v1/completions", b"POST", key, more)


def _lines(rng: random.Random, key: str) -> bytes:
    method = rng.choice(
        [
            b"GET",
            b"POST",
            b"HEAD",
            b"OPTIONS",
            b"TRACE",
            b"CONNECT",
            b"get",
            b"",
            b"M" * 70_000,
            b"G\x00",
        ]
    )
    path = rng.choice(
        [
            b"/",
            b"*",
            b"",
            b"//",
            b"/../../etc/passwd",
            b"/%2e%2e/%00",
            b"/v1/models/%ff%fe",
            b"/" + b"p" * 70_000,
            b"http://evil/health",
            b"http://localhost/health",
            b"localhost:80",
            b"/health#x",
            b"/health?" + b"q" * 50_000,
            b"/h\xc3\xa9",
            b"/\x00",
            b"[::1",
            b"http://[::1/",
            b"/health%",
            b"/a b",
            b"/api/blobs/sha256:%00",
            b"/api/tags/..",
            b"/v1/audio/\xff",
            b"/v1/completions;x=1",
        ]
    )
    version = rng.choice(
        [
            b" HTTP/1.1",
            b" HTTP/1.0",
            b" HTTP/2.0",
            b" HTTP/0.9",
            b" HTTP/9.9",
            b" HTTP/1.",
            b" HTTP/11",
            b" http/1.1",
            b"",
            b"  HTTP/1.1",
            b" HTTP/1.1 ",
            b" HTTP/1.1\x00",
        ]
    )
    host = rng.choice(
        [b"Host: localhost\r\n"] * 3 + [b"", b"Host: [\r\n", b"Host: localhost:99999999\r\n"]
    )
    return (
        method
        + b" "
        + path
        + version
        + b"\r\n"
        + host
        + b"Authorization: Bearer "
        + key.encode()
        + b"\r\n\r\n"
    )


def _other_protocols(rng: random.Random, key: str) -> bytes:
    return rng.choice(
        [
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x12\x04\x00\x00\x00\x00\x00",
            b"GET /\r\n",
            b"GET /health\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(300),
            b"SSH-2.0-x\r\n",
            b"\r\n" * 50_000,
            b"\n",
            b"EHLO localhost\r\n",
            b"\x00" * 1000,
            rng.randbytes(1000),
            b"*1\r\n$4\r\nPING\r\n",
            b"HTTP/1.1 200 OK\r\n\r\n",
        ]
    )


def _pipelined(rng: random.Random, key: str) -> bytes:
    return b"".join(request(key=key) for _ in range(rng.randint(2, 200)))


_DAMAGES: list[Callable[[random.Random, str], bytes]] = [
    _truncated,
    _wrong_length,
    _both_lengths,
    _codings,
    _chunks,
    _headers,
    _lines,
    _other_protocols,
    _pipelined,
]


def fuzz(
    port: int, key: str, seeds: Sequence[int], at_once: int = 16
) -> Iterator[tuple[int, Answers | Exception]]:
    """The responses to the damaged requests `seeds`, or the exception of one without valid HTTP."""

    async def one(seed: int, room: asyncio.Semaphore) -> tuple[int, Answers | Exception]:
        async with room:
            try:
                return seed, await exchange(port, damaged(seed, key))
            except (TimeoutError, httptools.HttpParserError, OSError) as error:
                return seed, error

    async def all_of_them() -> list[tuple[int, Answers | Exception]]:
        room = asyncio.Semaphore(at_once)
        return await asyncio.gather(*(one(seed, room) for seed in seeds))

    yield from asyncio.run(all_of_them())


def faults(answers: Answers | Exception) -> list[str]:
    """What is wrong with what a damaged request got."""
    if isinstance(answers, Exception):
        return [repr(answers)]
    found = [
        f"status {status}"
        for status in answers.statuses
        if not (100 <= status <= 200 or 400 <= status < 500)
    ]
    pairs = zip(answers.statuses, answers.bodies, strict=True)
    found += [
        f"{len(body)} bytes"
        for status, body in pairs
        if status >= 400 and len(body) > MAX_ERROR_BYTES
    ]
    if len([status for status in answers.statuses if status >= 200]) > 4:
        found.append(f"{len(answers.statuses)} answers")
    return found
