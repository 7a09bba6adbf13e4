"""The fixed-time server over HTTP, as a process: `fixed_time_http.py SLOTS TTFT_S TPOT_S`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web

CONTEXT_TOKENS = 4096


class SlotServer:
    """Answers completions at fixed times after a request got a slot; the others wait in order."""

    def __init__(self, slots: int, ttft_s: float, tpot_s: float) -> None:
        self.slots = asyncio.Semaphore(slots)
        self.ttft_s = ttft_s
        self.tpot_s = tpot_s

    async def models(self, _request: web.Request) -> web.Response:
        entry = {"id": "fixed", "object": "model", "max_model_len": CONTEXT_TOKENS}
        return web.json_response({"object": "list", "data": [entry]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        # The wait for a slot begins when the request is there, not when its body has been parsed.
        async with self.slots:
            start_s = time.perf_counter()
            body = json.loads(await request.read())
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            due_s = start_s + self.ttft_s
            for index in range(body["max_tokens"]):
                await asyncio.sleep(due_s - time.perf_counter())
                choice = {"index": 0, "text": "a", "token_ids": [index], "finish_reason": None}
                await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                due_s += self.tpot_s
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


@contextlib.contextmanager
def fixed_time_server(slots: int, ttft_s: float, tpot_s: float) -> Iterator[str]:
    """Yield the URL of a server in a process of its own."""
    command = [sys.executable, str(Path(__file__)), str(slots), str(ttft_s), str(tpot_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


async def main(slots: int, ttft_s: float, tpot_s: float) -> None:
    """Serve on a free port, and print it."""
    server = SlotServer(slots, ttft_s, tpot_s)
    app = web.Application(client_max_size=1 << 24)
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/completions", server.completions)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
