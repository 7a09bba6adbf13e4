"""A checkpoint measured inside this process: the engine alone, without HTTP, text or a second process."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llmkit.bench.memory import OwnMemory
from llmkit.bench.metrics import RequestTimeline, Run
from llmkit.bench.workload import WorkloadRequest, chains
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.types import Request, RequestError, SamplingParams, TokenOutput
from llmkit.runtime.load import EngineOptions, load_engine


@dataclass
class _Progress:
    """A request on its way through the engine."""

    request: WorkloadRequest
    sent_s: float
    chain: deque[WorkloadRequest]  # what the same client sends next
    outputs: list[tuple[float, TokenOutput]] = field(default_factory=list)  # with the times of their steps
    error: str | None = None

    def timeline(self) -> RequestTimeline:
        """What came of it, once it has ended."""
        last = self.outputs[-1][1] if self.outputs else None
        tokens = sum(len(output.token_ids) for _, output in self.outputs)
        error = self.error
        if last is not None and last.finish_reason == "error":
            error = last.error or "the engine failed"
        elif last is not None and tokens != self.request.max_tokens:
            error = f"{tokens} tokens came, {self.request.max_tokens} were asked for"
        return RequestTimeline(
            self.request.id,
            self.sent_s,
            tuple(at_s for at_s, output in self.outputs if output.token_ids),
            last.prompt_tokens if last else len(self.request.prompt),
            last.cached_tokens if last else 0,
            tokens,
            error,
        )


class OfflineTarget:
    """See `SpeedTarget`. A token arrives when the step that sampled it returns."""

    def __init__(self, name: str, reference: str, context_tokens: int, options: EngineOptions) -> None:
        self.name, self.reference, self.options = name, reference, options
        self.model_context_tokens = context_tokens
        self.engine: Engine | None = None
        self._memory = OwnMemory()

    @property
    def context_tokens(self) -> int | None:
        """The model's context; once started, what the engine has of it."""
        return self.engine.config.max_model_len if self.engine else self.model_context_tokens

    def start(self) -> dict[str, float]:
        """Load the model: load_s. Raises what `load_engine` raises."""
        started = time.perf_counter()
        with self._memory.counted():
            self.engine = load_engine(self.reference, self.options)
        return {"load_s": time.perf_counter() - started}

    def run(self, requests: Sequence[WorkloadRequest], clients: int) -> Run:
        """See `SpeedTarget.run`."""
        assert self.engine
        with self._memory.counted():
            return run_engine(self.engine, requests, clients)

    def stop(self) -> dict[str, float]:
        """Let go of the model: peak_memory_bytes, what loading and running it added to this process."""
        self.engine = None
        if self.options.device == "cuda":  # whoever plans its memory next sees what is given back only
            gc.collect()
            torch.cuda.empty_cache()
        return {"peak_memory_bytes": self._memory.peak} if self._memory.peak else {}


def run_engine(engine: Engine, requests: Sequence[WorkloadRequest], clients: int) -> Run:
    """Run the requests through an idle engine, `clients` conversations of them under way.

    A request with a time counts as sent then, also when the engine is in the middle of a step: it waits for its end.
    """
    progress: dict[str, _Progress] = {}
    waiting = deque(deque(chain) for chain in chains(requests))
    running = 0
    started = time.perf_counter()

    def add(chain: deque[WorkloadRequest]) -> None:
        nonlocal running
        request = chain.popleft()
        sent_s = time.perf_counter() if request.at_s is None else started + request.at_s
        entry = progress[request.id] = _Progress(request, sent_s, chain)
        sampling = SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
        try:
            engine.add(Request(request.id, list(request.prompt), sampling))
            running += 1
        except RequestError as error:
            entry.error = error.message

    while waiting or running:
        while waiting and running < clients:
            due_s = started + (waiting[0][0].at_s or 0.0) - time.perf_counter()
            if due_s > 0 and running:
                break
            time.sleep(max(0.0, due_s))
            add(waiting.popleft())
        outputs = engine.step() if running else []
        now = time.perf_counter()
        for output in outputs:
            entry = progress[output.request_id]
            entry.outputs.append((now, output))
            if output.finish_reason is not None:
                running -= 1
                if entry.chain:
                    add(entry.chain)
    wall_s = time.perf_counter() - started
    never = "the request before it in its conversation failed"
    missing = {request.id: RequestTimeline(request.id, 0.0, error=never) for request in requests}
    return Run(wall_s, [progress[r.id].timeline() if r.id in progress else missing[r.id] for r in requests])
