"""What takes minutes: endurance, long attacks, a thousand clients (`make soak`)."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from support import attacks, schemathesis_cases, soak_traffic
from support.scripted_model import start_scripted_server
from support.server_process import LlmkitServer, wait_for
from support.tiny_models import tiny_checkpoint

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
SERVER: dict[str, Any] = {
    "served_model_name": "tiny",
    "kv_cache_memory": 2**24,
    "max_num_seqs": 16,
    "body_timeout": 5.0,
}
REQUESTS = 10_000
WARM_UP = 2_500
SEED = 7
GROWTH = 0.02


@pytest.fixture(scope="module", autouse=True)
def server_logs_nothing(server: LlmkitServer) -> Iterator[None]:
    """No traffic makes the server log anything but the first fields that it ignores."""
    yield
    lines = server.log.read_text().splitlines()
    expected = re.compile(r" is ready at |: the field .* is ignored$|: more than 1,000 field names")
    assert [line for line in lines if not expected.search(line)] == []
    assert len(lines) < 1010


def test_soak_of_ten_thousand_requests_leaks_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        capsys.disabled(),
        # The store of responses is full before the warm-up ends.
        start_scripted_server(
            tmp_path,
            "hermes",
            max_num_seqs=16,
            kv_cache_memory=2**24,
            response_store_size=2**18,
        ) as server,
    ):
        began = time.monotonic()
        warm = asyncio.run(soak_traffic.soak(server.url, WARM_UP, SEED, say="warm-up: "))
        soak_traffic.settle(server)
        before = soak_traffic.Resources.of(server)
        tally = asyncio.run(
            soak_traffic.soak(server.url, REQUESTS - WARM_UP, SEED + 1, say="soak: ")
        )
        soak_traffic.settle(server)
        after = soak_traffic.Resources.of(server)
        api = after.api_bytes / before.api_bytes - 1
        engine = after.engine_bytes / before.engine_bytes - 1
        figures = {
            "requests": REQUESTS,
            "cancelled": warm.cancelled + tally.cancelled,
            "statuses": dict(warm.statuses + tally.statuses),
            "seconds": round(time.monotonic() - began),
            "before": vars(before),
            "after": vars(after),
            "grown": {"api": round(api, 4), "engine": round(engine, 4)},
        }
        sys.stdout.write(f"{json.dumps(figures)}\n")
        assert warm.wrong + tally.wrong == []
        assert (after.api_files, after.engine_files) == (before.api_files, before.engine_files)
        assert max(api, engine) < GROWTH
        assert server.process.poll() is None
        assert "Traceback" not in server.log.read_text()


def test_soak_fuzz_of_the_http_layer(server: LlmkitServer) -> None:
    for begin in range(0, 20_000, 1000):
        for number, answers in attacks.fuzz(server.port, "", range(begin, begin + 1000)):
            assert attacks.faults(answers) == [], f"damaged({number}): {attacks.damaged(number)}"
    with server.client() as client:
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("number", range(1, 4))
def test_soak_run_of_schemathesis(server: LlmkitServer, number: int) -> None:
    with server.client() as client:
        statuses = schemathesis_cases.attack(client, examples=40, number=number)
        assert client.get("/health").status_code == 200
    assert sum((came[200] for name, came in statuses.items() if " post " in name), 0) > 100


def test_slow_clients_are_cut_off_and_disturb_no_other(server: LlmkitServer) -> None:
    """Slowloris, in headers, in a body, behind an answer and with nothing but line feeds."""
    complete_request = attacks.request()
    starts = [
        b"",
        complete_request[:-5],
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n",
    ]
    starts.append(attacks.request(b"", b"/health", b"GET") + b"\r\n")
    drips = [b"X", b"5", b"x", b"\r\n"]

    async def slow(begin: bytes, drip: bytes) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        began = time.monotonic()
        writer.write(begin)
        try:
            async with asyncio.timeout(attacks.HANG_S * 3):
                while not reader.at_eof():
                    writer.write(drip)
                    await writer.drain()
                    await asyncio.sleep(0.5)
                    if reader._buffer:  # type: ignore[attr-defined]
                        await reader.read(65536)
        except ConnectionError:
            pass
        writer.transport.abort()
        return time.monotonic() - began

    async def all_of_them() -> None:
        many = [
            asyncio.create_task(slow(*pair))
            for pair in zip(starts, drips, strict=True)
            for _ in range(50)
        ]
        async with aiohttp.ClientSession(server.url) as session:
            while not all(task.done() for task in many):
                async with session.post(
                    "/v1/completions", data=attacks.BODY, headers=JSON
                ) as answer:
                    assert answer.status == 200
                await asyncio.sleep(0.5)
        await asyncio.gather(*many)

    asyncio.run(all_of_them())
    soak_traffic.settle(server)


JSON = {"content-type": "application/json"}


def test_thousand_concurrent_clients_get_an_answer_or_429(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    options: dict[str, Any] = {
        "kv_cache_memory": 2**24,
        "max_num_seqs": 64,
        "max_waiting": 400,
        "served_model_name": "tiny",
    }
    # A shell's soft limit is low; the server raises it to the hard limit.
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        server = LlmkitServer(tmp_path / "log", model, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 24, "ignore_eos": True}

    async def one(session: aiohttp.ClientSession, index: int) -> int:
        async with session.post(
            "/v1/completions", json=body | {"stream": index % 2 == 0}
        ) as answer:
            text = await answer.text()
            if answer.status == 200:
                assert (
                    text.endswith("data: [DONE]\n\n")
                    if index % 2 == 0
                    else json.loads(text)["usage"]["completion_tokens"] == 24
                )
            else:
                assert int(answer.headers["retry-after"]) > 0
                assert json.loads(text)["error"]["code"] == "queue_full"
            return answer.status

    async def all_of_them() -> Counter[int]:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=attacks.HANG_S * 10)
        async with aiohttp.ClientSession(
            server.url, connector=connector, timeout=timeout
        ) as session:
            return Counter(await asyncio.gather(*(one(session, index) for index in range(1000))))

    try:
        server.wait_ready()
        statuses = asyncio.run(all_of_them())
        assert statuses.keys() <= {200, 429}
        assert statuses[200] >= 464
        soak_traffic.settle(server)
        assert "Traceback" not in server.log.read_text()
    finally:
        server.process.kill()
        server.process.wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_server_out_of_files_recovers(server: LlmkitServer) -> None:
    api = psutil.Process(server.process.pid)
    limits = api.rlimit(psutil.RLIMIT_NOFILE)
    api.rlimit(psutil.RLIMIT_NOFILE, (api.num_fds() + 20, limits[1]))

    async def crowd() -> None:
        async def one() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.wait([asyncio.ensure_future(reader.read(1000))], timeout=2)
            await asyncio.sleep(2)
            writer.transport.abort()

        await asyncio.gather(*(one() for _ in range(200)), return_exceptions=True)

    try:
        asyncio.run(crowd())
    finally:
        api.rlimit(psutil.RLIMIT_NOFILE, limits)

    def healthy() -> bool:
        with server.client() as client:
            return client.get("/health").status_code == 200

    wait_for(healthy)
