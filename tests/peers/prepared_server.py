"""`llmkit serve` with an engine process that computes nothing: it answers with prepared tokens.

    python tests/peers/prepared_server.py MODEL STEP_MS [PROFILE]

The API process is the real one, with its own loop, routes and protocol. MODEL is a folder with a
config.json and a tokenizer. The engine process (this file as a module, with --fd) gives each
request one token every STEP_MS, all in one message, as an engine step does. PROFILE is a file to
which the API process writes what cProfile found, when it ends.

When the server is ready it writes `ready PORT` to stdout.
"""

from __future__ import annotations

import asyncio
import cProfile
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_outputs import EngineOutput, EngineStats
from llmkit.runtime.process_channel import Channel, end_process, parent_socket, spawn
from llmkit.runtime.server.engines.engine_messages import (
    AbortRequest,
    AddRequest,
    EngineOutputs,
    EngineReady,
    LoadModel,
    StatsUpdate,
    ToEngine,
    to_engine_decoder,
)
from llmkit.runtime.server.http.key_ring import KeyRing
from llmkit.runtime.server.http.tls import new_event_loop
from llmkit.runtime.server.lifecycle import serve
from llmkit.runtime.server.run_server import bind
from llmkit.runtime.server.serve_options import ServeOptions

MAX_MODEL_LEN = 4096
VOCAB = 512
NUM_BLOCKS = 4096
FIRST_TOKEN = 3  # after the special tokens of the tiny tokenizer
STEP_MS = "STEP_MS"  # environment variable of the engine process


class PreparedEngine:
    """Gives each request the same tokens, one a step."""

    def __init__(self) -> None:
        self._requests: dict[str, tuple[int, int]] = {}  # prompt tokens and max_tokens, by id
        self._num_generated: dict[str, int] = {}  # by id
        self._steps = 0
        self._prompt_tokens = 0
        self._generated = 0

    def add(self, message: ToEngine) -> None:
        """Apply a message of the API process."""
        match message:
            case AddRequest(request):
                num_prompt = len(request.prompt_token_ids)
                self._prompt_tokens += num_prompt
                self._requests[request.request_id] = (
                    num_prompt,
                    request.sampling_params.max_tokens,
                )
                self._num_generated[request.request_id] = 0
            case AbortRequest(request_id):
                self._requests.pop(request_id, None)
                self._num_generated.pop(request_id, None)

    @property
    def has_work(self) -> bool:
        """Whether any request wants tokens."""
        return bool(self._requests)

    def step(self) -> EngineOutputs:
        """Return the next token of every request."""
        outputs = []
        first_ids = []
        for request_id, (num_prompt, max_tokens) in list(self._requests.items()):
            index = self._num_generated[request_id]
            self._num_generated[request_id] = index + 1
            if index == 0:
                first_ids.append(request_id)
            is_last = index + 1 == max_tokens
            if is_last:
                del self._requests[request_id]
                del self._num_generated[request_id]
            token_id = FIRST_TOKEN + (7 * index) % (VOCAB // 2)
            finish_reason = "length" if is_last else None
            outputs.append(EngineOutput(request_id, [token_id], finish_reason, None, num_prompt, 0))
        self._steps += 1
        self._generated += len(outputs)
        return EngineOutputs(outputs, self.stats(), dict.fromkeys(first_ids, 0.001))

    def stats(self) -> EngineStats:
        """Statistics of the size that a real engine sends."""
        return EngineStats(
            running=len(self._requests),
            kv_used_blocks=len(self._requests),
            kv_cached_blocks=NUM_BLOCKS // 2,
            kv_total_blocks=NUM_BLOCKS,
            prompt_tokens_total=self._prompt_tokens,
            generation_tokens_total=self._generated,
            steps_total=self._steps,
            prefix_queries_total=self._prompt_tokens,
        )


def run_engine(step_s: float) -> None:
    """Answer the API process until it ends."""
    channel: Channel[ToEngine] = Channel(parent_socket(), to_engine_decoder)
    channel.receive(wait=True)  # LoadModel
    channel.send(
        EngineReady(
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB,
            dtype="float32",
            device="cpu",
            kv_cache_tokens=NUM_BLOCKS * 16,
            load_s=0.0,
            seconds={},
            plan={"model_limit": MAX_MODEL_LEN},
            adapters=[],
            fast_paths=[],
            card={},
        )
    )
    engine = PreparedEngine()
    while True:
        messages = channel.receive(wait=not engine.has_work)
        for message in messages:
            engine.add(message)
        if engine.has_work:
            time.sleep(step_s)
            channel.send(engine.step())
        elif messages:
            channel.send(StatsUpdate(engine.stats()))


def run_api_process(model: Path, step_ms: str) -> int:
    """Serve until a signal."""
    options = ServeOptions(model=str(model), port=0, engine=EngineOptions(device="cpu"))
    listener = bind(options.host, options.port)

    def start_engine(replica: int, reference: str) -> Any:
        message = LoadModel(reference, options.engine, debug=False)
        return spawn("prepared_server", message, {STEP_MS: step_ms})

    def on_ready(info: Mapping[str, Any]) -> None:
        print("ready", listener.getsockname()[1], flush=True)

    process, engine_socket = start_engine(0, options.model)
    try:
        with asyncio.Runner(loop_factory=lambda: new_event_loop(options)) as runner:
            return runner.run(
                serve(
                    options,
                    KeyRing(options, log),
                    listener,
                    [(process, engine_socket)],
                    None,
                    start_engine,
                    time.perf_counter(),
                    log,
                    on_ready,
                )
            )
    finally:
        engine_socket.close()
        end_process(process)


def log(text: str) -> None:
    """Write what the server says to stderr."""
    print(text, file=sys.stderr)


def main() -> int:
    """Run the process that the arguments name."""
    if "--fd" in sys.argv:
        run_engine(float(os.environ[STEP_MS]) / 1e3)
        return 0
    model, step_ms, *profile = sys.argv[1:]
    if not profile:
        return run_api_process(Path(model), step_ms)
    profiler = cProfile.Profile(time.thread_time)
    try:
        return profiler.runcall(run_api_process, Path(model), step_ms)
    finally:
        profiler.dump_stats(profile[0])


if __name__ == "__main__":
    sys.exit(main())
