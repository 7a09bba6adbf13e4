"""What clients wait for: the part `serving` of `make gpu`.

Time to first token (TTFT) and inter-token latency (ITL) of an engine without its HTTP server: one
request, contexts of very different lengths, and requests that arrive while others decode.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from llmkit.bench.gpu.decode_steps import SAMPLERS, StepBench, StepModel, free_memory, new_engine
from llmkit.bench.gpu.figure_log import FigureLog, PartOptions
from llmkit.bench.gpu.model_shapes import BLOCK_SIZE, MODEL_CONFIGS
from llmkit.model.families import model_spec
from llmkit.runtime.engine.cuda_graphs import CudaGraphRunner
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_request import EngineRequest

SERVED = (StepModel("Llama-3.1-8B", "fp8"), StepModel("Qwen3-0.6B", "bf16"))
LONG_CONTEXT = 32768
SHORT_CONTEXT = 256
SHORT_REQUESTS = 63


@dataclass(frozen=True)
class Arrival:
    """A request and when it comes."""

    at_s: float
    prompt_tokens: int
    output_tokens: int

    @property
    def num_tokens(self) -> int:
        """Of its prompt and its output."""
        return self.prompt_tokens + self.output_tokens


def measure(log: FigureLog, options: PartOptions) -> None:
    """Start an engine for every model, and run the loads on it."""
    for step_model in SERVED:
        serving = ServingBench(step_model, options)
        log.measure("start", step_model.label, serving.start, needs_s=20)
        for name, arrivals in loads(options.is_tiny).items():
            run = partial(serving.run, arrivals)
            log.measure("latency", f"{step_model.label}, {name}", run, needs_s=10)
            del run
        del serving
        free_memory(options.device)


def loads(is_tiny: bool) -> dict[str, list[Arrival]]:
    """The loads by name."""
    if is_tiny:
        return {
            "one request": [Arrival(0.0, 8, 4)],
            "arrivals during decode": [Arrival(0.01 * n, 6 + n, 5) for n in range(3)],
        }
    short = [Arrival(0.0, SHORT_CONTEXT, 128) for _ in range(SHORT_REQUESTS)]
    return {
        "one request": [Arrival(0.0, 1024, 128)],
        "arrivals during decode": poisson_arrivals(rate=8.0, count=96),
        f"{SHORT_REQUESTS} short, one of {LONG_CONTEXT:,} tokens": [
            *short,
            Arrival(0.0, LONG_CONTEXT - 128, 128),
        ],
        f"{SHORT_REQUESTS + 1} short": [*short, Arrival(0.0, SHORT_CONTEXT, 128)],
    }


def poisson_arrivals(rate: float, count: int) -> list[Arrival]:
    """Requests that arrive at random: `rate` a second, with prompts of 128 to 1,024 tokens."""
    generator = random.Random(0)  # noqa: S311
    at_s = 0.0
    arrivals = []
    for _ in range(count):
        at_s += generator.expovariate(rate)
        arrivals.append(Arrival(at_s, generator.randint(128, 1024), 128))
    return arrivals


@dataclass
class Client:
    """A request, and when its tokens came."""

    sent_s: float
    token_times_s: list[float]


class ServingBench:
    """An engine that runs all loads, with its graphs captured as at the start of a server."""

    def __init__(self, step_model: StepModel, options: PartOptions) -> None:
        self.step_model = step_model
        self.bench = StepBench(step_model, options.device, options.is_tiny)
        self.arrivals = loads(options.is_tiny).values()
        if not options.is_tiny:  # rotary embeddings for the long context
            config = MODEL_CONFIGS[step_model.model] | {"max_position_embeddings": 131072}
            self.bench.spec = model_spec(config)

    @cached_property
    def engine(self) -> Engine:
        """The engine."""
        requests = [one for arrivals in self.arrivals for one in arrivals]
        engine = new_engine(
            self.bench.model,
            max(one.num_tokens for one in requests),
            max_num_seqs=max(map(len, self.arrivals)),
            kv_cache_dtype=self.step_model.kv_cache_dtype,
            num_tokens=max(
                sum(one.num_tokens + 2 * BLOCK_SIZE for one in arrivals)
                for arrivals in self.arrivals
            ),
        )
        engine.runner.capture_graphs()
        return engine

    def start(self) -> dict[str, Any]:
        """The seconds to capture all graphs of an engine, Triton's compiler included."""
        assert self.bench.model.spec  # made before the clock starts
        start_s = time.perf_counter()
        runner = self.engine.runner.graph_runner
        seconds = time.perf_counter() - start_s
        return {"max_num_seqs": self.engine.config.max_num_seqs, "capture_s": seconds} | (
            {"graphs": len(runner.graphs)} if isinstance(runner, CudaGraphRunner) else {}
        )

    def run(self, arrivals: Sequence[Arrival]) -> dict[str, Any]:
        """Run a load after a shorter one that warms up. Latencies are in milliseconds."""
        run_load(self.engine, [replace(one, at_s=0.0, output_tokens=3) for one in arrivals])
        start_s = time.perf_counter()
        clients = run_load(self.engine, arrivals)
        seconds = time.perf_counter() - start_s
        ttft_ms = [(one.token_times_s[0] - one.sent_s) * 1e3 for one in clients]
        itl_ms = [
            (later - earlier) * 1e3
            for one in clients
            for earlier, later in zip(one.token_times_s, one.token_times_s[1:], strict=False)
        ]
        tokens = sum(one.output_tokens for one in arrivals)
        return {
            "model": self.step_model.model,
            "weights": self.step_model.weights,
            "requests": len(clients),
            "ttft_p50_ms": percentile(ttft_ms, 0.5),
            "ttft_p99_ms": percentile(ttft_ms, 0.99),
            "itl_p50_ms": percentile(itl_ms, 0.5),
            "itl_p99_ms": percentile(itl_ms, 0.99),
            "seconds": seconds,
            "output_tps": tokens / seconds,
        }


def run_load(engine: Engine, arrivals: Sequence[Arrival]) -> list[Client]:
    """Send each request at its time, and note when its tokens come."""
    vocab_size = engine.model.spec.vocab_size
    prompts = [torch.randint(0, vocab_size, (one.prompt_tokens,)).tolist() for one in arrivals]
    clients: dict[str, Client] = {}
    start_s = time.perf_counter()
    while len(clients) < len(arrivals) or engine.has_work:
        now_s = time.perf_counter() - start_s
        while len(clients) < len(arrivals) and arrivals[len(clients)].at_s <= now_s:
            index = len(clients)
            params = replace(SAMPLERS["top-k top-p"], max_tokens=arrivals[index].output_tokens)
            # The request was sent at its own time, even when a step was under way.
            clients[str(index)] = Client(arrivals[index].at_s + start_s, [])
            engine.add(EngineRequest(str(index), prompts[index], params))
        if not engine.has_work:
            time.sleep(max(0.0, arrivals[len(clients)].at_s - now_s))
            continue
        outputs = engine.step()
        now_s = time.perf_counter()
        for output in outputs:
            if output.error:
                raise RuntimeError(output.error)
            clients[output.request_id].token_times_s += [now_s] * len(output.token_ids)
    return list(clients.values())


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
