"""Requests that wait for a shadow, and what is done with each of them.

A request is copied when its answer is complete, so that the client's answer never waits. The number
of copies and their bytes are bounded: what is beyond that is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.runtime.server.router.model_pool import ModelPool
from llmkit.runtime.server.shadow.prediction_compare import IncomparableError, compare_predictions
from llmkit.runtime.server.shadow.shadow_answer import Answer, read_answer
from llmkit.runtime.server.shadow.shadow_client import ShadowClient, ShadowFailedError
from llmkit.runtime.server.shadow.shadow_judge import judge
from llmkit.runtime.server.shadow.shadow_log import ShadowLog
from llmkit.runtime.server.shadow.shadow_metrics import ShadowMetrics
from llmkit.runtime.server.shadow.shadow_options import Shadow, ShadowOptions
from llmkit.runtime.server.tiers.tier import Tier

_MAX_WAITING = 256  # copies of one shadow
_MAX_AT_ONCE = 8
MAX_BYTES = 64 * 1024 * 1024  # requests and answers of all copies together
# After so many failures in a row a shadow gets nothing for a while.
_MAX_FAILURES = 3
_PAUSE_S = 10.0


@dataclass(frozen=True)
class Copied:
    """A request and the answer that its client got."""

    path: str
    request_id: str
    request: bytes  # the body
    response: bytes
    is_stream: bool
    seconds: float  # from the request to the end of the response

    @property
    def num_bytes(self) -> int:
        """The memory that it holds."""
        return len(self.request) + len(self.response)


class ByteBudget:
    """The bytes that all copies may hold together."""

    def __init__(self, max_bytes: int) -> None:
        self._num_free = max_bytes

    def take(self, num_bytes: int) -> bool:
        """Reserve bytes; False if there are too few."""
        if num_bytes > self._num_free:
            return False
        self._num_free -= num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        """Return bytes that were taken."""
        self._num_free += num_bytes


class ShadowQueue:
    """The copies of one model's requests."""

    def __init__(
        self,
        shadow: Shadow,
        clients: Mapping[str, ShadowClient],
        options: ShadowOptions,
        metrics: ShadowMetrics,
        log: ShadowLog | None,
        budget: ByteBudget,
        chance: random.Random,
    ) -> None:
        """clients: of all models, by name. chance: decides which requests are copied."""
        self._shadow = shadow
        self._model_client = clients[shadow.model]
        self._shadow_client = clients[shadow.shadow]
        self._judge_client = clients[options.judge] if options.judge is not None else None
        self._log_texts = options.log_texts
        self._labels = (shadow.model, shadow.shadow)
        self._metrics = metrics
        self._log = log
        self._chance = chance
        self.budget = budget
        self._waiting: asyncio.Queue[Copied] = asyncio.Queue(_MAX_WAITING)
        self._workers: list[asyncio.Task[None]] = []
        self._num_failures = 0  # in a row
        self._resume_s = 0.0  # time.monotonic() of the end of a pause
        self._is_closed = False

    def chooses(self) -> bool:
        """Whether the next request is copied."""
        return self._chance.random() < self._shadow.share

    def drop(self) -> None:
        """Count a chosen request that is not copied, because there is no room."""
        self._metrics.record_outcome(*self._labels, "dropped")

    def skip(self) -> None:
        """Count a chosen request whose answer is none, or is not complete."""
        self._metrics.record_outcome(*self._labels, "skipped")

    def add(self, copied: Copied) -> None:
        """Queue a copy, whose bytes are taken from the budget. This never waits."""
        is_paused = time.monotonic() < self._resume_s
        if self._is_closed or is_paused or self._waiting.full():
            self.budget.give_back(copied.num_bytes)
            self.drop()
            return
        self._waiting.put_nowait(copied)
        self._metrics.set_waiting(*self._labels, self._waiting.qsize())
        if len(self._workers) < _MAX_AT_ONCE:
            self._workers.append(asyncio.create_task(self._work()))

    async def close(self) -> None:
        """Forget all copies, and those of answers that end later."""
        self._is_closed = True
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            copied = await self._waiting.get()
            self._metrics.set_waiting(*self._labels, self._waiting.qsize())
            try:
                await self._compare(copied)
            except Exception as error:  # of one copy, whatever a server has answered
                self._metrics.record_incomparable(*self._labels, "error")
                await self._write(copied, {"error": type(error).__name__})
            finally:
                self.budget.give_back(copied.num_bytes)

    async def _compare(self, copied: Copied) -> None:
        """Ask the shadow, and compare its answer."""
        body = json.loads(copied.request)
        answer = read_answer(copied.response, copied.is_stream)
        if answer is None or not has_one_answer(body):
            self.skip()
            return
        try:
            shadow_answer, shadow_s = await self._ask_shadow(copied.path, body)
        except ShadowFailedError as error:
            self._count_failure()
            await self._write(copied, {"error": str(error)})
            return
        self._num_failures = 0
        is_same = answer.is_same(shadow_answer)
        self._metrics.record_outcome(*self._labels, "answered")
        self._metrics.record_latency(*self._labels, copied.seconds, shadow_s)
        self._metrics.record_same(*self._labels, is_same)
        record: dict[str, Any] = {
            "shadow_seconds": round(shadow_s, 4),
            "same": is_same,
            "finish_reasons": [answer.finish_reason, shadow_answer.finish_reason],
        }
        record |= await self._divergence(body, answer)
        if self._judge_client is not None:
            verdict = await judge(self._judge_client, body, answer, shadow_answer)
            self._metrics.record_verdict(*self._labels, verdict)
            record["verdict"] = verdict
        if self._log_texts:
            record |= {
                "request": body,
                "answer": _as_document(answer),
                "shadow_answer": _as_document(shadow_answer),
            }
        await self._write(copied, record)

    async def _ask_shadow(self, path: str, body: Mapping[str, Any]) -> tuple[Answer, float]:
        """The shadow's answer, and its seconds. Raises ShadowFailedError."""
        whole = {key: value for key, value in body.items() if key != "stream_options"}
        await self._shadow_client.load()
        start_s = time.perf_counter()
        content = await self._shadow_client.generate(path, {**whole, "stream": False})
        seconds = time.perf_counter() - start_s
        answer = read_answer(content, is_stream=False)
        if answer is None:
            raise ShadowFailedError("the response has no answer")
        return answer, seconds

    async def _divergence(self, body: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
        """What the log says of the KL divergence."""
        try:
            divergence = await compare_predictions(
                self._model_client, self._shadow_client, body, answer
            )
        except IncomparableError as error:
            self._metrics.record_incomparable(*self._labels, error.reason)
            return {"incomparable": error.reason}
        self._metrics.record_divergences(
            *self._labels, divergence.kl_sum, divergence.num_tokens, divergence.num_same_top
        )
        return {
            "tokens": divergence.num_tokens,
            "mean_kl": round(divergence.mean_kl, 8),
            "max_kl": round(divergence.max_kl, 8),
            "top1": round(divergence.num_same_top / divergence.num_tokens, 6),
        }

    def _count_failure(self) -> None:
        self._metrics.record_outcome(*self._labels, "failed")
        self._num_failures += 1
        if self._num_failures >= _MAX_FAILURES:
            self._resume_s = time.monotonic() + _PAUSE_S

    async def _write(self, copied: Copied, record: dict[str, Any]) -> None:
        if self._log is None:
            return
        facts = {
            "time": round(time.time(), 3),
            "request_id": copied.request_id,
            "path": copied.path,
            "model": self._shadow.model,
            "shadow": self._shadow.shadow,
            "seconds": round(copied.seconds, 4),
        }
        with contextlib.suppress(OSError):  # a full disk is no reason to end the comparisons
            await self._log.write(facts | record)


class Shadows:
    """All shadows of a router."""

    def __init__(
        self,
        options: ShadowOptions,
        tiers: Mapping[str, Tier],
        pool: ModelPool,
        router_key: str | None = None,
    ) -> None:
        """tiers: local models and URLs, by name. router_key: see `ShadowClient`.

        Raises ShortageError when the log cannot be written.
        """
        self.metrics = ShadowMetrics()
        self._log = ShadowLog(options.log) if options.log is not None else None
        clients = {name: ShadowClient(tier, pool, router_key) for name, tier in tiers.items()}
        budget = ByteBudget(MAX_BYTES)
        chance = random.Random()  # noqa: S311 -- statistics, no secret
        self._queues = {
            shadow.model: ShadowQueue(
                shadow, clients, options, self.metrics, self._log, budget, chance
            )
            for shadow in options.shadows
        }

    def queue_of(self, model: str) -> ShadowQueue | None:
        """The queue for a request to `model`; None: it is not copied."""
        queue = self._queues.get(model)
        return queue if queue is not None and queue.chooses() else None

    async def close(self) -> None:
        """Forget all copies, and close the log."""
        await asyncio.gather(*(queue.close() for queue in self._queues.values()))
        if self._log is not None:
            self._log.close()


def has_one_answer(body: Mapping[str, Any]) -> bool:
    """Whether a request asks for one answer to one prompt, without echo."""
    prompt = body.get("prompt")
    is_batch = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    if is_batch and not all(type(token) is int for token in prompt or [None]):
        return False
    return body.get("n") in (None, 1) and not body.get("echo")


def _as_document(answer: Answer) -> dict[str, Any]:
    calls = [
        {"name": call.name, "arguments": call.arguments} for call in answer.tool_calls.values()
    ]
    return {"text": answer.text, "reasoning": answer.reasoning, "tool_calls": calls}
