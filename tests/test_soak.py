"""What takes minutes: endurance, long attacks, a thousand clients (`make soak`)."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import attacks
import described
import psutil
import pytest
import soaking
from scripted import start
from serving import ServerProcess, serving, wait_for
from tiny import tiny_checkpoint

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
REQUESTS, WARM_UP, SEED = 10_000, 2_500, 7
GROWTH = 0.02


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("attacked")
    model = tiny_checkpoint(folder / "model")
    options = {"served_model_name": "tiny", "kv_cache_memory": 2**24, "max_num_seqs": 16, "body_timeout": 5.0}
    with serving(folder / "log", model, **options) as running:
        yield running
        assert [line for line in running.log.read_text().splitlines() if " is ready at " not in line] == []


def test_ten_thousand_requests_leave_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled(), start(tmp_path, "hermes", max_num_seqs=16, kv_cache_memory=2**24) as server:
        began = time.monotonic()
        warm = asyncio.run(soaking.soak(server.url, WARM_UP, SEED, say="warm-up: "))
        soaking.settle(server)
        before = soaking.Resources.of(server)
        tally = asyncio.run(soaking.soak(server.url, REQUESTS - WARM_UP, SEED + 1, say="soak: "))
        soaking.settle(server)
        after = soaking.Resources.of(server)
        api, engine = after.api_bytes / before.api_bytes - 1, after.engine_bytes / before.engine_bytes - 1
        figures = {
            "requests": REQUESTS, "cancelled": warm.cancelled + tally.cancelled,
            "statuses": dict(warm.statuses + tally.statuses), "seconds": round(time.monotonic() - began),
            "before": vars(before), "after": vars(after), "grown": {"api": round(api, 4), "engine": round(engine, 4)},
        }  # fmt: skip
        sys.stdout.write(f"{json.dumps(figures)}\n")
        assert warm.wrong + tally.wrong == []
        assert (after.api_files, after.engine_files) == (before.api_files, before.engine_files)
        assert max(api, engine) < GROWTH
        assert server.process.poll() is None
        assert "Traceback" not in server.log.read_text()


def test_a_long_fuzz_of_the_http_layer(server: ServerProcess) -> None:
    for begin in range(0, 20_000, 1000):
        for number, answers in attacks.fuzz(server.port, "", range(begin, begin + 1000)):
            assert attacks.faults(answers) == [], f"damaged({number}): {attacks.damaged(number)}"
    with server.client() as client:
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("number", range(1, 4))
def test_a_long_run_of_schemathesis(server: ServerProcess, number: int) -> None:
    with server.client() as client:
        statuses = described.attack(client, examples=40, number=number)
        assert client.get("/health").status_code == 200
    assert sum((came[200] for name, came in statuses.items() if " post " in name), 0) > 100


def test_slow_clients_are_hung_up_on_and_disturb_nobody(server: ServerProcess) -> None:
    """Slowloris, in headers, in a body, behind an answer and with nothing but line feeds."""
    whole = attacks.request()
    starts = [b"", whole[:-5], b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"]
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
        many = [asyncio.create_task(slow(*pair)) for pair in zip(starts, drips, strict=True) for _ in range(50)]
        async with aiohttp.ClientSession(server.url) as session:
            while not all(task.done() for task in many):
                async with session.post("/v1/completions", data=attacks.BODY, headers=JSON) as answer:
                    assert answer.status == 200
                await asyncio.sleep(0.5)
        await asyncio.gather(*many)

    asyncio.run(all_of_them())
    soaking.settle(server)


JSON = {"content-type": "application/json"}


def test_a_thousand_clients_at_once_get_an_answer_or_a_429(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    options: dict[str, Any] = {
        "kv_cache_memory": 2**24,
        "max_num_seqs": 64,
        "max_waiting": 400,
        "served_model_name": "tiny",
    }
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # a shell's is low, and the server's to raise
    try:
        server = ServerProcess(tmp_path / "log", model, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 24, "ignore_eos": True}

    async def one(session: aiohttp.ClientSession, index: int) -> int:
        async with session.post("/v1/completions", json=body | {"stream": index % 2 == 0}) as answer:
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
        async with aiohttp.ClientSession(server.url, connector=connector, timeout=timeout) as session:
            return Counter(await asyncio.gather(*(one(session, index) for index in range(1000))))

    try:
        server.wait_ready()
        statuses = asyncio.run(all_of_them())
        assert statuses.keys() <= {200, 429}
        assert statuses[200] >= 464
        soaking.settle(server)
        assert "Traceback" not in server.log.read_text()
    finally:
        server.process.kill()
        server.process.wait()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_out_of_files_goes_on_when_it_has_some_again(server: ServerProcess) -> None:
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
