"""CPU time of the API process for each streamed token and for each request.

    python tests/peers/stream_cost.py [--before CHECKOUT] [--kinds KIND ...] [--streams 32]
        [--tokens 128] [--rounds 5] [--step-ms 30] [--profile FILE]

The server is the real API process before an engine process that computes nothing
(`prepared_server.py`). Bursts of concurrent streams ask for one token and for `--tokens` of them;
the difference is the cost of the tokens, what remains is that of the requests. CPU time is user and
system time of the API process. With `--before`, a server of another checkout is measured in turn
with this one, by the same interpreter, and the ratio of each round is printed.

An engine step (`--step-ms`) must take longer than its tokens need in the API process: otherwise
several tokens are sent together, which costs less, and "parts a token" falls. It is not quite 1
anyway: a token may be a piece of a character.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.tiny_models import write_tokenizer  # noqa: E402

CPU_CLOCK_OF_ALL_THREADS = 2  # CPUCLOCK_SCHED in linux/posix-timers.h
SHORT_BURSTS = 6  # of one token each, for one long burst: short ones cost little
HERMES_TEMPLATE = (
    '{% if tools %}Call as <tool_call>{"name": ...}</tool_call>{{ tools | tojson }}{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
MESSAGES = [{"role": "user", "content": "hello world, how are you today?"}]
PART = re.compile(rb'\r\n[0-9a-f]+\r\ndata: \{[^\n]*"choices":\[\{')
# The path and the body of each kind of request.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES}),
    "usage": (
        "/v1/chat/completions",
        {
            "messages": MESSAGES,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    "tools": ("/v1/chat/completions", {"messages": MESSAGES, "tools": [TOOL]}),
    "stop": ("/v1/chat/completions", {"messages": MESSAGES, "stop": ["zebra", "\n\n\n"]}),
    "completions": ("/v1/completions", {"prompt": MESSAGES[0]["content"]}),
}


@dataclass
class Cost:
    """CPU milliseconds, and parts of a response's body a token."""

    token_ms: float
    request_ms: float
    parts_per_token: float


class Server:
    """A server of a checkout, and its clients."""

    def __init__(self, checkout: Path, model: Path, step_ms: float, profile: Path | None) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(checkout / ".typecheck"), str(Path(__file__).parent)]
            ),
            "XDG_STATE_HOME": str(model),
        }
        command = [sys.executable, str(Path(__file__).with_name("prepared_server.py"))]
        command += [str(model), str(step_ms), *([] if profile is None else [str(profile)])]
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, cwd=model
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("ready "):
            raise SystemExit(f"the server of {checkout} has not started")
        self._port = int(line.split()[1])

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()

    def cost(self, kind: str, streams: int, tokens: int) -> Cost:
        """Measure the cost of one kind of request."""
        start_s = self._cpu_s()
        for _ in range(SHORT_BURSTS):
            self._burst(kind, streams, 1)
        middle_s = self._cpu_s()
        num_parts = self._burst(kind, streams, tokens)
        end_s = self._cpu_s()
        request_s = (middle_s - start_s) / SHORT_BURSTS / streams
        token_s = ((end_s - middle_s) / streams - request_s) / (tokens - 1)
        return Cost(token_s * 1e3, request_s * 1e3, num_parts / (streams * tokens))

    def _burst(self, kind: str, streams: int, tokens: int) -> int:
        """Open `streams` streams of `tokens` tokens each at once, and read them to their ends.

        Returns the number of parts with tokens in which the bodies were sent.
        """
        path, body = KINDS[kind]
        content = json.dumps(body | {"max_tokens": tokens, "stream": True}).encode()
        request = (
            f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        ).encode() + content
        responses = [b""] * streams
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as connections:
            for index in range(streams):
                connection = socket.create_connection(("127.0.0.1", self._port))
                connections.enter_context(connection)
                connection.sendall(request)
                selector.register(connection, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    assert isinstance(key.fileobj, socket.socket)
                    data = key.fileobj.recv(1 << 16)
                    responses[key.data] += data
                    if not data:
                        selector.unregister(key.fileobj)
        for response in responses:
            if not response.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in response:
                raise SystemExit(response.decode(errors="replace"))
        return sum(len(PART.findall(response)) for response in responses)

    def _cpu_s(self) -> float:
        # The CPU clock of another process, as clock_getcpuclockid(3) of Linux names it: psutil
        # counts in steps of 10 ms.
        return time.clock_gettime((~self._process.pid << 3) | CPU_CLOCK_OF_ALL_THREADS)


@contextlib.contextmanager
def started(server: Server) -> Iterator[Server]:
    """Yield `server`, and close it."""
    try:
        yield server
    finally:
        server.close()


def report(kind: str, costs: dict[str, list[Cost]]) -> None:
    """Print the medians of the servers, and the ratios of the rounds."""
    for name, rounds in costs.items():
        print(
            f"{kind:12} {name:7} {median(cost.token_ms for cost in rounds):.4f} ms a token, "
            f"{median(cost.request_ms for cost in rounds):.2f} ms a request, "
            f"{median(cost.parts_per_token for cost in rounds):.2f} parts a token",
            flush=True,
        )
    if len(costs) == 1:
        return
    pairs = list(zip(costs["now"], costs["before"], strict=True))
    for what, ratios in (
        ("token", [now.token_ms / before.token_ms for now, before in pairs]),
        ("request", [now.request_ms / before.request_ms for now, before in pairs]),
    ):
        print(
            f"{kind:12} now / before, CPU time a {what}: {median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds)",
            flush=True,
        )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["chat"])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=30.0)
    parser.add_argument("--profile", type=Path, metavar="FILE", help="cProfile's result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        model = Path(folder)
        write_tokenizer(model, chat_template=HERMES_TEMPLATE)
        (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
        checkouts = {"now": ROOT}
        if options.before is not None:
            checkouts["before"] = options.before.resolve()
        measured = {
            name: servers.enter_context(
                started(Server(checkout, model, options.step_ms, options.profile))
            )
            for name, checkout in checkouts.items()
        }
        for server in measured.values():
            for kind in options.kinds:
                server.cost(kind, options.streams, 8)  # imports, caches
        for kind in options.kinds:
            costs: dict[str, list[Cost]] = {name: [] for name in measured}
            for number in range(options.rounds):
                names = list(measured)
                for name in names if number % 2 == 0 else reversed(names):
                    costs[name].append(measured[name].cost(kind, options.streams, options.tokens))
            report(kind, costs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
