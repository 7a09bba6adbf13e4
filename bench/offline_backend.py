"""The offline backend: the engine inside this process, without HTTP, text or a second process."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from llmkit.bench.bench_metrics import RequestTimeline, RunResult
from llmkit.bench.draft_counts import DraftCounts
from llmkit.bench.host_memory import ProcessMemoryTracker
from llmkit.bench.workload import WorkloadRequest, group_conversations
from llmkit.runtime.engine.engine import Engine
from llmkit.runtime.engine.engine_errors import RequestError
from llmkit.runtime.engine.engine_options import EngineOptions
from llmkit.runtime.engine.engine_outputs import EngineOutput
from llmkit.runtime.engine.engine_request import EngineRequest
from llmkit.runtime.engine.sampling_params import SamplingParams
from llmkit.runtime.engine_loader import load_engine


@dataclass
class _RequestState:
    """A request in the engine, and its outputs so far."""

    request: WorkloadRequest
    sent_s: float
    follow_ups: deque[WorkloadRequest]  # the later turns of its conversation
    # Each output, with the time at which its step returned.
    outputs: list[tuple[float, EngineOutput]] = field(default_factory=list)
    error: str | None = None  # set when the engine refuses the request

    def timeline(self) -> RequestTimeline:
        """The timeline of the request, once it has finished."""
        last = self.outputs[-1][1] if self.outputs else None
        output_tokens = sum(len(output.token_ids) for _, output in self.outputs)
        error = self.error
        if last is not None and last.finish_reason == "error":
            error = last.error or "the engine failed"
        elif last is not None and output_tokens != self.request.max_tokens:
            error = f"{output_tokens} tokens came, {self.request.max_tokens} were asked for"
        return RequestTimeline(
            self.request.id,
            self.sent_s,
            tuple(arrival_s for arrival_s, output in self.outputs if output.token_ids),
            last.prompt_tokens if last else len(self.request.prompt),
            last.cached_tokens if last else 0,
            output_tokens,
            error,
        )


class OfflineBackend:
    """A `Backend` that runs the engine in this process.

    A token's arrival is the time at which the step that sampled it returns.
    """

    def __init__(
        self, name: str, reference: str, context_tokens: int, options: EngineOptions
    ) -> None:
        self.name = name
        self.reference = reference
        self.options = options
        self.model_context_tokens = context_tokens
        self.engine: Engine | None = None
        self._memory = ProcessMemoryTracker()

    @property
    def context_tokens(self) -> int | None:
        """The engine's context length; before the start, the model's."""
        return self.engine.config.max_model_len if self.engine else self.model_context_tokens

    def start(self) -> dict[str, float]:
        """Load the model. Returns load_s. Raises what `load_engine` raises."""
        start_s = time.perf_counter()
        with self._memory.track():
            self.engine = load_engine(self.reference, self.options)
        return {"load_s": time.perf_counter() - start_s}

    def run(self, requests: Sequence[WorkloadRequest], max_concurrency: int) -> RunResult:
        """See `Backend.run`."""
        assert self.engine
        with self._memory.track():
            return run_engine(self.engine, requests, max_concurrency)

    def stop(self) -> dict[str, float]:
        """Release the model. Returns peak_memory_bytes: how much this process has grown."""
        self.engine = None
        if self.options.device == "cuda":
            # The next memory plan counts only the memory that was returned to the device.
            gc.collect()
            torch.cuda.empty_cache()
        peak_bytes = self._memory.peak_bytes
        return {"peak_memory_bytes": peak_bytes} if peak_bytes else {}


def run_engine(
    engine: Engine, requests: Sequence[WorkloadRequest], max_concurrency: int
) -> RunResult:
    """Run the requests through an idle engine, with at most `max_concurrency` conversations.

    A request with a scheduled time counts as sent at that time, even when it has to wait for the
    end of the current step.
    """
    states: dict[str, _RequestState] = {}  # by request id
    waiting = deque(deque(conversation) for conversation in group_conversations(requests))
    num_running = 0
    counts_before = _draft_counts(engine)
    start_s = time.perf_counter()

    def add_next(conversation: deque[WorkloadRequest]) -> None:
        nonlocal num_running
        request = conversation.popleft()
        sent_s = time.perf_counter()
        if request.send_at_s is not None:
            sent_s = start_s + request.send_at_s
        state = _RequestState(request, sent_s, conversation)
        states[request.id] = state
        sampling = SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=True)
        try:
            engine.add(EngineRequest(request.id, list(request.prompt), sampling))
            num_running += 1
        except RequestError as error:
            state.error = error.message

    while waiting or num_running:
        while waiting and num_running < max_concurrency:
            wait_s = start_s + (waiting[0][0].send_at_s or 0.0) - time.perf_counter()
            if wait_s > 0 and num_running:
                break
            time.sleep(max(0.0, wait_s))
            add_next(waiting.popleft())
        outputs = engine.step() if num_running else []
        now_s = time.perf_counter()
        for output in outputs:
            state = states[output.request_id]
            state.outputs.append((now_s, output))
            if output.finish_reason is not None:
                num_running -= 1
                if state.follow_ups:
                    add_next(state.follow_ups)
    wall_s = time.perf_counter() - start_s
    timelines = []
    for request in requests:
        if request.id in states:
            timelines.append(states[request.id].timeline())
        else:
            error = "the request before it in its conversation failed"
            timelines.append(RequestTimeline(request.id, 0.0, error=error))
    counts = _draft_counts(engine).since(counts_before)
    return RunResult(wall_s, timelines, draft_counts=counts)


def _draft_counts(engine: Engine) -> DraftCounts:
    stats = engine.stats()
    return DraftCounts(
        stats.drafts_total,
        stats.drafted_total,
        stats.accepted_total,
        stats.accepted_per_pos_total,
    )
