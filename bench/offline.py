"""A checkpoint measured inside this process: the engine alone, without HTTP, text or a second process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

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
    late_s: float = 0.0
    arrivals_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    finished: bool = False

    def take(self, output: TokenOutput, now_s: float) -> None:
        """Record what one step brought."""
        if output.token_ids:
            self.arrivals_s.append(now_s)
            self.output_tokens += len(output.token_ids)
        self.prompt_tokens, self.cached_tokens = output.prompt_tokens, output.cached_tokens
        if output.finish_reason is not None:
            self.finished = True
            if output.finish_reason == "error":
                self.error = output.error or "the engine failed"
            elif self.output_tokens != self.request.max_tokens:
                self.error = f"{self.output_tokens} tokens came, {self.request.max_tokens} were asked for"

    def timeline(self) -> RequestTimeline:
        return RequestTimeline(
            self.request.id,
            self.sent_s,
            tuple(self.arrivals_s),
            self.prompt_tokens or len(self.request.prompt),
            self.cached_tokens,
            self.output_tokens,
            self.error,
            self.late_s,
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
        return {"peak_memory_bytes": self._memory.peak} if self._memory.peak else {}


class OwnMemory:
    """What the resident memory of this process and its children, other ranks, has grown by within some stretches of
    work, in bytes, and the most of it."""

    def __init__(self) -> None:
        self.kept, self.peak = 0, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is added within; what comes and goes too, where the kernel (Linux) lets its mark be set back."""
        marked, before = _set_mark_back(), _resident()
        yield
        after, gone = _resident(), _mark() - psutil.Process().memory_info().rss if marked else 0
        self.peak = max(self.peak, self.kept + after + max(0, gone) - before)
        self.kept += after - before


def _resident() -> int:
    own = psutil.Process()
    return sum(process.memory_info().rss for process in (own, *own.children(recursive=True)))


def _set_mark_back() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _mark() -> int:
    """The largest resident size since the mark was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def run_engine(engine: Engine, requests: Sequence[WorkloadRequest], clients: int) -> Run:
    """Run the requests through an idle engine, `clients` conversations of them under way."""
    progress: dict[str, _Progress] = {}
    waiting = deque(deque(chain) for chain in chains(requests))
    running = 0
    started = time.perf_counter()

    def add(chain: deque[WorkloadRequest]) -> None:
        nonlocal running
        request, now = chain.popleft(), time.perf_counter()
        late_s = 0.0 if request.at_s is None else now - started - request.at_s
        entry = progress[request.id] = _Progress(request, now, chain, late_s)
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
            entry.take(output, now)
            running -= entry.finished
            if entry.finished and entry.chain:
                add(entry.chain)
    wall_s = time.perf_counter() - started
    never = "the request before it in its conversation failed"
    missing = {request.id: RequestTimeline(request.id, 0.0, error=never) for request in requests}
    return Run(wall_s, [progress[r.id].timeline() if r.id in progress else missing[r.id] for r in requests])
