"""What clients wait for: the part `serving` of `make gpu`.

Time to first token (TTFT) and inter-token latency (ITL) of an engine without its HTTP server: one
request, contexts of very different lengths, and requests that arrive while others decode.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from llmkit.bench.gpu.decode_steps import SAMPLERS, StepBench, StepModel, free_memory, new_engine
from llmkit.bench.gpu.figure_log import FigureLog, PartOptions
from llmkit.bench.gpu.model_shapes import MODEL_CONFIGS
from llmkit.model.families import model_spec
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


def measure(log: FigureLog, options: PartOptions) -> None:
    """Run the three loads on every model."""
    for step_model in SERVED:
        bench = StepBench(step_model, options.device, options.is_tiny)
        if not options.is_tiny:  # rotary embeddings for the long context
            config = MODEL_CONFIGS[step_model.model] | {"max_position_embeddings": 131072}
            bench.spec = model_spec(config)
        for name, arrivals in loads(options.is_tiny).items():
            run = partial(serve, bench, arrivals)
            log.measure("latency", f"{step_model.label}, {name}", run, needs_s=10)
            del run
        del bench
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


def serve(bench: StepBench, arrivals: Sequence[Arrival]) -> dict[str, Any]:
    """Run a load on an engine that has run it once before. Latencies are in milliseconds."""
    longest = max(one.prompt_tokens + one.output_tokens for one in arrivals)
    engine = new_engine(
        bench.model,
        longest,
        max_num_seqs=min(256, len(arrivals)),
        kv_cache_dtype=bench.step_model.kv_cache_dtype,
        num_tokens=sum(one.prompt_tokens + one.output_tokens + 32 for one in arrivals),
    )
    # Compiles kernels and captures graphs: the same load at once, then as it comes.
    run_load(engine, [replace(one, at_s=0.0, output_tokens=3) for one in arrivals])
    start_s = time.perf_counter()
    clients = run_load(engine, arrivals)
    seconds = time.perf_counter() - start_s
    ttft_ms = [(one.token_times_s[0] - one.sent_s) * 1e3 for one in clients]
    itl_ms = [
        (later - earlier) * 1e3
        for one in clients
        for earlier, later in zip(one.token_times_s, one.token_times_s[1:], strict=False)
    ]
    tokens = sum(one.output_tokens for one in arrivals)
    return {
        "model": bench.step_model.model,
        "weights": bench.step_model.weights,
        "requests": len(clients),
        "ttft_p50_ms": percentile(ttft_ms, 0.5),
        "ttft_p99_ms": percentile(ttft_ms, 0.99),
        "itl_p50_ms": percentile(itl_ms, 0.5),
        "itl_p99_ms": percentile(itl_ms, 0.99),
        "seconds": seconds,
        "output_tps": tokens / seconds,
    }


def run_load(engine: Any, arrivals: Sequence[Arrival]) -> list[Client]:
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
